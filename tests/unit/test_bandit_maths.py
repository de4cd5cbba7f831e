"""The exact iteration against independent truths: autograd on the loss as written, the optimum, the theorems."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bandit import exact, metrics, sampled, theory
from bandit.mixtures import MIXTURES, POLICY, SECOND, Mixture, always
from bandit.palette import COLORS, color_of
from bandit.problem import draw_rewards, logsumexp, make_bandit
from bandit.samplers import SAMPLERS, Dense, extremes, from_mixture, get_sampler
from bandit.simulate import simulate
from bandit.steps import largest_stable_lr, matched_lr
from bandit.summary import order_and_rate

BETA = 1.7
NAMES = [*SAMPLERS, "mix_0.3_0.2_0.6"]


def exact_run(name, rewards, lr, num_iter, beta=BETA, log_ref=None, dtype=np.float64):
    bandit = make_bandit(rewards, beta, log_ref, dtype)
    return simulate(bandit, name, get_sampler(name), "exact", lr, num_iter, 1, 0)


def random_case(num_envs=3, num_actions=6, seed=0):
    """Rewards, reference log-probabilities and a policy's logits, all [envs, |Y|]."""
    rng = np.random.default_rng(seed)
    rewards, theta = rng.normal(size=(2, num_envs, num_actions))
    log_ref = rng.normal(size=(num_envs, num_actions))
    return rewards, log_ref - logsumexp(log_ref), theta


def softmax(logits):
    return torch.softmax(torch.as_tensor(logits), dim=-1)


def pair_distribution(name, rewards, log_ref, theta):
    """w(y, y') of one environment as a distribution over ordered pairs, from the words that define each sampler."""
    r, ref, pi = torch.tensor(rewards), torch.tensor(log_ref), torch.log_softmax(torch.tensor(theta), -1)
    uniform = torch.full_like(r, 1 / len(r))
    best = softmax(ref + r / BETA)
    ratio = BETA * (pi - ref)
    outer = torch.outer

    def lm(first, second):
        return outer(*(softmax(a * pi + b * ref) for a, b in (first, second)))

    def mixed(x):
        alpha1, alpha2 = len(r) ** 2, torch.exp(x[:, None] - x[None, :]).sum()
        return (alpha1 * outer(uniform, uniform) + alpha2 * outer(softmax(x), softmax(-x))) / (alpha1 + alpha2)

    def best_worst(scores, draws=8):
        return torch.tensor(best_and_worst_by_enumeration(pi.exp().numpy(), scores.numpy(), draws))

    def clipped():
        d, spread = ratio[:, None] - ratio[None, :], r.max() - r.min()
        w = torch.minimum(2 + d.exp() + (-d).exp(), 2 + spread.exp() + (-spread).exp())
        return w / w.sum()

    on, off = (1, 0), (0, 1)
    return {
        "DPO-Unif": lambda: outer(uniform, uniform),
        "DPO-Mix-R": lambda: mixed(r),
        "DPO-Mix-P": lambda: mixed(ratio),
        "DPO-Mix-P*": clipped,
        "DPO-Mix-R-1": lambda: outer(uniform, uniform),
        "DPO-Mix-R-2": lambda: outer(softmax(r), softmax(-r)),
        "DPO-Mix-P-1": lambda: outer(uniform, uniform),
        "DPO-Mix-P-2": lambda: outer(softmax(ratio), softmax(-ratio)),
        "DPO-Opt-Unif": lambda: outer(best, uniform),
        "DPO-Policy-Unif": lambda: outer(pi.exp(), uniform),
        "DPO-Policy-Policy": lambda: outer(pi.exp(), pi.exp()),
        "offline": lambda: lm(off, off),
        "online": lambda: lm(on, on),
        "gshf": lambda: lm(off, on),
        "mixp": lambda: lm((1.5, -0.5), (0.5, 0.5)),
        "mixp-iterative": lambda: 0.3 * lm(on, on) + 0.7 * lm((1.5, -0.5), (0.5, 0.5)),
        "pilaf": lambda: (lm(on, on) + lm((1 + BETA, -BETA), (1 - BETA, BETA))) / 2,
        "simplemix": lambda: (lm(on, on) + lm(off, off)) / 2,
        "xpo": lambda: lm(on, off),
        "theory": lambda: lm((BETA, 1 - BETA), (-BETA, 1 + BETA)),
        "theory-mix": lambda: (lm(off, off) + lm((BETA, 1 - BETA), (-BETA, 1 + BETA))) / 2,
        "nash-md": lambda: lm(on, (0.875, 0.125)),
        "history": lambda: lm(on, off),  # in the first update: before it the policy is the reference
        "best-worst": lambda: best_worst(r),
        "implicit-best-worst": lambda: best_worst(ratio),
        "random-pairs": lambda: lm(on, on),
        "mix_0.3_0.2_0.6": lambda: 0.4 * lm(on, on) + 0.6 * lm((1.3, -0.3), (0.8, 0.2)),
    }[name]()


