"""Exact gradients in closed form: increments of u for one update, no autograd.

All forms compute gain * sum_y' w (P* - sigma(d)), P* = sigma(Dr) where no label is flipped; they differ only in cost.
sigma(x) = (1 + tanh(x / 2)) / 2 never overflows and leaves w/2 * (2 P* - 1 - tanh(d / 2)).
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.polynomial import chebyshev

from bandit.problem import Bandit, gaps
from bandit.samplers import Dense, Factors, Sampler
from bandit.steps import gain

Increment = Callable[[np.ndarray, np.ndarray], None]

# Up to this many arms two products with the [|Y|, pairs] incidence matrix beat broadcasting over |Y| x |Y|.
EDGES_TO = 32

# Below this many arms the |Y|^2 form is as fast as interpolation and simpler to trust.
INTERPOLATE_FROM = 256


def dense(u: np.ndarray, bandit: Bandit, sampler: Sampler, lr: float | str, law: Dense | None = None) -> np.ndarray:
    """Increment [envs, |Y|] at u for any sampler, with the whole |Y| x |Y| matrix of weights (None: those at u)."""
    weights, log_scale = law or sampler.weights(u, bandit)
    step = gain(lr, sampler, bandit, weights.sum(axis=(1, 2))[:, None], log_scale)
    return step / 2 * np.vecdot(weights, bandit.win_margins - np.tanh(gaps(u) / 2))


def fixed_weights(bandit: Bandit, sampler: Sampler, lr: float | str) -> Increment:
    """Weights that never change, with gain and constant part folded in once: few array operations an update."""
    weights, log_scale = sampler.weights(bandit.rewards, bandit)
    step = gain(lr, sampler, bandit, weights.sum(axis=(1, 2))[:, None], log_scale)
    weights = np.ascontiguousarray(step[..., None] / 2 * weights)
    constant = np.vecdot(weights, bandit.win_margins)
    if bandit.num_actions <= EDGES_TO:
        return _edge_sums(weights, constant)
    half, matrix = np.empty_like(bandit.rewards), np.empty_like(weights)
    column, row = half[:, :, None], half[:, None, :]

    def increment(u: np.ndarray, out: np.ndarray) -> None:
        np.multiply(u, 0.5, half)
        np.subtract(column, row, matrix)
        np.tanh(matrix, matrix)
        np.vecdot(weights, matrix, out)
        np.subtract(constant, out, out)

    return increment


def _edge_sums(weights: np.ndarray, constant: np.ndarray) -> Increment:
    """The same over the unordered pairs y < y', through the complete graph's incidence matrix [|Y|, pairs]."""
    num_actions = weights.shape[1]
    first, second = np.triu_indices(num_actions, 1)
    identity = np.eye(num_actions, dtype=weights.dtype)
    incidence = identity[:, first] - identity[:, second]
    half, back = incidence / 2, np.ascontiguousarray(incidence.T)
    edges = np.ascontiguousarray(weights[:, first, second])
    forces = np.empty_like(edges)

    def increment(u: np.ndarray, out: np.ndarray) -> None:
        np.dot(u, half, forces)
        np.tanh(forces, forces)
        np.multiply(edges, forces, forces)
        np.dot(forces, back, out)
        np.subtract(constant, out, out)

    return increment


def mix_policy(bandit: Bandit, sampler: Sampler, lr: float | str) -> Increment:
    """DPO-Mix-P: w sigma(d) = 1 + e^d leaves two products of a constant matrix with a vector, and |Y| exponentials.

    With a = e^u and b = e^-u, w = 2 + a b' + b a' and
    sum_y' w (P* - sigma(d)) = sum_y' (2 P* - 1) + a (P* - 1) b + b P* a.
    The dense form takes over where e^|d| nears overflow, and for DPO-Mix-P* where some |d| exceeds the reward range.
    """
    wins = (1 + bandit.win_margins) / 2
    matrices = np.stack([wins - 1, wins])
    constant = bandit.win_margins.sum(axis=2)
    pairs = bandit.num_actions**2
    both = np.empty((2, *bandit.rewards.shape), bandit.rewards.dtype)
    (a, b), swapped, force = both, both[::-1], np.empty_like(both)
    unscaled = np.zeros_like(bandit.rewards[:, :1])
    safe = np.sqrt(np.finfo(both.dtype).max)
    # At the optimum the largest |d| is the reward range up to rounding, which is nothing to clip.
    limit = bandit.reward_range * (1 + 1e-12)

    def increment(u: np.ndarray, out: np.ndarray) -> None:
        clips = sampler.clipped and (np.ptp(u, axis=-1, keepdims=True) > limit).any()
        if not clips:
            np.exp(u, a)
            np.reciprocal(a, b)
            sums = np.add.reduce(both, axis=2, keepdims=True)
            total = 2 * (pairs + sums[0] * sums[1])
        if clips or not total.max() < safe:
            out[...] = dense(u, bandit, sampler, lr)
            return
        np.matvec(matrices, swapped, force)
        np.multiply(both, force, force)
        np.add(force[0], force[1], out)
        np.add(out, constant, out)
        np.multiply(out, gain(lr, sampler, bandit, total, unscaled), out)

    return increment


@lru_cache(maxsize=64)
def _chebyshev(num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in (-1, 1) and the matrix from values there to Chebyshev coefficients."""
    nodes = chebyshev.chebpts1(num_nodes)
    to_coefficients = chebyshev.chebvander(nodes, num_nodes - 1).T * (2 / num_nodes)
    to_coefficients[0] /= 2
    return nodes, to_coefficients


