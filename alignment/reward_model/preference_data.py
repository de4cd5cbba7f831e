"""Preference pairs: reading them, and splitting them so that no prompt is on both sides."""

import json
import random
from collections import defaultdict
from pathlib import Path

from common.cli import UserError
from common.records import check_writable, not_json, write_atomic

FIELDS = ("prompt", "chosen", "rejected")


def read_pairs(path: str | Path) -> list[dict]:
    """Pairs of a JSONL file, one {"prompt", "chosen", "rejected"} a line.

    Raises:
        UserError: naming the file and line that is wrong.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8").split("\n")  # not splitlines(): U+2028 is a character
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    pairs = [_pair(f"{path}: line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise UserError(f"{path}: holds no pairs")
    return pairs


def _pair(where: str, line: str) -> dict:
    try:
        pair = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {not_json(error)}") from None
    for field in FIELDS:
        if not isinstance(pair, dict) or not isinstance(pair.get(field), str):
            raise UserError(f"{where}: no text '{field}'")
    check_writable(where, pair)
    return pair


def write_pairs(path: str | Path, pairs: list[dict]) -> None:
    """Writes pairs as JSONL, atomically."""
    write_atomic(path, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))


def split_by_prompt(pairs: list[dict], fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Two parts without a common prompt; the first holds about `fraction` of the pairs.

    Prompts come in random order, each goes to the part that is further behind its share, and so a prompt with
    very many pairs cannot unbalance the parts for long.
    """
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair["prompt"]].append(pair)
    prompts = sorted(groups)
    random.Random(seed).shuffle(prompts)
    first, second = [], []
    for prompt in prompts:
        behind = fraction * (len(first) + len(second) + len(groups[prompt])) - len(first)
        (first if 2 * behind > len(groups[prompt]) else second).extend(groups[prompt])
    return first, second
