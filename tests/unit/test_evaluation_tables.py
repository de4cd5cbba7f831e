"""Tables, verdict and what may not be compared, on run folders made of numbers."""

import csv
import io
import json

import numpy as np
import pytest
from run_folders import write_answers, write_kl
from scipy import stats

from common.cli import UserError
from evaluation.run_files import (
    BASE,
    FIRST,
    KL,
    TEST,
    TRAIN,
    Model,
    all_models,
    kl_file,
    question,
    read_run,
    scored_file,
    trajectory,
)
from evaluation.stats import Estimate
from evaluation.tables import (
    LOST_DIVERSITY,
    MISSING,
    RUNAWAY_KL,
    cell,
    curve,
    last_models,
    lost_diversity,
    markdown,
    pair_table,
    summary_csv,
    summary_row,
    summary_table,
    verdict,
    warnings,
    win_rate,
    win_rows,
)

ONLINE, MIXP, GIVEN = Model("online", 2), Model("mixp", 2), Model("their-7b", None)
SAMPLERS = ["online", "mixp"]
MODELS = all_models(SAMPLERS, 2)


@pytest.fixture
def run_dir(tmp_path):
    """Two samplers, two iterations; `mixp` is evaluated but has no KL and no judge's scores."""
    for model, gain in {BASE: 0.0, FIRST: 0.5, ONLINE: 1.0, MIXP: 2.0}.items():
        for part in (TEST, TRAIN):
            write_answers(tmp_path, model, np.sin(np.arange(20)) + gain, part, cut=model == MIXP)
        if model != MIXP:
            write_answers(tmp_path, model, np.zeros(20), judge="judge")
    write_kl(tmp_path, FIRST, [1.0, 2.0, 3.0])
    write_kl(tmp_path, ONLINE, [4.0, 5.0, 6.0])
    return tmp_path


def pairs_of(run_dir, seed=0):
    run = read_run(run_dir, MODELS)
    return pair_table(run, last_models(run, SAMPLERS, 2)[2:], 2, seed)


def test_models_of_a_run():
    assert MODELS == [BASE, FIRST, ONLINE, MIXP]
    assert all_models([], 1, ["their-7b"]) == [BASE, GIVEN]
    assert trajectory("mixp", 3) == [BASE, FIRST, MIXP, Model("mixp", 3)]


def test_summary_of_a_constructed_run(run_dir):
    run = read_run(run_dir, MODELS)
    rows = {model: summary_row(run, model, 0.1) for model in MODELS}
    mean = np.sin(np.arange(20)).mean()
    assert rows[MIXP]["test_reward"].value == pytest.approx(mean + 2)
    assert rows[MIXP]["test_gain"] == pytest.approx((2, 2, 2))  # paired: the prompts' own scatter cancels
    assert rows[FIRST]["win_rate"].value == 1 and rows[ONLINE]["judge_win_rate"].value == 0.5
    assert rows[MIXP]["cut"].value == 1 and rows[BASE]["cut"].value == 0 and rows[BASE]["different"].value == 1
    assert rows[BASE]["length"].value == pytest.approx(19.5)
    assert rows[BASE]["kl"].value == 0 and rows[ONLINE]["kl"].value == pytest.approx(5)
    assert rows[BASE]["win_rate"] == Estimate(0.5) and rows[BASE]["test_gain"] == Estimate(0.0)
    assert rows[MIXP]["kl"] is None and rows[MIXP]["judge_win_rate"] is None and rows[MIXP]["value"] is None
    assert win_rate(run, "rewards", MIXP, ONLINE).value == 1 and win_rate(run, "judge", MIXP, ONLINE) is None

    table = summary_table(rows)
    assert table[4][0] == "mixp, iteration 2" and table[4].count(MISSING) == 3
    text = markdown(table)
    assert text.count("\n") == 6 and "\n| mixp, iteration 2 " in text
    lines = list(csv.DictReader(io.StringIO(summary_csv(rows))))
    written = [(line["sampler"], line["iteration"]) for line in lines]
    assert written == [("base", "0"), ("shared", "1"), ("online", "2"), ("mixp", "2")]
    assert float(lines[2]["test_reward"]) == pytest.approx(mean + 1) and lines[3]["kl"] == ""
    every = win_rows(run, MODELS)
    assert len(every) == 4 * 3 + 3 * 2
    assert all(every[j, a, b].value + every[j, b, a].value == pytest.approx(1) for j, a, b in every)


def test_cells():
    assert cell(Estimate(2.5)) == "2.50" and cell(Estimate(-0.001)) == "0.00" and cell(None) == MISSING
    assert cell(Estimate(0.5, 0.25, 0.755), 1, percent=True) == "50.0% [25.0, 75.5]"


