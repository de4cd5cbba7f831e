"""The statistics of the reports against scipy, closed forms, enumeration, and simulated coverage."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from evaluation.stats import (
    Curve,
    Effect,
    at_equal_kl,
    bca,
    crossed_effect,
    distinct,
    false_alarm,
    holm,
    kl_estimate,
    matched_kl,
    mean_effect,
    rate_of_wins,
    wilson,
    wins,
)


def test_mean_over_prompts_is_students_t():
    values = np.random.default_rng(5).exponential(2.0, 7)
    found, truth = mean_effect(values), stats.ttest_1samp(values, 0)
    assert found.interval == pytest.approx((values.mean(), *truth.confidence_interval(0.95)))
    assert found.p_value == pytest.approx(truth.pvalue)
    assert mean_effect(np.array([2.5])) == (2.5, None, None) and mean_effect(np.array([2.5])).p_value is None
    assert Effect(0.0, 0.0, 3.0).p_value == 1 and Effect(0.1, 0.0, 3.0).p_value == 0


def test_crossed_effect_is_the_formula_and_students_t_at_its_ends():
    values = np.random.default_rng(0).normal(size=(4, 30)) + np.array([0, 1, 3, 5])[:, None] + np.sin(np.arange(30))
    found = crossed_effect(values)
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    left = values - rows[:, None] - columns + values.mean()
    squared = rows.var(ddof=1) / 4 + columns.var(ddof=1) / 30 - (left**2).sum() / (3 * 29) / 120
    assert found.value == pytest.approx(values.mean()) and found.stderr == pytest.approx(math.sqrt(squared))
    # Seeds that differ while prompts do not: a t-test over the seeds. One seed: a t-test over the prompts.
    of_seeds = np.repeat(np.array([[0.3], [1.4], [0.2], [-0.5]]), 50, axis=1)
    truth = stats.ttest_1samp(of_seeds[:, 0], 0)
    assert crossed_effect(of_seeds).interval[1:] == pytest.approx(truth.confidence_interval(0.95))
    assert crossed_effect(values[:1]) == mean_effect(values[0])
    assert crossed_effect(values[:, :1]).stderr is None  # one prompt shows nothing about others


@pytest.mark.parametrize(
    ("seeds", "prompts", "of_seed", "of_prompt", "residual", "most"),
    [
        (3, 96, 0.3, 0.5, 1, 0.97),
        (3, 96, 1, 1, 1, 0.97),
        (5, 96, 0.1, 1, 1, 0.97),
        (8, 40, 0, 1, 1, 0.97),
        (12, 300, 0.3, 0.5, 1, 0.97),
        (5, 96, 0, 0, 1, 1.0),  # nothing but the residual, of which a part is counted on both sides: too wide
    ],
)
def test_crossed_intervals_cover(seeds, prompts, of_seed, of_prompt, residual, most):
    rng, covered, draws = np.random.default_rng(1), 0, 1500
    for _ in range(draws):
        values = of_seed * rng.standard_normal((seeds, 1)) + of_prompt * rng.standard_normal(prompts)
        found = crossed_effect(values + residual * rng.standard_normal((seeds, prompts))).interval
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / draws <= most


def test_holm_is_the_closed_test_of_bonferroni():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5):
        p = rng.uniform(size=count) ** 3
        # Reject i at level a if every set that holds i is rejected: the largest of the sets' Bonferroni p-values.
        sets = [s for n in range(1, count + 1) for s in itertools.combinations(range(count), n)]
        truth = [max(min(1, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(count)]
        assert holm(list(p)) == pytest.approx(truth)
    assert holm([]) == []


def test_false_alarm_is_how_often_one_run_excludes_zero():
    rng, prompts = np.random.default_rng(3), 96
    of_seed, residual = 0.3, 1.5
    draw = lambda n: of_seed * rng.standard_normal((n, 1)) + residual * rng.standard_normal((n, prompts))  # noqa: E731
    alarms = [i.low > 0 or i.high < 0 for row in draw(4000) for i in [mean_effect(row).interval]]
    assert false_alarm(draw(400)) == pytest.approx(np.mean(alarms), abs=0.03)
    assert np.mean(alarms) > 0.25
    assert false_alarm(residual * rng.standard_normal((400, prompts))) == pytest.approx(0.05, abs=0.01)
    assert false_alarm(draw(1)) is None


def test_wins_count_ties_half():
    assert wins(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, -1.0])).tolist() == [1, 0.5, 0, 1]


@pytest.mark.parametrize(("won", "count"), [(0, 10), (3, 10), (39, 40), (240, 400)])
def test_win_rate_without_ties_is_wilsons(won, count):
    scores = np.array([[1.0] * won + [0.0] * (count - won)])
    truth = stats.binomtest(won, count).proportion_ci(0.95, "wilson")
    assert rate_of_wins(scores) == pytest.approx((won / count, *truth))
    assert wilson(won / count, count) == pytest.approx((won / count, *truth))


@pytest.mark.parametrize(("win", "tie"), [(0.5, 0.3), (0.2, 0.7), (0.1, 0.0), (0.85, 0.1)])
def test_win_rates_with_ties_cover(win, tie):
    rng, covered = np.random.default_rng(2), 0
    for _ in range(2000):
        found = rate_of_wins(rng.choice([1.0, 0.5, 0.0], (1, 60), p=[win, tie, 1 - win - tie]))
        covered += found.low <= win + tie / 2 <= found.high
    assert 0.93 <= covered / 2000 <= 0.985
    assert rate_of_wins(np.full((1, 4), 0.5)).low < 0.3  # four ties show little


def test_win_rate_over_seeds_is_wider_where_seeds_differ():
    rng = np.random.default_rng(0)
    alike = (rng.uniform(size=(4, 200)) < 0.7) * 1.0
    apart = (rng.uniform(size=(4, 200)) < np.array([0.5, 0.6, 0.8, 0.9])[:, None]) * 1.0
    widths = [found.high - found.low for found in (rate_of_wins(alike), rate_of_wins(apart))]
    assert widths[0] < 0.2 < widths[1] and rate_of_wins(apart).high < 1


def test_kl_has_an_interval_on_the_logarithmic_scale():
    one_value_each = np.repeat(np.array([[1.6], [2.1], [5.8]]), 10, axis=1)
    truth = stats.ttest_1samp(np.log([1.6, 2.1, 5.8]), 0).confidence_interval(0.95)
    assert kl_estimate(one_value_each) == pytest.approx((stats.gmean([1.6, 2.1, 5.8]), *(math.exp(v) for v in truth)))
    # One run: the delta method, exp(log m ± t s / (m √P)).
    values = np.random.default_rng(1).gamma(2, 1, 50)
    half = stats.t.ppf(0.975, 49) * stats.sem(values) / values.mean()
    assert kl_estimate(values[None]) == pytest.approx(values.mean() * np.exp([0, -half, half]))
    assert kl_estimate(np.zeros((2, 5))) == (0, None, None)


def test_kl_intervals_cover():
    rng, covered = np.random.default_rng(4), 0
    for _ in range(1500):
        levels = 2 * np.exp(0.5 * rng.standard_normal((5, 1)))
        found = kl_estimate(levels * rng.gamma(2, 0.5, 64) * rng.gamma(4, 0.25, (5, 64)))
        covered += found.low <= 2 <= found.high
    assert 0.92 <= covered / 1500 <= 0.98


def test_distinct_n_by_hand():
    assert distinct(["a b a b", "A b"], 1) == 2 / 6
    assert distinct(["a b a b", "A b"], 2) == 2 / 4  # a-b, b-a, a-b, a-b
    assert distinct(["a", ""], 2) is None


def test_bca_is_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.exponential(1, 25), rng.exponential(2, 12)

    def ratio(a, b):
        return np.stack([(a @ x) / (b @ y)], axis=1)

    [found] = bca(ratio, (25, 12), seed=0)
    statistic = lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis)  # noqa: E731
    truth = stats.bootstrap((x, y), statistic, n_resamples=20000, rng=np.random.default_rng(1), method="BCa")
    width = truth.confidence_interval.high - truth.confidence_interval.low
    assert found.value == pytest.approx(x.mean() / y.mean())
    assert found[1:] == pytest.approx(truth.confidence_interval, abs=0.06 * width)
    assert bca(ratio, (25, 12), seed=0) == [found]


def constant_curve(kls, rewards, noise, prompts=400, seed=0):
    """Every prompt has the same KL; rewards scatter with standard deviation `noise`, mean exactly `rewards`."""
    scatter = np.random.default_rng(seed).normal(size=(len(kls), prompts))
    scatter = (scatter - scatter.mean(axis=1, keepdims=True)) / scatter.std(axis=1, keepdims=True)
    return Curve(np.array(rewards)[:, None] + noise * scatter, np.repeat(np.array(kls)[:, None], 8, axis=1))


def test_matched_kl_of_straight_lines():
    ours = constant_curve([1.0, 3.0, 5.0], [1.0, 2.0, 3.0], noise=0.4, seed=1)  # 0.5 + KL / 2
    theirs = constant_curve([4.0, 1.0], [0.75, 0.0], noise=0.4, seed=2)  # (KL - 1) / 4, points out of order
    found = matched_kl(ours, theirs, seed=3)
    assert (found.low, found.kl) == (1.0, 4.0)
    assert found.at.value == pytest.approx(2.5 - 0.75)
    assert found.average.value == pytest.approx(1.0 + 0.75 / 2)
    # At KL 4 ours is the mean of its last two points, prompt by prompt; the resampling is paired over prompts.
    per_prompt = mean_effect((ours.rewards[1] + ours.rewards[2]) / 2 - theirs.rewards[0])
    assert found.at[1:] == pytest.approx(per_prompt.interval[1:], abs=0.2 * per_prompt.half)


def test_paired_rewards_and_kl_are_resampled_together():
    """Prompts on which the reward is as much higher as the KL leave the difference at equal KL as it is."""
    more = np.random.default_rng(0).normal(0, 0.2, 60)
    more -= more.mean()
    line = Curve(np.array([[1.0], [3.0]]) + more, np.array([[1.0], [3.0]]) + more, paired=True)
    flat = Curve(np.zeros((2, 60)), np.array([[0.5], [2.0]]) + np.zeros(60), paired=True)
    widths = [(at := matched_kl(*curves, 0).at).high - at.low
              for curves in ((line, flat), (line._replace(paired=False), flat))]  # fmt: skip
    assert widths[0] == pytest.approx(0, abs=1e-9) and widths[1] > 0.05


def test_uncertain_kl_widens_the_interval():
    sharp = constant_curve([1.0, 3.0], [0.0, 4.0], noise=0.0)
    blurred = sharp._replace(kl=sharp.kl + np.random.default_rng(0).normal(0, 0.5, sharp.kl.shape))
    flat = constant_curve([0.5, 2.0], [0.0, 0.0], noise=0.0)
    assert matched_kl(sharp, flat, 0).at == pytest.approx((2.0, 2.0, 2.0))
    spread = matched_kl(blurred, flat, 0).at
    assert spread.high - spread.low > 0.2


def test_curves_that_do_not_overlap():
    assert matched_kl(constant_curve([1, 2], [0, 1], 0.1), constant_curve([3, 4], [0, 1], 0.1), 0) is None


def simulated_study(rng, seeds, effect, samplers=3, prompts=60):
    """Reward = 1 + 0.8 log KL + seed + prompt + noise, `effect` more for the second sampler, whose KL is higher."""
    kl = np.exp(0.4 * rng.standard_normal((seeds, samplers)) + 0.3 * np.arange(samplers))
    mean = 1 + 0.8 * np.log(kl) + 0.3 * rng.standard_normal((seeds, 1)) + effect * (np.arange(samplers) == 1)
    mean = mean + 0.2 * rng.standard_normal((seeds, samplers))
    noise = rng.standard_normal(prompts) + 0.8 * rng.standard_normal((seeds, samplers, prompts))
    return mean[..., None] + noise, kl


def test_effect_at_equal_kl_is_least_squares_and_covers():
    rewards, kl = simulated_study(np.random.default_rng(0), 4, 0.3)
    design = [[*np.eye(4)[s], k == 1, k == 2, np.log(kl[s, k])] for s in range(4) for k in range(3)]
    truth, *_ = np.linalg.lstsq(np.array(design, dtype=float), rewards.mean(axis=2).ravel(), rcond=None)
    assert [e.value for e in at_equal_kl(rewards, kl)] == pytest.approx(truth[4:6])
    rng, covered = np.random.default_rng(1), 0
    for _ in range(1200):
        found = at_equal_kl(*simulated_study(rng, 6, 0.3))[0].interval
        covered += found.low <= 0.3 <= found.high
    assert 0.92 <= covered / 1200 <= 0.98


def test_effect_at_equal_kl_needs_seeds_and_overlap():
    rewards, kl = simulated_study(np.random.default_rng(0), 2, 0.3, samplers=2)
    assert at_equal_kl(rewards, kl) is None  # no degree of freedom is left
    rewards, kl = simulated_study(np.random.default_rng(0), 4, 0.3, samplers=2)
    assert at_equal_kl(rewards, np.repeat([[1.0, 2.0]], 4, axis=0)) is None  # the sampler decides the KL
    assert at_equal_kl(rewards, kl * 0) is None
