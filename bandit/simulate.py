"""The loop that every run shares: state, increment, next state; measured in blocks."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from bandit import exact, sampled
from bandit.metrics import NAMES, measure
from bandit.problem import Bandit
from bandit.samplers import Sampler

# Numbers kept before they are measured: enough to amortise the calls, few enough to stay in cache.
BLOCK_NUMBERS = 20_000


class Diverged(ValueError):
    """The state left the range of floating-point numbers."""


def run(
    bandit: Bandit, increment: exact.Increment, num_iter: int, progress: Callable[[int], object] | None = None
) -> dict[str, np.ndarray]:
    """Iterates from the reference policy.

    Returns:
        The series of `metrics.measure`, each [envs, num_iter]; column t is the state after t updates, so column 0
        is the reference policy and the last column the state after num_iter - 1 updates.

    Raises:
        Diverged: a state is not finite.
    """
    out = np.empty_like(bandit.rewards)
    updates = num_iter - 1
    block = max(1, min(updates, BLOCK_NUMBERS // bandit.rewards.size))
    states = np.zeros((block + 1, *bandit.rewards.shape), bandit.rewards.dtype)
    rows = list(states)
    wide = Bandit(bandit.rewards.astype(np.float64), bandit.log_ref.astype(np.float64), bandit.beta)
    series = {name: np.empty((len(bandit.rewards), num_iter)) for name in NAMES}

    def record(first: int, measured_states: np.ndarray) -> None:
        for name, values in measure(wide, measured_states.astype(np.float64, copy=False)).items():
            series[name][:, first : first + len(measured_states)] = values

    record(0, states[:1])
    for start in range(0, updates, block):
        steps = min(block, updates - start)
        for now, after in pairwise(rows[: steps + 1]):
            increment(now, out)
            np.add(now, out, after)
        if not np.isfinite(states[steps]).all():
            raise Diverged(f"the iteration diverged before update {start + steps}; use a smaller --lr")
        record(start + 1, states[1 : steps + 1])
        states[0] = states[steps]
        if progress is not None:
            progress(steps)
    return series


def simulate(
    bandit: Bandit,
    name: str,
    sampler: Sampler,
    mode: str,
    lr: float | str,
    num_iter: int,
    num_samples: int,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """One sampler, with `exact` or `empirical` gradients, in all environments."""
    if mode == "exact":
        increment = exact.make_increment(bandit, sampler, lr)
    else:
        increment = sampled.make_increment(bandit, sampler, name, lr, num_samples, seed)
    return run(bandit, increment, num_iter, progress)
