"""Does the noise of labels explain where the order turns? What one update gains, and what its noise takes, exactly.

Reads   nothing; environments are drawn from the seeds.
Writes  OUTPUT_DIR/lab_noise.png; prints a table.

    OMP_NUM_THREADS=1 python alignment/lab/noise.py --seeds 4 --output_dir docs/figures

F is the value gap, g the gradient of one labelled pair's loss, G its mean and C its covariance within a prompt, P a
preconditioner (1 for SGD, 1 / root mean square of a batch's gradient for Adam). After a step of size s with M labels

    E F = F - s F'P G + s^2/2 (G P F'' P G + tr(P F'' P C) / M)

so that the best step gains (F'P G)^2 / 2 over (G P F'' P G + tr(P F'' P C) / M). G, C, F' and F'' are sums over all
pairs and both labels. The points lie on the path of `online` with exact gradients, where a share of the gap is left.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from lab.curvature import LEARNERS, SAMPLERS, jacobian_of
from lab.environment import Environment, Setting, exact_values, make_environment
from lab.intervals import paired
from lab.learners import make_learner
from lab.sampling import lab_sampler, pair_law
from lab.train import OPTIMIZERS, Runs, expected_gradient

from bandit.mixtures import Mixture
from bandit.palette import color_of
from common.cli import Parser, run

SHARES = [0.5, 0.25]  # of the reference's gap: halfway, and where runs with drawn labels end
PATH_LRS = {"table": 0.2, "linear": 0.05, "transformer": 0.004}  # Adam's, of the path that holds the points
ROWS = 64  # Hessian-vector products at a time


class Point(NamedTuple):
    """A policy of one environment and what does not depend on the sampler.

    Attributes:
        seed: number into the environment.
        logps, nodes: log-probabilities of responses [1, P, N] and of next tokens [1, P, n, V].
        jacobian: gradients of the responses' log-probabilities [P N, D]; of their scores for table and linear.
        slope: F' [D].
        curved: function that multiplies rows [R, D] by F''.
        bent: J F'' J^T [P N, P N].
    """

    seed: int
    logps: torch.Tensor
    nodes: torch.Tensor
    jacobian: torch.Tensor
    slope: torch.Tensor
    curved: Callable
    bent: torch.Tensor


class Step(NamedTuple):
    """The terms of one update: F'P G, G P F'' P G and tr(P F'' P C) of one label."""

    signal: float
    bend: float
    noise: float

    def gain(self, labels: float) -> float:
        """Return the expected decrease of the gap at the best step size, with so many labels (inf: no noise).

        NaN where the parabola opens downwards: it says nothing of a best step then.
        """
        curvature = self.bend + self.noise / labels
        return max(self.signal, 0.0) ** 2 / 2 / curvature if curvature > 0 else float("nan")


def main() -> None:
    """Environments -> points on online's path -> terms of every sampler -> figure and table."""
    p = Parser(__doc__)
    p.add("--seeds", "environments", type=int, default=4)
    p.add("--beta", "KL coefficient", type=float, default=0.3)
    p.add("--output_dir", "folder of the figure", required=True)
    args = p.parse_args()
    torch.set_num_threads(1)  # more only wait for each other at these sizes
    setting = Setting(beta=args.beta)
    env = make_environment(setting, list(range(args.seeds)))
    steps = measured(setting, env)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    draw(steps, args.seeds, setting.pairs).savefig(output / "lab_noise.png", dpi=110, bbox_inches="tight")
    print(table(steps, args.seeds, setting.pairs))


def measured(setting: Setting, env: Environment) -> dict[tuple, Step]:
    """Return the terms by (learner, optimizer, sampler, share of the gap that is left, seed)."""
    steps = {}
    for learner, seed in product(LEARNERS, range(len(env.rewards))):
        one = replace(setting, learner=learner)
        points = zip(SHARES, points_of(one, env, seed), strict=True)
        for (share, point), optimizer, name in product(points, OPTIMIZERS, SAMPLERS):
            steps[learner, optimizer, name, share, seed] = step_of(one, env, point, lab_sampler(name).row, optimizer)
    return steps


# --- Points -----------------------------------------------------------------------------------------------------


def points_of(setting: Setting, env: Environment, seed: int) -> list[Point]:
    """Return the points where SHARES of the reference's gap are left, on the path of `online` without noise."""
    learner, start = make_learner(setting, env.reference, env.ref_logps)
    rows, which = torch.tensor([seed]), Runs([lab_sampler("online")], torch.ones(1), torch.tensor([seed]))
    parameters = start[seed : seed + 1].clone().requires_grad_()
    optimizer = OPTIMIZERS["adam"](parameters)
    lr = torch.tensor([[PATH_LRS[setting.learner]]])
    found: list[Point] = []
    first = None
    while len(found) < len(SHARES):
        logps, nodes = learner(parameters, rows)
        gap = float(exact_values(logps.detach(), env.ref_logps[rows], env.rewards[rows], setting.beta)[0])
        first = first or gap
        while len(found) < len(SHARES) and gap <= SHARES[len(found)] * first:
            found.append(point_at(setting, env, learner, parameters.detach(), seed))
        loss = (
            logps * expected_gradient(setting, env, which, logps.detach(), nodes.detach(), env.ref_nodes[rows])
        ).sum()
        optimizer(lr, torch.autograd.grad(loss, parameters)[0])
    return found


