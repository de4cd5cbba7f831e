"""One table and one figure from run folders that differ in their seed only: which differences of samplers are real.

Reads   RUN_DIR/seed_N/eval and results, as summarize.py does, for every seed N.
Writes  RUN_DIR/results/: seeds.md, seeds.csv, report.html, reward_vs_kl_over_seeds.{png,pdf}.

    python alignment/evaluation/compare_seeds.py --run_dir alignment/runs/ablation --seeds 1 2 3 \\
        --samplers online mixp --iterations 2
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / "alignment"), str(PROJECT)]  # the samplers' colours are the bandit's

import numpy as np

from common.cli import Parser, UserError, natural, non_negative, positive, positive_int, run
from common.records import write_atomic, writing
from evaluation.run_files import (
    APART,
    BASE,
    JUDGES,
    KL,
    TEST,
    Model,
    Run,
    agreed,
    all_models,
    checked_names,
    of_same_prompts,
    read_run,
    trajectory,
)
from evaluation.stats import (
    Effect,
    at_equal_kl,
    crossed_effect,
    distinct,
    false_alarm,
    holm,
    kl_estimate,
    rate_of_wins,
    wins,
)
from evaluation.tables import cell, csv_text, kl_of, markdown, value_of, warnings

NOTE = (
    "Mean [95% interval] over training seeds and test prompts together (crossed random effects, Student's). p: "
    "two-sided, Holm-corrected over the samplers of a column. Win rates: Wilson's. KL: on the logarithmic scale, "
    "geometric mean. At equal KL: reward = seed + sampler + slope · log KL, both of the same responses where those "
    "are scored. False alarm: how often one run's interval over prompts alone excludes 0 where the sampler does not "
    "differ from {}."
)
CAPTION = (
    "Mean reward against the KL from the base model. Thin: the seeds' curves, from the base model "
    "through the shared iteration 1 to the last model (dot); band: their range; thick: their mean, where all reach."
)


def parser() -> Parser:
    """Return the command line."""
    flags = Parser(__doc__)
    flags.add("--run_dir", "folder that holds seed_N", required=True)
    flags.add("--seeds", "which N", type=natural, nargs="+", required=True)
    flags.add("--samplers", "names; all are compared with the first", nargs="+", required=True)
    flags.add("--iterations", "how many iterations the runs have", type=positive_int, required=True)
    flags.add("--beta", "of training; the value is reward - (beta / margin scale) KL", type=non_negative, default=0.1)
    flags.add("--margin_scale", "of training: what rewards were multiplied with", type=positive, default=1.0)
    return flags


def main() -> None:
    args = parser().parse_args()
    if args.iterations < 2:
        raise UserError("--iterations: samplers differ from iteration 2 on")
    from evaluation.figures import save_figure
    from evaluation.report import page

    run_dir, samplers = Path(args.run_dir), checked_names("--samplers", args.samplers)
    models = all_models(samplers, args.iterations)
    folders = [run_dir / f"seed_{seed}" for seed in dict.fromkeys(args.seeds)]
    runs = [read_run(folder, models) for folder in folders]
    check_same_settings(dict(zip(folders, runs, strict=True)))
    found = comparisons(runs, samplers, args.iterations, args.beta / args.margin_scale)
    rows, words = table(runs, samplers, args.iterations, found), verdict(runs, samplers, args.iterations, found)
    warned = [f"{f.name}: {text}" for f, one in zip(folders, runs, strict=True) for text in warnings(one, models)]
    note, text = NOTE.format(samplers[0]), "\n".join(warned + words)
    results = run_dir / "results"
    with writing(results):
        results.mkdir(exist_ok=True)
        figure = reward_vs_kl(runs, samplers, args.iterations)
        figures = save_figure(figure, "reward_vs_kl_over_seeds", CAPTION, results) if figure else {}
    write_atomic(results / "seeds.md", f"{markdown(rows)}\n{text}\n{note}\n")
    write_atomic(results / "seeds.csv", csv_text(rows))
    title = f"{len(runs)} seeds of {run_dir.resolve().name}"
    tables = {f"After iteration {args.iterations}": (note, rows)}
    write_atomic(results / "report.html", page(title, words, warned, tables, figures, runs[0], []))
    print(f"\n{markdown(rows)}\n{text}\n\nTable, figure and the report page: {results}/report.html")


def check_same_settings(runs: dict[Path, Run]) -> None:
    """Raise `UserError` unless the run folders were evaluated alike, but for their seeds."""
    for heading in dict.fromkeys(heading for one in runs.values() for heading in one.settings):
        made = {path: one.settings[heading] for path, one in runs.items() if one.settings.get(heading)}
        agreed(made, APART | {"seed"})


def stacked(runs: list[Run], judge: str, model: Model, part: str = TEST) -> np.ndarray | None:
    """Return rewards [S, N] of a model on the prompts `part`; None unless every seed has them.

    Raises:
        UserError: the seeds answered different prompts.
    """
    found = [one.answers.get((judge, part, model)) for one in runs]
    if None in found:
        return None
    if any(answers.prompts != found[0].prompts for answers in found):
        raise UserError(f"{model.title}: the seeds answered different prompts; they cannot be compared")
    return np.stack([answers.rewards for answers in found])


def beside_kl(runs: list[Run], judge: str, models: list[Model]) -> list[np.ndarray] | None:
    """Return rewards [S, N] of each model to set against its KL; None where some are missing.

    They are of the responses that the KL was measured on where all have them, else of the test prompts.
    """
    for part in (KL, TEST):
        found = [stacked(runs, judge, model, part) for model in models]
        if all(rewards is not None for rewards in found):
            return found
    return None


def stacked_kl(runs: list[Run], model: Model) -> np.ndarray | None:
    """Return the KL [S, P] from the base model; None unless every seed has it."""
    if model == BASE:
        return np.zeros((len(runs), 1))
    if any(model not in one.kl for one in runs):
        return None
    if not of_same_prompts([one.kl[model] for one in runs]):
        raise UserError(f"{model.title}: the seeds' KL was measured on different prompts; they cannot be compared")
    return np.stack([kl_of(one, model) for one in runs])


def stacked_value(runs: list[Run], model: Model, beta: float) -> np.ndarray | None:
    """Return reward - beta · KL [S, P] of what the KL was measured on; None unless every seed has it."""
    found = [value_of(one, model, beta) for one in runs]
    return None if any(values is None for values in found) else np.stack(found)


def comparisons(runs: list[Run], samplers: list[str], iteration: int, beta: float) -> dict[str, dict[str, tuple]]:
    """Return column → sampler → (difference from the first sampler, Holm-corrected p, paired values or None).

    The columns are the judges, `value`, and `equal KL`; what is not there for both samplers is left out.
    """
    last = [Model(name, iteration) for name in samplers]
    columns: dict[str, Callable] = {judge: lambda m, judge=judge: stacked(runs, judge, m) for judge in JUDGES}
    columns["value"] = lambda m: stacked_value(runs, m, beta)
    found: dict[str, dict[str, tuple]] = {}
    for column, values_of in columns.items():
        values = {m.label: values for m in last if (values := values_of(m)) is not None}
        if samplers[0] in values:
            paired = {name: v - values[samplers[0]] for name, v in values.items() if name != samplers[0]}
            found[column] = corrected({name: (effect_over_seeds(v), v) for name, v in paired.items()})
    rewards, kl = beside_kl(runs, "rewards", last), [stacked_kl(runs, m) for m in last]
    if rewards and all(values is not None for values in kl):
        effects = at_equal_kl(np.stack(rewards, axis=1), np.stack([k.mean(axis=1) for k in kl], axis=1))
        if effects:  # one seed has none
            found["equal KL"] = corrected({n: (e, None) for n, e in zip(samplers[1:], effects, strict=True)})
    return found


def effect_over_seeds(paired: np.ndarray) -> Effect:
    """Return the effect of paired differences [S, N]; one seed shows nothing about others."""
    return crossed_effect(paired) if len(paired) > 1 else Effect(float(paired.mean()))


def corrected(effects: dict[str, tuple[Effect, np.ndarray | None]]) -> dict[str, tuple]:
    """Return (effect, p-value corrected for the number of samplers or None, paired values) for each sampler."""
    tested = {name: effect.p_value for name, (effect, _) in effects.items() if effect.p_value is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {name: (effect, adjusted.get(name), values) for name, (effect, values) in effects.items()}


def table(runs: list[Run], samplers: list[str], iteration: int, found: dict) -> list[list[str]]:
    """Return every sampler after `iteration` beside the first one, as texts, heading first."""
    first = samplers[0]
    headings = {"rewards": f"over {first}", "judge": f"judge: over {first}", "value": f"value over {first}"}
    headings["equal KL"] = f"over {first} at equal KL"
    shown = {column: text for column, text in headings.items() if column in found or column in JUDGES}
    pairs = [text for heading in shown.values() for text in (heading, "p")]
    beside = ["win rate against base", "by the judge", "KL from base", "distinct-2", "false alarm"]
    lines = [["sampler", "reward, test prompts", *pairs, *beside]]
    for sampler in samplers:
        model, cells = Model(sampler, iteration), []
        for column in shown:
            effect, p, _ = found.get(column, {}).get(sampler, (None, None, None))
            own = (
                ["–", "–"]
                if sampler == first
                else [cell(effect and effect.interval), "–" if p is None else f"{p:.2g}"]
            )
            cells += own
        rates = [cell(_win_rate(runs, judge, model), 1, percent=True) for judge in JUDGES]
        rewards, kl = stacked(runs, "rewards", model), stacked_kl(runs, model)
        reward = cell(None if rewards is None else crossed_effect(rewards).interval)
        kl_cell = cell(None if kl is None else kl_estimate(kl))
        lines.append([sampler, reward, *cells, *rates, kl_cell, _diversity(runs, model), _alarm(found, sampler)])
    return lines


def _win_rate(runs: list[Run], judge: str, model: Model):
    ours, base = stacked(runs, judge, model), stacked(runs, judge, BASE)
    return None if ours is None or base is None else rate_of_wins(wins(ours, base))


def _diversity(runs: list[Run], model: Model) -> str:
    """Return the range of distinct-2 over the seeds."""
    shares = [distinct(answers.texts, 2) for one in runs if (answers := one.test(model))]
    shares = [share for share in shares if share is not None]
    return f"{min(shares):.2f} to {max(shares):.2f}" if shares else "–"


def _alarm(found: dict, sampler: str) -> str:
    _, _, paired = found.get("rewards", {}).get(sampler, (None, None, None))
    share = None if paired is None else false_alarm(paired)
    return "–" if share is None else f"{share:.2f}"


def verdict(runs: list[Run], samplers: list[str], iteration: int, found: dict) -> list[str]:
    """Return what the seeds and prompts show and what they do not, in sentences."""
    words = []
    for column, name in (JUDGES | {"value": "value", "equal KL": "reward at equal KL"}).items():
        there = {sampler: (effect, p) for sampler, (effect, p, _) in found.get(column, {}).items() if p is not None}
        clear = [f"{sampler} {effect.value:+.2f}" for sampler, (effect, p) in there.items() if p < 0.05]
        if there:
            words.append(f"{name}: {', '.join(clear) or 'none'} (of {len(there)})")
    if not words:
        return [f"Nothing can be said about differences from {samplers[0]}: that needs two seeds that are evaluated."]
    halves = [effect.half for effect, p, _ in found.get("rewards", {}).values() if p is not None]
    size = f"Differences in reward below {max(halves):.2f} could not have been told from 0 at this size. " * bool(
        halves
    )
    return [
        f"Clear differences from {samplers[0]} after iteration {iteration}, over {len(runs)} seeds and the prompts "
        f"together, Holm-corrected at 5%. {'; '.join(words)}.",
        f"{size}Seeds are few: a sampler that is missing here is not shown to be equal.",
    ]


class Band(NamedTuple):
    """Reward against KL over seeds: on `kl` [G] the lowest and highest of the seeds' curves that reach it, each [G],
    and their mean, NaN where one of them has ended."""

    kl: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray


def curves(runs: list[Run], judge: str, sampler: str, iterations: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return KL and mean reward, both [S, M], of a sampler's models, the base first; None if one is missing."""
    models = trajectory(sampler, iterations)
    kl, rewards = [stacked_kl(runs, m) for m in models], beside_kl(runs, judge, models)
    if rewards is None or any(values is None for values in kl):
        return None
    return tuple(np.stack([v.mean(axis=1) for v in values], axis=1) for values in (kl, rewards))


def band(kl: np.ndarray, rewards: np.ndarray, points: int = 201) -> Band:
    """Return the range of the seeds' curves [S, M], each interpolated along its own points in order of their KL."""
    grid = np.linspace(0, kl.max(), points)
    order = np.argsort(kl, axis=1, kind="stable")
    kl, rewards = (np.take_along_axis(values, order, axis=1) for values in (kl, rewards))
    lines = np.stack([np.interp(grid, x, y, right=np.nan) for x, y in zip(kl, rewards, strict=True)])
    return Band(grid, np.nanmin(lines, axis=0), lines.mean(axis=0), np.nanmax(lines, axis=0))


def reward_vs_kl(runs: list, samplers: list[str], iterations: int):
    """Draw a panel for each judge that scored every seed; None while there is none."""
    from evaluation.figures import band_panels

    found = {
        name: {s: c for s in samplers if (c := curves(runs, judge, s, iterations)) is not None}
        for judge, name in JUDGES.items()
    }
    panels = {name: {s: (band(*c), *c) for s, c in lines.items()} for name, lines in found.items() if lines}
    return band_panels(panels) if panels else None


if __name__ == "__main__":
    run(main)