def best_and_worst_by_enumeration(pi, scores, draws):
    """P(best = y, worst = y') over all counts of the arms in `draws` draws; equal scores are ordered at random."""
    joint = np.zeros((len(pi), len(pi)))
    for seen in itertools.combinations_with_replacement(range(len(pi)), draws):
        counts = np.bincount(seen, minlength=len(pi))
        probability = stats.multinomial.pmf(counts, draws, pi)
        top = [y for y in seen if scores[y] == max(scores[list(seen)])]
        bottom = [y for y in seen if scores[y] == min(scores[list(seen)])]
        # All draws of one score: best and worst are two of them, in random order.
        pairs = list(itertools.permutations(seen, 2)) if top == bottom else list(itertools.product(top, bottom))
        for best, worst in pairs:
            joint[best, worst] += probability / len(pairs)
    return joint


def autograd(name, rewards, log_ref, theta):
    """Gradient of the loss as written, one environment."""
    weights = pair_distribution(name, rewards, log_ref, theta)
    logits = torch.tensor(theta, requires_grad=True)
    h = torch.log_softmax(logits, -1) - torch.tensor(log_ref)
    d = BETA * (h[:, None] - h[None, :])
    r = torch.tensor(rewards)
    wins = torch.sigmoid(r[:, None] - r[None, :])
    (-(weights * (wins * F.logsigmoid(d) + (1 - wins) * F.logsigmoid(-d))).sum()).backward()
    return logits.grad.numpy()


@pytest.mark.parametrize("name", NAMES)
def test_increment_is_minus_beta_lr_times_the_autograd_gradient(name):
    rewards, log_ref, theta = random_case()
    bandit = make_bandit(rewards, BETA, log_ref)
    out = np.empty_like(rewards)
    exact.make_increment(bandit, get_sampler(name), 0.37)(BETA * (theta - log_ref), out)
    expected = [-BETA * 0.37 * autograd(name, *case) for case in zip(rewards, log_ref, theta, strict=True)]
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-14)


def test_every_sampler_of_the_table_is_checked_and_has_a_colour():
    assert set(COLORS) == set(SAMPLERS)
    assert color_of("new") == color_of("new") != color_of("newer")
    assert len({color_of(name) for name in MIXTURES}) == len(MIXTURES)  # rows without a law here too


def best_and_worst_of_tuples(pi, scores, draws):
    """The same, draw by draw: over all tuples of arms and all orders that break ties."""
    joint = np.zeros((len(pi), len(pi)))
    orders = list(itertools.permutations(range(draws)))
    for arms in itertools.product(range(len(pi)), repeat=draws):
        for order in orders:
            ranked = sorted(range(draws), key=lambda i: (scores[arms[i]], order[i]))  # noqa: B023
            joint[arms[ranked[-1]], arms[ranked[0]]] += np.prod(pi[list(arms)]) / len(orders)
    return joint


SCORES = {"distinct": [0.3, -1.0, 2.0, 0.1], "tied": [0.5, 1.0, 0.5, 1.0], "all equal": [0.0, 0.0, 0.0, 0.0]}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("draws", [2, 3, 4])
def test_best_and_worst_of_draws_equal_enumeration_of_all_tuples(scores, draws):
    pi, scores = np.array([0.5, 0.2, 0.25, 0.05]), np.array(scores)
    expected = best_and_worst_of_tuples(pi, scores, draws)
    np.testing.assert_allclose(extremes(pi[None], scores[None], draws)[0], expected, atol=1e-15)
    np.testing.assert_allclose(best_and_worst_by_enumeration(pi, scores, draws), expected, atol=1e-15)


