"""From chosen pairs of texts to token ids, and from token ids to padded batches.

A row is a dict: `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ints), `margin` (float), and, once
`reference.py` has run, `ref_chosen_logps` and `ref_rejected_logps` (floats).
"""

import random
from collections import Counter

import torch

from common.models import encode_prompt, encode_response
from dpo_iteration.pairs import PreferencePair


def build_rows(
    tokenizer,
    pairs: list[tuple[dict, PreferencePair]],
    margin_scale: float,
    max_prompt_length: int,
    max_length: int,
) -> tuple[list[dict], Counter]:
    """Tokenized rows in the order of `pairs`, and counts of what was cut or dropped.

    A prompt is cut from the left (BOS stays), a response from the right. EOS follows only those responses that ended
    by themselves (`stop_reasons` is `stop`; a file without it: all) and were not cut here.
    """
    rows, counts = [], Counter()
    for instance, pair in pairs:
        prompt = trim_prompt(tokenizer, encode_prompt(tokenizer, instance["prompt"]), max_prompt_length, counts)
        room = max_length - len(prompt)
        chosen, rejected = (
            response_ids(tokenizer, instance, index, room, counts) for index in (pair.chosen, pair.rejected)
        )
        if chosen == rejected:
            counts["pairs dropped: identical after cutting"] += 1
            continue
        rows.append(
            {
                "prompt": instance["prompt"],
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                # The only place where the margin is scaled.
                "margin": margin_scale * pair.difference,
            }
        )
    return rows, counts


def trim_prompt(tokenizer, ids: list[int], limit: int, counts: Counter) -> list[int]:
    """The last `limit` tokens of a prompt, the first of which is still BOS where the prompt began with it."""
    if len(ids) <= limit:
        return ids
    counts["prompts cut"] += 1
    head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    tail = limit - len(head)
    return head + (ids[-tail:] if tail else [])


def response_ids(tokenizer, instance: dict, index: int, room: int, counts: Counter) -> list[int]:
    """Token ids of one response, at most `room`; what happened to it is added to `counts`."""
    reasons = instance.get("stop_reasons")
    ended = reasons is None or reasons[index] == "stop"
    ids = encode_response(tokenizer, instance["responses"][index], ended)
    counts["responses that ended"] += ended
    counts["responses cut"] += len(ids) > room
    return ids[:room]  # EOS is the last id, so a cut response loses it


def split_by_prompt(rows: list[dict], fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, evaluation rows): `fraction` of the distinct prompts, drawn with `seed`, are held out."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    count = min(max(round(fraction * len(prompts)), fraction > 0), len(prompts) - 1)
    held_out = set(random.Random(seed).sample(prompts, count))
    return (
        [row for row in rows if row["prompt"] not in held_out],
        [row for row in rows if row["prompt"] in held_out],
    )


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of B rows: sequences [2B, T], padded on the right, and [B] numbers.

    All chosen responses come first, then all rejected ones. The pad id is 0: what stands behind the last real
    token is neither attended to nor predicted.
    """
    sequences = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
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
    return {**batch, "input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}