def test_reward_kl_and_value_are_of_the_same_responses(run_dir):
    rewards, kl = np.array([3.0, 1.0, 2.5]), np.array([4.0, 5.0, 6.5])
    write_answers(run_dir, BASE, rewards - 2, KL, temperature=0.7)
    write_answers(run_dir, ONLINE, rewards, KL, sha="abc", temperature=0.7)
    write_kl(run_dir, ONLINE, kl, sha="abc")
    run = read_run(run_dir, MODELS)
    row = summary_row(run, ONLINE, 0.2)
    truth = stats.ttest_1samp(rewards - 0.2 * kl, 0)
    assert row["value"] == pytest.approx(((rewards - 0.2 * kl).mean(), *truth.confidence_interval(0.95)))
    assert row["kl_reward"].value == pytest.approx(rewards.mean())
    assert summary_row(run, BASE, 0.2)["value"].value == pytest.approx(rewards.mean() - 2)
    assert "value there: reward − (β / margin scale)·KL" in summary_table({ONLINE: row})[0]
    write_kl(run_dir, ONLINE, kl, sha="other")
    with pytest.raises(UserError, match="kl_online_iter2.*online_iter2_rewards"):
        read_run(run_dir, MODELS)


def test_the_published_estimate_of_the_kl_stands_beside_ours_where_it_is(run_dir):
    path = kl_file(run_dir, ONLINE)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"published_kl": 7.0, "published_stderr": 0.5}))
    run = read_run(run_dir, MODELS)
    half = stats.t.ppf(0.975, 2) * 0.5
    assert summary_row(run, ONLINE, 0.1)["published_kl"] == pytest.approx((7, 7 - half, 7 + half))
    table = summary_table({m: summary_row(run, m, 0.1) for m in MODELS})
    assert "KL as published" in table[0] and table[1][table[0].index("KL as published")] == MISSING


def test_sampler_against_sampler_starts_at_its_own_models(run_dir):
    [_, row] = pairs_of(run_dir)
    assert row[0] == "online against mixp" and row[1].startswith("-1.00 [-1.00")
    assert row[3] == MISSING and row[4] == MISSING
    write_kl(run_dir, MIXP, [2.0, 3.0, 4.0])
    run = read_run(run_dir, MODELS)
    # One model of its own each: the line from the shared iteration 1 would be half of a difference.
    assert curve(run, "mixp", 2).kl.mean(axis=1).tolist() == [3] and pairs_of(run_dir)[1][4:] == [
        "no common range",
        "",
        "",
    ]


def test_a_difference_at_equal_kl_is_not_pulled_to_zero(tmp_path):
    """Reward √KL for one sampler, 0.3 more for the other from iteration 2 on; the KL of their models differs."""
    for n, kls in {2: (2.0, 2.4), 3: (5.0, 4.6)}.items():
        for sampler, kl, more in zip(SAMPLERS, kls, (0.0, 0.3), strict=True):
            write_answers(tmp_path, Model(sampler, n), np.full(20, kl / 4 + more))
            write_kl(tmp_path, Model(sampler, n), [kl - 0.1, kl, kl + 0.1])
    write_answers(tmp_path, FIRST, np.full(20, 0.25))
    write_kl(tmp_path, FIRST, [0.9, 1.0, 1.1])
    run = read_run(tmp_path, all_models(SAMPLERS, 3))
    [_, row] = pair_table(run, last_models(run, SAMPLERS, 3)[2:], 3, 0)
    assert row[4] == "2.40 to 4.60" and row[5].startswith("-0.30") and row[6].startswith("-0.30")


def test_a_single_run_names_no_winner(run_dir):
    run = read_run(run_dir, MODELS)
    gains, caution = verdict(run, last_models(run, SAMPLERS, 2))
    assert gains.startswith("3 of 3") and "mixp 2 +2.00" in gains and "seeds" in caution
    assert not any(word in gains + caution for word in ("best", "Highest", "above"))


def test_the_verdict_corrects_for_the_number_of_models(tmp_path):
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(30)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    write_answers(tmp_path, BASE, np.zeros(30))
    p = [0.001, 0.03, 0.04, 0.9]
    names = [f"m{i}" for i in range(4)]
    for name, value in zip(names, p, strict=True):
        t = stats.t.isf(value / 2, 29)
        write_answers(tmp_path, Model(name, None), noise + t / np.sqrt(30))
    run = read_run(tmp_path, all_models([], 1, names))
    text = verdict(run, last_models(run, [], 1, names))[0]
    assert text.startswith("1 of 4")  # 0.03 · 3 and 0.04 · 2 are above 0.05