def test_best_and_worst_of_two_draws_are_the_two_draws():
    rewards, log_ref, theta = random_case()
    bandit, u = make_bandit(rewards, BETA, log_ref), BETA * (theta - log_ref)
    outer = np.exp(bandit.log_policy(u))
    outer = outer[:, :, None] * outer[:, None, :]
    both = extremes(np.exp(bandit.log_policy(u)), rewards, 2)
    np.testing.assert_allclose((both + both.swapaxes(1, 2)) / 2, outer, atol=1e-15)


def test_candidates_from_two_policies_are_refused():
    sampler = from_mixture(Mixture(always(POLICY, SECOND), "", candidates=4))
    with pytest.raises(NotImplementedError, match="two policies"):
        sampler.weights(np.zeros((1, 3)), make_bandit([0.0, 1.0, 2.0], BETA))


@pytest.mark.parametrize("mode", ["exact", "empirical"])
def test_history_pairs_the_policy_with_the_one_before_the_last_update(mode):
    """Against increments whose weights are given: pi_t x pi_(t-1), pi_(-1) the reference."""
    rewards, log_ref, _ = random_case(num_envs=1, num_actions=4)
    bandit, lr, states = make_bandit(rewards, BETA, log_ref), 0.4, [np.zeros_like(rewards)] * 2

    class Told:
        fixed, alpha = False, None

        @staticmethod
        def successive(bandit):
            def weights(u):
                np.testing.assert_array_equal(u, states[-1])
                first, second = (np.exp(bandit.log_policy(state))[0] for state in states[-1:-3:-1])
                outer = np.outer(first, second)
                return Dense((outer + outer.T)[None], np.zeros((1, 1)))

            return weights

    def make(sampler):
        if mode == "exact":
            return exact.make_increment(bandit, sampler, lr)
        return sampled.make_increment(bandit, sampler, "history", lr, 50, 0)

    ours, told = make(SAMPLERS["history"]), make(Told)
    out, expected = np.empty_like(rewards), np.empty_like(rewards)
    reused = np.empty_like(rewards)  # the simulator hands over rows of one buffer
    for _ in range(6):
        reused[...] = states[-1]
        ours(reused, out)
        told(states[-1], expected)
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-15)
        states.append(states[-1] + out)
    assert np.abs(states[-1]).max() > 0.05


