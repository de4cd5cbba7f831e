"""The loop that every run shares: blocks of updates, recorded."""

from collections.abc import Callable

import numpy as np

from bandit import exact, sampled
from bandit.problem import Bandit
from bandit.samplers import Sampler

# Pairs of a block of updates, some milliseconds: states stay in cache until they are measured, progress moves.
BLOCK = 4_000_000


class Diverged(ValueError):
    """The state left the range of floating-point numbers."""


def simulate(
    bandit: Bandit,
    name: str,
    sampler: Sampler,
    mode: str,
    lr: exact.Rate,
    num_iter: int,
    num_samples: int,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """One sampler, with `exact` or `sampled` gradients, in all environments, from the reference policy.

    Returns:
        The series exact.METRICS, each [envs, num_iter]; column t is the state after t updates, so column 0 is the
        reference policy and the last column the state after num_iter - 1 updates.

    Raises:
        Diverged: a state is not finite.
    """
    if mode == "exact":
        updates = exact.Updates(bandit, sampler, lr)
    else:
        draw = sampled.own_streams(name, len(bandit.rewards), num_samples, seed)
        updates = sampled.Updates(bandit, sampler, lr, num_samples, draw)
    u = np.zeros_like(bandit.rewards)
    series = np.empty((len(exact.METRICS), len(u), num_iter))
    block = max(1, BLOCK // (u.size * bandit.num_actions))
    for start in range(0, num_iter, block):
        steps = min(block, num_iter - start)
        series[:, :, start : start + steps] = found = updates.advance(u, steps)
        if not np.isfinite(found).all():
            raise Diverged(f"the iteration diverged before update {start + steps}; use a smaller --lr")
        if progress is not None:
            progress(steps)
    return dict(zip(exact.METRICS, series, strict=True))
