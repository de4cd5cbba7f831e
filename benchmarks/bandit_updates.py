"""Milliseconds per update: a straightforward autograd implementation beside the simulator, in one run.

Reads and writes nothing; prints a Markdown table. Both sides use one thread, take turns, and report the fastest
turn's processor time, so that other work on the machine counts little. The baseline (torch, float32, as a reader of
the paper would write it) makes the |Y| x |Y| loss, backward, SGD, and records nothing; ours (float64) records all
four metrics of every update. Sampled gradients are also compared with numpy's multinomial draw of the counts alone,
which no program that draws them so can beat. The first row is what the first call of a process waits for.

    OMP_NUM_THREADS=1 python benchmarks/bandit_updates.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import PROJECT, Row, report  # isort: skip (before torch)

import numpy as np
import torch
import torch.nn.functional as F

from bandit import sampled
from bandit.problem import draw_rewards, make_bandit
from bandit.samplers import SAMPLERS
from bandit.simulate import simulate

BETA, EXACT_LR, SAMPLED_LR, NUM_SAMPLES = 3.0, 1.0, 0.05, 8192

# mode, environments, |Y|, target ratio (None: none was set), updates per turn of ours, and of the baseline
CASES = [
    ("exact", 1, 20, 150, 4000, 100),
    ("exact", 1, 100, None, 1000, 100),
    ("exact", 1, 1000, 30, 100, 5),
    ("exact", 100, 20, 12, 200, 50),
    ("sampled", 1, 20, None, 200, 20),
    ("sampled", 1, 100, None, 100, 20),
]


def pair_weights(sampler: str, gap_rewards: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Normalised weights [envs, |Y|, |Y|], never differentiated."""
    gap = {"DPO-Unif": torch.zeros_like(d), "DPO-Mix-R": gap_rewards, "DPO-Mix-P": d.detach()}[sampler]
    weights = 2 + torch.exp(gap) + torch.exp(-gap)
    return weights / weights.sum(dim=(1, 2), keepdim=True)


def exact_loss(theta: torch.Tensor, rewards: torch.Tensor, sampler: str) -> torch.Tensor:
    """DPO's loss over all pairs; theta and rewards [envs, |Y|], uniform reference."""
    log_pi = F.log_softmax(theta, dim=-1)
    d = BETA * (log_pi[:, :, None] - log_pi[:, None, :])
    gap_rewards = rewards[:, :, None] - rewards[:, None, :]
    wins = torch.sigmoid(gap_rewards)
    weights = pair_weights(sampler, gap_rewards, d)
    return -(weights * (wins * F.logsigmoid(d) + (1 - wins) * F.logsigmoid(-d))).sum()


def sampled_loss(theta: torch.Tensor, rewards: torch.Tensor, sampler: str) -> torch.Tensor:
    """The same over NUM_SAMPLES drawn pairs with drawn labels; one environment."""
    log_pi = F.log_softmax(theta, dim=-1)[0]
    gap_rewards = rewards[:, :, None] - rewards[:, None, :]
    d = BETA * (log_pi[None, :, None] - log_pi[None, None, :])
    weights = pair_weights(sampler, gap_rewards, d)
    cells = torch.multinomial(weights.flatten(), NUM_SAMPLES, replacement=True)
    first, second = cells // theta.shape[1], cells % theta.shape[1]
    labels = torch.bernoulli(torch.sigmoid(gap_rewards[0, first, second]))
    margin = BETA * (log_pi[first] - log_pi[second])
    return -(labels * F.logsigmoid(margin) + (1 - labels) * F.logsigmoid(-margin)).mean()


def run_baseline(rewards: np.ndarray, sampler: str, mode: str, num_iter: int) -> None:
    target = torch.tensor(rewards, dtype=torch.float32)
    theta = torch.zeros_like(target, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=EXACT_LR if mode == "exact" else SAMPLED_LR)
    loss_of = exact_loss if mode == "exact" else sampled_loss
    for _ in range(num_iter):
        optimizer.zero_grad()
        loss_of(theta, target, sampler).backward()
        optimizer.step()


def run_ours(rewards: np.ndarray, sampler: str, mode: str, num_iter: int) -> None:
    bandit = make_bandit(rewards, BETA)
    lr = EXACT_LR if mode == "exact" else SAMPLED_LR
    simulate(bandit, sampler, SAMPLERS[sampler], mode, lr, num_iter, NUM_SAMPLES, seed=0)


