"""Statistics of the reports: effects with standard errors, intervals, diversity. Pure functions on arrays.

S seeds, N prompts, K samplers, M models of a sampler. Several responses per prompt are averaged before they come
here. Differences and wins are paired: pass them prompt by prompt.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special  # scipy.stats takes half a second more to import

RESAMPLES = 2000
LEVEL = 0.95
Z = float(special.ndtri((1 + LEVEL) / 2))


class Estimate(NamedTuple):
    """A value with its 95% interval; the bounds are None where the data cannot give any."""

    value: float
    low: float | None = None
    high: float | None = None


class Effect(NamedTuple):
    """A mean with its standard error and degrees of freedom; both are None where the data cannot give any."""

    value: float
    stderr: float | None = None
    df: float | None = None

    @property
    def half(self) -> float | None:
        """Half the width of Student's 95% interval."""
        return None if self.stderr is None else float(special.stdtrit(self.df, (1 + LEVEL) / 2)) * self.stderr

    @property
    def interval(self) -> Estimate:
        """The value with Student's 95% interval."""
        return Estimate(self.value, *(() if self.half is None else (self.value - self.half, self.value + self.half)))

    @property
    def p_value(self) -> float | None:
        """Two-sided p-value of the hypothesis that the mean is 0."""
        if self.stderr is None:
            return None
        if self.stderr == 0:
            return float(self.value == 0)
        return float(2 * special.stdtr(self.df, -abs(self.value) / self.stderr))


def mean_effect(values: np.ndarray) -> Effect:
    """Return the mean of [N] independent values, N - 1 degrees of freedom."""
    count = len(values)
    return Effect(float(values.mean()), *((float(values.std(ddof=1)) / count**0.5, count - 1.0) if count > 1 else ()))


def crossed_effect(values: np.ndarray) -> Effect:
    """Return the mean of [S, N] values in which seeds and prompts are both random and crossed.

    SE² = s²_seed/S + s²_prompt/N - s²_residual/(S N), where s²_seed and s²_prompt are the variances of the rows' and
    of the columns' means; no component of variance is taken below 0. Degrees of freedom: Satterthwaite (1946).
    One seed gives the effect over prompts alone; one prompt shows nothing about others.
    """
    seeds, prompts = values.shape
    if seeds == 1 or prompts == 1:
        return mean_effect(values[0]) if seeds == 1 else Effect(float(values.mean()))
    df = seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)
    return Effect(float(values.mean()), *combined(squared_errors(values), df))


def squared_errors(values: np.ndarray) -> tuple[float, float, float]:
    """Return the squared standard errors of the mean of [S, N]: over seeds, over prompts, and of the residual."""
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    residual = values - rows[:, None] - columns + values.mean()
    df = (len(rows) - 1) * (len(columns) - 1)
    return rows.var(ddof=1) / len(rows), columns.var(ddof=1) / len(columns), (residual**2).sum() / df / values.size


def combined(parts: tuple, df: tuple) -> tuple[float, float]:
    """Return standard error and degrees of freedom of a sum of squared errors over seeds and over prompts.

    Args:
        parts: squared standard errors: over seeds, over prompts, and of the residual, which is in both of them.
        df: their degrees of freedom.
    """
    over_seeds, over_prompts, both = max(parts[0], parts[2]), max(parts[1], parts[2]), parts[2]
    total = over_seeds + over_prompts - both
    spread = sum(v**2 / d for v, d in zip((over_seeds, over_prompts, both), df, strict=True))
    return float(np.sqrt(total)), float(total**2 / spread) if spread else float(min(df))


