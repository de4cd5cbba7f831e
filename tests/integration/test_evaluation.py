"""Win rates, bootstrap intervals, diversity and matched KL against closed forms; tables of constructed runs."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from run_folders import write_answers, write_kl
from scipy.stats import binom

from common.cli import UserError
from evaluation.run_files import BASE, FIRST, Model, all_models, answers_file, kl_file, read_run, trajectory
from evaluation.stats import Curve, Estimate, distinct, matched_kl, mean_interval, normal_interval, wins
from evaluation.tables import (
    MISSING,
    cell,
    markdown,
    pair_table,
    summary_csv,
    summary_rows,
    summary_table,
    verdict,
    win_rate,
    win_rows,
)

ONLINE, MIXP = Model("online", 2), Model("mixp", 2)


def test_wins_count_ties_half():
    assert wins(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, -1.0])).tolist() == [1, 0.5, 0, 1]


@pytest.mark.parametrize(("won", "count"), [(240, 400), (30, 50), (390, 400)])
def test_bootstrap_of_a_win_rate_is_binomial(won, count):
    values = np.array([1.0] * won + [0.0] * (count - won))
    found = mean_interval(values, seed=0)
    assert found.value == pytest.approx(won / count)
    for bound, level in ((found.low, 0.025), (found.high, 0.975)):
        # 2000 resamples: the quantile's own noise is about one step of 1/count for these sizes.
        assert bound == pytest.approx(binom.ppf(level, count, won / count) / count, abs=2.1 / count)


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(5).normal(3.0, 2.0, 900)
    found = mean_interval(values, seed=1)
    normal = normal_interval(values.mean(), values.std(ddof=1) / 30)
    assert found.low == pytest.approx(normal.low, abs=0.02)
    assert found.high == pytest.approx(normal.high, abs=0.02)
    assert mean_interval(values, seed=1) == found != mean_interval(values, seed=2)


def test_one_prompt_has_no_interval():
    assert mean_interval(np.array([2.5]), seed=0) == Estimate(2.5)
    assert cell(Estimate(2.5)) == "2.50" and cell(Estimate(-0.001)) == "0.00" and cell(None) == MISSING
    assert cell(Estimate(0.5, 0.25, 0.755), 1, percent=True) == "50.0% [25.0, 75.5]"


def test_distinct_n_by_hand():
    assert distinct(["a b a b", "A b"], 1) == 2 / 6
    assert distinct(["a b a b", "A b"], 2) == 2 / 4  # a-b, b-a, a-b, a-b
    assert distinct(["a", ""], 2) is None


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
    per_prompt = (ours.rewards[1] + ours.rewards[2]) / 2 - theirs.rewards[0]
    normal = normal_interval(per_prompt.mean(), per_prompt.std() / 20)
    assert found.at.low == pytest.approx(normal.low, abs=0.1 * (normal.high - normal.low))
    assert found.at.high == pytest.approx(normal.high, abs=0.1 * (normal.high - normal.low))


def test_uncertain_kl_widens_the_interval():
    sharp = constant_curve([1.0, 3.0], [0.0, 4.0], noise=0.0)
    blurred = sharp._replace(kl=sharp.kl + np.random.default_rng(0).normal(0, 0.5, sharp.kl.shape))
    flat = constant_curve([0.5, 2.0], [0.0, 0.0], noise=0.0)
    assert matched_kl(sharp, flat, 0).at == pytest.approx((2.0, 2.0, 2.0))
    spread = matched_kl(blurred, flat, 0).at
    assert spread.high - spread.low > 0.2


def test_curves_that_do_not_overlap():
    assert matched_kl(constant_curve([1, 2], [0, 1], 0.1), constant_curve([3, 4], [0, 1], 0.1), 0) is None


@pytest.fixture
def run_dir(tmp_path):
    """Two samplers, two iterations; `mixp` is evaluated but has no KL and no judge's scores."""
    shift = {BASE: 0.0, FIRST: 0.5, ONLINE: 1.0, MIXP: 2.0}
    for model, gain in shift.items():
        for part in ("test", "train"):
            write_answers(tmp_path, model, np.sin(np.arange(20)) + gain, part, cut=model == MIXP)
        if model != MIXP:
            write_answers(tmp_path, model, np.zeros(20), judge="judge")
    write_kl(tmp_path, FIRST, [1.0, 2.0, 3.0])
    write_kl(tmp_path, ONLINE, [4.0, 5.0, 6.0])
    return tmp_path


MODELS = all_models(["online", "mixp"], 2)


def test_models_of_a_run():
    assert MODELS == [BASE, FIRST, ONLINE, MIXP]
    assert trajectory("mixp", 3) == [BASE, FIRST, MIXP, Model("mixp", 3)]
    assert answers_file(Path("r"), "judge", "train", MIXP).as_posix() == (
        "r/data/test_data_with_judge_iter1_mixp_2.json"
    )


