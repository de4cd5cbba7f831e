"""Samplers over several seeds: intervals against scipy, tables and figure of constructed run folders."""

import csv
import re

import numpy as np
import pytest
from commands import bash, python, settings
from run_folders import write_answers, write_kl
from scipy import stats

from common.cli import UserError
from evaluation.run_files import BASE, FIRST, Model, all_models, read_run
from evaluation.seeds import band, check_same_settings, curves, difference, differences, over_seeds, verdict

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


@pytest.fixture
def runs(run_dir):
    return [read_run(run_dir / f"seed_{seed}", MODELS) for seed in (1, 2, 3)]


def test_interval_over_seeds_is_students():
    values = np.array([0.3, 1.4, 0.2, -0.5])
    found = over_seeds(values)
    assert found == pytest.approx((values.mean(), *stats.ttest_1samp(values, 0).confidence_interval(0.95)))
    assert over_seeds(np.array([2.0])) == (2.0, None, None)


def test_difference_is_paired_over_seeds_and_prompts():
    rng = np.random.default_rng(0)
    theirs = rng.normal(0, 10, (4, 200))  # far wider than the difference, which is what pairing takes away
    found = difference(theirs + 1 + 0.1 * rng.standard_normal((4, 200)), theirs, seed=0)
    assert found.is_clear and found.seeds.value == pytest.approx(found.prompts.value)
    assert 0.9 < found.prompts.low < found.prompts.high < 1.1
    assert not difference(theirs[:, :1] + 1, theirs[:, :1], seed=0).is_clear  # one prompt shows nothing


def test_a_difference_in_one_seed_only_is_not_clear(runs):
    found = differences(runs, SAMPLERS, 2, seed=0)
    assert found["reward", "mixp"].is_clear and found["reward", "mixp"].seeds.value == pytest.approx(1, abs=0.1)
    # The judge's differences are -0.5, 0 and 0.5.
    assert found["judge", "mixp"].seeds.value == pytest.approx(0) and not found["judge", "mixp"].is_clear
    words = verdict(runs, SAMPLERS, 2, seed=0)
    assert "training reward model mixp (+1" in words and "second judge none of 1" in words


def test_band_follows_each_seeds_own_curve(runs):
    kl, rewards = curves(runs, "reward", "mixp", 2)
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
        write_answers(run_dir / "seed_3", model, PROMPTS, prompts=[f"other {i}" for i in range(30)])
        write_answers(run_dir / "seed_3", model, PROMPTS, judge="judge", prompts=[f"other {i}" for i in range(30)])
    runs = [read_run(run_dir / f"seed_{seed}", MODELS) for seed in (1, 3)]
    with pytest.raises(UserError, match="different prompts"):
        differences(runs, SAMPLERS, 2, seed=0)


def test_seeds_that_were_evaluated_in_another_way_are_not_compared(run_dir, runs):
    folders = [run_dir / f"seed_{seed}" for seed in (1, 2, 3)]
    check_same_settings(dict(zip(folders, runs, strict=True)))
    for model in (FIRST, ONLINE, MIXP):
        write_kl(run_dir / "seed_2", model, [1.0, 2.0], temperature=1.0)
    changed = {folder: read_run(folder, MODELS) for folder in folders}
    with pytest.raises(UserError, match="seed_2: made with temperature=1.0, but .*seed_1 with temperature=0.7"):
        check_same_settings(changed)


def test_the_script_writes_table_figure_and_page(run_dir):
    words = "--seeds", 1, 2, 3, "--samplers", "online", "mixp", "--iterations", 2
    result = python("evaluation/compare_seeds.py", "--run_dir", run_dir, *words)
    assert result.returncode == 0, result.stderr
    rows = list(csv.reader((run_dir / "results/seeds.csv").open()))
    assert [row[0] for row in rows] == ["sampler", "online", "mixp"] and "missing" not in sum(rows, [])
    assert rows[2][8].startswith("6.00 [")
    for name in ("seeds.md", "report.html", "reward_vs_kl_over_seeds.png", "reward_vs_kl_over_seeds.pdf"):
        assert (run_dir / "results" / name).stat().st_size > 500
    refused = python(
        "evaluation/compare_seeds.py",
        "--run_dir",
        run_dir,
        "--seeds",
        9,
        "--samplers",
        "online",
        "--iterations",
        2,
    )
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "seed_9" in refused.stderr


def test_driver_gives_every_seed_the_same_first_iteration():
    words = settings(DRY_RUN=1, RUN_DIR="/study", SEEDS="4 5", SAMPLERS="online pilaf")
    result = bash("alignment/sample_ablation.sh", *words)
    assert result.returncode == 0, result.stderr
    lines = re.findall(r"^\[(.+?)\] (.+)$", result.stdout, re.MULTILINE)
    data = ["generate 2 online pilaf", "annotate 2 online pilaf", "train 2 online", "train 2 pilaf"]
    drivers = [("train_safe_rlhf", data), ("kl", ["kl", "summarize"])]
    drivers += [("eval_safe_rlhf", ["evaluate", "annotate_evaluation", "judge", "summarize"])]
    expected = ["generate 1 online", "annotate 1 online", "train 1 online"]
    for seed in (4, 5):
        for _, stages in drivers:
            expected += [f"seed {seed}", *stages]
    assert [stage for stage, _ in lines] == [*expected, "compare_seeds"]
    trainings = [command for stage, command in lines if stage.startswith("train 2")]
    assert all("--model_name_or_path /study/shared/models/rlhflow_iter1 " in command for command in trainings)
    assert ["--seed 4" in command for command in trainings] == [True, True, False, False]
    assert "/study/seed_5/models/rlhflow_iter2_pilaf" in trainings[-1]
    refused = bash("alignment/sample_ablation.sh", "SEEDS=1;2")
    assert refused.returncode == 2 and "SEEDS" in refused.stderr
