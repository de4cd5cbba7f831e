"""Implicit rewards beta log(pi(y|x) / pi_ref(y|x)) of all candidate responses, for the choice implicit_max_min.

DPO's policy is its own reward model (Rafailov et al. 2023, arXiv 2305.18290, eq. 5); pi is the policy that training
starts from, the one that the responses were sampled from.
"""

from collections import Counter
from pathlib import Path

from common.models import encode_prompt
from dpo_iteration.reference import cached_logps
from dpo_iteration.rows import response_ids, trim_prompt


def add_implicit_rewards(
    instances: list[dict], tokenizer, options, training, dtype: str, autocast: bool
) -> list[dict]:
    """The instances with their `implicit_rewards` [K].

    Args:
        options: with `train_dir`, `model_name_or_path`, `ref_model`, `beta`, `max_prompt_length`, `max_length`.
        training, dtype, autocast: as for `reference.cached_logps`.
    """
    rows = candidate_rows(instances, tokenizer, options.max_prompt_length, options.max_length)
    names = {"policy": options.model_name_or_path, "reference": options.ref_model}
    files = {what: Path(f"{options.train_dir}.candidates_{what}_logps.json") for what in names}
    policy, reference = (
        cached_logps(files[what], rows, what, name, options, training, dtype, autocast)
        for what, name in names.items()
    )
    ratios = [
        options.beta * (ours - theirs)
        for pair in zip(policy, reference, strict=True)
        for ours, theirs in zip(*pair, strict=True)
    ]
    count = len(instances[0]["responses"])
    width = count + count % 2
    starts = range(0, len(ratios), width)
    return [
        {**instance, "implicit_rewards": ratios[start : start + count]}
        for instance, start in zip(instances, starts, strict=True)
    ]


def candidate_rows(instances: list[dict], tokenizer, max_prompt_length: int, max_length: int) -> list[dict]:
    """All responses two by two, as rows whose two sides are scored; an odd last one stands in its row twice."""
    rows = []
    for instance in instances:
        prompt = trim_prompt(tokenizer, encode_prompt(tokenizer, instance["prompt"]), max_prompt_length, Counter())
        last = len(instance["responses"]) - 1
        ids = [response_ids(tokenizer, instance, k, max_length - len(prompt), Counter()) for k in range(last + 1)]
        rows += [
            {"prompt_ids": prompt, "chosen_ids": ids[k], "rejected_ids": ids[min(k + 1, last)]}
            for k in range(0, last + 1, 2)
        ]
    return rows
