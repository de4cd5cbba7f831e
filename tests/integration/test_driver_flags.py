"""Every flag that a driver gives to a script is one that the script has, with every setting given."""

import re

import pytest
from commands import ALIGNMENT, python
from plans import in_turn, plan, refused

GIVEN = {
    "DATASET_SPLIT": "train",
    "DATASET_KEY": "prompt",
    "CHAT_TEMPLATE_KWARGS": '{"date_string": "1 Jan 2025"}',
    "CONTINUE_FINAL_MESSAGE": 1,
    "MAX_PROMPT_CHARACTERS": 99,
    "TRUST_REMOTE_CODE": 1,
    "K": 4,
    "COMPILE": "cudagraphs",
    "GENERATION_DTYPE": "float32",
    "REWARD_COLUMN": 0,
    "REWARD_MAX_LENGTH": 99,
    "REWARD_DTYPE": "float32",
    "TOKEN_BUDGET": 99,
    "JUDGE_MODEL": "judge",
    "JUDGE_COLUMN": 0,
    "LENGTH_PENALTY": 0.1,
    "LABELS": "sampled",
    "LABEL_NOISE": 0.1,
    "MAX_STEPS": 3,
    "BF16": True,
    "SAVE_DTYPE": "float32",
    "ACCELERATE_CONFIG": "single",
    "ATTENTION": "sdpa",
    "USE_LORA": 1,
    "LORA_R": 4,
    "LORA_ALPHA": 8,
    "LORA_TARGETS": "q_proj",
    "QLORA": 1,
    "OPTIMIZER": "adamw_torch",
    "SAVE_MINUTES": 5,
    "DDP_TIMEOUT": 60,
    "PUBLISHED_ESTIMATOR": 1,
    "KL_DTYPE": "float32",
    "GPUS": 8,
    "SAMPLERS": "mixp",
    "ITERS": 2,
    "SEEDS": 1,
}
# Driver → what else it is given, one dry run each; the ablation's stages but its last are those of the others.
MORE = {
    "sample_train_safe_rlhf.sh": (
        {},
        {"TRAINER": "trl", "TRL_LOSS_TYPE": "ipo"},
        {"REWARD_FUNCTION": "rules.py:exact"},
    ),
    "sample_eval_safe_rlhf.sh": ({}, {"REWARD_FUNCTION": "rules.py:exact"}),
    "sample_kl.sh": ({}, {"SCORE_KL": 1}),
    "sample_ablation.sh": ({},),
}


@pytest.fixture(scope="module")
def given() -> dict[str, set[str]]:
    """Script → the flags that the drivers give it."""
    found: dict[str, set[str]] = {}
    for driver, several in MORE.items():
        for more in several:
            for _, words in plan(driver, **GIVEN, **more):
                at = [i for i, word in enumerate(words) if word.startswith(str(ALIGNMENT)) and word.endswith(".py")]
                if not at:
                    continue
                for line in in_turn(["-", *words[at[0] :]]):
                    flags = {word for word in line if re.fullmatch(r"--[a-zA-Z_]\w*", word)}
                    found.setdefault(words[at[0]].removeprefix(f"{ALIGNMENT}/"), set()).update(flags)
    return found


def test_every_script_is_there_and_has_the_flags(given):
    assert len(given) == 7
    for script, flags in given.items():
        done = python(script, "--help")
        assert done.returncode == 0, script
        known = set(re.findall(r"--[a-zA-Z_]\w*", done.stdout))
        assert flags <= known, f"{script}: {sorted(flags - known)}"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"LR_SCHEDULER": "nothing"}, "nothing"),
        ({"LOSS_TYPE": "kl", "LABELS": "sampled"}, "--labels"),
        ({"TRAINER": "trl", "TRL_LOSS_TYPE": "nothing"}, "--loss_type"),
    ],
)
def test_what_training_would_refuse_ends_before_the_first_generation(given, named, tmp_path):
    assert named in refused("sample_train_safe_rlhf.sh", RECIPE="quickstart", RUN_DIR=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
