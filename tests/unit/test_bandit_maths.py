"""The exact iteration against independent truths: autograd on the loss as written, the optimum, the theorems."""

import itertools
import re

import numpy as np
import pytest
import torch
from bandit_cases import (
    BETA,
    DEFINED,
    NAMES,
    best_and_worst_by_enumeration,
    defined_laws,
    exact_step,
    loss_as_written,
    random_case,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bandit import exact, kernel, sampled, samplers, theory
from bandit.mixtures import MIXTURES, POLICY, SECOND, Mixture, always
from bandit.palette import COLORS, color_of, marker_of
from bandit.problem import draw_rewards, gaps, logsumexp, make_bandit
from bandit.samplers import SAMPLERS, Dense, NotTabular, Sampler, extremes, from_mixture, get_sampler
from bandit.simulate import simulate
from bandit.steps import largest_stable_lr, matched_lr
from bandit.summary import order_and_rate


def exact_run(name, rewards, lr, num_iter, beta=BETA, log_ref=None, dtype=np.float64):
    bandit = make_bandit(rewards, beta, log_ref, dtype)
    return simulate(bandit, name, get_sampler(name), "exact", lr, num_iter, 1, 0)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_that_the_samplers_words_define(name):
    if name not in DEFINED:
        pytest.skip("a row that is not written out in tests/support/bandit_cases.py")
    rewards, log_ref, theta = random_case()
    bandit = make_bandit(rewards, BETA, log_ref)
    weights, _ = get_sampler(name).weights(BETA * (theta - log_ref), bandit, np.zeros_like(rewards))
    for got, *case in zip(weights, rewards, log_ref, theta, strict=True):
        law = defined_laws(*case)[name]().numpy()
        np.testing.assert_allclose(got / got.sum(), (law + law.T) / 2, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize("name", NAMES)
def test_increment_is_minus_beta_lr_times_the_autograd_gradient(name, noise):
    rewards, log_ref, theta = random_case()
    bandit, sampler = make_bandit(rewards, BETA, log_ref, label_noise=noise), get_sampler(name)
    u = BETA * (theta - log_ref)
    weights, _ = sampler.weights(u, bandit, np.zeros_like(u))
    got = exact_step(bandit, sampler, 0.37, u)
    for row, (r, ref, logits, w) in enumerate(zip(rewards, log_ref, theta, weights, strict=True)):
        logits = torch.tensor(logits, requires_grad=True)
        loss_as_written(w / w.sum(), r, ref, logits, noise=noise).backward()
        np.testing.assert_allclose(got[row], -BETA * 0.37 * logits.grad.numpy(), rtol=1e-10, atol=1e-14)


def test_every_row_has_a_colour_and_a_marker_and_the_papers_are_told_apart():
    for name in [*SAMPLERS, *MIXTURES, "new"]:
        assert re.fullmatch("#[0-9A-F]{6}", color_of(name)) and marker_of(name)
    assert color_of("new") == color_of("new") != color_of("newer")
    assert len({COLORS[name] for name in ("DPO-Unif", "DPO-Mix-R", "DPO-Mix-P", "DPO-Mix-P*")}) == 4
    assert len({COLORS[name] for name in ("offline", "online", "gshf", "mixp")}) == 4


KERNEL_CASES = {
    "2 arms": (2, 1.0, 0.0),
    "20 arms": (20, 3.0, 0.1),
    "33 arms, wide": (33, 100.0, 0.0),
    "5 arms, powers overflow": (5, 400.0, 0.0),
    "7 arms, far beyond": (7, 900.0, 0.0),
    "300 arms": (300, 2.0, 0.0),
}


@pytest.mark.parametrize("lr", [0.7, "matched"])
@pytest.mark.parametrize("case", KERNEL_CASES)
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_update_is_the_formula(name, case, lr):
    num_actions, spread, noise = KERNEL_CASES[case]
    rng = np.random.default_rng(1)
    rewards, u, before = rng.normal(size=(3, 2, num_actions))
    u = spread * u / np.ptp(u, axis=1, keepdims=True)
    log_ref = np.log(rng.dirichlet(np.ones(num_actions), size=2))
    bandit, sampler = make_bandit(rewards, BETA, log_ref, label_noise=noise), get_sampler(name)
    if isinstance(lr, str) and spread > 300:
        lr = np.array([[0.1], [0.2]])  # a matched step overflows there
    updates = exact.Updates(bandit, sampler, lr)
    updates.before[...] = before
    series = updates.advance(u.copy(), 1)[:, :, 0]
    expected = exact.increment(u, bandit, sampler, lr, before)
    np.testing.assert_allclose(updates.last, expected, rtol=1e-9, atol=2e-13 * np.abs(expected).max() + 1e-300)
    np.testing.assert_allclose(series, exact.measure(bandit, u), rtol=1e-11, atol=1e-300)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=40))
