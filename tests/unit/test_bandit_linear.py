"""Log-linear policies against autograd on the loss as written, the tabular simulator, and measured curvature."""

import csv

import numpy as np
import pytest
import torch
from bandit_cases import BETA, NAMES, exact_step, loss_as_written, run_script

from bandit import linear
from bandit.problem import Bandit
from bandit.samplers import SAMPLERS, get_sampler
from bandit.simulate import simulate


def problem_of(variant="realizable", prompts=4, actions=3, d=5, envs=2, seed=0):
    return linear.make_problem(linear.VARIANTS[variant], prompts, actions, d, BETA, envs, seed)


def one_update(problem, name, v, lr):
    """v after one update at lr [instances]."""
    rates = np.repeat(lr, problem.features.shape[1])[:, None]
    step = exact_step(problem.bandit, get_sampler(name), rates, problem.implicit_rewards(v))
    return v + problem.pull_back(step)[:, 0]


@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_a_gradient_step_on_the_mean_loss_of_the_prompts(name):
    problem = problem_of()
    rng = np.random.default_rng(1)
    log_ref = np.log(rng.dirichlet(np.ones(3), size=8))
    problem = linear.Problem(Bandit(problem.bandit.rewards, log_ref, BETA), problem.features)
    thetas, lr = rng.normal(size=(2, 5)), np.array([0.7, 0.2])
    after = one_update(problem, name, BETA * thetas, lr)
    states = problem.implicit_rewards(BETA * thetas)
    weights, _ = get_sampler(name).weights(states, problem.bandit, np.zeros_like(states))
    for instance in range(2):
        theta, loss = torch.tensor(thetas[instance], requires_grad=True), 0.0
        for prompt in range(4):
            row = 4 * instance + prompt
            logits = torch.tensor(problem.features[instance, prompt]) @ theta + torch.tensor(log_ref[row])
            w = weights[row] / weights[row].sum()
            loss = loss + loss_as_written(w, problem.bandit.rewards[row], log_ref[row], logits) / 4
        loss.backward()
        expected = BETA * (thetas[instance] - lr[instance] * theta.grad.numpy())
        np.testing.assert_allclose(after[instance], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["DPO-Unif", "DPO-Mix-P*", "online", "history"])
def test_with_as_many_features_as_directions_it_is_the_tabular_case(name):
    """Orthonormal features: the mean over prompts divides the step by their number, nothing else differs."""
    problem = problem_of(d=8)
    got = linear.run(problem, SAMPLERS[name], np.full(2, 4 * 0.3), 25)
    expected = simulate(problem.bandit, name, SAMPLERS[name], "exact", 0.3, 25, 1, 0)
    for key, values in got.items():
        np.testing.assert_allclose(values, expected[key].reshape(2, 4, 25).mean(1), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["DPO-Unif", "DPO-Mix-R"])
def test_the_hessian_is_the_measured_one(name):
    problem = problem_of("correlated")
    v, h, lr = np.random.default_rng(2).normal(size=(2, 5)), 1e-6, np.ones(2)
    columns = []
    for direction in np.eye(5):
        ahead, behind = (one_update(problem, name, v + s * direction, lr) - s * direction for s in (h, -h))
        columns.append((behind - ahead) / (2 * h))
    measured = np.stack(columns, axis=-1)
    got = linear.hessian(problem, SAMPLERS[name], problem.implicit_rewards(v))
    np.testing.assert_allclose(got, measured, rtol=1e-5, atol=1e-8)


def test_limit_and_condition_come_from_the_hessians_at_start_and_optimum():
    problem = problem_of()
    limit, condition = linear.limit_and_condition(problem, SAMPLERS["online"])
    start, end = (
        [np.linalg.eigvalsh(one) for one in linear.hessian(problem, SAMPLERS["online"], u)]
        for u in (0 * problem.bandit.rewards, problem.bandit.rewards)
    )
    np.testing.assert_allclose(limit, [2 / max(a[-1], b[-1]) for a, b in zip(start, end, strict=True)])
    np.testing.assert_allclose(condition, [b[-1] / b[0] for b in end])


@pytest.mark.parametrize("variant", linear.VARIANTS)
def test_problems_are_what_their_variant_says(variant):
    problem, kind = problem_of(variant, prompts=30, actions=6, d=10), linear.VARIANTS[variant]
    flat = problem.features.reshape(2, 180, 10)
    rewards = problem.bandit.rewards.reshape(2, 180)
    np.testing.assert_allclose(problem.features.sum(axis=2), 0, atol=1e-12)
    np.testing.assert_allclose(problem.bandit.rewards.sum(axis=1), 0, atol=1e-12)
    lengths = np.arange(1, 11) ** -kind.decay
    np.testing.assert_allclose(flat.swapaxes(1, 2) @ flat, np.stack([np.diag(lengths**2)] * 2), atol=1e-12)
    residual = rewards - problem.closest.reshape(2, 180)
    np.testing.assert_allclose(np.vecmat(residual, flat), 0, atol=1e-10)
    np.testing.assert_allclose(residual.var(axis=1), kind.outside, atol=1e-9)
    np.testing.assert_allclose(rewards.var(axis=1), 1, rtol=1e-9)


