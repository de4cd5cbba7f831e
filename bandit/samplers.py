"""The samplers: one table. A sampler is a symmetric, low-rank matrix of pair weights.

A row's function gives `Factors`: left, right [envs, |Y|, k] and log_scale [envs, 1]. The unnormalised weight
of the ordered pair (y, y') is exp(log_scale) * (left @ right^T)[y, y']. The scale is apart: weights such as e^d
overflow long before their ratios do. DPO's loss is symmetric in the pair, so a distribution that is not (y1 from one
policy, y2 from another) is replaced by its symmetric part: the same gradient, and the same law of (winner, loser).

Weights as in Shi, Zhou, Du, "The Crucial Role of Samplers in Online Direct Preference Optimization", ICLR 2025:
DPO-Unif 1; DPO-Mix-R 2 + e^D + e^-D with D = r_y - r_y'; DPO-Mix-P the same with D = d(y, y') = u_y - u_y';
DPO-Mix-P* the same with d clipped to [-R, R], R = max r - min r of that environment.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bandit.mixtures import MIXTURES, POLICY, Mixture, always, get_mixture
from bandit.problem import Bandit, gaps


class Factors(NamedTuple):
    left: np.ndarray
    right: np.ndarray
    log_scale: np.ndarray

    def total(self) -> np.ndarray:
        """Sum of left @ right^T over all ordered pairs, [envs, 1]."""
        return (self.left.sum(axis=1) * self.right.sum(axis=1)).sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class Sampler:
    """One row.

    Attributes:
        factors: (u [envs, |Y|], bandit) -> Factors.
        about: what a pair is drawn from, for `--help`.
        fixed: True if the weights do not depend on the policy.
        clipped: True if d is clipped to the reward range (DPO-Mix-P*).
        alpha: the theorems' loss weight alpha as a multiple of Z, the sum of the weights above; None if no theorem
            covers the sampler. Mix-R and Mix-P: alpha1 + alpha2 = sum (1 + e^D) = Z / 2. Unif: alpha = 2 |Y|^2 = 2 Z.
    """

    factors: Callable[[np.ndarray, Bandit], Factors]
    about: str
    fixed: bool = False
    clipped: bool = False
    alpha: float | None = None

    def weights(self, u: np.ndarray, bandit: Bandit) -> tuple[np.ndarray, np.ndarray]:
        """Pair weights [envs, |Y|, |Y|] up to exp(log_scale), and log_scale [envs, 1]."""
        if self.clipped:
            return clipped_weights(u, bandit)
        left, right, log_scale = self.factors(u, bandit)
        return left @ right.swapaxes(1, 2), log_scale


def uniform(u: np.ndarray, bandit: Bandit) -> Factors:
    """Weight 1 for every pair."""
    ones = np.ones_like(u)[..., None]
    return Factors(ones, ones, np.zeros_like(u[:, :1]))


def exponential(x: np.ndarray) -> Factors:
    """Weight e^(x_y - x_y') + e^(x_y' - x_y), the largest at most exp(log_scale): one arm from e^x, one from e^-x."""
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    up, down = np.exp(x - high), np.exp(low - x)
    return Factors(np.stack([up, down], axis=-1), np.stack([down, up], axis=-1), high - low)


def mixture(x: np.ndarray) -> Factors:
    """Weight 2 + e^(x_y - x_y') + e^(x_y' - x_y): the uniform pair and the exponential one."""
    left, right, log_scale = exponential(x)
    ones = np.ones_like(x)[..., None]
    constant = 2 * np.exp(-log_scale)[..., None] * ones
    return Factors(np.concatenate([constant, left], -1), np.concatenate([ones, right], -1), log_scale)


def clipped_weights(u: np.ndarray, bandit: Bandit) -> tuple[np.ndarray, np.ndarray]:
    """min(2 + e^d + e^-d, 2 + e^R + e^-R), which is 2 + e^c + e^-c with c = min(|d|, R): the sum grows with |d|."""
    limit = bandit.reward_range[..., None]
    clipped = np.minimum(np.abs(gaps(u)), limit)
    weights = 2 * np.exp(-limit) + np.exp(clipped - limit) + np.exp(-clipped - limit)
    return weights, bandit.reward_range


def product_mixture(parts: list[tuple[float, np.ndarray, np.ndarray]]) -> Factors:
    """With probability p one arm from a and one from b, for every (p, log a, log b) of parts.

    The distribution carries no scale of its own. It is scaled so that the largest weight is at most 1 (exactly 1 for
    the uniform pair, DPO-Unif's weight), which keeps the matched step below the stability limit.
    """
    left, right, largest = [], [], 0.0
    for probability, log_a, log_b in parts:
        a, b = np.exp(log_a), np.exp(log_b)
        left += [probability / 2 * a, probability / 2 * b]
        right += [b, a]
        largest = largest + probability * a.max(axis=-1, keepdims=True) * b.max(axis=-1, keepdims=True)
    return Factors(np.stack(left, axis=-1), np.stack(right, axis=-1), -np.log(largest))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _log_uniform(u: np.ndarray) -> np.ndarray:
    return np.full_like(u, -math.log(u.shape[-1]))


def logit_mixture(mixture: Mixture) -> Callable[[np.ndarray, Bandit], Factors]:
    """A row of the language-model table: each arm from pi^w_policy pi_ref^w_reference, normalised."""

    def factors(u: np.ndarray, bandit: Bandit) -> Factors:
        log_pi, log_ref = bandit.log_policy(u), bandit.log_ref
        return product_mixture(
            [
                (p, *(_log_softmax(policy * log_pi + reference * log_ref) for policy, reference in arms))
                for p, *arms in mixture.pairs(bandit.beta)
            ]
        )

    return factors


def _optimal_uniform(u: np.ndarray, bandit: Bandit) -> Factors:
    return product_mixture([(1.0, bandit.log_optimum, _log_uniform(u))])


def _policy_uniform(u: np.ndarray, bandit: Bandit) -> Factors:
    return product_mixture([(1.0, bandit.log_policy(u), _log_uniform(u))])


def _mix_reward(u: np.ndarray, bandit: Bandit) -> Factors:
    return mixture(bandit.rewards)


def _mix_policy(u: np.ndarray, bandit: Bandit) -> Factors:
    return mixture(u)


SAMPLERS = {
    "DPO-Unif": Sampler(uniform, "both arms uniform", fixed=True, alpha=2.0),
    "DPO-Mix-R": Sampler(_mix_reward, "uniform pair mixed with (e^r, e^-r)", fixed=True, alpha=0.5),
    "DPO-Mix-P": Sampler(
        _mix_policy, "uniform pair mixed with ((pi/pi_ref)^beta, (pi_ref/pi)^beta)", alpha=0.5
    ),
    "DPO-Mix-P*": Sampler(
        _mix_policy, "DPO-Mix-P, weights clipped at the reward range", clipped=True, alpha=0.5
    ),
    "DPO-Mix-R-1": Sampler(uniform, "the uniform component of DPO-Mix-R alone", fixed=True),
    "DPO-Mix-R-2": Sampler(lambda u, b: exponential(b.rewards), "(e^r, e^-r) alone", fixed=True),
    "DPO-Mix-P-1": Sampler(uniform, "the uniform component of DPO-Mix-P alone", fixed=True),
    "DPO-Mix-P-2": Sampler(lambda u, b: exponential(u), "((pi/pi_ref)^beta, (pi_ref/pi)^beta) alone"),
    "DPO-Opt-Unif": Sampler(_optimal_uniform, "one arm from the optimal policy, one uniform", fixed=True),
    "DPO-Policy-Unif": Sampler(_policy_uniform, "one arm from the current policy, one uniform"),
    "DPO-Policy-Policy": Sampler(
        logit_mixture(Mixture(always(POLICY, POLICY), "")), "both arms from the current policy"
    ),
    **{
        name: Sampler(logit_mixture(row), row.about, fixed=name == "offline")
        for name, row in MIXTURES.items()
    },
}


def get_sampler(name: str) -> Sampler:
    """Row of the table, or a member of the logit-mixture family, `mix_A_B_P`, see bandit/mixtures.py.

    Raises:
        ValueError: the name is neither.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    if name.startswith("mix"):
        mixture = get_mixture(name)
        return Sampler(logit_mixture(mixture), mixture.about)
    raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}, mix_A_B_P")
