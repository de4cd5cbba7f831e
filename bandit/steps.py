"""Step sizes. The learning rate multiplies the gradient of the normalised loss (pair weights that sum to 1).

A number, or a rule that exact.gain knows.
"""

import numpy as np

from bandit.problem import Bandit, gaps
from bandit.samplers import Sampler

RULES = ("matched", "theory")


def matched_lr(sampler: Sampler, bandit: Bandit, u: np.ndarray) -> np.ndarray:
    """lr* = Z / (2 beta^2 |Y|) of each environment at the state u, [envs]."""
    weights, log_scale = sampler.weights(u, bandit)
    total = weights.sum(axis=(1, 2)) * np.exp(log_scale[:, 0])
    return total / (2 * bandit.beta**2 * bandit.num_actions)


def largest_stable_lr(sampler: Sampler, bandit: Bandit, u: np.ndarray | None = None) -> np.ndarray:
    """Above this constant lr the optimum repels the exact iteration, [envs]; with u: 2 / the loss's curvature there.

    Near u = r the error r - u is multiplied by I - lr (2 beta^2 / Z) L, L the graph Laplacian with edge weights
    w sigma'(Dr). It is 2 lr* for DPO-Mix-R and DPO-Mix-P, where all edges weigh 1 and L's largest eigenvalue is |Y|.
    """
    u = bandit.rewards if u is None else u
    weights, _ = sampler.weights(u, bandit)
    largest = np.linalg.eigvalsh(laplacian(weights, u))[:, -1]
    return weights.sum(axis=(1, 2)) / (bandit.beta**2 * largest)


def laplacian(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Graph Laplacian [envs, |Y|, |Y|] with edge weights w sigma'(d): u's Hessian of sum w log-loss / 2."""
    tail = np.exp(-np.abs(gaps(u)))
    edges = weights * tail / (1 + tail) ** 2
    return edges.sum(axis=2)[..., None] * np.eye(u.shape[-1]) - edges
