"""Which two of a prompt's K responses become the chosen and the rejected one: pure functions in one table.

Each function takes

    scores      [K] floats, what the choice looks at: rewards; with `max_min_p` rewards less a length penalty, with
                `implicit_max_min` implicit rewards
    components  [K] ints, which pair of the sampler's table each response came from (None where the file has none)
    rng         a `random.Random`, the only source of chance

and returns two indices into the K responses, in any order, or None where the prompt allows no such pair. The one
with the higher (penalised) reward is then the chosen one; a tie is no preference and is dropped (`choose`).
"""

import random
import statistics
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from common.cli import UserError

Indices = tuple[int, int] | None


class PreferencePair(NamedTuple):
    """Indices of the chosen and the rejected response and the difference of their scores, above 0."""

    chosen: int
    rejected: int
    difference: float


def any_two(scores, components, rng) -> Indices:
    """Two responses at random."""
    first, second = rng.sample(range(len(scores)), 2)
    return first, second


def max_random(scores, components, rng) -> Indices:
    """The best response against a random other one."""
    best = _best(scores, range(len(scores)))
    return best, rng.choice([i for i in range(len(scores)) if i != best])


def max_min(scores, components, rng) -> Indices:
    """The best response against the worst."""
    return _best(scores, range(len(scores))), _worst(scores, range(len(scores)))


def any_max_min(scores, components, rng) -> Indices:
    """The best response against the worst, equal scores in random order: two different ones even if all are equal.

    Implicit rewards are all 0 while the policy is the reference.
    """
    order = rng.sample(range(len(scores)), len(scores))
    return _best(scores, order), _worst(scores, order[::-1])


def max_max(scores, components, rng) -> Indices:
    """The best response against the second best."""
    best = _best(scores, range(len(scores)))
    return best, _best(scores, [i for i in range(len(scores)) if i != best])


def max_sweet(scores, components, rng) -> Indices:
    """The best response against the one whose score is nearest to mean - 2 standard deviations of the K scores.

    Xiao et al., "Finding the Sweet Spot", arXiv 2502.16825: of many samples the minimum serves less well.
    """
    best, target = _best(scores, range(len(scores))), statistics.mean(scores) - 2 * statistics.pstdev(scores)
    return best, min((i for i in range(len(scores)) if i != best), key=lambda i: abs(scores[i] - target))


def mixed_max_min(scores, components, rng) -> Indices:
    """Best against worst within one component of the sampler.

    The component is drawn among those with two responses or more, in proportion to its number of responses: so a
    sampler's mixing probabilities carry over to the pairs. None where no component has two.
    """
    sizes = {c: n for c, n in sorted(Counter(components).items()) if n >= 2}
    if not sizes:
        return None
    (component,) = rng.choices(list(sizes), weights=sizes.values())
    members = [i for i, c in enumerate(components) if c == component]
    return _best(scores, members), _worst(scores, members)


def _best(scores, among) -> int:
    return max(among, key=lambda i: scores[i])


def _worst(scores, among) -> int:
    return min(among, key=lambda i: scores[i])


CHOOSE_TYPES: dict[str, Callable] = {
    "random": any_two,
    "max_random": max_random,
    "max_min": max_min,
    "max_max": max_max,
    "max_sweet": max_sweet,
    "max_min_p": max_min,  # of penalised rewards, see `rewards_of`
    "implicit_max_min": any_max_min,  # of implicit rewards
    "mixed_max_min": mixed_max_min,
}


def rewards_of(instance: dict, choose_type: str, length_penalty: float) -> list[float]:
    """What the margin is made of: the rewards; for `max_min_p` less `length_penalty` per token of the response.

    Tokens are `num_tokens`; a file without it is penalised per character.
    """
    if choose_type != "max_min_p":
        return list(instance["rewards"])
    lengths = instance.get("num_tokens") or [len(text) for text in instance["responses"]]
    return [r - length_penalty * n for r, n in zip(instance["rewards"], lengths, strict=True)]


def choose(
    instance: dict, choose_type: str, rng: random.Random, length_penalty: float = 0.0
) -> tuple[PreferencePair | None, str]:
    """The pair of one prompt.

    Args:
        instance: with `responses` [K], `rewards` [K]; `pairs` [K] for mixed_max_min, `implicit_rewards` [K] for
            implicit_max_min.

    Returns:
        (pair, "") or (None, why the prompt was dropped).
    """
    rewards = rewards_of(instance, choose_type, length_penalty)
    scores = instance["implicit_rewards"] if choose_type == "implicit_max_min" else rewards
    indices = CHOOSE_TYPES[choose_type](scores, instance.get("pairs"), rng)
    if indices is None:
        return None, "no component with two responses"
    chosen, rejected = sorted(indices, key=lambda i: -rewards[i])
    if rewards[chosen] == rewards[rejected]:
        return None, "equal rewards"
    if instance["responses"][chosen] == instance["responses"][rejected]:
        return None, "identical responses"
    return PreferencePair(chosen, rejected, rewards[chosen] - rewards[rejected]), ""


def choose_all(
    instances: list[dict], path: str, choose_type: str, seed: int, length_penalty: float = 0.0
) -> tuple[list[tuple[dict, PreferencePair]], Counter]:
    """The pairs of a file, in its order, and how many prompts were dropped and why.

    Each row has its own random numbers, from (seed, row): its pair does not depend on the other rows.

    Raises:
        UserError: naming file and row where a prompt has fewer than two responses.
    """
    kept, dropped = [], Counter()
    for row, instance in enumerate(instances):
        if len(instance["responses"]) < 2:
            raise UserError(f"{path}: row {row}: one response only; a pair needs two")
        pair, why = choose(instance, choose_type, random.Random(f"{seed}/{row}"), length_penalty)
        if pair is None:
            dropped[why] += 1
        else:
            kept.append((instance, pair))
    return kept, dropped
