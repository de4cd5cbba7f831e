"""Preference pairs: reading them, and splitting them so that no prompt is on both sides."""

import json
import random
from collections import defaultdict
from pathlib import Path

from common.cli import UserError
from common.records import check_writable, write_atomic
from common.sources import read_rows

FIELDS = ("prompt", "chosen", "rejected")


def read_pairs(source: str | Path) -> list[dict]:
    """Pairs {"prompt", "chosen", "rejected"} of a file, a folder or a hub's name, see common/sources.py.

    Other columns are passed over.

    Raises:
        UserError: naming the file and the line or row that is wrong.
    """
    pairs = [_pair(where, row) for where, row in read_rows(str(source), "train")]
    if not pairs:
        raise UserError(f"{source}: holds no pairs")
    return pairs


def _pair(where: str, row: object) -> dict:
    for field in FIELDS:
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise UserError(f"{where}: no text '{field}'")
    pair = {field: row[field] for field in FIELDS}
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
