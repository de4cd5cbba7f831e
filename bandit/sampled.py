"""Sampled gradients: N labelled pairs an update, as counts of (winner, loser) cells.

A pair drawn from the symmetric weights w with a Bradley-Terry label falls into cell (winner y, loser y') with
probability 2 w(y, y') P*(y, y') for y != y' (and w(y, y) on the diagonal, where the gradient is 0). The loss of the N
pairs depends on the counts of the cells alone, so they are drawn directly.
"""

from collections.abc import Callable

import numpy as np

from bandit.exact import Increment
from bandit.problem import Bandit, gaps, sampling_stream
from bandit.samplers import Sampler
from bandit.steps import gain

# From weights [envs, |Y|, |Y|]: wins minus losses of an arm and pairs drawn of two arms, see `antisymmetric_part`.
Draw = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

# Updates whose counts are drawn in one call where the weights never change; bounded so that memory stays small.
AHEAD_CELLS = 40_000


def draw_multinomial(stream: np.random.Generator, cells: np.ndarray, num_samples: int, size: int) -> np.ndarray:
    """Counts [size, cells] by one binomial a cell: cost grows with the number of cells."""
    return stream.multinomial(num_samples, cells, size=size)


def draw_pairs(stream: np.random.Generator, cells: np.ndarray, num_samples: int, size: int) -> np.ndarray:
    """Counts [size, cells] of pairs drawn one by one: cost grows with the number of pairs.

    The order of the pairs is irrelevant, so their uniforms are made already sorted (normalised sums of exponentials),
    which keeps the look-up in the cumulative distribution in cache.
    """
    cumulative = np.cumsum(cells)
    counts = np.empty((size, len(cells)), np.int64)
    for row in counts:
        arrivals = np.cumsum(stream.standard_exponential(num_samples + 1))
        positions = arrivals[:-1] * (cumulative[-1] / arrivals[-1])
        found = np.searchsorted(cumulative, positions, side="right")
        row[:] = np.bincount(np.minimum(found, len(cells) - 1), minlength=len(cells))
    return counts


def draw_counts(stream: np.random.Generator, cells: np.ndarray, num_samples: int, size: int) -> np.ndarray:
    """Counts [size, cells] by the cheaper of the two draws, which have the same law."""
    draw = draw_multinomial if len(cells) <= num_samples else draw_pairs
    return draw(stream, cells, num_samples, size)


def cell_probabilities(weights: np.ndarray, bandit: Bandit) -> np.ndarray:
    """Probability of every (winner, loser) cell, float64 [envs, |Y|^2], from symmetric weights [envs, |Y|, |Y|]."""
    cells = (weights * (1 + bandit.win_margins)).astype(np.float64).reshape(len(weights), -1)
    return cells / cells.sum(axis=1, keepdims=True)


def antisymmetric_part(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts [..., |Y|, |Y|] as wins minus losses of an arm [..., |Y|] and pairs drawn of two arms, float64."""
    flipped = counts.swapaxes(-1, -2)
    return (counts - flipped).sum(axis=-1), (counts + flipped).astype(np.float64)


def draw_ahead(
    bandit: Bandit, weights: np.ndarray, streams: list[np.random.Generator], num_samples: int, updates: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labelled pairs of the next updates at these weights, each environment from its own stream."""
    cells = cell_probabilities(weights, bandit)
    drawn = [draw_counts(*each, num_samples, updates) for each in zip(streams, cells, strict=True)]
    counts = np.stack(drawn, axis=1).reshape(updates, *weights.shape)
    return list(zip(*antisymmetric_part(counts), strict=True))


def increment_of(
    bandit: Bandit, sampler: Sampler, lr: float | str | np.ndarray, num_samples: int, draw: Draw
) -> Increment:
    """A function (u [envs, |Y|], out) that writes the increment of one update on num_samples fresh pairs.

    With C the counts: gain Z sum_y' (C(y, y') sigma(-d) - C(y', y) sigma(d)) / (2 N), the exact increment on average.
    """
    weights_at = sampler.successive(bandit)

    def weights_and_step(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights, log_scale = weights_at(u)
        total = weights.sum(axis=(1, 2))[:, None]
        return weights, gain(lr, sampler, bandit, total, log_scale) * total / (4 * num_samples)

    fixed = weights_and_step(bandit.rewards) if sampler.fixed else None

    def increment(u: np.ndarray, out: np.ndarray) -> None:
        weights, step = fixed or weights_and_step(u)
        wins, pairs = draw(weights)
        np.multiply(step, wins - np.vecdot(pairs, np.tanh(gaps(u) / 2)), out)

    return increment


def make_increment(
    bandit: Bandit, sampler: Sampler, name: str, lr: float | str, num_samples: int, seed: int
) -> Increment:
    """Sampled increments in which each environment has a stream of its own."""
    streams = [sampling_stream(seed, name, env) for env in range(len(bandit.rewards))]
    updates = max(1, AHEAD_CELLS // bandit.win_margins.size) if sampler.fixed else 1
    ahead = iter(())

    def draw(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal ahead
        drawn = next(ahead, None)
        if drawn is None:
            ahead = iter(draw_ahead(bandit, weights, streams, num_samples, updates))
            drawn = next(ahead)
        return drawn

    return increment_of(bandit, sampler, lr, num_samples, draw)


def draw_rows(stream: np.random.Generator, cells: np.ndarray, num_samples: int) -> np.ndarray:
    """Counts of every row of cells [envs, cells] from one stream: no call per environment."""
    num_envs, num_cells = cells.shape
    if num_cells <= num_samples:
        return stream.multinomial(num_samples, cells)
    # Row e's cumulative probabilities fill (e, e + 1]: one look-up serves all rows.
    first = np.arange(num_envs)[:, None]
    cumulative = np.cumsum(cells, axis=1)
    cumulative = cumulative / cumulative[:, -1:] + first
    arrivals = first + stream.random((num_envs, num_samples))
    found = np.searchsorted(cumulative.ravel(), arrivals.ravel(), side="right").reshape(arrivals.shape)
    found = np.minimum(found, (first + 1) * num_cells - 1)  # e + 0.99... may round to e + 1
    return np.bincount(found.ravel(), minlength=cells.size).reshape(cells.shape)


def make_joint_increment(
    bandit: Bandit,
    sampler: Sampler,
    lr: float | str | np.ndarray,
    num_samples: int,
    stream: np.random.Generator,
) -> Increment:
    """Sampled increments from one stream for all environments: many environments, few pairs each."""

    def draw(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = draw_rows(stream, cell_probabilities(weights, bandit), num_samples)
        return antisymmetric_part(counts.reshape(weights.shape))

    return increment_of(bandit, sampler, lr, num_samples, draw)
