"""Which two of a prompt's K responses become a pair, and which of the two wins: pure functions.

The choice is one function of the table `CHOOSE_TYPES`; the label is either the sign of the rewards' difference or
drawn from it (`win_probability`, `draw_winner`). The lab uses the same functions.

Each function takes

    scores      [K] floats, what the choice looks at: rewards; with `max_min_p` rewards less a length penalty, with
                `implicit_max_min` implicit rewards
    components  [K] ints, which pair of the sampler's table each response came from (None where the file has none)
    rng         a `random.Random`, the only source of chance

and returns two indices into the K responses, in any order, or None where the prompt allows no such pair. The one
with the higher (penalised) reward is then the chosen one; a tie is no preference and is dropped (`choose`).
"""

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from common.cli import UserError

Indices = tuple[int, int] | None
Scores = list[float]
Components = list[int] | None


class PreferencePair(NamedTuple):
    """Indices of the chosen and the rejected response, the difference of their rewards, whether a draw labelled them.

    The difference is above 0 unless the label was drawn: then it says which one the rewards prefer.
    """

    chosen: int
    rejected: int
    difference: float
    drawn: bool = False


def any_two(scores: Scores, components: Components, rng: random.Random) -> Indices:
    """Take two responses at random."""
    first, second = rng.sample(range(len(scores)), 2)
    return first, second


def max_random(scores: Scores, components: Components, rng: random.Random) -> Indices:
    """Take the best response and a random other one."""
    best = _best(scores, range(len(scores)))
    return best, rng.choice([i for i in range(len(scores)) if i != best])


def max_min(scores: Scores, components: Components, rng: random.Random) -> Indices:
    """Take the best response and the worst."""
    return _best(scores, range(len(scores))), _worst(scores, range(len(scores)))


def any_max_min(scores: Scores, components: Components, rng: random.Random) -> Indices:
    """Take the best response and the worst, equal scores in random order: two different ones even if all are equal.

    Implicit rewards are all 0 while the policy is the reference.
    """
    order = rng.sample(range(len(scores)), len(scores))
    return _best(scores, order), _worst(scores, order[::-1])


def max_max(scores: Scores, components: Components, rng: random.Random) -> Indices:
    """Take the best response and the second best."""
    best = _best(scores, range(len(scores)))
    return best, _best(scores, [i for i in range(len(scores)) if i != best])


def max_sweet(scores: Scores, components: Components, rng: random.Random) -> Indices:
    """Take the best and the one whose score is nearest to mean - 2 standard deviations of the K scores.

    Xiao et al., "Finding the Sweet Spot", arXiv 2502.16825: of many samples the minimum serves less well.
    """
    best, target = _best(scores, range(len(scores))), statistics.mean(scores) - 2 * statistics.pstdev(scores)
    return best, min((i for i in range(len(scores)) if i != best), key=lambda i: abs(scores[i] - target))


def mixed_max_min(scores: Scores, components: Components, rng: random.Random) -> Indices:
    """Take the best and the worst within one component of the sampler.

    The component is drawn among those with two responses or more, in proportion to its number of responses: so a
    sampler's mixing probabilities carry over to the pairs. None where no component has two.
    """
    sizes = {c: n for c, n in sorted(Counter(components).items()) if n >= 2}
    if not sizes:
        return None
    (component,) = rng.choices(list(sizes), weights=sizes.values())
    members = [i for i, c in enumerate(components) if c == component]
    # The last of equals is the worst: two different ones of this component even if all are equal.
    return _best(scores, members), _worst(scores, members[::-1])


def _best(scores: Scores, among: Iterable[int]) -> int:
    return max(among, key=lambda i: scores[i])


def _worst(scores: Scores, among: Iterable[int]) -> int:
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


# --- Labels -----------------------------------------------------------------------------------------------------

LABELS = ("margin", "sampled")


def win_probability(margin: float, label_noise: float = 0.0) -> float:
    """Return P*(first beats second) = (1 - 2 noise) sigmoid(margin) + noise, as in the bandit (bandit/problem.py).

    Args:
        margin: margin_scale x (reward of the first - reward of the second).
        label_noise: share of the labels that are flipped, 0 to 1/2.
    """
    positive = 1 / (1 + math.exp(-abs(margin)))
    return (1 - 2 * label_noise) * (positive if margin >= 0 else 1 - positive) + label_noise