def test_compiled_exponentials_are_right_to_rounding(values):
    x = np.array(values)
    out = np.empty_like(x)
    kernel.exponentials(x, out, np.empty(x.size, np.int64))
    np.testing.assert_allclose(out, np.exp(np.clip(x, -708, 709)), rtol=5e-16)


def test_a_row_with_a_law_of_its_own_is_simulated_by_that_law():
    """Also with `alpha`: a theorem's constant says nothing about which law it is."""
    asked = []

    def law(u, bandit):
        asked.append(u.copy())
        weights = np.ones((*u.shape, u.shape[1]))
        weights[:, 0, :] = weights[:, :, 0] = 5.0
        return Dense(weights, np.zeros((len(u), 1)))

    rewards, log_ref, _ = random_case(num_envs=2, num_actions=4)
    bandit, u = make_bandit(rewards, BETA, log_ref), np.zeros((2, 4))
    weights = law(u, bandit).matrix
    surprise = (np.tanh(gaps(rewards) / 2) - np.tanh(gaps(u) / 2)) / 2
    expected = (weights * surprise).sum(axis=2)
    for lr in (0.3, "theory", "matched"):
        gain = {"theory": 2 * 0.5 / 4, "matched": 1 / 4}.get(lr, 2 * BETA**2 * 0.3 / weights.sum((1, 2))[:, None])
        np.testing.assert_allclose(exact_step(bandit, Sampler("own", law=law, alpha=0.5), lr, u), gain * expected)
    asked.clear()
    for mode in ("exact", "sampled"):
        simulate(bandit, "own", Sampler("own", law=law, alpha=0.5), mode, 0.3, 5, 10, 0)
    assert len(asked) == 10 and np.abs(asked[-1]).max() > 0


def test_a_sampler_has_one_law():
    with pytest.raises(ValueError, match="either"):
        Sampler("none")
    with pytest.raises(ValueError, match="either"):
        Sampler("both", samplers.uniform, law=lambda u, bandit: None)


def test_laws_of_three_terms_run_by_the_formula():
    row = Mixture(lambda beta: ((0.5, POLICY, POLICY), (0.3, SECOND, SECOND), (0.2, POLICY, SECOND)), "")
    rewards, log_ref, theta = random_case()
    bandit, u, sampler = make_bandit(rewards, BETA, log_ref), BETA * (theta - log_ref), from_mixture(row)
    pi, ref = np.exp(bandit.log_policy(u)), np.exp(log_ref)
    outer = [np.einsum("ei,ej->eij", *pair) for pair in ((pi, pi), (ref, ref), (pi, ref))]
    law = 0.5 * outer[0] + 0.3 * outer[1] + 0.2 * outer[2]
    weights, _ = sampler.weights(u, bandit)
    np.testing.assert_allclose(weights / weights.sum((1, 2), keepdims=True), (law + law.swapaxes(1, 2)) / 2)
    step = exact_step(bandit, sampler, 0.5, u)
    np.testing.assert_allclose(step, exact.increment(u, bandit, sampler, 0.5, np.zeros_like(u)))


@pytest.mark.parametrize(
    "row",
    [
        Mixture(always(POLICY, SECOND), "", candidates=4),
        Mixture(always(POLICY, POLICY), "", candidates=4, choose="median"),
        Mixture(always(POLICY, POLICY), "", second_model="a third"),
        Mixture(always((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)), ""),
    ],
    ids=["two policies", "choice", "second model", "three models"],
)
def test_rows_that_the_bandit_has_no_law_for_are_refused_and_left_out_of_the_table(row):
    with pytest.raises(NotTabular):
        from_mixture(row)
    rows = samplers.tabular_rows({"new": row, "online": MIXTURES["online"]})
    assert list(rows) == ["online"]


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