def test_two_samplers_end_at_one_policy_where_rewards_are_realizable_and_at_two_where_not():
    for variant, together in (("realizable", True), ("misspecified", False)):
        problem = problem_of(variant, prompts=6, actions=4, d=5)
        ends = []
        for name in ("DPO-Unif", "online"):
            limit, _ = linear.limit_and_condition(problem, SAMPLERS[name])
            ends.append(linear.run(problem, SAMPLERS[name], 0.5 * limit, 800)["value_diff"][:, -1])
        assert bool(np.max(ends) < 1e-15) is together
        assert np.allclose(*ends, rtol=1e-3, atol=1e-15) is together


def test_updates_needed_and_the_tuned_scale():
    gaps = np.array([[1.0, 0.1, 1e-3, 1e-4], [2.0, 1.0, 0.5, 0.1]])
    np.testing.assert_array_equal(linear.updates_needed(gaps), [2, np.inf])
    problem, sampler = problem_of(prompts=6, actions=4, d=5), SAMPLERS["DPO-Unif"]
    limit, _ = linear.limit_and_condition(problem, sampler)
    best = linear.tuned_scale(problem, sampler, 60)
    needed = {
        scale: linear.updates_needed(linear.run(problem, sampler, scale * limit, 60)["value_diff"]).max()
        for scale in linear.EXACT_SCALES
    }
    assert needed[best] == min(needed.values()) < max(needed.values())


def test_of_steps_that_end_alike_the_one_with_the_smallest_mean_gap_is_chosen():
    """Rewards that no parameter expresses: several steps end at the same gap, up to rounding."""
    problem, sampler = problem_of("misspecified", prompts=6, actions=4, d=2), SAMPLERS["online"]
    limit, _ = linear.limit_and_condition(problem, sampler)
    gaps = linear.run(problem, sampler, limit[:, None] * linear.EXACT_SCALES, 400)["value_diff"]
    alike = np.isclose(gaps[:, :, -1], gaps[:, :1, -1], rtol=1e-12, atol=0).all(axis=0)
    assert alike.sum() >= 3
    best = np.where(alike, gaps.mean(axis=2).max(axis=0), np.inf).argmin()
    assert best > 0 and linear.tuned_scale(problem, sampler, 400) == linear.EXACT_SCALES[best]


TINY = ["--num_prompts", 4, "--num_actions", 3, "--num_envs", 3, "--num_tuning", 2, "--num_iter", 12]


def test_command_line_writes_results_and_figures(tmp_path):
    for folder, workers in (("a", 2), ("b", 1)):
        process = run_script("linear", *TINY, "--num_workers", workers, "--output_dir", tmp_path / folder)
        assert process.returncode == 0, process.stderr
    figures = {f"linear_{name}.{kind}" for name in ("value_diff", "param_diff") for kind in ("pdf", "png")}
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == figures | {"summary.csv", "trajectories.npz", "config.json"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    data = np.load(tmp_path / "a" / "trajectories.npz")
    assert data["misspecified/6/pilaf/value_diff"].shape == (3, 12)
    rows = list(csv.DictReader((tmp_path / "a" / "summary.csv").open()))
    assert len(rows) == (3 * 3 - 1) * 7 and {row["d"] for row in rows} == {"8", "6", "1"}


def test_dimensions_in_any_order(tmp_path):
    """The most features come last; there the misspecified variant has no panel, and none to its right."""
    process = run_script("linear", *TINY, "--dims", 1, 8, "--output_dir", tmp_path / "out")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    "arguments, culprit",
    [
        (["--samplers", "best"], "'best'"),
        (["--variants", "odd"], "'odd'"),
        (["--dims", "9"], "--dims: 9, but prompts x (|Y| - 1) is 8"),
        (["--dims", "0"], "--dims"),
        (["--dims", "8", "--variants", "misspecified"], "--dims: with 8 features"),
        (["--beta", "0"], "--beta"),
        (["--beta", "nan"], "--beta"),
        (["--num_iter", "1"], "--num_iter"),
        (["--num_actions", "1"], "--num_actions"),
        (["--num_envs", "x"], "--num_envs"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(arguments, culprit, tmp_path):
    process = run_script("linear", *TINY, *arguments, "--output_dir", tmp_path / "out")
    assert process.returncode == 2 and culprit in process.stderr
    assert len(process.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
