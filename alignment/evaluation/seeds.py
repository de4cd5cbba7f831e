"""Samplers compared over several seeds: estimates with both kinds of uncertainty, tables. Pure functions on runs."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from common.cli import UserError
from evaluation.run_files import BASE, JUDGES, Model, Run, agreed, trajectory
from evaluation.stats import Estimate, mean_interval, wins
from evaluation.tables import cell

HEADING = [
    "sampler",
    "reward, test prompts",
    "over {} (seeds)",
    "over {} (prompts)",
    "judge: over {} (seeds)",
    "judge: over {} (prompts)",
    "win rate against base",
    "by the judge",
    "KL from base",
]


def over_seeds(values: np.ndarray) -> Estimate:
    """Mean of [S] values, one a seed, with Student's 95% interval; without bounds for one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return Estimate(mean, mean - half, mean + half)


class Difference(NamedTuple):
    """A mean difference with its interval over training seeds (these prompts) and over prompts (these seeds)."""

    seeds: Estimate
    prompts: Estimate

    @property
    def is_clear(self) -> bool:
        """Whether both intervals exclude 0, on the same side."""
        lows, highs = zip(*((e.low, e.high) for e in self), strict=True)
        return None not in lows and (min(lows) > 0 or max(highs) < 0)


def difference(ours: np.ndarray, theirs: np.ndarray, seed: int) -> Difference:
    """Of rewards [S, N]: seed s, prompt n; paired in both."""
    paired = ours - theirs
    return Difference(over_seeds(paired.mean(axis=1)), mean_interval(paired.mean(axis=0), seed))


def stacked(runs: list[Run], judge: str, model: Model) -> np.ndarray | None:
    """Rewards [S, N] of a model on the test prompts; None unless every seed has them.

    Raises:
        UserError: the seeds were tested on different prompts.
    """
    found = [run.answers.get((judge, "test", model)) for run in runs]
    if None in found:
        return None
    if any(answers.prompts != found[0].prompts for answers in found):
        raise UserError(f"{model.title}: the seeds were tested on different prompts; they cannot be compared")
    return np.stack([answers.rewards for answers in found])


def check_same_settings(runs: dict[Path, Run]) -> None:
    """Raises `UserError` unless the run folders were evaluated alike, but for their seeds."""
    for heading in dict.fromkeys(heading for run in runs.values() for heading in run.settings):
        agreed({path: run.settings.get(heading, {}) for path, run in runs.items()}, ("seed",))


def kl_of(runs: list[Run], model: Model) -> np.ndarray | None:
    """KL [S] from the base model; None unless every seed has it."""
    if model == BASE:
        return np.zeros(len(runs))
    return np.array([run.kl[model]["kl"] for run in runs]) if all(model in run.kl for run in runs) else None


def differences(runs: list[Run], samplers: list[str], iteration: int, seed: int) -> dict[tuple[str, str], Difference]:
    """(judge, sampler) → difference from the first sampler after `iteration`, where both are there."""
    found = {}
    for judge, sampler in itertools.product(JUDGES, samplers[1:]):
        ours, theirs = (stacked(runs, judge, Model(name, iteration)) for name in (sampler, samplers[0]))
        if ours is not None and theirs is not None:
            found[judge, sampler] = difference(ours, theirs, seed)
    return found


def table(runs: list[Run], samplers: list[str], iteration: int, seed: int) -> list[list[str]]:
    """Every sampler after `iteration` beside the first one, as texts, heading first."""
    against = differences(runs, samplers, iteration, seed)
    lines = [[text.format(samplers[0]) for text in HEADING]]
    for sampler in samplers:
        model = Model(sampler, iteration)
        apart = [against.get((judge, sampler)) for judge in JUDGES]
        shown = ["–" if sampler == samplers[0] else cell(part) for d in apart for part in d or (None, None)]
        rates = [cell(_win_rate(runs, judge, model), 1, percent=True) for judge in JUDGES]
        reward, kl = stacked(runs, "reward", model), kl_of(runs, model)
        lines.append([sampler, _cell(reward, lambda r: r.mean(axis=1)), *shown, *rates, _cell(kl, np.asarray)])
    return lines


def _cell(values: np.ndarray | None, per_seed: Callable) -> str:
    return cell(None if values is None else over_seeds(per_seed(values)))


def _win_rate(runs: list[Run], judge: str, model: Model) -> Estimate | None:
    ours, base = stacked(runs, judge, model), stacked(runs, judge, BASE)
    return None if ours is None or base is None else over_seeds(wins(ours, base).mean(axis=1))


def verdict(runs: list[Run], samplers: list[str], iteration: int, seed: int) -> str:
    """What the seeds and prompts show and what they do not, in words."""
    found = differences(runs, samplers, iteration, seed)
    words = []
    for judge, name in zip(JUDGES, ("training reward model", "second judge"), strict=True):
        there = {sampler: d for (j, sampler), d in found.items() if j == judge}
        clear = [f"{sampler} ({d.seeds.value:+.2f})" for sampler, d in there.items() if d.is_clear]
        if there:
            words.append(f"by the {name} {', '.join(clear) or 'none'} of {len(there)}")
    if not words:
        return "No sampler has been evaluated beside the first one yet."
    return (
        f"Differences from {samplers[0]} after iteration {iteration} that exclude 0 both over {len(runs)} seeds and "
        f"over prompts: {'; '.join(words)}. The intervals are not corrected for the number of comparisons."
    )


class Band(NamedTuple):
    """Reward against KL over seeds: on `kl` [G] the lowest and highest of the seeds' curves that reach it, each [G],
    and their mean, NaN where one of them has ended."""

    kl: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray


def curves(runs: list[Run], judge: str, sampler: str, iterations: int) -> tuple[np.ndarray, np.ndarray] | None:
    """KL and mean reward, both [S, M], of a sampler's models from the base model on; None if one is missing."""
    models = trajectory(sampler, iterations)
    kl, rewards = [kl_of(runs, m) for m in models], [stacked(runs, judge, m) for m in models]
    if any(values is None for values in (*kl, *rewards)):
        return None
    return np.stack(kl, axis=1), np.stack([r.mean(axis=1) for r in rewards], axis=1)


def band(kl: np.ndarray, rewards: np.ndarray, points: int = 201) -> Band:
    """The seeds' curves [S, M], each interpolated along its own points in the order of their KL."""
    grid = np.linspace(0, kl.max(), points)
    order = np.argsort(kl, axis=1, kind="stable")
    kl, rewards = (np.take_along_axis(values, order, axis=1) for values in (kl, rewards))
    lines = np.stack([np.interp(grid, x, y, right=np.nan) for x, y in zip(kl, rewards, strict=True)])
    return Band(grid, np.nanmin(lines, axis=0), lines.mean(axis=0), np.nanmax(lines, axis=0))