@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_history_pairs_the_policy_with_the_one_before_the_last_update(mode):
    """Cells and increments from pi_t x pi_(t-1), pi_(-1) the reference, written out."""
    rewards, log_ref, _ = random_case(num_envs=1, num_actions=4)
    bandit, lr, states = make_bandit(rewards, BETA, log_ref), 0.4, [np.zeros_like(rewards)] * 2
    cells = []

    def draw(found, updates):
        cells.append(found.copy())
        return np.arange(16).reshape(1, 1, 16)

    if mode == "exact":
        updates = exact.Updates(bandit, SAMPLERS["history"], lr)
    else:
        updates = sampled.Updates(bandit, SAMPLERS["history"], lr, 120, draw)
    for _ in range(6):
        u = states[-1].copy()
        updates.advance(u, 1)
        first, second = (np.exp(bandit.log_policy(state))[0] for state in states[-1:-3:-1])
        law = (np.outer(first, second) + np.outer(second, first)) / 2
        loses = 1 / (1 + np.exp(gaps(states[-1])[0]))
        if mode == "exact":
            wins = 1 / (1 + np.exp(-gaps(rewards)[0]))
            expected = 2 * BETA**2 * lr * (law * (wins - 1 + loses)).sum(axis=1)
        else:
            np.testing.assert_allclose(cells[-1].reshape(4, 4), 2 * law / (1 + np.exp(-gaps(rewards)[0])), rtol=1e-12)
            counts = np.arange(16).reshape(4, 4)
            expected = BETA**2 * lr / 120 * (counts * loses - counts.T * loses.T).sum(axis=1)
        np.testing.assert_allclose(u[0] - states[-1][0], expected, rtol=1e-9, atol=1e-14)
        states.append(u)
    assert np.abs(states[-1]).max() > 0.05


def test_two_runs_of_history_do_not_share_their_memory():
    rewards = draw_rewards("normal", 2, 5, 13)
    first, second = (exact_run("history", rewards, 0.5, 20)["value"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_the_optimum_is_a_fixed_point(name):
    rewards, log_ref, _ = random_case(seed=2)
    bandit = make_bandit(rewards, BETA, log_ref)
    np.testing.assert_allclose(exact_step(bandit, get_sampler(name), 1.0, bandit.rewards + 5.0), 0, atol=1e-14)
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
    got = dict(zip(exact.METRICS, exact.measure(bandit, BETA * (theta - log_ref)), strict=True))
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
        np.testing.assert_allclose(got[key], values, rtol=1e-12, err_msg=key)


def test_value_gap_survives_policies_far_from_the_optimum():
    bandit = make_bandit([0.0, 1.0, 800.0], 0.5)
    expected = pytest.approx(800 - 0.5 * np.log(3) - (801 / 3), rel=1e-12)
    assert exact.value_gap(bandit, np.zeros((1, 3))) == expected
    updates = exact.Updates(bandit, SAMPLERS["DPO-Unif"], 1.0)
    assert updates.advance(np.zeros((1, 3)), 1)[2, 0, 0] == expected


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


@pytest.mark.parametrize("mode", ["exact", "sampled"])
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
    after = u.copy()
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        step = exact_step(bandit, get_sampler(name), 0.1, u)
        updates = sampled.Updates(bandit, get_sampler(name), 0.1, 100, sampled.own_streams(name, 1, 100, 0))
        updates.update(after)
        measured = exact.measure(bandit, u)
    assert np.isfinite(step).all() and np.isfinite(after).all() and np.isfinite(measured).all()


def test_value_gap_is_never_negative_and_float32_ends_at_its_own_rounding():
    rewards = draw_rewards("normal", 5, 20, 11)
    for dtype, floor in ((np.float64, 1e-13), (np.float32, 1e-5)):
        series = exact_run("DPO-Mix-R", rewards, "matched", 60, dtype=dtype)
        assert series["value_diff"].min() >= 0
        assert series["param_diff"][:, -1].max() < floor
    assert series["param_diff"][:, -1].max() > 1e-9
