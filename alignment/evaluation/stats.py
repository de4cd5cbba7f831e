"""Win rates, bootstrap intervals, diversity, and the comparison at matched KL. Pure functions on arrays."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


class Estimate(NamedTuple):
    """A value with its 95% interval; the bounds are None where one observation cannot give any."""

    value: float
    low: float | None = None
    high: float | None = None


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where our reward is higher, 0.5 where both are equal, 0 elsewhere; all [N], prompt by prompt."""
    return (ours > theirs) + 0.5 * (ours == theirs)


def resampled_indices(count: int, seed: int) -> np.ndarray:
    """Bootstrap samples of `count` prompts: indices [RESAMPLES, count]."""
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """The central 95% of bootstrap samples."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_interval(values: np.ndarray, seed: int) -> Estimate:
    """Mean of [N] values, one a prompt, with its percentile bootstrap interval over prompts.

    For differences and wins of two models, pass their values prompt by prompt: that is the paired bootstrap.
    """
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean)
    return Estimate(mean, *percentile_interval(values[resampled_indices(len(values), seed)].mean(axis=1)))


def normal_interval(mean: float, stderr: float | None) -> Estimate:
    """Mean ± 1.96 standard errors."""
    return Estimate(mean) if stderr is None else Estimate(mean, mean - 1.96 * stderr, mean + 1.96 * stderr)


def distinct(texts: list[str], n: int) -> float | None:
    """Share of different n-grams (words, lower case) among all of the texts' n-grams; None if they have none."""
    grams = []
    for text in texts:
        words = text.lower().split()
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


class Curve(NamedTuple):
    """A sampler's M models: reward of each test prompt [M, N], KL of each KL prompt [M, P]."""

    rewards: np.ndarray
    kl: np.ndarray


class Matched(NamedTuple):
    """Reward differences at equal KL: at `kl`, the largest that both curves reach, and on average from `low` on."""

    low: float
    kl: float
    at: Estimate
    average: Estimate


def interpolate(kl: np.ndarray, reward: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Reward at the KL values `at`, along the straight lines that join the points in the order of their KL."""
    order = np.argsort(kl, kind="stable")
    return np.interp(at, kl[order], reward[order])


def matched_kl(ours: Curve, theirs: Curve, seed: int) -> Matched | None:
    """Our reward minus theirs at common KL; None if the curves share no range of KL.

    The interval is a bootstrap over test prompts and over KL prompts, the same for both curves. A resampled curve
    that ends before the common KL is continued with its last reward.
    """
    ends = [(c.kl.mean(axis=1).min(), c.kl.mean(axis=1).max()) for c in (ours, theirs)]
    low, high = max(a for a, _ in ends), min(b for _, b in ends)
    if low >= high:
        return None
    grid = np.linspace(low, high, 21)

    def difference(tests: np.ndarray, kls: np.ndarray) -> np.ndarray:
        ours_at, theirs_at = (
            interpolate(c.kl[:, kls].mean(axis=1), c.rewards[:, tests].mean(axis=1), grid) for c in (ours, theirs)
        )
        return ours_at - theirs_at

    tests, kls = ours.rewards.shape[1], ours.kl.shape[1]
    estimate = difference(np.arange(tests), np.arange(kls))
    pairs = zip(resampled_indices(tests, seed), resampled_indices(kls, seed + 1), strict=True)
    samples = np.array([difference(*pair) for pair in pairs])
    summaries: tuple[Callable, ...] = (lambda d: d[..., -1], lambda d: d.mean(axis=-1))
    at, average = (Estimate(float(f(estimate)), *percentile_interval(f(samples))) for f in summaries)
    return Matched(float(low), float(high), at, average)
