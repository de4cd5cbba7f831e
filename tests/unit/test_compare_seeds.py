"""Samplers over several seeds: differences, tables and figure of constructed run folders."""

import csv

import numpy as np
import pytest
from commands import alone
from run_folders import write_answers, write_kl

from common.cli import UserError
from evaluation.compare_seeds import band, check_same_settings, comparisons, curves, verdict
from evaluation.run_files import BASE, FIRST, KL, TEST, Model, all_models, read_run
from evaluation.stats import crossed_effect, holm
from evaluation.tables import value_of

SAMPLERS = ["online", "mixp"]
ONLINE, MIXP = Model("online", 2), Model("mixp", 2)
MODELS = all_models(SAMPLERS, 2)
PROMPTS = np.sin(np.arange(30.0))


def write_seed(folder, seed, gain, judge_gain=0.0):
    """A run in which `mixp` is better than `online` by `gain` on average, and by `judge_gain` for the judge."""
    rng = np.random.default_rng(seed)
    for model, level in {BASE: 0, FIRST: 1, ONLINE: 2, MIXP: 2 + gain}.items():
        write_answers(folder, model, PROMPTS + level + 0.1 * rng.standard_normal(30))
        write_answers(folder, model, PROMPTS + judge_gain * (model == MIXP), judge="judge")
    for model, kl in {FIRST: 1.0, ONLINE: 2.0, MIXP: 4.0 + seed}.items():
        write_kl(folder, model, [kl - 0.5, kl + 0.5])


@pytest.fixture
def run_dir(tmp_path):
    for seed, gain in ((1, 0.9), (2, 1.1), (3, 1.0)):
        write_seed(tmp_path / f"seed_{seed}", seed, gain, judge_gain=(seed - 2) * 0.5)
    return tmp_path


def read_runs(run_dir):
    return [read_run(run_dir / f"seed_{seed}", MODELS) for seed in (1, 2, 3)]


def test_a_difference_in_one_seed_only_is_not_clear(run_dir):
    runs = read_runs(run_dir)
    found = comparisons(runs, SAMPLERS, 2, 0.1)
    effect, p, paired = found["rewards"]["mixp"]
    assert effect == crossed_effect(paired) and effect.value == pytest.approx(1, abs=0.1)
    assert paired.shape == (3, 30) and p == effect.p_value < 0.05
    # The judge's differences are -0.5, 0 and 0.5.
    effect, p, _ = found["judge"]["mixp"]
    assert effect.value == pytest.approx(0) and p > 0.5
    words = verdict(runs, SAMPLERS, 2, found)[0]
    assert "mixp +1" in words and "second judge: none" in words


def test_one_seed_shows_nothing(run_dir):
    found = comparisons(read_runs(run_dir)[:1], SAMPLERS, 2, 0.1)
    effect, p, _ = found["rewards"]["mixp"]
    assert effect.value > 0.5 and effect.stderr is None and p is None
    assert "mixp" not in " ".join(verdict(read_runs(run_dir)[:1], SAMPLERS, 2, found))


def test_p_values_are_corrected_over_the_samplers(tmp_path):
    rng = np.random.default_rng(0)
    samplers = ["online", "a", "b", "c"]
    for seed in (1, 2, 3):
        for sampler in samplers:
            write_answers(tmp_path / f"seed_{seed}", Model(sampler, 2), rng.standard_normal(40))
    runs = [read_run(tmp_path / f"seed_{seed}", all_models(samplers, 2)) for seed in (1, 2, 3)]
    found = comparisons(runs, samplers, 2, 0.1)
    assert list(found) == ["rewards"]  # no judge, no KL
    p = [effect.p_value for effect, _, _ in found["rewards"].values()]
    assert [adjusted for _, adjusted, _ in found["rewards"].values()] == holm(p)


def test_value_over_seeds(run_dir):
    for seed in (1, 2, 3):
        folder = run_dir / f"seed_{seed}"
        for model, more in {ONLINE: 0.0, MIXP: 1.0}.items():
            write_answers(folder, model, [1.0 + more, 2.0 + more], KL, sha="x")
        write_kl(folder, ONLINE, [1.0, 2.0], sha="x")
        write_kl(folder, MIXP, [3.0, 4.0 + seed], sha="x")
    effect, _, paired = comparisons(read_runs(run_dir), SAMPLERS, 2, 0.1)["value"]["mixp"]
    assert paired.tolist() == pytest.approx(np.array([[0.8, 1 - 0.1 * (2 + seed)] for seed in (1, 2, 3)]))
    assert effect.value == pytest.approx(paired.mean())


