"""Sampled gradients: the law of the draws, their mean, their floor, and the independence of the streams."""

import numpy as np
import pytest
from bandit_cases import exact_step
from scipy import special, stats

from bandit import kernel, sampled, theory
from bandit.problem import draw_rewards, make_bandit, sampling_stream
from bandit.samplers import SAMPLERS, get_sampler
from bandit.simulate import simulate

BETA = 3.0
DRAWS = [sampled.draw_multinomial, sampled.draw_pairs]


def cells_of(name, num_actions=4, seed=0):
    """Cell probabilities [|Y|^2] of a sampler at a random state, with its bandit, weights and state."""
    rng = np.random.default_rng(seed)
    bandit = make_bandit(rng.normal(size=num_actions), BETA)
    u = rng.normal(size=(1, num_actions))
    weights, _ = get_sampler(name).weights(u, bandit)
    return sampled.cell_probabilities(weights, bandit)[0].ravel(), bandit, weights[0], u


def labelled_pairs(rng, weights, rewards, num_samples):
    """Counts [|Y|^2] by the definition: draw an ordered pair, then a Bradley-Terry label."""
    num_actions = len(rewards)
    pairs = rng.choice(num_actions**2, size=num_samples, p=weights.ravel() / weights.sum())
    first, second = np.divmod(pairs, num_actions)
    first_wins = rng.random(num_samples) < 1 / (1 + np.exp(rewards[second] - rewards[first]))
    winner, loser = np.where(first_wins, first, second), np.where(first_wins, second, first)
    return np.bincount(winner * num_actions + loser, minlength=num_actions**2)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_cell_probabilities_are_those_of_labelled_pairs(name):
    cells, bandit, weights, _ = cells_of(name)
    counts = labelled_pairs(np.random.default_rng(1), weights, bandit.rewards[0], 400_000)
    assert stats.chisquare(counts, cells * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("name", ["best-worst", "implicit-best-worst"])
def test_cells_of_best_and_worst_are_those_of_drawn_candidates(name):
    """By the definition: 8 arms from the policy, the best and the worst of them, a Bradley-Terry label."""
    cells, bandit, _, u = cells_of(name)
    rng, rewards = np.random.default_rng(13), bandit.rewards[0]
    scores = rewards if name == "best-worst" else u[0]
    arms = rng.choice(4, size=(400_000, 8), p=np.exp(bandit.log_policy(u))[0])
    rows = np.arange(len(arms))
    first, second = arms[rows, scores[arms].argmax(1)], arms[rows, scores[arms].argmin(1)]
    first_wins = rng.random(len(arms)) < 1 / (1 + np.exp(rewards[second] - rewards[first]))
    winner, loser = np.where(first_wins, first, second), np.where(first_wins, second, first)
    counts = np.bincount(winner * 4 + loser, minlength=16)
    assert stats.chisquare(counts, cells * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("draw", DRAWS)
def test_both_draws_follow_the_cell_probabilities(draw):
    cells, *_ = cells_of("DPO-Mix-R")
    counts = draw(np.random.default_rng(2), cells, 1000, 400)
    assert (counts.sum(axis=1) == 1000).all()
    total = counts.sum(axis=0)
    assert stats.chisquare(total, cells * total.sum()).pvalue > 1e-4


@pytest.mark.parametrize("draw", DRAWS)
def test_both_draws_vary_as_a_multinomial(draw):
    """A right mean could hide a wrong spread: compare the whole law of one small draw with enumeration."""
    cells, size = np.array([0.5, 0.3, 0.2]), 40_000
    counts = draw(np.random.default_rng(3), cells, 3, size)
    outcomes = [(a, b, 3 - a - b) for a in range(4) for b in range(4 - a)]
    expected = np.array([stats.multinomial.pmf(o, 3, cells) for o in outcomes]) * size
    observed = [(counts == o).all(axis=1).sum() for o in outcomes]
    assert stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize("draw", DRAWS)
def test_an_impossible_cell_is_never_drawn(draw):
    counts = draw(np.random.default_rng(4), np.array([0.0, 0.4, 0.0, 0.6, 0.0]), 500, 200)
    assert counts[:, [0, 2, 4]].sum() == 0


@pytest.mark.parametrize("cells, num_samples, expected", [(9, 9, DRAWS[0]), (9, 8, DRAWS[1])])
def test_the_cheaper_draw_is_chosen_by_cells_against_samples(cells, num_samples, expected):
    probabilities = np.full(cells, 1 / cells)
    chosen = sampled.draw_counts(np.random.default_rng(5), probabilities, num_samples, 3)
    np.testing.assert_array_equal(chosen, expected(np.random.default_rng(5), probabilities, num_samples, 3))


def updates_of(bandit, name, lr, num_samples, seed):
    draw = sampled.own_streams(name, len(bandit.rewards), num_samples, seed)
    return sampled.Updates(bandit, get_sampler(name), lr, num_samples, draw)


def moves(updates, u, times):
    """What each of so many updates from the same state adds, [times, envs, |Y|]."""
    after = np.repeat(u[None], times, axis=0)
    for state in after:
        updates.before[...] = 0
        updates.update(state)
    return after - u


@pytest.mark.parametrize("num_actions", [5, 20])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_compiled_cells_are_those_of_the_weights(name, num_actions):
    cells, bandit, _, u = cells_of(name, num_actions)
    updates = updates_of(bandit, name, 0.3, 10, 0)
    updates.before[...] = u
    updates.find_law(u)
    np.testing.assert_allclose(updates.cells[0].ravel(), cells, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("num_samples", [40, 2])
def test_the_sampled_increment_is_the_exact_one_on_average(name, num_samples):
    _, bandit, _, u = cells_of(name, num_actions=5, seed=6)
    increments = moves(updates_of(bandit, name, 1.0, num_samples, 7), u, 4000)
    error = np.mean(increments, axis=0) - exact_step(bandit, SAMPLERS[name], 1.0, u)
    assert (np.abs(error) < 5 * np.std(increments, axis=0) / np.sqrt(4000)).all()


def test_the_increment_is_the_gradient_of_the_drawn_pairs():
    """One pair: u moves by beta^2 lr sigma(-d) towards the winner, whichever it is."""
    bandit, u = make_bandit([0.0, 1.0], BETA), np.array([[0.2, -0.3]])
    found = {tuple(np.round(step[0], 12)) for step in moves(updates_of(bandit, "DPO-Unif", 0.1, 1, 0), u, 200)}
    up, down = (BETA**2 * 0.1 / (1 + np.exp(d)) for d in (0.5, -0.5))
    assert found == {(0.0, 0.0), *((round(a, 12), round(-a, 12)) for a in (up, -down))}


@pytest.mark.parametrize("spread", [1.0, 600.0, 2000.0])
def test_a_step_on_given_counts_is_the_sum_over_their_pairs(spread):
    rng = np.random.default_rng(14)
    u, counts, steps = spread * rng.random((2, 6)), rng.integers(0, 9, (2, 6, 6)), np.array([0.1, 2.0])
    expected = u.copy()
    for env, winner, loser in np.ndindex(2, 6, 6):
        move = steps[env] * counts[env, winner, loser] * special.expit(u[env, loser] - u[env, winner])
        expected[env, winner] += move
        expected[env, loser] -= move
    after, before = u.copy(), np.empty_like(u)
    kernel.move(after, before, counts, steps)
    np.testing.assert_allclose(after, expected, rtol=1e-12)
    np.testing.assert_array_equal(before, u)


@pytest.mark.parametrize("name", ["DPO-Unif", "DPO-Mix-R", "DPO-Mix-P*", "DPO-Mix-P"])
def test_noise_floor_is_the_predicted_one(name):
    bandit = make_bandit(draw_rewards("normal", 8, 20, 8) / 2, BETA)
    series = simulate(bandit, name, SAMPLERS[name], "sampled", 0.05, 3000, 8192, 9)
    floor = series["param_diff"][:, 1500:].mean()
    assert floor == pytest.approx(theory.noise_floor(BETA, 0.05, 8192, 20), rel=0.1)


def test_a_curve_depends_on_its_own_stream_alone():
    bandit = make_bandit(draw_rewards("normal", 2, 5, 10), BETA)

    def run(name, seed=11):
        return simulate(bandit, name, SAMPLERS[name], "sampled", 0.05, 30, 64, seed)["param_diff"]

    first = run("DPO-Unif")
    run("DPO-Mix-R")
    np.testing.assert_array_equal(first, run("DPO-Unif"))
    assert not np.array_equal(first, run("DPO-Unif", seed=12))
    assert not np.array_equal(first, run("offline"))  # the same law, another name, another stream


def test_streams_of_samplers_environments_and_seeds_all_differ():
    keys = [(seed, name, env) for seed in (0, 1) for name in SAMPLERS for env in (0, 1)]
    assert len({sampling_stream(*key).random() for key in keys}) == len(keys)
    np.testing.assert_array_equal(draw_rewards("normal", 5, 4, 3)[:2], draw_rewards("normal", 2, 4, 3))


def test_drawing_ahead_changes_nothing(monkeypatch):
    bandit = make_bandit(draw_rewards("normal", 2, 5, 12), BETA)
    runs = []
    for ahead in (1, sampled.AHEAD_CELLS):
        monkeypatch.setattr(sampled, "AHEAD_CELLS", ahead)
        runs.append(simulate(bandit, "DPO-Mix-R", SAMPLERS["DPO-Mix-R"], "sampled", 0.05, 40, 64, 0)["value"])
    np.testing.assert_array_equal(*runs)
