"""Does the noise of labels explain where the order turns? A whole run, linearised at the optimum, exactly.

Reads   nothing; environments are drawn from the seeds.
Writes  OUTPUT_DIR/lab_noise.png; prints a table.

    OMP_NUM_THREADS=1 python alignment/lab/noise.py --seeds 8 --output_dir docs/figures

Let f be the log-probabilities less those of pi*, K = J J^T the tangent kernel, L the Hessian of the expected loss in
f, and A that of the value gap. At pi* a pair's gradient in f has the mean 0 and the covariance L, since the loss is
the labels' own likelihood. So an update of SGD with M labels is

    f <- f - s K (L f + noise),     noise of covariance L / M

With L = R R^T, R^T K R = U diag(l) U^T and G = K R U a run ends at f = f_0 - G diag(a) U^T R^T f_0 + G c. There a and
the variances v of c follow a <- (1 - s l) a + s and v <- (1 - s l)^2 v + s^2 / M. The gap is f^T A f / 2. What this
leaves out: the law of pairs and J are those at pi* from the first update on, and there is no Adam.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from lab.curvature import LEARNERS, SAMPLERS, figure_of, loss_hessian, root_of, tangent_kernel
from lab.environment import Environment, Setting
from lab.intervals import interval_text, paired
from lab.sampling import lab_sampler

from bandit.palette import color_of
from common.cli import run

RATES = 2.0 ** (1 - torch.arange(25).double() / 2)  # of the step size, over 1 / the largest eigenvalue
NOISE = ("labels", "none")


def main() -> None:
    """Environments -> gaps of linearised runs -> figure and table."""
    figure_of(__doc__, 8, "lab_noise.png", gaps_of, draw, table)


def gaps_of(setting: Setting, env: Environment, optimum: torch.Tensor, parameters: torch.Tensor, seed: int):
    """Return one environment's expected gaps at the end of a run, [learners, samplers, NOISE]."""
    hessians = [loss_hessian(setting, env, optimum, lab_sampler(name).row, seed) for name in SAMPLERS]
    kernels = [tangent_kernel(setting, env, parameters, learner, seed) for learner in LEARNERS]
    start, value = (env.ref_logps - optimum)[seed].flatten(), value_hessian(setting, optimum[seed])
    labels = (setting.pairs, float("inf"))  # as NOISE has them
    return [
        [[float(run_gaps(kernel, h, value, start, setting.updates, m).min()) for m in labels] for h in hessians]
        for kernel in kernels
    ]


def value_hessian(setting: Setting, optimum: torch.Tensor) -> torch.Tensor:
    """Return A, [P N, P N], at the optimum's log-probabilities [P, N]: beta times covariances within prompts."""
    pi = optimum.exp()
    blocks = torch.diag_embed(pi) - pi.unsqueeze(-1) * pi.unsqueeze(-2)
    return torch.block_diag(*blocks) * setting.beta / setting.prompts


def run_gaps(kernel, hessian, value, start, updates: int, labels: float) -> torch.Tensor:
    """Return the expected gap after a run of SGD, for each step size of RATES.

    Args:
        kernel, hessian, value: K, L and A, [n, n].
        start: f_0, [n].
        labels: M, inf for none of their noise.
    """
    root = root_of(hessian)
    speeds, basis = torch.linalg.eigh(root.mT @ kernel @ root)
    directions = kernel @ root @ basis  # G
    learnt, spread = (
        torch.zeros(len(RATES), len(speeds)).double(),
        torch.zeros(len(RATES), len(speeds)).double(),
    )  # a, v
    for update in range(updates):
        size = RATES.unsqueeze(1) / speeds[-1] * (1 - update / updates)
        kept = 1 - size * speeds
        learnt, spread = kept * learnt + size, kept**2 * spread + size**2 / labels
    left = start - (learnt * (start @ root @ basis)) @ directions.mT
    bias = torch.einsum("ri,ij,rj->r", left, value, left)
    return (bias + spread @ (directions * (value @ directions)).sum(0)) / 2


def draw(gaps: np.ndarray):
    """Draw gaps minus online's, [seeds, learners, samplers, NOISE]: filled with noise, hollow without."""
    figure, axes = plt.subplots(1, len(LEARNERS), figsize=(9.6, 3.0), layout="constrained")
    for axis, learner, values in zip(axes, LEARNERS, gaps.swapaxes(0, 1), strict=True):
        for x, name in enumerate(SAMPLERS[1:]):
            for which in range(len(NOISE)):
                mean, low, high = paired(values[:, x + 1, which] - values[:, 0, which])[:3]
                style = {"fmt": "o", "ms": 5, "color": color_of(name), "mfc": "white" if which else None}
                axis.errorbar(x + 0.2 * (which - 0.5), mean, [[mean - low], [high - mean]], **style)
        axis.axhline(0, color="grey", lw=0.8)
        axis.set_title(learner)
        axis.set_xticks(range(len(SAMPLERS) - 1), SAMPLERS[1:])
    for fill, text in (("grey", "32 labels per update"), ("white", "no noise")):
        axes[0].plot([], [], "o", color="grey", mfc=fill, label=text)
    axes[0].legend(fontsize=7, loc="upper left")
    axes[0].set_ylabel("predicted gap minus online's")
    return figure


def table(gaps: np.ndarray) -> str:
    """Return gaps of `online` and differences from it, 95% over seeds."""
    lines = ["| learner | noise | " + " | ".join(SAMPLERS) + " |", "|---" * (2 + len(SAMPLERS)) + "|"]
    for learner, values in zip(LEARNERS, gaps.swapaxes(0, 1), strict=True):
        for which, noise in enumerate(NOISE):
            cells = [f"{values[:, 0, which].mean():.3f}"]
            for x in range(1, len(SAMPLERS)):
                cells.append(interval_text(*paired(values[:, x, which] - values[:, 0, which])[:3]))
            lines.append(f"| {learner} | {noise} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
