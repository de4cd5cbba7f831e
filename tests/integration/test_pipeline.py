"""The real drivers from end to end on tiny models: two samplers, two iterations, evaluation, KL, report."""

import datetime
import json
import math

import pytest
import torch
import yaml
from commands import FORKS, bash, settings
from datasets import Dataset
from driver_runs import EVALUATE, KL, TRAIN, inputs, save_inputs
from safetensors.torch import load_file

from common.record_stream import read_records
from scripts.settings import KNOWN

SAMPLERS = ("online", "mixp")
MODELS = ("base_iter0", "shared_iter1", "online_iter2", "mixp_iter2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    save_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def given(place):
    return inputs(place) | {"RUN_DIR": place / "run"}


@pytest.fixture(scope="module")
def run(place, given):
    for driver in (TRAIN, KL, EVALUATE):
        result = bash(f"alignment/{driver}", *settings(**given), LOADED_PYTHON=FORKS.started())
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
        for part, count in (("test_prompts", 4), ("train_prompts", 8)):
            for scored in ("rewards", "judge"):
                file = run / f"eval/{part}/{model}_{scored}.json"
                assert len(read_records(file, ("responses", "rewards"))[0]) == count
        if model != "base_iter0":
            result = json.loads((run / f"results/kl_{model}.json").read_text())
            assert result["kl"] > 0 and result["num_prompts"] == 4


def test_settings_are_kept(run, place):
    kept = yaml.safe_load((run / "settings.yaml").read_text())
    assert kept["BASE_MODEL"] == str(place / "policy") and kept["LEARNING_RATE"] == 1e-3
    assert set(kept) == set(KNOWN)


def test_report(run):
    results = run / "results"
    table = (results / "summary.md").read_text()
    for sampler in SAMPLERS:
        assert sampler in table
    assert (results / "report.html").stat().st_size > 50_000
    assert len(list(results.glob("*.png"))) >= 3 and len(list(results.glob("*.pdf"))) >= 3
    mean = sum(r["rewards"][0] for r in read_records(run / "eval/test_prompts/base_iter0_rewards.json")[0]) / 4
    assert f"{mean:.2f}" in table


def test_nothing_unfinished_is_left(run):
    left = [p.name for p in run.rglob("*") if p.name.endswith((".journal", ".tmp", ".partial"))]
    assert left == []


def test_a_second_run_does_no_work(run, given):
    files = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.suffix in (".json", ".safetensors")}
    result = bash(f"alignment/{TRAIN}", *settings(**given), LOADED_PYTHON=FORKS.started())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("already") == 9
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_a_reward_function_sees_the_data_sets_own_fields(place, given, tmp_path):
    """An answer to compare with; `messages` of the data set are not the prompt's; what JSON has not is left out."""
    rows = [
        {"prompt": f"{i} and {i}?", "answer": 2 * i, "messages": [{"role": "user", "content": "x"}]} for i in range(8)
    ]
    Dataset.from_list([row | {"day": datetime.date(2026, 1, 1 + row["answer"])} for row in rows]).to_parquet(
        tmp_path / "sums.parquet"
    )
    (tmp_path / "rules.py").write_text(
        "def score(prompt, responses, fields):\n"
        "    assert not {'day', 'messages', 'fields'} & set(fields) and fields['raw_prompt'] == prompt\n"
        "    return [fields['answer'] + i / 8 for i in range(len(responses))]\n"
    )
    own = {"PROMPTS": tmp_path / "sums.parquet", "REWARD_FUNCTION": f"{tmp_path}/rules.py:score"}
    own |= {"ITERS": 1, "RUN_DIR": tmp_path / "run", "BACKEND": "hf"}
    result = bash(f"alignment/{TRAIN}", *settings(**given | own), LOADED_PYTHON=FORKS.started())
    assert result.returncode == 0, result.stderr[-3000:]
    assert "JSON has no such values, of the data set's fields: day\n" in result.stdout
    scored = read_records(tmp_path / "run/data/data_with_rewards_iter1_online.json", ("rewards",))[0]
    assert [i["rewards"] for i in scored] == [[2 * n, 2 * n + 1 / 8] for n in range(8)]
    assert (tmp_path / "run/models/rlhflow_iter1/model.safetensors").exists()
    # Responses that were made for a reward model do not have them.
    (tmp_path / "run/data/data_with_rewards_iter1_online.json").unlink()
    file = tmp_path / "run/data/gen_data_iter1_online.json"
    data = json.loads(file.read_text())
    for instance in data["instances"]:
        del instance["fields"]
    file.write_text(json.dumps(data))
    result = bash(f"alignment/{TRAIN}", *settings(**given | own), LOADED_PYTHON=FORKS.started())
    assert result.returncode == 2 and "made without --keep_fields" in result.stderr


def test_other_settings_are_named_and_refused(run, given):
    result = bash(f"alignment/{TRAIN}", *settings(**given | {"MAX_NEW_TOKENS": 6}))
    assert result.returncode == 2
    assert "MAX_NEW_TOKENS 8 -> 6" in result.stdout
    assert "max_new_tokens=8, now max_new_tokens=6" in result.stderr
