"""The samplers: one table. A sampler is a symmetric matrix of pair weights.

A row's law gives the unnormalised weight of the ordered pair (y, y') as exp(log_scale) * matrix[y, y'], the matrix
whole (`Dense`) or, where it is of low rank, as left @ right^T (`Factors`). The scale is apart: weights such as e^d
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


class Dense(NamedTuple):
    """Pair weights [envs, |Y|, |Y|] up to exp(log_scale), log_scale [envs, 1]."""

    matrix: np.ndarray
    log_scale: np.ndarray

    def dense(self) -> "Dense":
        return self


class Factors(NamedTuple):
    """The same as left @ right^T, both [envs, |Y|, k]."""

    left: np.ndarray
    right: np.ndarray
    log_scale: np.ndarray

    def dense(self) -> Dense:
        return Dense(self.left @ self.right.swapaxes(1, 2), self.log_scale)

    def total(self) -> np.ndarray:
        """Sum of left @ right^T over all ordered pairs, [envs, 1]."""
        return (self.left.sum(axis=1) * self.right.sum(axis=1)).sum(axis=-1, keepdims=True)


Law = Factors | Dense


@dataclass(frozen=True)
class Sampler:
    """One row.

    Attributes:
        law: (u [envs, |Y|], bandit) -> Factors or Dense; with `looks_back` (u, bandit, u before the last update).
        about: what a pair is drawn from, for `--help`.
        fixed: True if the weights do not depend on the policy; the law then gives Factors.
        looks_back: True if the weights depend on the state before the last update too.
        clipped: True if d is clipped to the reward range (DPO-Mix-P*), which limits exact.mix_policy's fast form.
        alpha: the theorems' loss weight alpha as a multiple of Z, the sum of the weights above; None if no theorem
            covers the sampler. Mix-R and Mix-P: alpha1 + alpha2 = sum (1 + e^D) = Z / 2. Unif: alpha = 2 |Y|^2 = 2 Z.
    """

    law: Callable[..., Law]
    about: str
    fixed: bool = False
    looks_back: bool = False
    clipped: bool = False
    alpha: float | None = None

    def weights(self, u: np.ndarray, bandit: Bandit, previous: np.ndarray | None = None) -> Dense:
        """Pair weights at the state u, reached from the state `previous` (None: from u itself, a run at rest)."""
        if self.looks_back:
            return self.law(u, bandit, u if previous is None else previous).dense()
        return self.law(u, bandit).dense()

    def successive(self, bandit: Bandit) -> Callable[[np.ndarray], Dense]:
        """The weights of one run, whose states are given in order; before the first there is the reference, u = 0."""
        if not self.looks_back:
            return lambda u: self.weights(u, bandit)
        previous = np.zeros_like(bandit.rewards)

        def weights(u: np.ndarray) -> Dense:
            nonlocal previous
            result = self.weights(u, bandit, previous)
            previous = u.copy()  # the caller may reuse the array
            return result

        return weights


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


def clipped_mixture(u: np.ndarray, bandit: Bandit) -> Dense:
    """min(2 + e^d + e^-d, 2 + e^R + e^-R), which is 2 + e^c + e^-c with c = min(|d|, R): the sum grows with |d|."""
    limit = bandit.reward_range[..., None]
    clipped = np.minimum(np.abs(gaps(u)), limit)
    weights = 2 * np.exp(-limit) + np.exp(clipped - limit) + np.exp(-clipped - limit)
    return Dense(weights, bandit.reward_range)


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


def logit_mixture(mixture: Mixture) -> Callable[..., Factors]:
    """Two draws of a row of the language-model table: each arm from pi^w_policy pi_second^w_second, normalised."""

    def law(u: np.ndarray, bandit: Bandit, previous: np.ndarray | None = None) -> Factors:
        log_pi = bandit.log_policy(u)
        log_second = bandit.log_ref if previous is None else bandit.log_policy(previous)
        return product_mixture(
            [
                (p, *(_log_softmax(policy * log_pi + second * log_second) for policy, second in arms))
                for p, *arms in mixture.pairs(bandit.beta)
            ]
        )

    return law


def extremes(pi: np.ndarray, scores: np.ndarray, draws: int) -> np.ndarray:
    """P(best = y, worst = y') of independent draws from pi, by score: [envs, |Y|, |Y|] from pi, scores [envs, |Y|].

    No draw below y' and none above y has probability S^draws, S = pi of the arms between; subtracting the cases in
    which y' or y itself does not occur leaves four such powers. Equal scores are ordered at random: best and worst
    are then shared among the arms of one score in proportion to pi.
    """
    below = np.matvec((scores[:, None, :] < scores[:, :, None]).astype(pi.dtype), pi)
    up_to = np.matvec((scores[:, None, :] <= scores[:, :, None]).astype(pi.dtype), pi)
    level = np.matvec((scores[:, None, :] == scores[:, :, None]).astype(pi.dtype), pi)
    share = np.divide(pi, level, out=np.zeros_like(pi), where=level > 0)

    def within(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        return np.maximum(high[:, :, None] - low[:, None, :], 0) ** draws

    levels = within(up_to, below) - within(up_to, up_to) - within(below, below) + within(below, up_to)
    # Cancellation can leave -1e-17 of a probability that is 0.
    return np.maximum(levels, 0) * share[:, :, None] * share[:, None, :]


def best_and_worst(mixture: Mixture) -> Callable[..., Dense]:
    """The best and the worst of the row's candidates, independent draws from one policy, by (implicit) reward."""

    def law(u: np.ndarray, bandit: Bandit) -> Dense:
        ((_, (policy, second), other),) = mixture.pairs(bandit.beta)
        if other != (policy, second):
            raise NotImplementedError("best and worst of draws from two policies have no closed form here")
        pi = np.exp(_log_softmax(policy * bandit.log_policy(u) + second * bandit.log_ref))
        weights = extremes(pi, bandit.rewards if mixture.choose == "max_min" else u, mixture.candidates)
        weights = (weights + weights.swapaxes(1, 2)) / 2
        return Dense(weights, -np.log(weights.max(axis=(1, 2))[:, None]))

    return law


def has_law(mixture: Mixture) -> bool:
    """Whether `from_mixture` has the row's law: that of `max_sweet` among many candidates has no closed form here."""
    return mixture.candidates == 2 or mixture.choose in ("max_min", "implicit_max_min", "random")


def from_mixture(mixture: Mixture, fixed: bool = False) -> Sampler:
    """A row of the language-model table as a sampler of arms.

    Two of N independent draws are two independent draws, so with the choice `random` only the pair counts.
    """
    looks_back = mixture.second_model == "previous"
    if mixture.candidates > 2 and mixture.choose != "random":
        return Sampler(best_and_worst(mixture), mixture.about)
    return Sampler(logit_mixture(mixture), mixture.about, fixed=fixed, looks_back=looks_back)


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
    "DPO-Mix-P": Sampler(_mix_policy, "uniform pair mixed with ((pi/pi_ref)^beta, (pi_ref/pi)^beta)", alpha=0.5),
    "DPO-Mix-P*": Sampler(clipped_mixture, "DPO-Mix-P, weights clipped at the reward range", clipped=True, alpha=0.5),
    "DPO-Mix-R-1": Sampler(uniform, "the uniform component of DPO-Mix-R alone", fixed=True),
    "DPO-Mix-R-2": Sampler(lambda u, b: exponential(b.rewards), "(e^r, e^-r) alone", fixed=True),
    "DPO-Mix-P-1": Sampler(uniform, "the uniform component of DPO-Mix-P alone", fixed=True),
    "DPO-Mix-P-2": Sampler(lambda u, b: exponential(u), "((pi/pi_ref)^beta, (pi_ref/pi)^beta) alone"),
    "DPO-Opt-Unif": Sampler(_optimal_uniform, "one arm from the optimal policy, one uniform", fixed=True),
    "DPO-Policy-Unif": Sampler(_policy_uniform, "one arm from the current policy, one uniform"),
    "DPO-Policy-Policy": Sampler(
        logit_mixture(Mixture(always(POLICY, POLICY), "")), "both arms from the current policy"
    ),
    **{name: from_mixture(row, fixed=name == "offline") for name, row in MIXTURES.items() if has_law(row)},
}


def get_sampler(name: str) -> Sampler:
    """Row of the table, or a member of the logit-mixture family, `mix_A_B_P`, see bandit/mixtures.py.

    Raises:
        ValueError: the name is neither.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    if name.startswith("mix"):
        return from_mixture(get_mixture(name))
    raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}, mix_A_B_P")
