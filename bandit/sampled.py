"""Sampled gradients: N labelled pairs an update, as counts of (winner, loser) cells.

A pair drawn from the symmetric weights w with a Bradley-Terry label falls into cell (winner y, loser y') with
probability 2 w(y, y') P*(y, y') for y != y' (and w(y, y) on the diagonal, where the gradient is 0). The loss of the N
pairs depends on the counts of the cells alone, so they are drawn directly.
"""

import numpy as np

from bandit.exact import Increment
from bandit.problem import Bandit, gaps, sampling_stream
from bandit.samplers import Sampler
from bandit.steps import gain

# Updates whose counts are drawn in one call where the weights never change; bounded so that memory stays small.
AHEAD_CELLS = 100_000


def draw_multinomial(
    stream: np.random.Generator, cells: np.ndarray, num_samples: int, size: int
) -> np.ndarray:
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
    cells = (weights * (1 + bandit.half_tanh_rewards)).astype(np.float64).reshape(len(weights), -1)
    return cells / cells.sum(axis=1, keepdims=True)


class CountSource:
    """Counts [envs, |Y|, |Y|] for one update after another, each environment from its own stream."""

    def __init__(
        self, bandit: Bandit, sampler: Sampler, streams: list[np.random.Generator], num_samples: int
    ):
        self.bandit, self.sampler, self.streams, self.num_samples = bandit, sampler, streams, num_samples
        self.ahead = iter(())
        self.batch = max(1, AHEAD_CELLS // bandit.half_tanh_rewards.size) if sampler.fixed else 1
        self.drawable = None

    def next(self, weights: np.ndarray) -> np.ndarray:
        """Counts of the next update; weights as Sampler.weights gives them at its state."""
        counts = next(self.ahead, None)
        if counts is None:
            self.ahead = iter(self._draw(weights))
            counts = next(self.ahead)
        return counts

    def _draw(self, weights: np.ndarray) -> np.ndarray:
        if self.drawable is None or not self.sampler.fixed:
            self.drawable = cell_probabilities(weights, self.bandit)
        drawn = [
            draw_counts(stream, cells, self.num_samples, self.batch)
            for stream, cells in zip(self.streams, self.drawable, strict=True)
        ]
        return np.stack(drawn, axis=1).reshape(self.batch, *weights.shape)


def make_increment(
    bandit: Bandit, sampler: Sampler, name: str, lr: float | str, num_samples: int, seed: int
) -> Increment:
    """A function (u [envs, |Y|], out) that writes the increment of one update on num_samples fresh pairs.

    With C the counts: gain Z sum_y' (C(y, y') sigma(-d) - C(y', y) sigma(d)) / (2 N), the exact increment on average.
    """
    streams = [sampling_stream(seed, name, env) for env in range(len(bandit.rewards))]
    source = CountSource(bandit, sampler, streams, num_samples)
    frozen = sampler.weights(bandit.rewards, bandit) if sampler.fixed else None

    def increment(u: np.ndarray, out: np.ndarray) -> None:
        weights, log_scale = frozen or sampler.weights(u, bandit)
        counts = source.next(weights)
        total = weights.sum(axis=(1, 2))[:, None]
        step = gain(lr, sampler, bandit, total, log_scale) * total / (4 * num_samples)
        flipped = counts.swapaxes(1, 2)
        wins = (counts - flipped).sum(axis=2)
        np.multiply(step, wins - np.vecdot(counts + flipped, np.tanh(gaps(u) / 2)), out)

    return increment
