"""Nothing reports home, no shell reads what a user wrote, and names cannot leave the run folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ALIGNMENT, bash, run, settings
from plans import flag
from plans import refused as refused_line

from common.cli import ENVIRONMENT, UserError
from scripts import resolve
from scripts.settings import COUNT, KNOWN, NATURAL

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


def plan(**values: str) -> dict[str, list[str]]:
    """Return stage → the words of its command as a shell reads them that is given the printed line."""
    result = bash("alignment/sample_train_safe_rlhf.sh", *settings(DRY_RUN=1, **values))
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
    "DATASET_KEY": ("generate 2 mixp", "--dataset_key"),
    "DATASET_SPLIT": ("generate 2 mixp", "--dataset_split"),
    "LR_SCHEDULER": ("train 2 mixp", "--lr_scheduler_type"),
    "LORA_TARGETS": ("train 2 mixp", "--lora_target_modules"),
}
PATHS = {
    "BASE_MODEL": ("generate 2 mixp", "--ref_model_name_or_path"),
    "ITER1_MODEL": ("generate 2 mixp", "--model_name_or_path"),
    "REWARD_MODEL": ("annotate 2 mixp", "--reward_name_or_path"),
    "RUN_DIR": ("train 2 mixp", "--output_dir"),
}
RIGHT = {"SAMPLERS": "mixp", "ITERS": "2", "USE_LORA": "1"}


@pytest.mark.parametrize("kind", KINDS)
def test_words_reach_the_scripts_as_they_are(kind, tmp_path):
    """All settings at once: each is one word of its command, and nothing in it was run or expanded."""
    value = re.sub(r"[\n\t]", "", hostile(tmp_path)[kind])
    commands = plan(**RIGHT | dict.fromkeys(TEXTS | PATHS, value))
    for name, (stage, flag_name) in (TEXTS | PATHS).items():
        expected = f"{value}/models/rlhflow_iter2_mixp" if name == "RUN_DIR" else value
        assert flag(commands[stage], flag_name) == expected, name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_split_at_spaces_and_nothing_else(kind, tmp_path):
    value = hostile(tmp_path)[kind]
    words = plan(**RIGHT, PROMPTS=value)["generate 2 mixp"]
    start = words.index("--dataset_name_or_path") + 1
    assert words[start : words.index("--template")] == value.split()
    assert list(tmp_path.iterdir()) == []


def refused(tmp_path, **values: str) -> str:
    line = refused_line("sample_train_safe_rlhf.sh", DRY_RUN=1, **values)
    assert list(tmp_path.iterdir()) == []
    return line


@pytest.mark.parametrize("name", TEXTS | PATHS)
def test_texts_hold_no_control_characters(name, tmp_path):
    assert name in refused(tmp_path, **{name: f"a\ntouch {tmp_path}/was_run"})


def test_whole_numbers_are_checked(tmp_path):
    """Bash calculates with some of them, and arithmetic runs `a[$(command)]`."""
    wrong = (f"a[$(touch {tmp_path}/was_run)]", "-1", "1.5", "010", "1 2", " 1", "1_0")
    for name in [name for name, option in KNOWN.items() if option["kind"] in (COUNT, NATURAL)]:
        for value in wrong:
            with pytest.raises(UserError, match=f"^{name} "):
                resolve.read(name, value)
    assert "ITERS" in refused(tmp_path, ITERS=wrong[0])


@pytest.mark.parametrize("name", ["../up", "a/b", "$(touch was_run)", "`id`", ";id", "*", "..", ".hidden", "-x"])
def test_samplers_and_recipes_stay_in_their_folders(name, tmp_path):
    assert "RECIPE" in refused(tmp_path, RECIPE=name)
    assert "SAMPLERS" in refused(tmp_path, SAMPLERS=name)
    assert "PAIRS" in refused(tmp_path, PAIRS=json.dumps({name: [[1, [1, 0], [1, 0]]]}))
    assert "ACCELERATE_CONFIG" in refused(tmp_path, ACCELERATE_CONFIG=name)
