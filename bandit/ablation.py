"""The ablation's sweeps, as data, and the computation of one cell of one.

A cell is a setting: the defaults, changed by a sweep's fixed entries and by one value of each axis. Every cell has
the same rewards where |Y| is the same, so that cells differ in the setting alone.
"""

import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pool

import numpy as np

from bandit import tuned
from bandit.exact import value_gap
from bandit.problem import Bandit, draw_rewards, logsumexp, make_bandit
from bandit.samplers import get_sampler

DEFAULTS = {
    "mode": "sampled",  # or exact
    "sampler": "family",  # y1 from pi^(1+a) pi_ref^-a, y2 from pi^(1-b) pi_ref^b, with probability p; or a name
    "a": 0.5,
    "b": 0.5,
    "p": 1.0,
    "beta": 1.0,  # in units of reward
    "num_actions": 20,
    "reward_gap": 1.0,  # standard deviation of the arms' rewards, which are normal
    "reference": 0.0,  # pi_ref proportional to exp(reference * reward)
    "label_noise": 0.0,  # share of flipped labels
    "pairs": 64,  # labelled pairs per update
    "budget": 8192,  # labelled pairs in all
    "max_updates": 300,  # exact updates before "not reached"
}

Axis = tuple[str, list]
Results = dict[str, np.ndarray]
Progress = Callable[[str], object]


@dataclass(frozen=True)
class Sweep:
    """Two axes and, for a row of panels, a third: (entry of DEFAULTS or `a=b`, its values)."""

    about: str
    x: Axis
    y: Axis
    panel: Axis = ("beta", [1.0])
    kind: str = "heat"  # how it is drawn: heat map, lines over x, dots
    fixed: dict = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.panel[1]), len(self.y[1]), len(self.x[1])

    def cells(self) -> Iterator[tuple[tuple[int, int, int], dict]]:
        """(index, setting) of every cell."""
        axes = (self.panel, self.y, self.x)
        for chosen in itertools.product(*(enumerate(values) for _, values in axes)):
            setting = {**DEFAULTS, **self.fixed}
            for (key, _), (_, value) in zip(axes, chosen, strict=True):
                setting |= {"a": value, "b": value} if key == "a=b" else {key: value}
            yield tuple(i for i, _ in chosen), setting

    def coarse(self) -> "Sweep":
        """Every other value of the two main axes, for a quick look."""
        (x, xs), (y, ys) = self.x, self.y
        return Sweep(self.about, (x, xs[::2]), (y, ys[::2]), self.panel, self.kind, self.fixed)


A = [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0]
B = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0]
BOTH = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0]
BETAS = [0.2, 0.5, 1.0, 2.0, 3.0, 5.0]
# random-pairs has online's law, DPO-Unif offline's where the reference is uniform.
COMPARED = ["offline", "online", "mixp", "pilaf", "simplemix", "xpo", "best-worst", "DPO-Mix-P*"]
EVERY = [
    "random-pairs", "offline", "online", "gshf", "xpo", "history", "simplemix", "mixp", "mixp-iterative", "pilaf",
    "best-worst", "implicit-best-worst", "DPO-Unif", "DPO-Mix-R", "DPO-Mix-P*",
]  # fmt: skip
SAMPLER = ("sampler", COMPARED)

EXACT, BUDGET = "exact updates to 1e-3", "after the budget"
REFERENCES = [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0]

SWEEPS = {
    "ab-exact": Sweep(EXACT, ("b", B), ("a", A), ("beta", [1.0, 3.0]), fixed={"mode": "exact"}),
    "ab-budget": Sweep(BUDGET, ("b", B), ("a", A), ("beta", [1.0, 3.0])),
    "beta-exact": Sweep(EXACT, ("beta", BETAS), ("a=b", BOTH), fixed={"mode": "exact"}),
    "beta-budget": Sweep(BUDGET, ("beta", BETAS), ("a=b", BOTH)),
    "pairs-budget": Sweep(BUDGET, ("pairs", [8, 32, 128, 512, 2048]), ("a=b", BOTH)),
    "p": Sweep(BUDGET, ("p", [0.0, 0.25, 0.5, 0.75, 1.0]), ("a=b", [0.5, 1.0, 2.0]), kind="lines"),
    "beta": Sweep(BUDGET, ("beta", BETAS), SAMPLER, kind="lines"),
    "num_actions": Sweep(BUDGET, ("num_actions", [5, 10, 20, 40]), SAMPLER, kind="lines"),
    "reward_gap": Sweep(BUDGET, ("reward_gap", [0.25, 0.5, 1.0, 2.0, 4.0]), SAMPLER, kind="lines"),
    "reference": Sweep(BUDGET, ("reference", REFERENCES), SAMPLER, kind="lines"),
    "label_noise": Sweep(BUDGET, ("label_noise", [0.0, 0.05, 0.1, 0.2, 0.3]), SAMPLER, kind="lines"),
    "pairs": Sweep(BUDGET, ("pairs", [8, 32, 128, 512, 2048]), SAMPLER, kind="lines"),
    "samplers-exact": Sweep(
        EXACT, ("beta", [0.3, 1.0, 3.0]), ("sampler", EVERY), kind="dots", fixed={"mode": "exact"}
    ),
    "samplers-budget": Sweep(BUDGET, ("beta", [0.3, 1.0, 3.0]), ("sampler", EVERY), kind="dots"),
}