def _num_nodes(half_width: float) -> int:
    """Nodes for 1e-16 on an interval: sigma's poles lie pi off the real axis, so the error falls like rho^-nodes."""
    distance = np.pi / max(half_width, 1e-3)
    return int(np.ceil(37 / np.log(distance + np.sqrt(1 + distance**2)))) + 4


def logistic_sums(u: np.ndarray, right: np.ndarray) -> np.ndarray:
    """S[i, k] = sum_j sigma(u_i - u_j) right[j, k] in O(|Y|), to rounding. u [|Y|], right [|Y|, k].

    As a function of u_i the sum is analytic: evaluate it at a few Chebyshev nodes, then interpolate.
    """
    centre, half_width = (u.max() + u.min()) / 2, max(np.ptp(u) / 2, 1e-3)
    nodes, to_coefficients = _chebyshev(_num_nodes(half_width))
    at, powers = np.exp(half_width * nodes)[:, None], np.exp(u - centre)
    values = (at / (at + powers)) @ right
    basis = chebyshev.chebvander((u - centre) / half_width, len(nodes) - 1)
    return basis @ (to_coefficients @ values)


def fixed_interpolated(bandit: Bandit, sampler: Sampler, lr: float | str) -> Increment:
    """Fixed weights of many arms: their few factors turn the |Y|^2 sum into a few logistic sums."""
    factors: Factors = sampler.law(bandit.rewards, bandit)
    step = gain(lr, sampler, bandit, factors.total(), factors.log_scale)
    left = step[..., None] * factors.left
    right = factors.right

    def forces(u: np.ndarray) -> np.ndarray:
        return np.stack([(a * logistic_sums(x, b)).sum(axis=1) for x, a, b in zip(u, left, right, strict=True)])

    # P* = (1 - 2 eps) sigma(Dr) + 2 eps sigma(0), eps the share of flipped labels.
    flipped = 2 * bandit.label_noise
    constant = (1 - flipped) * forces(bandit.rewards) + flipped * forces(np.zeros_like(bandit.rewards))
    direct = None

    def increment(u: np.ndarray, out: np.ndarray) -> None:
        nonlocal direct
        if _wide(u):
            direct = direct or fixed_weights(bandit, sampler, lr)
            direct(u, out)
        else:
            np.subtract(constant, forces(u), out)

    return increment


def _wide(u: np.ndarray) -> bool:
    """True if the nodes would be so many that the direct sum is as fast, or exponentials might overflow."""
    half_width = np.ptp(u, axis=-1).max() / 2
    return half_width > 80 or _num_nodes(half_width) > u.shape[-1] // 4


def make_increment(bandit: Bandit, sampler: Sampler, lr: float | str) -> Increment:
    """The fastest form for this sampler: a function (u [envs, |Y|], out) that writes u's next increment into out."""
    if sampler.fixed:
        many = bandit.num_actions >= INTERPOLATE_FROM and not _wide(bandit.rewards)
        return (fixed_interpolated if many else fixed_weights)(bandit, sampler, lr)
    if sampler.alpha is not None:
        return mix_policy(bandit, sampler, lr)

    weights = sampler.successive(bandit)

    def increment(u: np.ndarray, out: np.ndarray) -> None:
        out[...] = dense(u, bandit, sampler, lr, weights(u))

    return increment