def run_draws(rewards: np.ndarray, sampler: str, num_iter: int) -> None:
    """The counts of so many updates, drawn one by one at fixed weights; one environment."""
    bandit = make_bandit(rewards, BETA)
    weights, _ = SAMPLERS[sampler].weights(np.zeros_like(bandit.rewards), bandit)
    cells = sampled.cell_probabilities(weights, bandit).ravel()
    stream = np.random.default_rng(0)
    for _ in range(num_iter):
        sampled.draw_counts(stream, cells, NUM_SAMPLES, 1)


FIRST_CALL = """
import sys, time
sys.path.insert(0, sys.argv[1])
from bandit import sampled
from bandit.problem import draw_rewards, make_bandit
from bandit.samplers import SAMPLERS
from bandit.simulate import simulate
bandit = make_bandit(draw_rewards("normal", 1, 20, 0), 3.0)
began = time.process_time()
simulate(bandit, "DPO-Mix-P", SAMPLERS["DPO-Mix-P"], "exact", 1.0, 100, 1, 0)
print(time.process_time() - began)
"""


def first_call() -> Row:
    """Processor time of the first exact run of a process, compiling and with the compiled code on disk."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", FIRST_CALL, str(PROJECT)]
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        compiling, cached = (
            float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
            for _ in range(2)
        )
    goals = "< 5 s, < 1 s"
    return Row(
        "first call, compiling; cached", f"{compiling:.2f} s", f"{cached:.2f} s", f"{compiling / cached:.0f}", goals
    )


def milliseconds(run: Callable[[], object], updates: int) -> float:
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start) / updates


def fastest(runs: list[tuple[Callable[[], object], int]], turns: int) -> list[float]:
    """Fastest of several turns of each run, the runs taking turns so that a busy machine hits both alike."""
    times = [[milliseconds(run, updates) for run, updates in runs] for _ in range(turns + 1)]
    return [min(column) for column in zip(*times[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="timed turns of each side (default 7)")
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    rows = [first_call(), *(row for case in CASES for row in measure(*case, turns))]
    report("Bandit", words(turns), rows)


def measure(
    mode: str,
    envs: int,
    actions: int,
    target: int | None,
    ours_updates: int,
    baseline_updates: int,
    turns: int,
) -> list[Row]:
    """A line for each sampler; for sampled gradients one more, beside the draws alone."""
    rewards = draw_rewards("normal", envs, actions, 0)
    rows = []
    for sampler in ("DPO-Unif", "DPO-Mix-R", "DPO-Mix-P"):
        sides = [
            (partial(run_baseline, rewards, sampler, mode, baseline_updates), baseline_updates),
            (partial(run_ours, rewards, sampler, mode, ours_updates), ours_updates),
        ]
        if mode == "sampled":
            sides.append((partial(run_draws, rewards, sampler, ours_updates), ours_updates))
        baseline, ours, *draws = fastest(sides, turns)
        case = f"{mode}, {envs} x {actions}, {sampler}"
        goal = f">= {target}" if target else "-"
        rows.append(Row(case, f"{baseline:.4f} ms", f"{ours:.4f} ms", f"{baseline / ours:.1f}", goal))
        if draws:
            row = Row(
                f"{case}: draws alone", f"{draws[0]:.4f} ms", f"{ours:.4f} ms", f"{ours / draws[0]:.2f}", "<= 1.3"
            )
            rows.append(row._replace(limit="1", bound_by="the draws"))
    return rows


def words(turns: int) -> str:
    """What was run, and the floor for 1000 arms."""
    matrix, result = np.ones((1000, 1000)), np.empty((1000, 1000))
    (floor,) = fastest([(lambda: np.multiply(matrix, 2.0, out=result), 1)], 50)
    return (
        f"Processor time per update on one thread, the fastest of {turns} turns; autograd in float32 beside ours in "
        "float64 with all metrics. Case: mode, environments x arms, sampler. One pass over a 1000 x 1000 float64 "
        f"matrix (read, write) takes {floor:.4f} ms. "
        "Ours is bound by one division per unordered pair at 1000 arms, by the short loops over arms at 20. "
        "`draws alone` compares with numpy's draw of the counts."
    )


if __name__ == "__main__":
    main()
