"""Does curvature explain where the order turns? The Hessian of the expected DPO loss at the optimum, by enumeration.

Reads   nothing; environments are drawn from the seeds.
Writes  OUTPUT_DIR/lab_curvature.png; prints the condition numbers.

    python alignment/lab/curvature.py --seeds 3 --output_dir docs/figures

At pi* the loss of a pair has the curvature beta^2 sigma'(beta h) d d^T, d = grad log pi(y1) - grad log pi(y2). The
Hessian is J^T L J: J the gradients of all responses' log-probabilities, L a graph Laplacian whose edge (y, y')
weighs beta^2 sigma'(r(y) - r(y')) times the probability of the pair. The second model is the reference.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from lab.environment import Environment, Setting, fitted, make_environment
from lab.intervals import paired
from lab.learners import Transformer, make_learner
from lab.sampling import lab_sampler, pair_law
from lab.tree import next_token_logps

from bandit.mixtures import Mixture
from bandit.palette import color_of
from common.cli import Parser, run

SAMPLERS = ["online", "mixp", "gshf", "theory", "offline"]
LEARNERS = ["table", "linear", "transformer"]
FIT_STEPS = 600  # of the transformer to pi*: a KL of about 0.001
DIRECTION = 100  # the condition number is the largest eigenvalue over this one: the smallest are rounding


def main() -> None:
    """Environments -> spectra -> figure and condition numbers."""
    figure_of(__doc__, 3, "lab_curvature.png", spectra_of, draw, conditions)


def figure_of(doc: str, seeds: int, file: str, one: Callable, draw: Callable, table: Callable) -> None:
    """Read the flags of a script, measure `one` environment after the other at the optimum, draw and print them all.

    Args:
        doc: the script's docstring.
        seeds: environments, where --seeds does not say.
        file: name of the figure.
        one: (setting, environments, optimum, transformers' parameters at it, seed) -> what is measured.
        draw, table: of what `one` returned, stacked over environments.
    """
    p = Parser(doc)
    p.add("--seeds", "environments", type=int, default=seeds)
    p.add("--beta", "KL coefficient", type=float, default=0.3)
    p.add("--output_dir", "folder of the figure", required=True)
    args = p.parse_args()
    torch.set_num_threads(1)  # more only wait for each other at these sizes
    setting = Setting(beta=args.beta)
    env = make_environment(setting, list(range(args.seeds)))
    optimum = (env.ref_logps + env.rewards / setting.beta).log_softmax(-1)
    parameters = fitted(Transformer(setting), env.reference, optimum.float(), FIT_STEPS)
    found = np.array([one(setting, env, optimum, parameters, seed) for seed in range(args.seeds)])
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    draw(found).savefig(output / file, dpi=110, bbox_inches="tight")
    print(table(found))


def spectra_of(setting: Setting, env: Environment, optimum: torch.Tensor, parameters: torch.Tensor, seed: int):
    """Return one environment's eigenvalues, [learners, samplers, P N], falling."""
    roots = [root_of(loss_hessian(setting, env, optimum, lab_sampler(name).row, seed)) for name in SAMPLERS]
    return [
        [eigenvalues(kernel, root) for root in roots]
        for kernel in (tangent_kernel(setting, env, parameters, learner, seed) for learner in LEARNERS)
    ]


def loss_hessian(setting: Setting, env: Environment, optimum: torch.Tensor, row: Mixture, seed: int) -> torch.Tensor:
    """Return L, the expected loss's Hessian in the log-probabilities at the optimum, [P N, P N]."""
    policy, second = (
        next_token_logps(logps[seed : seed + 1], setting.vocabulary, setting.length)
        for logps in (optimum, env.ref_logps)
    )
    law = pair_law(row, setting.beta, policy, second, setting.length, setting.temperature)[0]
    wins = (env.rewards[seed].unsqueeze(-1) - env.rewards[seed].unsqueeze(-2)).sigmoid()
    edges = (law + law.mT) / setting.prompts * setting.beta**2 * wins * (1 - wins)
    return torch.block_diag(*(torch.diag_embed(edges.sum(-1)) - edges))


def tangent_kernel(setting: Setting, env: Environment, parameters, learner: str, seed: int) -> torch.Tensor:
    """Return J J^T, [P N, P N]; for table and linear of the scores, from which L takes the normalisation out.

    Args:
        parameters: the transformers' at the optimum, [seeds, D].
    """
    if learner == "transformer":
        model = Transformer(setting)
        logps = lambda theta: model(theta.unsqueeze(0))[0].flatten()  # noqa: E731
        jacobian = torch.func.jacrev(logps, chunk_size=64)(parameters[seed])
    else:
        model, start = make_learner(dataclasses.replace(setting, learner=learner), env.reference, env.ref_logps)
        jacobian = model.features(start[:1], None)[0].flatten(0, 1)
    jacobian = jacobian.double()
    return jacobian @ jacobian.mT


def root_of(hessian: torch.Tensor) -> torch.Tensor:
    """Return R with L = R R^T."""
    values, vectors = torch.linalg.eigh(hessian)
    return vectors * values.clamp(min=0).sqrt()


def eigenvalues(kernel: torch.Tensor, root: torch.Tensor) -> np.ndarray:
    """Return those of J^T L J that can differ from 0, falling: of R^T J J^T R with L = R R^T."""
    return torch.linalg.eigvalsh(root.mT @ kernel @ root).flip(0).clamp(min=0).numpy()


def draw(spectra: np.ndarray):
    """Draw eigenvalues over the largest, geometric means over seeds, a panel per learner."""
    figure, axes = plt.subplots(1, len(LEARNERS), figsize=(9.6, 3.0), sharey=True)
    for axis, learner, values in zip(axes, LEARNERS, spectra.swapaxes(0, 1), strict=True):
        for i, sampler in enumerate(SAMPLERS):
            shares = np.maximum(values[:, i] / values[:, i, :1], 1e-12)
            mean = np.exp(np.log(shares).mean(axis=0))
            over = {"ls": (0, (4, 3)), "zorder": 3} if sampler == "theory" else {}  # `offline` lies on it
            directions = np.arange(1, len(mean) + 1)
            axis.plot(directions, mean, color=color_of(sampler), label=sampler, lw=1.4, **over)
        axis.set(title=learner, xlabel="direction", xscale="log", yscale="log", ylim=(1e-6, 1.5))
    axes[0].set_ylabel("eigenvalue / largest")
    axes[0].legend(fontsize=7)
    return figure


def conditions(spectra: np.ndarray) -> str:
    """Return a table: largest eigenvalue over the DIRECTION-th, geometric mean and 95% interval over seeds."""
    lines = ["| learner | " + " | ".join(SAMPLERS) + " |", "|---" * (len(SAMPLERS) + 1) + "|"]
    for learner, values in zip(LEARNERS, spectra.swapaxes(0, 1), strict=True):
        cells = []
        for i in range(len(SAMPLERS)):
            mean, low, high = np.exp(paired(np.log(values[:, i, 0] / values[:, i, DIRECTION - 1]))[:3])
            cells.append(f"{mean:.3g} [{low:.3g}, {high:.3g}]")
        lines.append(f"| {learner} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
