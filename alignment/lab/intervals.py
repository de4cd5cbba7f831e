"""From values of samplers x learning rates x seeds to intervals: cross-fitted learning rates, paired t, Holm."""

from typing import NamedTuple

import numpy as np
from scipy import stats

FOLDS = 5


class Comparison(NamedTuple):
    """One sampler against the baseline: mean paired difference, its 95% t-interval, p-value and Holm's."""

    sampler: str
    gap: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    lr: float
    at_edge: float


def cross_fitted(gaps: np.ndarray, chosen_by: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate every seed at the learning rate that is best on the seeds of the other folds.

    Args:
        gaps: [lrs, seeds] what is reported.
        chosen_by: [lrs, seeds] what the choice minimises; None: the gaps.

    Returns:
        (values [seeds], the number of the lr used for each seed [seeds]).
    """
    criterion = gaps if chosen_by is None else chosen_by
    seeds = np.arange(gaps.shape[1])
    used = np.empty(len(seeds), dtype=int)
    folds = min(FOLDS, len(seeds))
    for fold in range(folds):
        held_out = seeds % folds == fold
        used[held_out] = criterion[:, ~held_out].mean(axis=1).argmin()
    return gaps[used, seeds], used


def holm(p_values: np.ndarray) -> np.ndarray:
    """Return Holm's adjusted p-values, in the order given."""
    order = np.argsort(p_values)
    steps = p_values[order] * (len(p_values) - np.arange(len(p_values)))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def paired(differences: np.ndarray) -> tuple[float, float, float, float]:
    """Return mean, 95% t-interval and two-sided p-value of paired differences [seeds]."""
    mean, count = differences.mean(), len(differences)
    stderr = differences.std(ddof=1) / count**0.5
    if not stderr > 0:
        return float(mean), float(mean), float(mean), float(mean == 0)
    half = stats.t.ppf(0.975, count - 1) * stderr
    return float(mean), float(mean - half), float(mean + half), float(2 * stats.t.sf(abs(mean) / stderr, count - 1))


def compare(gaps: np.ndarray, names: list[str], lrs: list[float], baseline: str = "online") -> list[Comparison]:
    """Compare every sampler with the baseline, each at its own cross-fitted learning rate.

    Args:
        gaps: [samplers, lrs, seeds] value gaps at the end.
    """
    fitted = {name: cross_fitted(gaps[i]) for i, name in enumerate(names)}
    base, _ = fitted[baseline]
    others = [name for name in names if name != baseline]
    rows = {name: paired(fitted[name][0] - base) for name in others}
    adjusted = dict(zip(others, holm(np.array([row[3] for row in rows.values()])), strict=True)) if others else {}
    result = []
    for name in names:
        values, used = fitted[name]
        row = rows.get(name, (0.0, 0.0, 0.0, 1.0))
        edge = float(np.isin(used, [0, len(lrs) - 1]).mean())
        lr = float(lrs[np.bincount(used).argmax()])
        result.append(Comparison(name, float(values.mean()), *row, float(adjusted.get(name, 1.0)), lr, edge))
    return result


def interval_text(value: float, low: float, high: float) -> str:
    """Return a difference with its interval as the docs write it, with a true minus."""
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")
