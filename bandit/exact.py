"""Exact gradients: the formula and the metrics in numpy, and the updates of a run, compiled where the law is data.

Numbers in brackets are the equations of docs/bandit.md. State: u [envs, |Y|], the implicit rewards.
"""

import numpy as np

from bandit import kernel
from bandit.problem import Bandit, gaps
from bandit.samplers import Sampler

METRICS = ("param_diff", "value", "value_diff", "max_delta")

Rate = float | str | np.ndarray  # a number, one per environment [envs, 1], or one of steps.RULES


def gain(lr: Rate, sampler: Sampler, bandit: Bandit, total: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    """Gain [envs, 1] of equation (4); total: sum of the pair weights up to exp(log_scale), [envs, 1].

    matched: lr* = Z / (2 beta^2 |Y|) with Z at the current policy; Z cancels and the gain is exp(log_scale) / |Y|.
    theory: eta = 1 / (beta^2 |Y|) on a loss whose weights sum to alpha, i.e. lr = eta * alpha. alpha is that of the
    theorems: sum (1 + e^D) = Z / 2 for the mixtures (so theory = matched), 2 |Y|^2 for DPO-Unif.
    """
    if not isinstance(lr, str):
        return 2 * bandit.beta**2 * lr / total  # (4)
    ratio = 0.5 if lr == "matched" else sampler.alpha
    return 2 * ratio * np.exp(log_scale) / bandit.num_actions


def increment(u: np.ndarray, bandit: Bandit, sampler: Sampler, lr: Rate, before: np.ndarray) -> np.ndarray:
    """What one update adds to u, [envs, |Y|]; before: u before the last update, for samplers that look back."""
    d = gaps(u)  # (1)
    weights, log_scale = sampler.weights(u, bandit, before)
    total = weights.sum(axis=(1, 2))[:, None]  # Z
    # P* - sigma(d), and sigma(x) = (1 + tanh(x / 2)) / 2 never overflows.
    surprise = (bandit.win_margins - np.tanh(d / 2)) / 2
    return gain(lr, sampler, bandit, total, log_scale) * np.vecdot(weights, surprise)  # (3)


def mean_gap(v: np.ndarray) -> np.ndarray:
    """sum |v_y - v_y'| / |Y|^2 over ordered pairs, [...] from v [..., |Y|], in O(|Y| log |Y|).

    The k-th smallest of |Y| values is subtracted |Y| - 1 - k times and added k times, in each order of the pair.
    """
    num_actions = v.shape[-1]
    signs = 2.0 * np.arange(num_actions) - (num_actions - 1)
    return np.sort(v, axis=-1) @ signs * (2 / num_actions**2)


def value_gap(bandit: Bandit, u: np.ndarray) -> np.ndarray:
    """V* - V(pi) = beta KL(pi || pi*) of states [..., envs, |Y|]: sum pi (e^x - 1 - x), x = log pi* - log pi (6).

    Every term is >= 0 and of second order, so the gap keeps its digits down to 1e-30, where V* - V(pi) is rounding.
    """
    log_pi = bandit.log_policy(u)
    x = bandit.log_optimum - log_pi
    pi = np.exp(log_pi)
    near = np.minimum(x, 1)
    terms = pi * (np.expm1(near) - near)
    if not x.max() <= 1:  # or NaN in some row; e^x may overflow, but pi e^x = pi*
        terms = np.where(x > 1, np.exp(bandit.log_optimum) - pi * (1 + x), terms)
    return bandit.beta * np.maximum(terms, 0).sum(axis=-1)


def measure(bandit: Bandit, u: np.ndarray) -> np.ndarray:
    """METRICS of float64 states u [..., envs, |Y|], stacked [4, ..., envs].

    param_diff: mean over all |Y|^2 pairs of |delta| (5); value: V(pi) = sum pi (r - beta log(pi / pi_ref)), as V*
    minus the gap; value_diff: V* - V(pi); max_delta: the largest |delta|. Rewards' units throughout.
    """
    v, gap = bandit.rewards - u, value_gap(bandit, u)
    return np.stack([mean_gap(v), bandit.best_value - gap, gap, np.ptp(v, axis=-1)])


def compiled_setup(bandit: Bandit, sampler: Sampler, lr: Rate) -> kernel.Setup | None:
    """The run's constants as kernel.py takes them; None where the formula above must do.

    That is for laws that are no data, for more than two terms (one, where they are not normalised), for float32.
    """
    if sampler.products is None or bandit.rewards.dtype != np.float64:
        return None
    law = sampler.products(bandit)
    if len(law.terms) > (2 if law.normalised else 1):
        return None
    envs, num_actions = bandit.rewards.shape
    slopes, bases = np.zeros((2, 2, 2)), np.zeros((envs, 4, num_actions))
    for k, (_, *arms) in enumerate(law.terms):
        for side, arm in enumerate(arms):
            slopes[k, side] = arm.of_u, arm.of_before
            bases[:, 2 * k + side] = arm.base
    rates = (1.0 if lr == "matched" else 2 * sampler.alpha) if isinstance(lr, str) else lr
    limit = np.full(envs, np.inf) if law.limit is None else law.limit[:, 0].copy()
    centre = (bandit.rewards.max(axis=1, keepdims=True) + bandit.rewards.min(axis=1, keepdims=True)) / 2
    return kernel.Setup(
        rewards=bandit.rewards.copy(),
        powers=np.exp(np.clip(bandit.rewards - centre, -350, 350)),  # used where they are within
        log_ref=bandit.log_ref.copy(),
        log_optimum=bandit.log_optimum,
        optimum=np.exp(bandit.log_optimum),
        beta=bandit.beta,
        keep=1.0 - 2 * bandit.label_noise,
        by_rule=isinstance(lr, str),
        rates=np.broadcast_to(np.asarray(rates, float).reshape(-1), envs).copy(),
        constant=law.constant,
        masses=np.array([*(mass for mass, *_ in law.terms), 0.0, 0.0][:2]),
        slopes=slopes,
        bases=bases,
        normalised=law.normalised,
        fixed=law.fixed,
        powers_of_state=not law.normalised and slopes[0].tolist() == [[1, 0], [-1, 0]] and not bases.any(),
        limit=limit,
    )


class Updates:
    """The exact updates of one run, which remembers the state before the last one, at first the reference's."""

    def __init__(self, bandit: Bandit, sampler: Sampler, lr: Rate):
        self.bandit, self.sampler, self.lr = bandit, sampler, lr
        self.setup = compiled_setup(bandit, sampler, lr)
        self.before, self.last = np.zeros_like(bandit.rewards), np.zeros_like(bandit.rewards)

    def advance(self, u: np.ndarray, updates: int) -> np.ndarray:
        """Move u by so many updates, in place; return METRICS of the states before each, [4, envs, updates].

        `last` is then what the last update added.
        """
        series = np.empty((len(METRICS), len(u), updates))
        if self.setup is not None:
            kernel.iterate(self.setup, u, self.before, self.last, series)
            series[1] = self.bandit.best_value[:, None] - series[2]
            return series
        wide = self.bandit.as_float64()
        for t in range(updates):
            series[:, :, t] = measure(wide, u.astype(np.float64, copy=False))
            self.last = increment(u, self.bandit, self.sampler, self.lr, self.before)
            self.before[...] = u
            u += self.last
        return series
