"""The theorems' bounds, the predicted floor of sampled gradients, and the check of the bounds on many instances.

Bounds (Shi, Zhou, Du, ICLR 2025; rewards in [0, 1], lr `theory`) on max |delta| after T updates:
DPO-Unif 0.588^T, with the weight of an ordered pair 2, so alpha = 2 |Y|^2; DPO-Mix-R 0.5^(2^T - 1);
DPO-Mix-P and DPO-Mix-P* 0.611^(2^T - 1).
"""

import math
from collections.abc import Iterator

import numpy as np

from bandit.problem import make_bandit, reward_stream
from bandit.samplers import SAMPLERS
from bandit.simulate import simulate

ALPHA_CONVENTION = "alpha = 2|Y|^2 for DPO-Unif (weight 2 per ordered pair)"

# sampler -> (base, whether the exponent is 2^T - 1 rather than T)
BOUNDS = {
    "DPO-Unif": (0.588, False),
    "DPO-Mix-R": (0.5, True),
    "DPO-Mix-P": (0.611, True),
    "DPO-Mix-P*": (0.611, True),
}

# Below this a float64 error of rewards of order 1 is rounding, and no bound can be checked.
ROUNDING = 1e-13


def bound(name: str, num_iter: int) -> np.ndarray:
    """Bound on max |delta| after 0 ... num_iter - 1 updates, [num_iter]; underflows to 0."""
    base, doubling = BOUNDS[name]
    updates = np.arange(num_iter, dtype=float)
    exponent = np.exp2(np.minimum(updates, 60)) - 1 if doubling else updates
    return np.exp(exponent * math.log(base))


def noise_floor(beta: float, lr: float, num_samples: int, num_actions: int) -> float:
    """Predicted stationary mean |delta| of sampled gradients at a small constant lr: the same for every sampler."""
    return beta * math.sqrt(2 * lr / (math.pi * num_samples)) * (1 - 1 / num_actions)


def instances(num_actions: int, num_envs: int, seed: int) -> np.ndarray:
    """Rewards in [0, 1], [about num_envs, |Y|]: uniform, at both ends, in two clusters, all splits 0...01...1."""
    stream = reward_stream(seed)
    third = num_envs // 3
    uniform = stream.random((third, num_actions))
    ends = stream.integers(0, 2, (third, num_actions)).astype(float)
    clusters = np.clip(ends + 0.1 * stream.standard_normal((third, num_actions)), 0, 1)
    splits = np.tril(np.ones((num_actions, num_actions)), -1)[1:]
    return np.concatenate([uniform, ends, clusters, splits])


def worst_ratio(name: str, rewards: np.ndarray, beta: float, num_iter: int) -> float:
    """Largest max |delta| / bound over environments and updates >= 1 whose bound is above rounding."""
    bandit = make_bandit(rewards, beta)
    series = simulate(bandit, name, SAMPLERS[name], "exact", "theory", num_iter, 1, 0)
    limits = bound(name, num_iter)
    checked = limits > ROUNDING
    checked[0] = False  # before the first update the ratio says nothing: both can be 1
    return float((series["max_delta"][:, checked] / limits[checked]).max())


def check_bounds(
    names: list[str], sizes: list[int], num_envs: int, beta: float, num_iter: int, seed: int
) -> Iterator[dict]:
    """One row a sampler and size: instances and the worst ratio (<= 1 where the theorem holds)."""
    for num_actions in sizes:
        rewards = instances(num_actions, num_envs, seed)
        for name in names:
            worst = worst_ratio(name, rewards, beta, num_iter)
            yield {
                "sampler": name,
                "num_actions": num_actions,
                "instances": len(rewards),
                "worst_ratio": worst,
                "holds": worst <= 1 + 1e-9,
            }