def point_at(setting: Setting, env: Environment, learner, parameters: torch.Tensor, seed: int) -> Point:
    """Return the point at parameters [1, D]."""

    def slopes(theta: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda t: gaps_of(setting, env, learner, t, seed).sum())(theta)

    def curved(rows: torch.Tensor) -> torch.Tensor:
        parts = [
            torch.func.jvp(slopes, (parameters.expand_as(part).contiguous(),), (part,))[1]
            for part in rows.split(ROWS)
        ]
        return torch.cat(parts)

    with torch.no_grad():
        logps, nodes = learner(parameters, torch.tensor([seed]))
    jacobian = jacobian_of(setting, env, parameters[0], seed)
    return Point(seed, logps, nodes, jacobian, slopes(parameters)[0], curved, curved(jacobian) @ jacobian.mT)


def gaps_of(setting: Setting, env: Environment, learner, parameters: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the value gaps [B] of one environment at parameters [B, D]."""
    rows = torch.full((len(parameters),), seed)
    logps, _ = learner(parameters, rows)
    return exact_values(logps, env.ref_logps[rows], env.rewards[rows], setting.beta)[0]


# --- Terms ------------------------------------------------------------------------------------------------------


def step_of(setting: Setting, env: Environment, point: Point, row: Mixture, optimizer: str) -> Step:
    """Return the terms of one update with a sampler's pairs."""
    mean, covariance = moments(setting, env, point, row)
    rows, bent = point.jacobian, point.bent
    if optimizer == "adam":
        variance = ((covariance @ rows) * rows).sum(0)
        rows = rows / ((mean @ rows) ** 2 + variance / setting.pairs).clamp(min=1e-20).sqrt()
        bent = point.curved(rows) @ rows.mT
    return Step(float(mean @ (rows @ point.slope)), float(mean @ bent @ mean), float((bent * covariance).sum()))


def moments(setting: Setting, env: Environment, point: Point, row: Mixture) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean [P N] and covariance [P N, P N] of a labelled pair's gradient in the log-probabilities.

    The gradient of -log sigma(beta h) is -beta (1 - sigma(beta h)) at the winner and its negative at the loser. Each
    prompt has the same number of pairs: the covariance is the mean of those within the prompts.
    """
    second = env.ref_nodes[point.seed : point.seed + 1]
    law = pair_law(row, setting.beta, point.nodes, second, setting.length, setting.temperature)[0].float()
    u = setting.beta * (point.logps[0] - env.ref_logps[point.seed])
    says, wins = (
        (scores.unsqueeze(-1) - scores.unsqueeze(-2)).sigmoid().float() for scores in (u, env.rewards[point.seed])
    )
    both = setting.beta * (law + law.mT)
    mean = (both * (says - wins)).sum(-1)  # [P, N]
    squares = setting.beta * both * (wins * (1 - says) ** 2 + (1 - wins) * says**2)
    within = torch.diag_embed(squares.sum(-1)) - squares - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    return mean.flatten() / setting.prompts, torch.block_diag(*within) / setting.prompts


# --- Output -----------------------------------------------------------------------------------------------------


def ratios(steps: dict, seeds: int, learner: str, optimizer: str, name: str, share: float, labels: float):
    """Return log(gain / online's gain) of each seed, [seeds]."""
    own, base = (
        np.array([steps[learner, optimizer, sampler, share, seed].gain(labels) for seed in range(seeds)])
        for sampler in (name, "online")
    )
    return np.log(own / base)


def draw(steps: dict, seeds: int, labels: int):
    """Draw gains over online's, a panel per point: filled with an update's labels (95%), hollow without noise."""
    figure, axes = plt.subplots(1, len(SHARES), figsize=(9.6, 3.4), sharey=True)
    rungs = list(product(LEARNERS, OPTIMIZERS))
    for axis, share in zip(axes, SHARES, strict=True):
        for i, name in enumerate(SAMPLERS[1:]):
            for x, rung in enumerate(rungs):
                logs = ratios(steps, seeds, *rung, name, share, labels)
                mean, low, high = np.exp(paired(logs)[:3])
                at, color = x + 0.18 * (i - 1.5), color_of(name)
                label = name if x == 0 else None
                axis.errorbar(at, mean, [[mean - low], [high - mean]], fmt="o", ms=4, color=color, label=label)
                exact = np.exp(ratios(steps, seeds, *rung, name, share, float("inf")).mean())
                axis.plot(at, exact, "o", ms=4, mfc="white", color=color)
        axis.axhline(1, color="grey", lw=0.8)
        axis.set(title=f"{share:g} of the reference's gap left", yscale="log")
        axis.set_xticks(range(len(rungs)), [f"{learner}\n{optimizer}" for learner, optimizer in rungs], fontsize=7)
    axes[0].set_ylabel("gain of an update / online's")
    axes[0].set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    axes[0].minorticks_off()
    axes[0].legend(fontsize=7)
    return figure


def table(steps: dict, seeds: int, labels: int) -> str:
    """Return gains over online's at every point: with the labels of an update, and without noise."""
    names = SAMPLERS[1:]
    lines = [
        "| learner | optimizer | gap left | labels | " + " | ".join(names) + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    for learner, optimizer, share, count in product(LEARNERS, OPTIMIZERS, SHARES, (labels, float("inf"))):
        cells = []
        for name in names:
            mean, low, high = np.exp(paired(ratios(steps, seeds, learner, optimizer, name, share, count))[:3])
            cells.append(f"{mean:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {learner} | {optimizer} | {share:g} | {count:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