def test_two_runs_of_history_do_not_share_their_memory():
    rewards = draw_rewards("normal", 2, 5, 13)
    first, second = (exact_run("history", rewards, 0.5, 20)["value"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ["DPO-Unif", "DPO-Mix-R"])
@pytest.mark.parametrize("spread", [1e-9, 0.1, 3.0, 20.0, 500.0])
def test_interpolated_sums_equal_the_direct_sums(name, spread):
    rng = np.random.default_rng(1)
    bandit = make_bandit(rng.normal(size=(2, 400)), BETA)
    u = spread * rng.uniform(-0.5, 0.5, size=(2, 400))
    out = np.empty_like(u)
    exact.fixed_interpolated(bandit, SAMPLERS[name], 1.0)(u, out)
    direct = exact.dense(u, bandit, SAMPLERS[name], 1.0)
    np.testing.assert_allclose(out, direct, atol=1e-12 * np.abs(direct).max())


@pytest.mark.parametrize("name", NAMES)
def test_the_optimum_is_a_fixed_point(name):
    rewards, log_ref, _ = random_case(seed=2)
    bandit = make_bandit(rewards, BETA, log_ref)
    out = np.empty_like(rewards)
    exact.make_increment(bandit, get_sampler(name), 1.0)(bandit.rewards + 5.0, out)
    np.testing.assert_allclose(out, 0, atol=1e-14)
    target = np.exp(log_ref) * np.exp(rewards / BETA)
    np.testing.assert_allclose(np.exp(bandit.log_policy(rewards)), target / target.sum(1, keepdims=True), rtol=1e-12)


CONVERGENT = ["DPO-Unif", "DPO-Mix-R", "DPO-Mix-P", "DPO-Mix-P*", "DPO-Opt-Unif", "online", "gshf", "history"]
# Best and worst hardly ever meet the arms between: their gaps close last.
SLOW = ["best-worst", "implicit-best-worst"]


@pytest.mark.parametrize("name, num_iter", [(n, 6000) for n in CONVERGENT] + [(n, 20_000) for n in SLOW])
def test_iteration_converges_to_the_optimum_from_any_reference(name, num_iter):
    rewards, log_ref, _ = random_case(seed=3)
    log_ref = log_ref / 2 - logsumexp(log_ref / 2)
    series = exact_run(name, rewards / 2, "matched", num_iter, log_ref=log_ref)
    assert series["param_diff"][:, 0].min() > 0.1
    assert series["max_delta"][:, -1].max() < 1e-10


def test_metrics_equal_their_definitions():
    rewards, log_ref, theta = random_case(seed=4)
    bandit = make_bandit(rewards, BETA, log_ref)
    got = metrics.measure(bandit, BETA * (theta - log_ref)[None])
    log_pi = theta - logsumexp(theta)
    v = rewards - BETA * (log_pi - log_ref)
    deltas = np.abs(v[:, :, None] - v[:, None, :])
    value = (np.exp(log_pi) * v).sum(1)
    best = BETA * np.log((np.exp(log_ref) * np.exp(rewards / BETA)).sum(1))
    expected = {
        "param_diff": deltas.sum((1, 2)) / rewards.shape[1] ** 2,
        "max_delta": deltas.max((1, 2)),
        "value": value,
        "value_diff": best - value,
    }
    for key, values in expected.items():
        np.testing.assert_allclose(got[key][:, 0], values, rtol=1e-12, err_msg=key)


def test_value_gap_survives_policies_far_from_the_optimum():
    bandit = make_bandit([0.0, 1.0, 800.0], 0.5)
    gap = metrics.value_gap(bandit, np.zeros((1, 1, 3)))
    assert gap[0, 0] == pytest.approx(800 - 0.5 * np.log(3) - (801 / 3), rel=1e-12)


@pytest.mark.parametrize("name, order", [("DPO-Mix-R", 2), ("DPO-Mix-P", 2), ("DPO-Mix-P*", 2), ("DPO-Unif", 1)])
def test_order_of_convergence_with_the_matched_step(name, order):
    series = exact_run(name, draw_rewards("normal", 20, 20, 5), "matched", 300)
    fits = [order_and_rate(errors)[0] for errors in series["param_diff"]]
    assert np.median(fits) == pytest.approx(order, abs=0.1)
    np.testing.assert_allclose(fits, order, atol=0.15)  # three float64 errors are hardly asymptotic for each draw


@pytest.mark.parametrize("name", ["DPO-Mix-R", "DPO-Mix-P"])
@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.3])
def test_local_rate_at_a_constant_step_is_one_minus_its_ratio_to_the_matched_one(name, ratio):
    rewards = draw_rewards("normal", 1, 10, 6)
    bandit = make_bandit(rewards, BETA)
    best = matched_lr(SAMPLERS[name], bandit, rewards)[0]
    assert largest_stable_lr(SAMPLERS[name], bandit)[0] == pytest.approx(2 * best, rel=1e-9)
    series = exact_run(name, rewards, ratio * best, 60)
    errors = series["param_diff"][0]
    errors = errors[errors > 1e-12]
    assert errors[-1] / errors[-2] == pytest.approx(abs(1 - ratio), rel=1e-2)


@pytest.mark.parametrize("name", ["DPO-Unif", "DPO-Mix-R", "offline", "DPO-Mix-R-2", "best-worst", "history"])
def test_the_iteration_is_stable_just_below_the_limit_and_not_above(name):
    rewards = draw_rewards("normal", 1, 10, 7)
    limit = largest_stable_lr(get_sampler(name), make_bandit(rewards, BETA))[0]
    assert exact_run(name, rewards, 0.97 * limit, 4000)["max_delta"][0, -1] < 1e-6
    assert exact_run(name, rewards, 1.03 * limit, 4000)["max_delta"][0, -1] > 1e-3


def matched_total(name, rewards):
    """Z of the weights as the paper's table has them."""
    gap = rewards[:, None] - rewards[None, :]
    return {"DPO-Unif": np.ones_like(gap), "DPO-Mix-R": 2 + np.exp(gap) + np.exp(-gap)}[name].sum()


