"""Samplers compared fairly: each at a step size tuned for it, on environments that the result does not use.

At one lr a comparison of samplers is a comparison of step sizes: their losses differ in curvature by orders of
magnitude. So every run has lr = scale * (stability limit of that sampler in that environment). The scale is the one
of a grid that did best on other environments of the same kind.
"""

from collections.abc import Callable

import numpy as np

from bandit import exact, sampled
from bandit.problem import Bandit
from bandit.samplers import Sampler
from bandit.steps import largest_stable_lr

# Multiples of the stability limit. Below 1 exact updates settle; small ones average the noise of sampled ones; the
# large ones are for samplers whose limit binds in a part of the run only.
EXACT_SCALES = (0.25, 0.5, 0.75, 0.9, 1.25, 2.0, 4.0, 8.0)
SAMPLED_SCALES = tuple(2.0**k for k in range(-9, 3))

TOLERANCE = 1e-3

# Exact updates between two looks at who has arrived.
BLOCK = 25

# Outcome [envs] by name, lower is better; NaN and inf count as worst.
Outcomes = dict[str, np.ndarray]
Run = Callable[[Bandit, np.ndarray], Outcomes]


def stability_limit(sampler: Sampler, bandit: Bandit) -> np.ndarray:
    """The smaller of 2 / curvature at the start (the reference) and at the optimum, [envs]."""
    start = largest_stable_lr(sampler, bandit, np.zeros_like(bandit.rewards))
    return np.minimum(start, largest_stable_lr(sampler, bandit))


def repeat(bandit: Bandit, times: int) -> Bandit:
    """The environments again and again: [times * envs, |Y|]."""
    return bandit.rows(np.tile(np.arange(len(bandit.rewards)), times))


def updates_needed(bandit: Bandit, sampler: Sampler, lr: np.ndarray, max_updates: int) -> Outcomes:
    """Exact updates until mean |delta| <= 1e-3, and until the value gap is 1e-3 of the reference's; inf: not reached.

    Args:
        lr: [envs, 1].
    """
    updates, u = exact.Updates(bandit, sampler, lr), np.zeros_like(bandit.rewards)
    found = {name: np.full(len(u), np.inf) for name in ("updates_param_diff", "updates_value_diff")}
    target = None
    for first in range(0, max_updates + 1, BLOCK):
        param_diff, _, value_diff, _ = updates.advance(u, min(BLOCK, max_updates + 1 - first))
        target = TOLERANCE * value_diff[:, :1] if target is None else target
        for name, reached in zip(found, (param_diff <= TOLERANCE, value_diff <= target), strict=True):
            arrival = np.where(reached.any(axis=1), first + reached.argmax(axis=1), np.inf)
            found[name] = np.minimum(found[name], arrival)
        if all(np.isfinite(values).all() for values in found.values()):
            break
    return found


def spend_budget(
    bandit: Bandit, sampler: Sampler, lr: np.ndarray, budget: int, pairs: int, stream: np.random.Generator
) -> Outcomes:
    """Value gap and mean |delta| after a budget of labelled pairs, `pairs` of them an update; lr [envs, 1]."""
    updates = sampled.Updates(bandit, sampler, lr, pairs, sampled.one_stream(stream, pairs))
    u = np.zeros_like(bandit.rewards)
    for _ in range(budget // pairs):
        updates.update(u)
    param_diff, _, value_diff, _ = exact.measure(bandit, u)
    return {"value_diff": value_diff, "param_diff": param_diff}


def _rank(values: np.ndarray) -> tuple[float, float]:
    """Order of step sizes: the median, then the share of environments that did not arrive."""
    values = np.where(np.isnan(values), np.inf, values)
    return float(np.median(values)), float(np.mean(np.isinf(values)))


def at_tuned_steps(
    bandit: Bandit, sampler: Sampler, num_tuning: int, scales: tuple[float, ...], run: Run
) -> tuple[Outcomes, dict[str, float]]:
    """Outcomes of the environments after the first num_tuning, at the scales that did best on those.

    Args:
        run: (bandit, lr [envs, 1]) -> outcomes.

    Returns:
        For each outcome its values [envs - num_tuning], and the scale chosen for it.
    """
    tuning, rest = bandit.rows(slice(num_tuning)), bandit.rows(slice(num_tuning, None))
    limits = np.outer(scales, stability_limit(sampler, tuning)).reshape(-1, 1)
    trials = run(repeat(tuning, len(scales)), limits)
    chosen = {}
    for name, values in trials.items():
        ranks = [_rank(of_scale) for of_scale in values.reshape(len(scales), -1)]
        chosen[name] = scales[ranks.index(min(ranks))]
    limit = stability_limit(sampler, rest)[:, None]
    results = {scale: run(rest, scale * limit) for scale in set(chosen.values())}
    return {name: results[scale][name] for name, scale in chosen.items()}, chosen
