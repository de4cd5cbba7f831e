"""Nothing reports home, no shell reads what a user wrote, and names cannot leave the run folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ALIGNMENT, bash, run
from test_drivers import flag

from common.cli import ENVIRONMENT

SCRIPTS = (
    "generation/generate.py",
    "annotate_data/get_rewards.py",
    "dpo_iteration/run_dpo.py",
    "evaluation/get_kl.py",
    "reward_model/train_reward_model.py",
    "scripts/quickstart_assets.py",
    "scripts/to_safetensors.py",
)
# Imports a script as `python script` would, then asks the libraries themselves.
ASK = """
import json, os, runpy, sys
runpy.run_path(sys.argv[1], run_name="imported")
from huggingface_hub import constants
print(json.dumps({"hub": constants.HF_HUB_DISABLE_TELEMETRY, "environment": dict(os.environ)}))
"""


def ask(script: str, **environment: str) -> dict:
    inherited = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(ALIGNMENT / script)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_telemetry_is_off(script):
    found = ask(script)
    assert found["hub"] is True
    assert {name: found["environment"].get(name) for name in ENVIRONMENT} == ENVIRONMENT
    assert ENVIRONMENT["VLLM_NO_USAGE_STATS"] == "1" and ENVIRONMENT["RAY_USAGE_STATS_ENABLED"] == "0"


def test_telemetry_is_on_for_who_asks_for_it():
    found = ask(SCRIPTS[0], HF_HUB_DISABLE_TELEMETRY="0", DO_NOT_TRACK="0")
    assert found["hub"] is False and found["environment"]["VLLM_NO_USAGE_STATS"] == "1"


def plan(**environment: str) -> dict[str, list[str]]:
    """Stage → the words of its command as a shell reads them that is given the printed line."""
    result = bash("alignment/sample_train_safe_rlhf.sh", DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    printed = re.findall(r"^\[(.+?)\] (.+)$", result.stdout, re.MULTILINE)
    return {stage: run(["bash", "-c", f"printf '%s\\0' {line}"]).stdout.split("\0") for stage, line in printed}


def hostile(tmp_path) -> dict[str, str]:
    """What a careless script would run, split, expand or redirect."""
    mark = tmp_path / "was_run"
    return {
        "substitution": f"$(touch {mark})",
        "backticks": f"`touch {mark}`",
        "semicolon": f"; touch {mark}; :",
        "quotes": f"'\"; touch {mark}; \"'",
        "spaces": "two  words with\ttab",
        "pattern": "/*",
        "redirection": f"> {mark}",
        "variable": "${HOME}",
        "line break": f"a\ntouch {mark}",
    }


KINDS = tuple(hostile(Path()))
TEXTS = {
    "BASE_MODEL": ("generate iter2", "--ref_model_name_or_path"),
    "ITER1_MODEL": ("generate iter2", "--model_name_or_path"),
    "REWARD_MODEL": ("annotate iter2 mine", "--reward_name_or_path"),
    "PAIRS_mine": ("generate iter2", "--pairs"),
    "TEMPLATE": ("generate iter2", "--template"),
    "TRAIN_START": ("generate iter2", "--start"),
    "K": ("generate iter2", "--K"),
    "LOSS_TYPE": ("train iter2 mine", "--loss_type"),
    "WARMUP_STEPS": ("train iter2 mine", "--warmup_steps"),
    "RUN_DIR": ("train iter2 mine", "--output_dir"),
}
RIGHT = {"SAMPLERS": "mine", "ITERS": "2", "ITER1_MODEL": "owner/first", "PAIRS_mine": "[[1,[2,-1],[0,1]]]"}


@pytest.mark.parametrize("kind", KINDS)
def test_words_reach_the_scripts_as_they_are(kind, tmp_path):
    """All constants at once: each is one word of its command, and nothing in it was run or expanded."""
    value = hostile(tmp_path)[kind]
    commands = plan(**RIGHT | dict.fromkeys(TEXTS, value))
    for name, (stage, flag_name) in TEXTS.items():
        found = flag(commands[stage], flag_name)
        assert found == (f"{value}/models/rlhflow_iter2_mine" if name == "RUN_DIR" else value), name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_split_at_spaces_and_nothing_else(kind, tmp_path):
    value = hostile(tmp_path)[kind].replace("\n", " ")
    words = plan(**RIGHT, PROMPTS=value)["generate iter2"]
    start = words.index("--dataset_name_or_path") + 1
    assert words[start : words.index("--template")] == value.split()
    assert list(tmp_path.iterdir()) == []


def refused(tmp_path, **environment: str) -> str:
    result = bash("alignment/sample_train_safe_rlhf.sh", DRY_RUN="1", **environment)
    assert result.returncode == 2, result.stdout
    [line] = result.stderr.splitlines()
    assert list(tmp_path.iterdir()) == []
    return line


# Names that become parts of paths, and numbers that bash calculates with (arithmetic runs `a[$(command)]`).
NUMBERS = ("GPUS", "SEED", "GLOBAL_BATCH", "PER_DEVICE_BATCH", "NUM_MACHINES", "MACHINE_RANK", "TEST_START",
           "KL_PROMPTS", "ITERS")  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_checked_before_bash_calculates_with_them(name, tmp_path):
    for value in (f"a[$(touch {tmp_path}/was_run)]", "-1", "1.5", "010", "", "1 2"):
        assert refused(tmp_path, **{name: value}).startswith(
            f"sample_train_safe_rlhf.sh: error: {name} '{value}': not"
        )


@pytest.mark.parametrize("name", ["../up", "a/b", "$(touch was_run)", "`id`", ";id", "*", "..", ".hidden", "-x"])
def test_samplers_and_recipes_stay_in_their_folders(name, tmp_path):
    assert f"'{name}'" in refused(tmp_path, RECIPE=name)
    line = refused(tmp_path, SAMPLERS=name)
    assert "only letters, digits" in line and f"sampler '{name.split()[0]}'" in line