@pytest.mark.parametrize("name", ["DPO-Unif", "DPO-Mix-R"])
def test_matched_and_theory_are_the_constant_steps_of_their_formulas(name):
    rewards = draw_rewards("uniform", 1, 8, 8)
    matched = matched_total(name, rewards[0]) / (2 * BETA**2 * 8)
    alpha = 2 * 8**2 if name == "DPO-Unif" else matched_total(name, rewards[0]) / 2
    for rule, lr in (("matched", matched), ("theory", alpha / (BETA**2 * 8))):
        by_rule, by_number = (exact_run(name, rewards, step, 5)["param_diff"] for step in (rule, lr))
        np.testing.assert_allclose(by_rule, by_number, rtol=1e-9, atol=1e-15)


@settings(deadline=None, max_examples=150)
@given(
    rewards=st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0])), min_size=2, max_size=12),
    beta=st.floats(0.05, 20),
    name=st.sampled_from(list(theory.BOUNDS)),
)
def test_bounds_hold_for_any_rewards_in_the_unit_interval(rewards, beta, name):
    assert theory.worst_ratio(name, np.array([rewards]), beta, 30) <= 1


@pytest.mark.parametrize("name", list(theory.BOUNDS))
def test_bounds_hold_on_hundreds_of_instances(name):
    for num_actions in (2, 7, 30):
        assert theory.worst_ratio(name, theory.instances(num_actions, 300, 9), 3.0, 30) <= 1


def test_bounds_hold_on_every_two_valued_instance_of_eight_arms():
    rewards = np.array(list(itertools.product([0.0, 1.0], repeat=8)))
    for name in theory.BOUNDS:
        assert theory.worst_ratio(name, rewards, 0.3, 30) <= 1


def test_the_other_alpha_convention_breaks_the_uniform_bound():
    series = exact_run("DPO-Unif", np.array([[0.0, 1.0]]), 2 / BETA**2, 30)
    broken = np.flatnonzero(series["max_delta"][0] > theory.bound("DPO-Unif", 30))
    assert broken[0] == 10


def test_the_clip_of_mix_p_star_is_each_environments_own():
    rewards = np.array([[0.0, 0.1, 0.2], [0.0, 10.0, 20.0]])
    u = np.array([[0.0, 3.0, 6.0], [0.0, 3.0, 6.0]])
    weights, log_scale = SAMPLERS["DPO-Mix-P*"].weights(u, make_bandit(rewards, BETA))
    weights = weights * np.exp(log_scale)[..., None]
    cap = 2 + np.exp(0.2) + np.exp(-0.2)
    assert weights[0, 0, 2] == pytest.approx(cap) and weights[0, 0, 1] == pytest.approx(cap)
    assert weights[1, 0, 2] == pytest.approx(2 + np.exp(6) + np.exp(-6))


@pytest.mark.parametrize("mode", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["DPO-Unif", "DPO-Mix-P*", "DPO-Mix-P", "mixp", "history", "best-worst"])
def test_environments_do_not_see_each_other(name, mode):
    rewards = draw_rewards("normal", 3, 6, 10)
    run = [simulate(make_bandit(r, BETA), name, SAMPLERS[name], mode, 0.5, 25, 64, 3) for r in (rewards, rewards[:1])]
    np.testing.assert_allclose(run[0]["max_delta"][:1], run[1]["max_delta"], rtol=1e-9, atol=1e-15)
    assert not np.allclose(run[0]["max_delta"][1], run[1]["max_delta"][0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_actions", [5, 300])
def test_gaps_of_700_do_not_overflow(name, num_actions):
    rewards = np.linspace(0, 1, num_actions)[None]
    u = np.linspace(-350, 350, num_actions)[None]
    bandit = make_bandit(rewards, 1.0)
    out = np.empty_like(u)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        exact.make_increment(bandit, get_sampler(name), 0.1)(u, out)
        sampled.make_increment(bandit, get_sampler(name), name, 0.1, 100, 0)(u, out)
        measured = metrics.measure(bandit, u[None])
    assert np.isfinite(out).all() and all(np.isfinite(values).all() for values in measured.values())


def test_value_gap_is_never_negative_and_float32_ends_at_its_own_rounding():
    rewards = draw_rewards("normal", 5, 20, 11)
    for dtype, floor in ((np.float64, 1e-13), (np.float32, 1e-5)):
        series = exact_run("DPO-Mix-R", rewards, "matched", 60, dtype=dtype)
        assert series["value_diff"].min() >= 0
        assert series["param_diff"][:, -1].max() < floor
    assert series["param_diff"][:, -1].max() > 1e-9