def sampler_name(setting: dict) -> str:
    """Name in the table of samplers."""
    if setting["sampler"] == "family":
        return f"mix_{setting['a']:g}_{setting['b']:g}_{setting['p']:g}"
    return setting["sampler"]


def environments(setting: dict, num_envs: int, seed: int) -> Bandit:
    """num_envs bandits of a setting."""
    rewards = setting["reward_gap"] * draw_rewards("normal", num_envs, setting["num_actions"], seed)
    log_ref = setting["reference"] * rewards
    return make_bandit(rewards, setting["beta"], log_ref - logsumexp(log_ref), label_noise=setting["label_noise"])


def evaluate(setting: dict, num_envs: int, num_tuning: int, seed: int) -> tuple[tuned.Outcomes, dict]:
    """Outcomes [num_envs] of a cell and the step scale chosen for each; num_tuning more environments choose it."""
    bandit, sampler = environments(setting, num_tuning + num_envs, seed), get_sampler(sampler_name(setting))
    start = value_gap(bandit, np.zeros_like(bandit.rewards))[num_tuning:]
    if setting["mode"] == "exact":
        scales = tuned.EXACT_SCALES

        def run(bandit: Bandit, lr: np.ndarray) -> tuned.Outcomes:
            return tuned.updates_needed(bandit, sampler, lr, setting["max_updates"])
    else:
        scales = tuned.SAMPLED_SCALES
        key = zlib.crc32(json.dumps(setting, sort_keys=True).encode())
        stream = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, key)))

        def run(bandit: Bandit, lr: np.ndarray) -> tuned.Outcomes:
            return tuned.spend_budget(bandit, sampler, lr, setting["budget"], setting["pairs"], stream)

    outcomes, chosen = tuned.at_tuned_steps(bandit, sampler, num_tuning, scales, run)
    return {**outcomes, "start": start}, chosen


def summarize(values: np.ndarray) -> dict[str, float]:
    """Median, 10% and 90% of one cell's values [envs], which may be inf, and the share that is finite."""
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], method="inverted_cdf")
    return {"median": middle, "low": low, "high": high, "reached": float(np.mean(np.isfinite(values)))}


def to_rows(name: str, sweep: Sweep, results: Results, steps: Results) -> list[dict]:
    """One row for each cell and outcome, for results.csv; `step` is the tuned multiple of the stability limit."""
    axes, table = {"panel": sweep.panel, "y": sweep.y, "x": sweep.x}, []
    for index, _ in sweep.cells():
        cell = {"sweep": name}
        for (role, (key, values)), at in zip(axes.items(), index, strict=True):
            cell |= {role: key, f"{role}_value": values[at]}
        for outcome in steps:
            row = {"outcome": outcome, **summarize(results[outcome][index]), "step": steps[outcome][index]}
            table.append(cell | row)
    return table


def share_at_the_edge(sweeps: dict[str, Sweep], steps: dict[str, Results]) -> float:
    """Share of cells and outcomes whose tuned step is the smallest or the largest of its grid."""
    at_edge = []
    for name, sweep in sweeps.items():
        exact = sweep.fixed.get("mode") == "exact"
        scales = tuned.EXACT_SCALES if exact else tuned.SAMPLED_SCALES
        at_edge += [np.isin(values, [scales[0], scales[-1]]).ravel() for values in steps[name].values()]
    return float(np.concatenate(at_edge).mean())


def compute(
    sweeps: dict[str, Sweep], num_envs: int, num_tuning: int, seed: int, workers: int, progress: Progress
) -> tuple[dict[str, Results], dict[str, Results]]:
    """All cells of some sweeps.

    Args:
        workers: processes; the results do not depend on their number.
        progress: called after each cell with the sweep's name.

    Returns:
        {sweep: {outcome: [panels, ys, xs, envs]}} and {sweep: {outcome: tuned step [panels, ys, xs]}}.
    """
    keys = [(name, index) for name, sweep in sweeps.items() for index, _ in sweep.cells()]
    settings = [setting for sweep in sweeps.values() for _, setting in sweep.cells()]
    job = partial(evaluate, num_envs=num_envs, num_tuning=num_tuning, seed=seed)
    results: dict[str, Results] = {name: {} for name in sweeps}
    steps: dict[str, Results] = {name: {} for name in sweeps}
    with Pool(workers) if workers > 1 else nullcontext() as pool:
        done = pool.imap(job, settings) if pool else map(job, settings)
        for (name, index), (outcomes, chosen) in zip(keys, done, strict=True):
            shape = sweeps[name].shape
            for outcome, values in outcomes.items():
                results[name].setdefault(outcome, np.empty((*shape, num_envs)))[index] = values
            for outcome, step in chosen.items():
                steps[name].setdefault(outcome, np.empty(shape))[index] = step
            progress(name)
    return results, steps