def noisy_margin(margin: float, label_noise: float) -> float:
    """Return the margin whose sigmoid is `win_probability(margin, label_noise)`: noise mixed into a soft label."""
    if label_noise == 0:
        return margin  # exact also where the probability rounds to 1
    p = win_probability(margin, label_noise)
    return math.log(p) - math.log1p(-p)


def draw_winner(margin: float, label_noise: float, rng: random.Random) -> bool:
    """Draw a Bradley-Terry label: whether the first response wins."""
    return rng.random() < win_probability(margin, label_noise)


def label_margin(pair: PreferencePair, margin_scale: float, label_noise: float) -> float:
    """Return the margin that the loss sees: +inf for a drawn label, else the rewards' with noise mixed in."""
    return math.inf if pair.drawn else noisy_margin(margin_scale * pair.difference, label_noise)


def drawn(pair: PreferencePair, margin_scale: float, label_noise: float, rng: random.Random) -> PreferencePair:
    """Return the pair with its winner drawn from the scaled difference of the rewards."""
    if draw_winner(margin_scale * pair.difference, label_noise, rng):
        return pair._replace(drawn=True)
    return PreferencePair(pair.rejected, pair.chosen, -pair.difference, drawn=True)


# --- One prompt, one file -----------------------------------------------------------------------------------------


def rewards_of(instance: dict, choose_type: str, length_penalty: float) -> list[float]:
    """Return what the margin is made of: the rewards; for `max_min_p` less `length_penalty` per token.

    Tokens are `num_tokens`; a file without it is penalised per character.
    """
    if choose_type != "max_min_p":
        return list(instance["rewards"])
    lengths = instance.get("num_tokens") or [len(text) for text in instance["responses"]]
    return [r - length_penalty * n for r, n in zip(instance["rewards"], lengths, strict=True)]


def choose(
    instance: dict, choose_type: str, rng: random.Random, length_penalty: float = 0.0, ties: bool = False
) -> tuple[PreferencePair | None, str]:
    """Return the pair of one prompt as (pair, ""), or (None, why the prompt was dropped).

    Args:
        instance: with `responses` [K], `rewards` [K]; `pairs` [K] for mixed_max_min, `implicit_rewards` [K] for
            implicit_max_min. With `response_ids` [K] responses are told apart by them, else by their text.
        ties: whether equal rewards make a pair: a label that is drawn may be a fair coin.
    """
    rewards = rewards_of(instance, choose_type, length_penalty)
    scores = instance["implicit_rewards"] if choose_type == "implicit_max_min" else rewards
    indices = CHOOSE_TYPES[choose_type](scores, instance.get("pairs"), rng)
    if indices is None:
        return None, "no component with two responses"
    if ties and indices[0] == indices[1]:  # all scores are equal
        indices = any_two(scores, None, rng)
    chosen, rejected = sorted(indices, key=lambda i: -rewards[i])
    if rewards[chosen] == rewards[rejected] and not ties:
        return None, "equal rewards"
    told_apart_by = instance.get("response_ids") or instance["responses"]
    if told_apart_by[chosen] == told_apart_by[rejected]:
        return None, "identical responses"
    return PreferencePair(chosen, rejected, rewards[chosen] - rewards[rejected]), ""


def choose_all(
    instances: Iterable[dict],
    path: str,
    choose_type: str,
    seed: int,
    length_penalty: float = 0.0,
    *,
    label_seed: int | None = None,
    margin_scale: float = 1.0,
    label_noise: float = 0.0,
    dropped: Counter | None = None,
) -> Iterator[tuple[dict, PreferencePair]]:
    """Yield the pairs of a file, in its order; count in `dropped` how many prompts were dropped and why.

    Each row has its own random numbers, from (seed, row): its pair does not depend on the other rows.

    Args:
        label_seed: winners are drawn, with this seed; None: the reward decides.
        margin_scale, label_noise: see `win_probability`.

    Raises:
        UserError: naming file and row where a prompt has fewer than two responses.
    """
    dropped = Counter() if dropped is None else dropped
    for row, instance in enumerate(instances):
        if len(instance["responses"]) < 2:
            raise UserError(f"{path}: row {row}: one response only; a pair needs two")
        rng = random.Random(f"{seed}/{row}")
        pair, why = choose(instance, choose_type, rng, length_penalty, ties=label_seed is not None)
        if pair is None:
            dropped[why] += 1
            continue
        if label_seed is not None:
            pair = drawn(pair, margin_scale, label_noise, random.Random(f"label/{label_seed}/{row}"))
        yield instance, pair
