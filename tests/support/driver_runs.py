"""Tiny inputs for real drivers, starting them, and looking at what they write while they run."""

import json
import os
import subprocess
import time
from pathlib import Path

from commands import ALIGNMENT, settings
from tiny import save_tiny_policy, save_tiny_reward_model

TRAIN, KL, EVALUATE = "sample_train_safe_rlhf.sh", "sample_kl.sh", "sample_eval_safe_rlhf.sh"
WORDS = ("cat", "dog", "sun", "tea", "sea", "ink", "owl", "map", "ice", "egg", "jam", "key")


def save_inputs(folder: Path) -> None:
    """Make tiny models and twelve prompts in `folder`."""
    save_tiny_policy(folder / "policy", 0, hidden=64, layers=2, heads=2)
    save_tiny_reward_model(folder / "reward", 1)
    save_tiny_reward_model(folder / "judge", 2)
    (folder / "prompts.json").write_text(json.dumps([{"prompt": f"what is a {word}?"} for word in WORDS]))


def inputs(folder: Path) -> dict[str, object]:
    """Return settings of a run of seconds on the inputs in `folder`."""
    return {
        "RECIPE": "quickstart",
        "BASE_MODEL": folder / "policy",
        "REWARD_MODEL": folder / "reward",
        "JUDGE_MODEL": folder / "judge",
        "PROMPTS": folder / "prompts.json",
        "SAMPLERS": "online mixp",
        "ITERS": 2,
        "TEMPLATE": "none",
        "REWARD_TEMPLATE": "none",
        "TRAIN_END": 8,
        "TEST_START": 8,
        "TEST_END": 12,
        "KL_PROMPTS": 4,
        "SCORE_KL": False,  # get_kl.py samples by itself
        "MAX_NEW_TOKENS": 8,
        "MAX_PROMPT_LENGTH": 24,
        "MAX_LENGTH": 40,
        "LEARNING_RATE": 1e-3,
        "BF16": False,
        "GLOBAL_BATCH": 4,
        "PER_DEVICE_BATCH": 2,
    }


# A journal that grows two rows at a time, a checkpoint every step.
SLOW = {
    "BACKEND": "hf",
    "MAX_NUM_SEQS": 2,  # responses in flight
    "MAX_NEW_TOKENS": 16,
    "MAX_LENGTH": 48,
    "GLOBAL_BATCH": 2,
    "SAVE_STRATEGY": "steps",
    "SAVE_STEPS": 1,
}


def start(driver: str, values: dict, log: Path, folder: Path | None = None, **environment) -> subprocess.Popen:
    """Start a driver as the leader of a process group of its own; what it prints goes to `log`."""
    with open(log, "wb") as output:
        return subprocess.Popen(
            ["bash", str(ALIGNMENT / driver), *settings(**values)],
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def journal_rows(folder: Path) -> dict[str, list[bytes]]:
    """Return journal → its whole lines, without the first, which holds the settings."""
    found = {}
    for path in folder.rglob("*.journal"):
        try:
            found[path.name] = path.read_bytes().split(b"\n")[1:-1]
        except FileNotFoundError:  # finished while we looked
            continue
    return found


def wait_until(condition, process: subprocess.Popen) -> bool:
    """Return whether `condition()` came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.005)
    return False
