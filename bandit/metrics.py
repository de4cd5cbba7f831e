"""What is recorded after every update, for a block of states at once."""

import numpy as np

from bandit.problem import Bandit, logsumexp

NAMES = ("param_diff", "value", "value_diff", "max_delta")


def mean_gap(sorted_v: np.ndarray) -> np.ndarray:
    """sum |v_y - v_y'| / |Y|^2 over ordered pairs in O(|Y|), v sorted along the last axis.

    The k-th smallest of |Y| values is subtracted |Y| - 1 - k times and added k times, in each order of the pair.
    """
    num_actions = sorted_v.shape[-1]
    signs = 2.0 * np.arange(num_actions) - (num_actions - 1)
    return sorted_v @ signs * (2 / num_actions**2)


def value_gap(bandit: Bandit, u: np.ndarray) -> np.ndarray:
    """V* - V(pi) = beta KL(pi || pi*) of states [..., envs, |Y|]: sum pi (e^x - 1 - x), x = log pi* - log pi.

    Every term is >= 0 and of second order, so the gap keeps its digits down to 1e-30, where V* - V(pi) is rounding.
    """
    log_pi = bandit.log_policy(u)
    x = bandit.log_optimum - log_pi
    pi = np.exp(log_pi)
    near = np.minimum(x, 1)
    terms = pi * (np.expm1(near) - near)
    if x.max() > 1:  # e^x may overflow, but pi e^x = pi*
        terms = np.where(x > 1, np.exp(bandit.log_optimum) - pi * (1 + x), terms)
    return bandit.beta * np.maximum(terms, 0).sum(axis=-1)


def measure(bandit: Bandit, u: np.ndarray) -> dict[str, np.ndarray]:
    """The four series, each [envs, steps], of float64 states u [steps, envs, |Y|].

    param_diff: mean over all |Y|^2 pairs of |delta|; value: V(pi) = sum pi (r - beta log(pi / pi_ref)), as V* minus
    the gap; value_diff: V* - V(pi); max_delta: the largest |delta|. Rewards' units throughout.
    """
    v = np.sort(bandit.rewards - u, axis=-1)
    gap = value_gap(bandit, u)
    best = bandit.beta * logsumexp(bandit.rewards / bandit.beta + bandit.log_ref)[:, 0]
    series = (mean_gap(v), best - gap, gap, v[..., -1] - v[..., 0])
    return {name: values.T for name, values in zip(NAMES, series, strict=True)}
