"""The real drivers from end to end on tiny models: two samplers, two iterations, evaluation, KL, report."""

import json
import math

import pytest
import torch
from commands import bash
from safetensors.torch import load_file
from tiny import save_tiny_policy, save_tiny_reward_model

from common.records import read_records

SAMPLERS = ("online", "mixp")
MODELS = ("base_0", "iter1_1", "online_2", "mixp_2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    save_tiny_policy(folder / "policy", 0, hidden=64, layers=2, heads=2)
    save_tiny_reward_model(folder / "reward", 1)
    save_tiny_reward_model(folder / "judge", 2)
    words = ["cat", "dog", "sun", "tea", "sea", "ink", "owl", "map", "ice", "egg", "jam", "key"]
    (folder / "prompts.json").write_text(json.dumps([{"prompt": f"what is a {w}?"} for w in words]))
    return folder


@pytest.fixture(scope="module")
def environment(place):
    return {
        "RECIPE": "quickstart",
        "RUN_DIR": place / "run",
        "BASE_MODEL": place / "policy",
        "REWARD_MODEL": place / "reward",
        "JUDGE_MODEL": place / "judge",
        "PROMPTS": place / "prompts.json",
        "SAMPLERS": " ".join(SAMPLERS),
        "ITERS": "2",
        "TEMPLATE": "none",
        "REWARD_TEMPLATE": "none",
        "TRAIN_END": "8",
        "TEST_START": "8",
        "TEST_END": "12",
        "KL_PROMPTS": "4",
        "MAX_NEW_TOKENS": "8",
        "MAX_PROMPT_LENGTH": "24",
        "MAX_LENGTH": "40",
        "LEARNING_RATE": "1e-3",
        "BF16": "False",
        "GLOBAL_BATCH": "4",
        "PER_DEVICE_BATCH": "2",
    }


@pytest.fixture(scope="module")
def run(place, environment):
    for driver in ("train_safe_rlhf", "kl", "eval_safe_rlhf"):
        result = bash(f"alignment/sample_{driver}.sh", **environment)
        assert result.returncode == 0, f"{driver}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return place / "run"


def test_training_data(run):
    for name, rows in (("iter1_online", 1), ("iter2_online", 1), ("iter2_mixp", 1)):
        instances, settings = read_records(
            run / f"data/data_with_rewards_{name}.json", ("responses", "rewards", "pairs")
        )
        assert len(instances) == 8
        assert all(len(i["responses"]) == len(i["rewards"]) == 2 for i in instances)
        assert set(settings) == {"generate", "annotate"}
        assert len(settings["generate"]["sampler"]) == rows
    mixp = read_records(run / "data/gen_data_iter2_mixp.json")[1]["generate"]
    assert mixp["policy"].endswith("models/rlhflow_iter1") and mixp["reference"].endswith("policy")


def test_models_are_trained_one_from_the_other(run, place):
    def weights(folder):
        return torch.cat([t.float().flatten() for _, t in sorted(load_file(folder / "model.safetensors").items())])

    base, first = weights(place / "policy"), weights(run / "models/rlhflow_iter1")
    later = [weights(run / f"models/rlhflow_iter2_{s}") for s in SAMPLERS]
    for other in later:
        assert (other - first).norm() < (other - base).norm()  # they started from iteration 1
        assert not torch.equal(other, first)
    assert not torch.equal(*later)


def test_losses_are_logged(run):
    for name in ("iter1", "iter2_online", "iter2_mixp"):
        history = json.loads((run / f"models/rlhflow_{name}/trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert losses and all(map(math.isfinite, losses))
        if name == "iter1":  # the policy is the reference still: h = 0, so the loss is log 2 whatever the margin
            assert losses[0] == pytest.approx(math.log(2), abs=1e-4)


def test_evaluation_files(run):
    for model in MODELS:
        label, iteration = model.rsplit("_", 1)
        for part, count in ((0, 4), (1, 8)):
            for judged in ("rewards", "judge"):
                file = run / f"data/test_data_with_{judged}_iter{part}_{label}_{iteration}.json"
                assert len(read_records(file, ("responses", "rewards"))[0]) == count
        if model != "base_0":
            result = json.loads((run / f"results/kl_{model}.json").read_text())
            assert result["kl"] > 0 and result["num_prompts"] == 4


def test_report(run):
    results = run / "results"
    table = (results / "summary.md").read_text()
    for sampler in SAMPLERS:
        assert sampler in table
    assert (results / "report.html").stat().st_size > 50_000
    assert len(list(results.glob("*.png"))) >= 3 and len(list(results.glob("*.pdf"))) >= 3
    mean = sum(r["rewards"][0] for r in read_records(run / "data/test_data_with_rewards_iter0_base_0.json")[0]) / 4
    assert f"{mean:.2f}" in table


def test_nothing_unfinished_is_left(run):
    left = [p.name for p in run.rglob("*") if p.name.endswith((".journal", ".tmp", ".partial"))]
    assert left == []


def test_a_second_run_does_no_work(run, environment):
    files = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.suffix in (".json", ".safetensors")}
    result = bash("alignment/sample_train_safe_rlhf.sh", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("already") == 9
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_other_settings_are_refused(run, environment):
    result = bash("alignment/sample_train_safe_rlhf.sh", **{**environment, "MAX_NEW_TOKENS": "6"})
    assert result.returncode == 2
    assert "max_new_tokens=8, now max_new_tokens=6" in result.stderr