def test_collapse_is_flagged(run_dir):
    run = read_run(run_dir, MODELS)
    assert warnings(run, MODELS) == []
    write_answers(run_dir, MIXP, np.ones(20), responses=["I cannot help with that.", "I am sorry."] * 10)
    write_kl(run_dir, MIXP, [6.0, 7.0, 8.0], per_token=RUNAWAY_KL + 0.01)
    found = warnings(read_run(run_dir, MODELS), MODELS)
    assert len(found) == 2 and all(text.startswith("mixp, iteration 2") for text in found)
    assert "0.10 against 1.00" in found[0] and "KL 0.16" in found[1]
    base = [f"a{i} b{i}" for i in range(10)]
    assert lost_diversity([f"c{i} x y" for i in range(10)], base) is None
    assert "distinct-2" in lost_diversity([f"x y x y x y x y c{i}" for i in range(10)], base)
    assert 0 < LOST_DIVERSITY < 1


def test_given_checkpoints_stand_beside_the_base_model(tmp_path):
    write_answers(tmp_path, BASE, np.zeros(8))
    write_answers(tmp_path, GIVEN, np.arange(8.0))
    write_kl(tmp_path, GIVEN, [1.0, 2.0])
    assert (tmp_path / "eval/test_prompts/their-7b_rewards.json").exists()
    assert (tmp_path / "results/kl_their-7b.json").exists()
    models = all_models([], 1, ["their-7b"])
    run = read_run(tmp_path, models)
    assert last_models(run, [], 1, ["their-7b"]) == models
    assert summary_table({GIVEN: summary_row(run, GIVEN, 0)})[1][0] == "their-7b"


def test_missing_pieces_are_missing_and_not_errors(tmp_path):
    write_answers(tmp_path, BASE, [1.0, 2.0, 3.0])
    run = read_run(tmp_path, MODELS)
    rows = {model: summary_row(run, model, 0.1) for model in MODELS}
    assert rows[BASE]["test_reward"].value == 2 and rows[BASE]["train_reward"] is None
    assert all(value is None for value in rows[MIXP].values())
    last = last_models(run, SAMPLERS, 2)
    assert len(verdict(run, last)) == 1
    assert all(text == MISSING for text in pair_table(run, last[2:], 2, 0)[1][1:5])


def test_the_question_is_shown_without_its_template():
    assert question({"prompt": "<s>why?", "raw_prompt": "why?"}) == "why?"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "why?"}]
    assert question({"prompt": "<s>why?", "messages": messages}) == "why?"
    assert question({"prompt": "why?"}) == "why?"


def test_what_cannot_be_compared_is_refused(run_dir, tmp_path_factory):
    path = scored_file(run_dir, "rewards", TEST, MIXP)
    kept = path.read_text()
    other = [f"other {i}" for i in range(20)]
    changes = {"reward_template": {"template": "chat"}, "prompts": {"prompts": other}, "0.7": {"temperature": 0.7}}
    for words, change in changes.items():
        write_answers(run_dir, MIXP, np.zeros(20), **change)
        with pytest.raises(UserError, match=words) as refused:
            read_run(run_dir, MODELS)
        assert path.name in str(refused.value)
    path.write_text(kept)
    write_kl(run_dir, MIXP, [1.0, 2.0, 3.0], temperature=1.0)
    with pytest.raises(UserError, match="temperature=1.0"):
        read_run(run_dir, MODELS)
    for model, digests in {ONLINE: ["a", "b", "c"], MIXP: ["a", "b", "d"]}.items():
        write_kl(run_dir, model, [1.0, 2.0, 3.0], prompts=digests)
    with pytest.raises(UserError, match="prompts"):
        read_run(run_dir, MODELS)
    kl_file(run_dir, MIXP).write_text("{}")
    with pytest.raises(UserError, match="kl_of_prompts"):
        read_run(run_dir, MODELS)
    kl_file(run_dir, MIXP).unlink()
    judged = scored_file(run_dir, "judge", TEST, ONLINE)
    judged.write_text(judged.read_text().replace("says 3", "said 3"))
    with pytest.raises(UserError, match=judged.name):
        read_run(run_dir, MODELS)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match=empty.name):
        read_run(empty, MODELS)


def test_models_may_sample_in_types_of_their_own(tmp_path):
    """On a GPU each samples in that of its weights; other settings of sampling must agree."""
    write_answers(tmp_path, BASE, np.zeros(3), dtype="float32")
    write_answers(tmp_path, ONLINE, np.ones(3), dtype="bfloat16")
    assert len(read_run(tmp_path, MODELS).answers) == 2
    write_answers(tmp_path, ONLINE, np.ones(3), temperature=0.7)
    with pytest.raises(UserError, match="temperature"):
        read_run(tmp_path, MODELS)