def holm(p_values: list[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the same order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def false_alarm(differences: np.ndarray) -> float | None:
    """Return how often one run's 95% interval over prompts excludes 0 where two samplers do not differ.

    Args:
        differences: paired differences [S, N]; their spread over seeds is taken as that of every run.
    """
    seeds, prompts = differences.shape
    if min(seeds, prompts) < 2:
        return None
    one_run = differences.var(axis=1, ddof=1).mean() / prompts
    over_seeds, _, residual = squared_errors(differences)
    total = one_run + seeds * max(0.0, over_seeds - residual)
    return float(2 * special.ndtr(-Z * np.sqrt(one_run / total))) if total else 0.0


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return 1 where our reward is higher, 0.5 where both are equal, 0 elsewhere; all of one shape."""
    return (ours > theirs) + 0.5 * (ours == theirs)


def rate_of_wins(scores: np.ndarray) -> Estimate:
    """Return the mean of wins [S, N] with Wilson's (1927) interval.

    The count in Wilson's formula is the one whose binomial variance is the mean's own: N for one run without ties,
    more with ties, fewer where wins of different seeds or of one prompt go together.
    """
    seeds, prompts = scores.shape
    rate, ties = float(scores.mean()), float((scores == 0.5).mean())
    count, critical, binomial = float(prompts), Z, rate * (1 - rate)
    effect = crossed_effect(scores)
    if seeds == 1 and binomial:
        # All ties would leave no variance: their share is shrunk as Wilson's interval shrinks the rate.
        count = prompts * binomial / (binomial - ties / 4 * prompts / (prompts + Z**2))
    elif effect.stderr and binomial:
        count, critical = binomial / effect.stderr**2, effect.half / effect.stderr
    return wilson(rate, count, critical)


def wilson(rate: float, count: float, critical: float = Z) -> Estimate:
    """Return a share with Wilson's score interval for `count` observations."""
    square = critical**2 / count
    centre = (rate + square / 2) / (1 + square)
    half = np.sqrt(square * (rate * (1 - rate) + square / 4)) / (1 + square)
    return Estimate(rate, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def kl_estimate(kl: np.ndarray) -> Estimate:
    """Return the KL of [S, P] seeds and prompts with an interval on the logarithmic scale.

    The value is the geometric mean of the seeds' means over prompts. To first order a prompt adds kl/mean - 1 to the
    logarithm of its seed's mean, which makes an [S, P] array for `crossed_effect`.
    """
    means = kl.mean(axis=1, keepdims=True)
    if (means <= 0).any():
        return Estimate(float(kl.mean()))
    logs = crossed_effect(np.log(means) + kl / means - 1).interval
    return Estimate(*(None if value is None else float(np.exp(value)) for value in logs))


def distinct(texts: list[str], n: int) -> float | None:
    """Return the share of different n-grams (words, lower case) among all of the texts' n-grams; None without any."""
    grams = []
    for text in texts:
        words = text.lower().split()
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


class Curve(NamedTuple):
    """A sampler's M models: rewards [M, N] and KL [M, P] of each prompt; `paired`: of the same responses."""

    rewards: np.ndarray
    kl: np.ndarray
    paired: bool = False


class Matched(NamedTuple):
    """Reward differences at equal KL: at `kl`, the largest that both curves reach, and on average from `low` on."""

    low: float
    kl: float
    at: Estimate
    average: Estimate


def interpolate(kl: np.ndarray, reward: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the reward at the KL values `at`, along the lines that join the points in the order of their KL."""
    order = np.argsort(kl, kind="stable")
    return np.interp(at, kl[order], reward[order])


def matched_kl(ours: Curve, theirs: Curve, seed: int) -> Matched | None:
    """Return our reward minus theirs at common KL; None if the curves share no range of KL.

    The interval is a BCa bootstrap over the rewards' prompts and over the KL's, or over both together where they are
    paired, the same for both curves. A resampled curve that ends before the common KL goes on with its last reward.
    """
    ends = [(c.kl.mean(axis=1).min(), c.kl.mean(axis=1).max()) for c in (ours, theirs)]
    low, high = max(a for a, _ in ends), min(b for _, b in ends)
    if low >= high:
        return None
    grid = np.linspace(low, high, 21)

    def difference(tests: np.ndarray, kls: np.ndarray) -> np.ndarray:  # weights [R, N], [R, P] → [R, 2]
        lines = [[interpolate(k, r, grid) for k, r in zip(kls @ c.kl.T, tests @ c.rewards.T, strict=True)]
                 for c in (ours, theirs)]  # fmt: skip
        apart = np.array(lines[0]) - np.array(lines[1])
        return np.stack([apart[:, -1], apart.mean(axis=1)], axis=1)

    if ours.paired and theirs.paired:
        at, average = bca(lambda weights: difference(weights, weights), (ours.kl.shape[1],), seed)
    else:
        at, average = bca(difference, (ours.rewards.shape[1], ours.kl.shape[1]), seed)
    return Matched(float(low), float(high), at, average)


def bca(statistic: Callable, counts: tuple[int, ...], seed: int) -> list[Estimate]:
    """Return estimates with bias-corrected accelerated bootstrap intervals (Efron 1987).

    Args:
        statistic: takes for each of the samples weights [R, count] that sum to 1; returns [R, D].
        counts: how many observations each sample has; they are resampled independently.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    equal = [np.full((1, n), 1 / n) for n in counts]
    drawn = statistic(*(rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in counts))
    value = statistic(*equal)[0]
    # Influence of each observation, by leaving it out; the acceleration is the skewness of their sum.
    cubes, squares = np.zeros_like(value), np.zeros_like(value)
    for i, n in enumerate(counts):
        if n < 2:
            return [Estimate(float(v)) for v in value]
        left_out = (1 - np.eye(n)) / (n - 1)
        found = statistic(*(left_out if j == i else np.repeat(w, n, axis=0) for j, w in enumerate(equal)))
        influence = (n - 1) * (found.mean(axis=0) - found)
        cubes, squares = cubes + (influence**3).sum(axis=0) / n**3, squares + (influence**2).sum(axis=0) / n**2
    acceleration = cubes / np.maximum(6 * squares**1.5, np.finfo(float).tiny)
    return [_bca_interval(*each) for each in zip(value, drawn.T, acceleration, strict=True)]


def _bca_interval(value: float, drawn: np.ndarray, acceleration: float) -> Estimate:
    below = ((drawn < value) + 0.5 * (drawn == value)).mean()
    bias = special.ndtri(np.clip(below, 0.5 / RESAMPLES, 1 - 0.5 / RESAMPLES))
    z = bias + np.array([-Z, Z])
    return Estimate(float(value), *map(float, np.quantile(drawn, special.ndtr(bias + z / (1 - acceleration * z)))))


def at_equal_kl(rewards: np.ndarray, kl: np.ndarray) -> list[Effect] | None:
    """Return how much each sampler but the first adds to the reward at equal KL, over seeds and prompts.

    Least squares of mean reward = seed + sampler + slope · log KL; errors over seeds from its residuals, over prompts
    from the same fit of each prompt, combined as in `crossed_effect`.

    Args:
        rewards: [S, K, N], each sampler's last model.
        kl: [S, K].

    Returns:
        K - 1 effects; None where there are too few seeds, or the samplers' KL does not overlap enough to tell.
    """
    seeds, samplers, prompts = rewards.shape
    df = seeds * samplers - (seeds + samplers)
    if df < 1 or prompts < 2 or (kl <= 0).any():
        return None
    cells = list(itertools.product(range(seeds), range(1, samplers + 1)))
    design = np.array([[*np.eye(seeds)[s], *np.eye(samplers + 1)[k][2:], np.log(kl[s, k - 1])] for s, k in cells])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    inverse = np.linalg.pinv(design)
    flat = rewards.reshape(-1, prompts)
    fitted = inverse @ flat  # [coefficients, N]
    left = flat - design @ fitted
    noise = (left.mean(axis=1) ** 2).sum() / df
    residual = ((left - left.mean(axis=1, keepdims=True)) ** 2).sum() / (df * (prompts - 1)) / prompts
    effects = []
    for k in range(seeds, seeds + samplers - 1):
        size = (inverse[k] ** 2).sum()  # the diagonal of (D'D)^-1
        parts = size * noise, fitted[k].var(ddof=1) / prompts, size * residual
        effects.append(Effect(float(fitted[k].mean()), *combined(parts, (df, prompts - 1, df * (prompts - 1)))))
    return effects
