"""Sampled gradients: N labelled pairs per update, as counts of (winner, loser) cells.

A pair is drawn from the symmetric weights w, its label is Bradley-Terry. It falls into cell (winner y, loser y') with
probability 2 w(y, y') P*(y, y') for y != y', and w(y, y) on the diagonal, where the gradient is 0. The loss of the N
pairs depends on the counts of the cells alone, so they are drawn directly.
"""

from collections.abc import Callable

import numpy as np

from bandit import kernel
from bandit.exact import Rate, compiled_setup, gain, measure
from bandit.problem import Bandit, sampling_stream
from bandit.samplers import Sampler

# (cells [envs, |Y|^2], updates) -> counts [updates, envs, |Y|^2].
Draw = Callable[[np.ndarray, int], np.ndarray]

# Updates whose counts are drawn in one call where the weights never change; bounded so that memory stays small.
AHEAD_CELLS = 40_000


def draw_multinomial(stream: np.random.Generator, cells: np.ndarray, num_samples: int, size: int) -> np.ndarray:
    """Counts [size, cells] by one binomial per cell: cost grows with the number of cells."""
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


def draw_rows(stream: np.random.Generator, cells: np.ndarray, num_samples: int, size: int) -> np.ndarray:
    """Counts [size, envs, cells] of every row of cells [envs, cells] from one stream: no call per environment."""
    if cells.shape[1] <= num_samples:
        return stream.multinomial(num_samples, cells, size=(size, len(cells)))
    counts = np.empty((size, *cells.shape), np.int64)
    for of_update in counts:
        kernel.look_up(cells, stream.random((len(cells), num_samples)), of_update)
    return counts


def own_streams(name: str, num_envs: int, num_samples: int, seed: int) -> Draw:
    """Each environment from a stream of its own: no curve changes when another is added."""
    streams = [sampling_stream(seed, name, env) for env in range(num_envs)]

    def draw(cells: np.ndarray, updates: int) -> np.ndarray:
        counts = np.empty((updates, *cells.shape), np.int64)
        for env, (stream, row) in enumerate(zip(streams, cells, strict=True)):
            counts[:, env] = draw_counts(stream, row, num_samples, updates)
        return counts

    return draw


def one_stream(stream: np.random.Generator, num_samples: int) -> Draw:
    """All environments from one stream: for many of them, with few pairs each."""
    return lambda cells, updates: draw_rows(stream, cells, num_samples, updates)


def cell_probabilities(weights: np.ndarray, bandit: Bandit) -> np.ndarray:
    """Probability of every (winner, loser) cell, float64 [envs, |Y|, |Y|], from symmetric weights of that shape."""
    cells = (weights * (1 + bandit.win_margins)).astype(np.float64)
    return cells / cells.sum(axis=(1, 2), keepdims=True)


class Updates:
    """The updates of one run on num_samples fresh pairs each: the exact ones on average, see exact.Updates."""

    def __init__(self, bandit: Bandit, sampler: Sampler, lr: Rate, num_samples: int, draw: Draw):
        self.bandit, self.sampler, self.lr, self.num_samples, self.draw = bandit, sampler, lr, num_samples, draw
        self.setup = compiled_setup(bandit, sampler, lr)
        self.before = np.zeros_like(bandit.rewards)
        self.cells, self.steps = np.empty(bandit.win_margins.shape), np.empty(len(bandit.rewards))
        self.fixed = sampler.fixed(bandit)
        self.ahead, self.num_ahead = iter(()), max(1, AHEAD_CELLS // self.cells.size) if self.fixed else 1

    def advance(self, u: np.ndarray, updates: int) -> np.ndarray:
        """Move u by so many updates, in place; return METRICS of the states before each, [4, envs, updates]."""
        states = np.empty((updates, *u.shape))
        for state in states:
            state[...] = u
            self.update(u)
        return measure(self.bandit.as_float64(), states).swapaxes(1, 2)

    def update(self, u: np.ndarray) -> None:
        """Move u by one update, in place."""
        counts = next(self.ahead, None)
        if counts is None:
            self.find_law(u)
            drawn = self.draw(self.cells.reshape(len(u), -1), self.num_ahead)
            self.ahead = iter(drawn.reshape(-1, *self.cells.shape))
            counts = next(self.ahead)
        kernel.move(u, self.before, counts, self.steps)

    def find_law(self, u: np.ndarray) -> None:
        """Set cells and steps = gain Z / 2N: u moves by steps * sum_y' (C(y, y') sigma(-d) - C(y', y) sigma(d))."""
        if self.setup is not None:
            kernel.fill_cells(self.setup, u, self.before, self.bandit.win_margins, self.cells, self.steps)
        else:
            weights, log_scale = self.sampler.weights(u, self.bandit, self.before)
            total = weights.sum(axis=(1, 2))[:, None]
            self.cells = cell_probabilities(weights, self.bandit)
            self.steps = (gain(self.lr, self.sampler, self.bandit, total, log_scale) * total)[:, 0].astype(float)
        self.steps /= 2 * self.num_samples
