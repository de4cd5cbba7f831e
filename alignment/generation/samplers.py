"""From a sampler's row to the distribution of each response. The rows themselves are in bandit/mixtures.py.

A sampler given on the command line (--pairs, --family) is a row like any other.
"""

import json
import math
import random
from collections.abc import Iterable
from typing import NamedTuple

from bandit.mixtures import POLICY, SECOND, WITHIN, Mixture, WeightPair, WeightPairs, get_mixture
from common.cli import UserError


def sampler_by_name(name: str) -> Mixture:
    """A row of the table or a member of the family by name. Raises `UserError` for an unknown name."""
    try:
        return get_mixture(name)
    except ValueError as error:
        raise UserError(f"{error}; or give --pairs") from None


def sampler_of_family(a: float, b: float, p: float) -> Mixture:
    """The paper's family with these weights. Raises `UserError` for numbers that are no such weights."""
    if not (math.isfinite(a) and math.isfinite(b) and 0 < p <= 1):
        raise UserError(f"--family {a} {b} {p}: a and b must be finite, and p above 0 and at most 1")
    return get_mixture(f"mix_{a!r}_{b!r}_{p!r}")


def sampler_from_json(text: str) -> Mixture:
    """The row written as '[[p, [w, w], [w, w]], ...]'. Raises `UserError` if that is not a sampler."""
    pairs = pairs_from_json(text)
    return Mixture(lambda beta: pairs, "--pairs", choose=WITHIN if len(pairs) > 1 else "max_min")


def pairs_from_json(text: str) -> WeightPairs:
    """The pairs written as '[[p, [w, w], [w, w]], ...]'. Raises `UserError` if they are not a sampler's."""
    try:
        rows = tuple(
            WeightPair(float(p), (float(a), float(b)), (float(c), float(d))) for p, (a, b), (c, d) in json.loads(text)
        )
    except (ValueError, TypeError):
        raise UserError(f"--pairs {text!r}: not of the form [[p, [w, w], [w, w]], ...]") from None
    numbers = [value for row in rows for value in (row.probability, *row.first, *row.second)]
    if not rows or not all(math.isfinite(value) for value in numbers):
        raise UserError(f"--pairs {text!r}: needs at least one row, of finite numbers")
    if any(row.probability <= 0 for row in rows) or abs(sum(row.probability for row in rows) - 1) > 1e-6:
        raise UserError(f"--pairs {text!r}: the probabilities must be above 0 and sum to 1")
    return rows


def models_needed(pairs: WeightPairs) -> tuple[bool, bool]:
    """(needs the policy, needs the second model). One is enough only if every side is that model alone."""
    sides = {side for row in pairs for side in (row.first, row.second)}
    if sides == {POLICY}:
        return True, False
    if sides == {SECOND}:
        return False, True
    return True, True


def check_count(pairs: WeightPairs, count: int) -> None:
    """Raises `UserError` if K = `count` responses cannot be split evenly over the two sides of the pairs."""
    if count % 2 and any(row.first != row.second for row in pairs):
        raise UserError(f"--K {count}: must be even, since this sampler's pairs have two different sides")


class Assignment(NamedTuple):
    """Where one response comes from: row of the sampler's pairs, and that side's (w_policy, w_second)."""

    row: int
    weights: tuple[float, float]


def assign_rows(pairs: WeightPairs, count: int, seed: int) -> list[Assignment]:
    """The distributions of a prompt's K = `count` responses.

    Responses j and j + ceil(K/2) are one pair: its row is drawn from the sampler's probabilities, the first half of
    the responses takes the first sides, the second half the second sides.
    """
    half = math.ceil(count / 2)
    rows = random.Random(seed).choices(range(len(pairs)), [row.probability for row in pairs], k=half)
    firsts = [Assignment(row, pairs[row].first) for row in rows]
    seconds = [Assignment(row, pairs[row].second) for row in rows]
    return (firsts + seconds)[:count]


def as_settings(pairs: Iterable[WeightPair]) -> list[list]:
    """The pairs as JSON: the form that `pairs_from_json` reads."""
    return [[row.probability, list(row.first), list(row.second)] for row in pairs]
