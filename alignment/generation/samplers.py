"""The table of samplers: which two distributions the responses of a DPO pair are drawn from.

A response is sampled token by token from softmax((w_policy * logits_policy + w_reference * logits_reference) / T).
A pair is two such weight vectors; a sampler is a small probability table over pairs. A new sampler is a new row.

Source: Shi, Zhou, Du, "The Crucial Role of Samplers in Online Direct Preference Optimization", ICLR 2025, section 5.
"""

import json
import math
import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

from common.cli import UserError

POLICY = (1.0, 0.0)
REFERENCE = (0.0, 1.0)


class Pair(NamedTuple):
    """One row of a sampler: with `probability`, a pair's responses come from `first` and from `second`.

    `first` and `second` are (w_policy, w_reference).
    """

    probability: float
    first: tuple[float, float]
    second: tuple[float, float]


Sampler = tuple[Pair, ...]


def family(a: float, b: float, p: float = 1.0) -> Sampler:
    """The paper's mixtures: with probability p, y1 from (1 + a, -a) and y2 from (1 - b, b); else both on-policy.

    a moves the first side away from the reference, b the second towards it.
    """
    mixed = Pair(p, (1 + a, -a), (1 - b, b))
    return (mixed,) if p == 1 else (Pair(1 - p, POLICY, POLICY), mixed)


# name → rows, as a function of beta, the KL coefficient of the DPO loss (only `pilaf` uses it).
SAMPLERS: dict[str, Callable[[float], Sampler]] = {
    "offline": lambda beta: (Pair(1.0, REFERENCE, REFERENCE),),  # vanilla DPO: both from the reference
    "online": lambda beta: (Pair(1.0, POLICY, POLICY),),  # on-policy DPO
    "gshf": lambda beta: (Pair(1.0, REFERENCE, POLICY),),  # hybrid: Xiong et al., arXiv 2312.11456
    "mixp": lambda beta: family(0.5, 0.5),  # the paper's, as in its Safe-RLHF experiment
    "pilaf": lambda beta: family(beta, beta, 0.5),  # Feng et al., arXiv 2502.04270
}


def sampler_by_name(name: str, beta: float) -> Sampler:
    """The rows of a named sampler. Raises `UserError` for an unknown name."""
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}; or give --pairs")
    return SAMPLERS[name](beta)


def sampler_from_json(text: str) -> Sampler:
    """The rows written as '[[p, [w, w], [w, w]], ...]'. Raises `UserError` if they are not a sampler."""
    try:
        rows = tuple(
            Pair(float(p), (float(a), float(b)), (float(c), float(d)))
            for p, (a, b), (c, d) in json.loads(text)
        )
    except (ValueError, TypeError):
        raise UserError(f"--pairs {text!r}: not of the form [[p, [w, w], [w, w]], ...]") from None
    numbers = [value for row in rows for value in (row.probability, *row.first, *row.second)]
    if not rows or not all(math.isfinite(value) for value in numbers):
        raise UserError(f"--pairs {text!r}: needs at least one row, of finite numbers")
    if any(row.probability <= 0 for row in rows) or abs(sum(row.probability for row in rows) - 1) > 1e-6:
        raise UserError(f"--pairs {text!r}: the probabilities must be above 0 and sum to 1")
    return rows


def models_needed(sampler: Sampler) -> tuple[bool, bool]:
    """(needs the policy, needs the reference). One model is enough only if every side is that model alone."""
    sides = {side for row in sampler for side in (row.first, row.second)}
    if sides == {POLICY}:
        return True, False
    if sides == {REFERENCE}:
        return False, True
    return True, True


def check_count(sampler: Sampler, count: int) -> None:
    """Raises `UserError` if K = `count` responses cannot be split evenly over the two sides of the pairs."""
    if count % 2 and any(row.first != row.second for row in sampler):
        raise UserError(f"--K {count}: must be even, since this sampler's pairs have two different sides")


class Assignment(NamedTuple):
    """Where one response comes from: row of the sampler, and that side's (w_policy, w_reference)."""

    row: int
    weights: tuple[float, float]


def assign_rows(sampler: Sampler, count: int, seed: int) -> list[Assignment]:
    """The distributions of a prompt's K = `count` responses.

    Responses j and j + ceil(K/2) are one pair: its row is drawn from the sampler's probabilities, the first half of
    the responses takes the first sides, the second half the second sides.
    """
    half = math.ceil(count / 2)
    rows = random.Random(seed).choices(range(len(sampler)), [row.probability for row in sampler], k=half)
    firsts = [Assignment(row, sampler[row].first) for row in rows]
    seconds = [Assignment(row, sampler[row].second) for row in rows]
    return (firsts + seconds)[:count]


def as_settings(sampler: Iterable[Pair]) -> list[list]:
    """The sampler as JSON: the form that `sampler_from_json` reads."""
    return [[row.probability, list(row.first), list(row.second)] for row in sampler]