def test_responses_to_test_prompts_serve_reward_and_kl(tmp_path):
    for model, more in {BASE: -1.0, ONLINE: 0.0, MIXP: 1.0}.items():
        write_answers(tmp_path, model, [1.0 + more, 2.0 + more], sha=model.label)
    write_kl(tmp_path, ONLINE, [1.0, 2.0], sha="online")
    write_kl(tmp_path, MIXP, [3.0, 4.0], sha="mixp")
    run = read_run(tmp_path, [BASE, ONLINE, MIXP])
    assert value_of(run, BASE, 0.1).tolist() == [0.0, 1.0]
    assert value_of(run, MIXP, 0.1).tolist() == pytest.approx([1.7, 2.6])
    write_kl(tmp_path, MIXP, [3.0, 4.0], sha="other responses")
    assert value_of(read_run(tmp_path, [BASE, ONLINE, MIXP]), MIXP, 0.1) is None


def test_equal_kl_takes_the_kl_out_of_a_difference(tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(1, 7):
        for model, shift in {ONLINE: 0.0, MIXP: 0.5}.items():
            kl = float(np.exp(shift + 0.5 * rng.standard_normal()))
            noise = 0.02 * rng.standard_normal(30)
            write_answers(tmp_path / f"seed_{seed}", model, PROMPTS + np.log(kl) + 0.2 * (model == MIXP) + noise)
            write_kl(tmp_path / f"seed_{seed}", model, [kl, kl])
    runs = [read_run(tmp_path / f"seed_{seed}", MODELS) for seed in range(1, 7)]
    found = comparisons(runs, SAMPLERS, 2, 0.1)
    assert found["rewards"]["mixp"][0].value > 0.4  # KL and sampler together
    effect, p, _ = found["equal KL"]["mixp"]
    assert effect.value == pytest.approx(0.2, abs=0.02) and p < 0.01


def test_band_follows_each_seeds_own_curve(run_dir):
    kl, rewards = curves(read_runs(run_dir), "rewards", "mixp", 2)
    assert kl.tolist() == [[0, 1, 5], [0, 1, 6], [0, 1, 7]]
    found = band(kl, rewards, points=8)
    assert found.kl.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    slopes = (rewards[:, 2] - rewards[:, 1]) / (kl[:, 2] - kl[:, 1])
    by_hand = rewards[:, 1] + 2 * slopes  # at KL 3
    assert (found.low[3], found.high[3]) == pytest.approx((by_hand.min(), by_hand.max()))
    assert found.mean[3] == pytest.approx(by_hand.mean())
    # Beyond KL 6 only the third seed's curve goes on.
    assert found.low[7] == found.high[7] == rewards[2, 2]
    assert np.isnan(found.mean).tolist() == [False] * 6 + [True] * 2


def test_seeds_with_other_prompts_are_not_compared(run_dir):
    for model in MODELS:
        for judge in ("rewards", "judge"):
            other = [f"other {i}" for i in range(30)]
            write_answers(run_dir / "seed_3", model, PROMPTS, TEST, judge, prompts=other)
    with pytest.raises(UserError, match="different prompts"):
        comparisons(read_runs(run_dir), SAMPLERS, 2, 0.1)


def test_seeds_that_were_evaluated_in_another_way_are_not_compared(run_dir):
    folders = [run_dir / f"seed_{seed}" for seed in (1, 2, 3)]
    check_same_settings(dict(zip(folders, read_runs(run_dir), strict=True)))
    for model in (FIRST, ONLINE, MIXP):
        write_kl(run_dir / "seed_2", model, [1.0, 2.0], temperature=1.0)
    with pytest.raises(UserError, match=r"seed_2.*temperature=1\.0.*seed_1.*temperature=0\.7"):
        check_same_settings(dict(zip(folders, read_runs(run_dir), strict=True)))


def test_a_seed_without_kl_or_judge_is_no_other_way_of_evaluating(run_dir):
    for file in [*(run_dir / "seed_2/results").glob("kl_*"), *(run_dir / "seed_2").rglob("*judge*.json")]:
        file.unlink()
    folders = [run_dir / f"seed_{seed}" for seed in (1, 2, 3)]
    check_same_settings(dict(zip(folders, read_runs(run_dir), strict=True)))


def test_the_script_writes_table_figure_and_page(run_dir):
    words = "--samplers", "online", "mixp", "--iterations", 2, "--run_dir", run_dir, "--seeds"
    result = alone("evaluation/compare_seeds.py", *words, 1, 2, 3)
    assert result.returncode == 0, result.stderr
    [heading, *rows] = csv.reader((run_dir / "results/seeds.csv").open())
    assert [row[0] for row in rows] == ["online", "mixp"] and "missing" not in sum(rows, [])
    assert float(rows[1][heading.index("KL from base")].split()[0]) == pytest.approx((5 * 6 * 7) ** (1 / 3), abs=0.01)
    for name in ("seeds.md", "report.html", "reward_vs_kl_over_seeds.png", "reward_vs_kl_over_seeds.pdf"):
        assert (run_dir / "results" / name).stat().st_size > 500
    one = alone("evaluation/compare_seeds.py", *words, 1)
    assert one.returncode == 0 and "missing" not in (run_dir / "results/seeds.md").read_text()
    refused = alone("evaluation/compare_seeds.py", *words, 9)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "seed_9" in refused.stderr
