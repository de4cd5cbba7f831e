"""The ablation: label noise, joint draws, step sizes, tuning, and the real command line at tiny size."""

import csv
import json

import numpy as np
import pytest
from bandit_cases import exact_step, run_script
from scipy import stats

from bandit import ablation, kernel, sampled, tuned
from bandit.problem import draw_rewards, gaps, make_bandit
from bandit.samplers import SAMPLERS, get_sampler
from bandit.simulate import simulate
from bandit.steps import largest_stable_lr

BETA = 1.3


def test_flipped_labels_are_drawn():
    bandit = make_bandit(np.random.default_rng(2).normal(size=4), BETA, label_noise=0.3)
    weights, _ = SAMPLERS["DPO-Mix-R"].weights(bandit.rewards, bandit)
    cells, rng, rewards = (
        sampled.cell_probabilities(weights, bandit)[0].ravel(),
        np.random.default_rng(3),
        bandit.rewards[0],
    )
    pairs = rng.choice(16, size=300_000, p=weights[0].ravel() / weights.sum())
    first, second = np.divmod(pairs, 4)
    first_wins = rng.random(len(pairs)) < 1 / (1 + np.exp(rewards[second] - rewards[first]))
    first_wins ^= rng.random(len(pairs)) < 0.3
    winner, loser = np.where(first_wins, first, second), np.where(first_wins, second, first)
    counts = np.bincount(winner * 4 + loser, minlength=16)
    assert stats.chisquare(counts, cells * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("num_samples", [2, 200])  # fewer than the cells, and more
def test_joint_draws_follow_each_rows_cells(num_samples):
    cells = np.random.default_rng(4).dirichlet(np.ones(9), size=3)
    cells[1] = [0, 0.5, 0, 0, 0.25, 0.25, 0, 0, 0]
    stream, total = np.random.default_rng(5), np.zeros((3, 9), int)
    for _ in range(60_000 // num_samples // 6):
        counts = sampled.draw_rows(stream, cells, num_samples, 2)
        assert (counts.sum(axis=2) == num_samples).all()
        total += counts.sum(axis=0)
    for row, expected in zip(total, cells, strict=True):
        possible = expected > 0
        assert row[~possible].sum() == 0
        assert stats.chisquare(row[possible], (expected * row.sum())[possible]).pvalue > 1e-4


@pytest.mark.parametrize("num_cells", [1, 4, 400])
def test_a_draw_falls_into_the_cell_of_its_uniform(num_cells):
    """numpy's search in the cumulative sums; shares that differ by many powers of ten, some 0, also at the ends."""
    rng = np.random.default_rng(13)
    cells = np.exp(rng.normal(size=(6, num_cells)) * [[0], [1], [5], [30], [100], [1]])
    cells[5, ::3] = 0
    cells[5, num_cells // 2] = 1
    uniforms = np.sort(rng.random((6, 500)), axis=1)
    uniforms[:, 0], uniforms[:, -1] = 0, 1 - 2**-53
    counts = np.empty(cells.shape, np.int64)
    kernel.look_up(cells, uniforms, counts)
    for row, shares, points in zip(counts, cells, uniforms, strict=True):
        cumulative = np.cumsum(shares)
        found = np.searchsorted(cumulative, points * cumulative[-1], side="right")
        np.testing.assert_array_equal(row, np.bincount(np.minimum(found, num_cells - 1), minlength=num_cells))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_run_that_has_diverged_draws_without_harm(value):
    cells, counts = np.full((2, 9), value), np.full((2, 9), -1)
    kernel.look_up(cells, np.random.default_rng(14).random((2, 50)), counts)
    assert (counts >= 0).all() and (counts.sum(axis=1) == 50).all()


@pytest.mark.parametrize("name", ["DPO-Unif", "mixp", "implicit-best-worst"])
def test_the_joint_increment_is_the_exact_one_on_average(name):
    rng = np.random.default_rng(6)
    bandit, u = make_bandit(rng.normal(size=(2, 4)), BETA), rng.normal(size=(2, 4))
    lr = np.array([[0.3], [1.1]])
    draw = sampled.one_stream(np.random.default_rng(7), 3)
    updates, drawn = sampled.Updates(bandit, SAMPLERS[name], lr, 3, draw), []
    for _ in range(2000):
        after = u.copy()
        updates.update(after)
        drawn.append(after - u)
    error = np.abs(np.mean(drawn, 0) - exact_step(bandit, SAMPLERS[name], lr, u))
    assert (error < 5 * np.std(drawn, 0) / np.sqrt(2000)).all()


@pytest.mark.parametrize("name", ["DPO-Unif", "DPO-Mix-R", "DPO-Opt-Unif"])
def test_the_stability_limit_at_a_state_is_two_over_the_measured_curvature(name):
    rng = np.random.default_rng(8)
    bandit, u, h = make_bandit(rng.normal(size=(1, 5)), BETA), rng.normal(size=(1, 5)), 1e-6
    columns = []
    for direction in np.eye(5):
        ahead, behind = (exact_step(bandit, SAMPLERS[name], 1.0, u + s * direction) for s in (h, -h))
        columns.append((behind - ahead)[0] / (2 * h))
    curvature = np.linalg.eigvals(np.array(columns)).real.max()
    assert largest_stable_lr(SAMPLERS[name], bandit, u)[0] == pytest.approx(2 / curvature, rel=1e-6)


def test_updates_needed_are_those_of_the_recorded_series():
    bandit = make_bandit(draw_rewards("normal", 3, 6, 9), BETA)
    series = simulate(bandit, "online", SAMPLERS["online"], "exact", 6.0, 250, 1, 0)
    found = tuned.updates_needed(bandit, SAMPLERS["online"], np.full((3, 1), 6.0), 100)
    for key, limit in (("param_diff", 1e-3), ("value_diff", 1e-3 * series["value_diff"][:, :1])):
        expected = [min(np.flatnonzero(row[:101]), default=np.inf) for row in series[key] <= limit]
        np.testing.assert_array_equal(found[f"updates_{key}"], expected)
    # Two environments arrive in time, the third one later.
    assert np.isfinite(found["updates_param_diff"]).sum() == 2 and series["param_diff"].min(axis=1).max() < 1e-3


def test_a_budget_is_spent_in_updates_of_so_many_pairs():
    bandit, lr = make_bandit(draw_rewards("normal", 2, 4, 10), BETA), np.full((2, 1), 0.05)
    spent = tuned.spend_budget(bandit, SAMPLERS["online"], lr, 90, 30, np.random.default_rng(11))
    draw = sampled.one_stream(np.random.default_rng(11), 30)
    updates, u = sampled.Updates(bandit, SAMPLERS["online"], lr, 30, draw), np.zeros((2, 4))
    for _ in range(3):
        updates.update(u)
    np.testing.assert_allclose(spent["param_diff"], np.abs(gaps(bandit.rewards - u)).mean((1, 2)), rtol=1e-12)


def test_steps_are_tuned_on_the_first_environments_and_used_on_the_others():
    bandit, sampler = make_bandit(draw_rewards("normal", 7, 4, 12), BETA), SAMPLERS["DPO-Mix-R"]

    def run(part, lr):
        """Best at half of the limit for the one outcome, at the limit for the other."""
        share = lr[:, 0] / tuned.stability_limit(sampler, part)
        return {"half": np.abs(share - 0.5) + part.rewards[:, 0], "whole": np.where(share == 1, 3.0, np.inf)}

    outcomes, chosen = tuned.at_tuned_steps(bandit, sampler, 3, (0.25, 0.5, 1.0), run)
    assert chosen == {"half": 0.5, "whole": 1.0}
    np.testing.assert_allclose(outcomes["half"], bandit.rewards[3:, 0], atol=1e-12)
    np.testing.assert_array_equal(outcomes["whole"], np.full(4, 3.0))


def test_settings_change_the_environments_as_their_names_say():
    base = ablation.environments(ablation.DEFAULTS, 4, 0)
    np.testing.assert_allclose(base.log_ref, -np.log(20))
    other = {**ablation.DEFAULTS, "reward_gap": 2.0, "reference": 0.5, "label_noise": 0.1, "beta": 3.0}
    bandit = ablation.environments(other, 4, 0)
    np.testing.assert_allclose(bandit.rewards, 2 * base.rewards)
    target = np.exp(0.5 * bandit.rewards)
    np.testing.assert_allclose(np.exp(bandit.log_ref), target / target.sum(1, keepdims=True))
    assert (bandit.label_noise, bandit.beta) == (0.1, 3.0)


def test_every_cell_of_every_sweep_has_a_known_sampler_and_known_settings():
    for sweep in ablation.SWEEPS.values():
        cells = list(sweep.cells())
        assert len(cells) == np.prod(sweep.shape)
        for _, setting in cells:
            assert set(setting) == set(ablation.DEFAULTS)
            get_sampler(ablation.sampler_name(setting))


def test_axes_reach_the_cell():
    cells = dict(ablation.SWEEPS["beta-budget"].cells())
    assert ablation.sampler_name(cells[0, 3, 4]) == "mix_1_1_1" and cells[0, 3, 4]["beta"] == 3
    cells = dict(ablation.SWEEPS["ab-exact"].cells())
    assert ablation.sampler_name(cells[1, 0, 2]) == "mix_-1_1_1" and cells[1, 0, 2]["beta"] == 3


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_the_theory_pair_is_the_member_beta_minus_1_beta_plus_1_where_the_reference_is_uniform(beta):
    bandit, u = make_bandit(np.zeros(5), beta), np.random.default_rng(13).normal(size=(1, 5))
    member, theory = (
        get_sampler(name).weights(u, bandit).matrix for name in (f"mix_{beta - 1}_{beta + 1}_1", "DPO-Mix-P-2")
    )
    np.testing.assert_allclose(member / member.sum(), theory / theory.sum(), rtol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_pilafs_pairs_weigh_the_loss_like_products_of_the_policys_probabilities(beta):
    """w sigma'(d) is proportional to pi(y) pi(y'): the curvature that the page on samplers speaks of."""
    rng = np.random.default_rng(14)
    bandit, u = make_bandit(np.zeros(5), beta, np.log(rng.dirichlet(np.ones(5)))), rng.normal(size=(1, 5))
    pi, d = np.exp(bandit.log_policy(u))[0], gaps(u)[0]
    weights = get_sampler(f"mix_{beta}_{beta}_1").weights(u, bandit).matrix[0] / pi[:, None] / pi[None, :]
    assert np.ptp(weights / (np.exp(d) + np.exp(-d))) < 1e-10 * weights.max()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    process = run_script(
        "ablation", "--sweeps", "beta-exact", "p", "samplers-budget", "num_actions", "--quick", "--num_envs", 3,
        "--num_tuning", 2, "--num_workers", 2, "--output_dir", folder,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return folder


def test_command_line_writes_results_and_figures(tiny):
    figures = ["heat_beta-exact", "dots_samplers-budget"]
    figures += [f"lines_{who}_{what}" for who in ("samplers", "family") for what in ("value_diff", "param_diff")]
    files = {f"{figure}.{kind}" for figure in figures for kind in ("pdf", "png")}
    assert {path.name for path in tiny.iterdir()} == files | {"results.csv", "results.npz", "config.json"}
    assert json.loads((tiny / "config.json").read_text())["settings"]["num_envs"] == 3
    data = np.load(tiny / "results.npz")
    assert data["beta-exact/updates_param_diff"].shape == (1, 4, 3, 3)
    rows = list(csv.DictReader((tiny / "results.csv").open()))
    assert {row["sweep"] for row in rows} == {"beta-exact", "p", "samplers-budget", "num_actions"}
    for row in rows:
        assert float(row["low"]) <= float(row["median"]) <= float(row["high"])
    row = next(r for r in rows if (r["sweep"], r["y_value"], r["outcome"]) == ("p", "0.5", "value_diff"))
    assert float(row["median"]) == pytest.approx(np.median(data["p/value_diff"][0, 0, 0]))


def test_the_number_of_processes_changes_no_result(tiny, tmp_path):
    process = run_script(
        "ablation", "--sweeps", "p", "--quick", "--num_envs", 3, "--num_tuning", 2, "--num_workers", 1,
        "--output_dir", tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    one, two = np.load(tmp_path / "results.npz"), np.load(tiny / "results.npz")
    for key in one.files:
        np.testing.assert_array_equal(one[key], two[key])


def test_results_of_other_settings_are_kept(tiny):
    before = (tiny / "results.csv").read_bytes()
    process = run_script("ablation", "--sweeps", "p", "--quick", "--output_dir", tiny)
    assert process.returncode == 2 and "holds results of other settings" in process.stderr
    assert len(process.stderr.splitlines()) == 1 and (tiny / "results.csv").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, culprit",
    [
        (["--sweeps", "gamma"], "'gamma'"),
        (["--num_envs", "0"], "--num_envs"),
        (["--num_tuning", "none"], "--num_tuning"),
        (["--seed", "-1"], "--seed"),
        (["--num_workers", "0.5"], "--num_workers"),
        (["--beta", "1"], "--beta"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(arguments, culprit, tmp_path):
    process = run_script("ablation", *arguments, "--output_dir", tmp_path / "out")
    assert process.returncode == 2 and culprit in process.stderr
    assert len(process.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_help_names_every_sweep():
    text = run_script("ablation", "--help").stdout
    assert all(f"  {name} " in text for name in ablation.SWEEPS)
