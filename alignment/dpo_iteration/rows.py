"""From chosen pairs to token ids, from token ids to padded batches.

A row has `prompt` (text), `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ints), `length` (tokens of the longer
sequence), `margin` (float), and, once `reference.py` has run, `ref_chosen_logps` and `ref_rejected_logps` (floats).
Rows are written once, as an Arrow file, by the first process; every process maps that file into memory, so that what
it holds does not grow with the number of pairs.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from common.models import encode_prompt, encode_response
from common.records import writing
from dpo_iteration.pairs import PreferencePair, label_margin

BATCH = 1000  # rows that are in memory while they are written


@dataclass
class Encoder:
    """Turns prompts and responses into token ids, and counts what was cut, dropped or encoded differently.

    Args:
        tokenizer: the policy's.
        max_prompt_length: tokens; a longer prompt is cut from the left, BOS stays.
        max_length: tokens of prompt and response; a longer response is cut from the right.
        sampled: whether instances hold, in `response_ids`, the ids that were sampled with this tokenizer. They are
            used as they are. Otherwise the text is encoded, and EOS follows those responses that ended by themselves
            (`stop_reasons` is `stop`; without it: all).
        vocabulary: the number of ids that the model knows.
        context: how many tokens the models read; None: they do not say.

    Attributes:
        counts: what happened, how often.
        knows_ends: whether any instance told why its responses stopped.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_length: int
    max_length: int
    sampled: bool = False
    vocabulary: int | None = None
    context: int | None = None
    counts: Counter = field(default_factory=Counter)
    knows_ends: bool = False

    def prompt(self, instance: dict) -> list[int]:
        """Return the token ids of a templated prompt."""
        return trim_prompt(
            self.tokenizer, encode_prompt(self.tokenizer, instance["prompt"]), self.max_prompt_length, self.counts
        )

    def response(self, instance: dict, index: int, room: int) -> list[int]:
        """Return at most `room` token ids of one response."""
        reasons = instance.get("stop_reasons")
        self.knows_ends |= reasons is not None
        ended = reasons is None or reasons[index] == "stop"
        text = instance["responses"][index]
        if self.sampled:
            ids = instance["response_ids"][index]
            self.counts["responses whose text would encode differently"] += ids != encode_response(
                self.tokenizer, text, ended
            )
        else:
            ids = encode_response(self.tokenizer, text, ended)
        self.counts["responses that ended"] += ended
        self.counts["responses cut"] += len(ids) > room
        return ids[:room]  # the stop token is the last id, so a cut response loses it


def build_rows(
    encoder: Encoder, pairs: Iterable[tuple[dict, PreferencePair]], margin_scale: float, label_noise: float = 0.0
) -> Iterator[dict]:
    """Yield tokenized rows in the order of `pairs`; pairs that cutting has made identical are dropped and counted."""
    for instance, pair in pairs:
        prompt = encoder.prompt(instance)
        room = encoder.max_length - len(prompt)
        chosen, rejected = (encoder.response(instance, index, room) for index in (pair.chosen, pair.rejected))
        if chosen == rejected:
            encoder.counts["pairs dropped: identical after cutting"] += 1
            continue
        yield {
            "prompt": instance["prompt"],
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "length": len(prompt) + max(len(chosen), len(rejected)),
            # The only place where the margin is scaled.
            "margin": label_margin(pair, margin_scale, label_noise),
        }


def trim_prompt(tokenizer: PreTrainedTokenizerBase, ids: list[int], limit: int, counts: Counter) -> list[int]:
    """Return the last `limit` tokens of a prompt, the first of which is still BOS where the prompt began with it."""
    if len(ids) <= limit:
        return ids
    counts["prompts cut"] += 1
    head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    tail = limit - len(head)
    return head + (ids[-tail:] if tail else [])


# --- The Arrow file -----------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    """Write rows to an Arrow file, `BATCH` of them in memory at a time; return their number."""
    ids = datasets.List(datasets.Value("int32"))
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "prompt_ids": ids,
            "chosen_ids": ids,
            "rejected_ids": ids,
            "length": datasets.Value("int32"),
            "margin": datasets.Value("float64"),
        }
    )
    with writing(path), ArrowWriter(features=features, path=str(path), writer_batch_size=BATCH) as writer:
        for row in rows:
            writer.write(row)
        return writer.finalize()[0]


def open_rows(path: Path) -> datasets.Dataset:
    """Return the rows of an Arrow file, mapped into memory."""
    return datasets.Dataset.from_file(str(path))


def split_by_prompt(
    rows: datasets.Dataset, fraction: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return (training, evaluation rows): `fraction` of the distinct prompts, drawn with `seed`, is held out."""
    if not fraction:
        return rows, None
    prompts = rows.unique("prompt")
    count = min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)
    held_out = set(random.Random(seed).sample(prompts, count))
    sides = ([], [])
    for index, prompt in enumerate(rows["prompt"]):
        sides[prompt in held_out].append(index)
    return rows.select(sides[False]), rows.select(sides[True])


class PaddedRows(torch.utils.data.Dataset):
    """Rows, and under negative indices the same rows with weight 0, which only fill up a batch."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index] if index >= 0 else {**self.rows[-1 - index], "weight": 0.0}


# --- Batches ------------------------------------------------------------------------------------------------------


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return a batch of B rows: sequences [2B, T], padded on the right, and [B] numbers.

    All chosen responses come first, then all rejected ones. The pad id is 0: what stands behind the last real
    token is neither attended to nor predicted.
    """
    sequences = [(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    response_mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, (prompt, response) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(response)
        input_ids[i, :end] = torch.tensor(prompt + response)
        attention_mask[i, :end] = 1
        response_mask[i, start:end] = True
    numbers = ("margin", "ref_chosen_logps", "ref_rejected_logps")
    batch = {name: torch.tensor([row[name] for row in rows]) for name in numbers if name in rows[0]}
    batch["weight"] = torch.tensor([row.get("weight", 1.0) for row in rows])
    return {**batch, "input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}