def test_summary_of_a_constructed_run(run_dir):
    run = read_run(run_dir, MODELS)
    rows = summary_rows(run, MODELS, seed=0)
    mean = np.sin(np.arange(20)).mean()
    assert rows[MIXP]["test_reward"].value == pytest.approx(mean + 2)
    assert rows[MIXP]["test_gain"] == pytest.approx((2, 2, 2))  # paired: the prompts' own scatter cancels
    assert rows[FIRST]["win_rate"].value == 1 and rows[ONLINE]["judge_win_rate"].value == 0.5
    assert rows[MIXP]["cut"].value == 1 and rows[BASE]["cut"].value == 0
    assert rows[BASE]["length"].value == pytest.approx(19.5)
    assert rows[BASE]["kl"].value == 0 and rows[ONLINE]["kl"].value == 5
    assert rows[BASE]["win_rate"] == Estimate(0.5) and rows[BASE]["test_gain"] == Estimate(0.0)
    half = 1.96 * 1 / math.sqrt(3)
    assert rows[ONLINE]["kl"][1:] == pytest.approx((5 - half, 5 + half))
    assert rows[MIXP]["kl"] is None and rows[MIXP]["judge_win_rate"] is None
    assert win_rate(run, "reward", MIXP, ONLINE, 0).value == 1
    assert win_rate(run, "judge", MIXP, ONLINE, 0) is None

    table = summary_table(rows)
    assert table[4][0] == "mixp, iteration 2" and table[4].count(MISSING) == 3
    text = markdown(table)
    assert text.count("\n") == 6 and "\n| mixp, iteration 2 " in text
    lines = list(csv.DictReader(io.StringIO(summary_csv(rows))))
    assert [(line["sampler"], line["iteration"]) for line in lines] == [
        ("base", "0"),
        ("iter1", "1"),
        ("online", "2"),
        ("mixp", "2"),
    ]
    assert float(lines[2]["test_reward"]) == pytest.approx(mean + 1) and lines[3]["kl"] == ""
    every = win_rows(run, MODELS, 0)
    assert len(every) == 4 * 3 + 3 * 2
    assert all(every[j, a, b].value + every[j, b, a].value == pytest.approx(1) for j, a, b in every)


def test_sampler_against_sampler(run_dir):
    [_, row] = pair_table(read_run(run_dir, MODELS), ["online", "mixp"], 2, seed=0)
    assert row[0] == "online against mixp" and row[1].startswith("-1.00 [-1.00")
    assert row[3] == MISSING and row[4] == MISSING
    write_kl(run_dir, MIXP, [2.0, 3.0, 4.0])
    [_, row] = pair_table(read_run(run_dir, MODELS), ["online", "mixp"], 2, seed=0)
    # online: 0.5 at KL 2 and 1.0 at KL 5; mixp: 0.5 at KL 2 and 2.0 at KL 3. Common: 2 to 3.
    assert row[4] == "2.00 to 3.00" and row[5].startswith(f"{0.5 + 0.5 / 3 - 2:.2f}")
    text = verdict(read_run(run_dir, MODELS), ["online", "mixp"], 2, seed=0)
    assert "mixp, iteration 2, +2.00" in text and "mixp above online" in text


def test_missing_pieces_are_missing_and_not_errors(tmp_path):
    write_answers(tmp_path, BASE, [1.0, 2.0, 3.0])
    run = read_run(tmp_path, MODELS)
    rows = summary_rows(run, MODELS, 0)
    assert rows[BASE]["test_reward"].value == 2 and rows[BASE]["train_reward"] is None
    assert all(value is None for value in rows[MIXP].values())
    assert "No trained model" in verdict(run, ["online", "mixp"], 2, 0)
    assert all(text == MISSING for text in pair_table(run, ["online", "mixp"], 2, 0)[1][1:5])


def test_what_cannot_be_compared_is_refused(run_dir, tmp_path_factory):
    path = answers_file(run_dir, "reward", "test", MIXP)
    kept = path.read_text()
    for change, words in [
        ({"template": "chat"}, "reward_template"),
        ({"prompts": [f"other {i}" for i in range(20)]}, "prompts"),
    ]:
        write_answers(run_dir, MIXP, np.zeros(20), **change)
        with pytest.raises(UserError, match=words) as refused:
            read_run(run_dir, MODELS)
        assert path.name in str(refused.value)
    path.write_text(kept.replace('"temperature": 0.1', '"temperature": 0.7'))
    with pytest.raises(UserError, match="temperature=0.7"):
        read_run(run_dir, MODELS)
    path.write_text(kept)
    write_kl(run_dir, MIXP, [1.0, 2.0, 3.0], temperature=1.0)
    with pytest.raises(UserError, match="temperature=1.0"):
        read_run(run_dir, MODELS)
    kl_file(run_dir, MIXP).write_text("{}")
    with pytest.raises(UserError, match="not a result of get_kl"):
        read_run(run_dir, MODELS)
    kl_file(run_dir, MIXP).unlink()
    judged = answers_file(run_dir, "judge", "test", ONLINE)
    judged.write_text(judged.read_text().replace("says 3", "said 3"))
    with pytest.raises(UserError, match="other responses"):
        read_run(run_dir, MODELS)
    with pytest.raises(UserError, match="nothing to summarize"):
        read_run(tmp_path_factory.mktemp("empty"), MODELS)
