"""The tables of the report, as rows of estimates and as Markdown and CSV."""

import csv
import io
import itertools

import numpy as np

from evaluation.run_files import BASE, FIRST, JUDGES, Model, Run, trajectory
from evaluation.stats import (
    Curve,
    Estimate,
    Matched,
    distinct,
    matched_kl,
    mean_interval,
    normal_interval,
    wins,
)

# Column → (heading, digits, whether it is a share that is shown in percent).
COLUMNS = {
    "train_reward": ("reward, train prompts", 2, False),
    "test_reward": ("reward, test prompts", 2, False),
    "test_gain": ("gain over base, test prompts", 2, False),
    "win_rate": ("win rate against base", 1, True),
    "judge_win_rate": ("win rate by the judge", 1, True),
    "judge_reward": ("judge's reward, test prompts", 2, False),
    "kl": ("KL from base", 2, False),
    "length": ("tokens a response", 1, False),
    "cut": ("cut at the limit", 1, True),
    "distinct_1": ("distinct-1", 3, False),
    "distinct_2": ("distinct-2", 3, False),
}
MISSING = "missing"

Row = dict[str, Estimate | None]


def summary_rows(run: Run, models: list[Model], seed: int) -> dict[Model, Row]:
    """Every column of every model; None where a file is missing."""
    return {model: _summary_row(run, model, seed) for model in models}


def _summary_row(run: Run, model: Model, seed: int) -> Row:
    row: Row = dict.fromkeys(COLUMNS)
    for column, key in {
        "train_reward": ("reward", "train"),
        "test_reward": ("reward", "test"),
        "judge_reward": ("judge", "test"),
    }.items():
        if (*key, model) in run.answers:
            row[column] = mean_interval(run.answers[*key, model].rewards, seed)
    for column, judge in {"win_rate": "reward", "judge_win_rate": "judge"}.items():
        row[column] = win_rate(run, judge, model, BASE, seed)
    test, base = (run.answers.get(("reward", "test", m)) for m in (model, BASE))
    if test and base:
        row["test_gain"] = mean_interval(test.rewards - base.rewards, seed)
    if test:
        texts = [text for responses in test.responses for text in responses]
        row |= {"length": mean_interval(test.tokens, seed), "cut": mean_interval(test.cut, seed)}
        for n in (1, 2):
            share = distinct(texts, n)
            row[f"distinct_{n}"] = None if share is None else Estimate(share)
    if model == BASE:  # beside itself
        row |= {"kl": Estimate(0.0), "test_gain": Estimate(0.0) if test else None}
        row |= {c: row[c] and Estimate(0.5) for c in ("win_rate", "judge_win_rate")}
    elif model in run.kl:
        row["kl"] = normal_interval(run.kl[model]["kl"], run.kl[model]["stderr"])
    return row


def win_rate(run: Run, judge: str, ours: Model, theirs: Model, seed: int) -> Estimate | None:
    """Share of test prompts on which `judge` gives `ours` the higher score, ties half; paired bootstrap interval."""
    found = [run.answers.get((judge, "test", model)) for model in (ours, theirs)]
    if None in found:
        return None
    return mean_interval(wins(found[0].rewards, found[1].rewards), seed)


def win_rows(run: Run, models: list[Model], seed: int) -> dict[tuple[str, Model, Model], Estimate]:
    """(judge, ours, theirs) → win rate, for every ordered pair of models that both have answers."""
    pairs = itertools.product(JUDGES, itertools.permutations(models, 2))
    found = {(judge, *pair): win_rate(run, judge, *pair, seed) for judge, pair in pairs}
    return {key: estimate for key, estimate in found.items() if estimate is not None}


def curve(run: Run, sampler: str, iterations: int) -> Curve | None:
    """The sampler's models from iteration 1 on that have test rewards and a KL; None if none is its own."""
    models = [
        m
        for m in trajectory(sampler, iterations)
        if m != BASE and m in run.kl and ("reward", "test", m) in run.answers
    ]
    if not set(models) - {FIRST}:
        return None
    rewards = np.stack([run.answers["reward", "test", m].rewards for m in models])
    return Curve(rewards, np.array([run.kl[m]["kl_of_prompts"] for m in models]))


def matched_rows(run: Run, samplers: list[str], iterations: int, seed: int) -> dict[tuple[str, str], Matched | str]:
    """Pair of samplers → comparison at matched KL, or why there is none."""
    curves = {sampler: curve(run, sampler, iterations) for sampler in samplers}
    rows: dict[tuple[str, str], Matched | str] = {}
    for ours, theirs in itertools.combinations(samplers, 2):
        if curves[ours] is None or curves[theirs] is None:
            rows[ours, theirs] = MISSING
        else:
            found = matched_kl(curves[ours], curves[theirs], seed)
            rows[ours, theirs] = found or "the curves do not overlap"
    return rows


def cell(estimate: Estimate | None, digits: int = 2, percent: bool = False) -> str:
    """`value [low, high]`, or that it is missing."""
    if estimate is None:
        return MISSING
    scale, unit = (100, "%") if percent else (1, "")
    # Adding 0.0 turns the -0.0 that rounding may leave into 0.0.
    value, *bounds = (None if v is None else f"{round(v * scale, digits) + 0.0:.{digits}f}" for v in estimate)
    return f"{value}{unit}" + ("" if None in bounds else f" [{bounds[0]}, {bounds[1]}]")


def summary_table(rows: dict[Model, Row]) -> list[list[str]]:
    """The paper's table as texts, heading first."""
    table = [["model", *(heading for heading, _, _ in COLUMNS.values())]]
    for model, row in rows.items():
        cells = [cell(row[c], digits, percent) for c, (_, digits, percent) in COLUMNS.items()]
        table.append([model.title, *cells])
    return table


def last_models(run: Run, samplers: list[str], iterations: int) -> list[Model]:
    """Base, iteration 1, and every sampler's model of the last iteration that any sampler was evaluated at."""
    done = [m.iteration for _, part, m in run.answers if part == "test" and m.label in samplers]
    return [BASE, FIRST, *(Model(sampler, max(done)) for sampler in samplers)] if done else [BASE, FIRST]


def pair_table(run: Run, samplers: list[str], iterations: int, seed: int) -> list[list[str]]:
    """Sampler against sampler at the last iteration and at matched KL as texts, heading first."""
    table = [
        [
            "samplers",
            "reward difference, test prompts",
            "win rate",
            "win rate by the judge",
            "common KL",
            "difference at its end",
            "average difference over it",
        ]
    ]
    matched = matched_rows(run, samplers, iterations, seed)
    last = {model.label: model for model in last_models(run, samplers, iterations)}
    for (ours, theirs), found in matched.items():
        models = [last[name] for name in (ours, theirs) if name in last]
        cells = [MISSING, MISSING, MISSING]
        if len(models) == 2:
            rates = [cell(win_rate(run, judge, *models, seed), 1, percent=True) for judge in JUDGES]
            cells = [cell(reward_difference(run, *models, seed)), *rates]
        cells += [found, "", ""]
        if isinstance(found, Matched):
            cells[3:] = [f"{found.low:.2f} to {found.kl:.2f}", cell(found.at), cell(found.average)]
        table.append([f"{ours} against {theirs}", *cells])
    return table


def reward_difference(run: Run, ours: Model, theirs: Model, seed: int) -> Estimate | None:
    """Mean difference of the training reward on the same test prompts, with its paired bootstrap interval."""
    found = [run.answers.get(("reward", "test", model)) for model in (ours, theirs)]
    return None if None in found else mean_interval(found[0].rewards - found[1].rewards, seed)


def verdict(run: Run, samplers: list[str], iterations: int, seed: int) -> str:
    """What the test prompts show and what they do not, in words."""
    last = last_models(run, samplers, iterations)
    gains = [(m, reward_difference(run, m, BASE, seed)) for m in last if m != BASE]
    gains = [(m, gain) for m, gain in gains if gain is not None]
    if not gains:
        return "No trained model has been evaluated beside the base model yet."
    best, gain = max(gains, key=lambda pair: pair[1].value)
    text = f"Highest mean reward on the test prompts: {best.title}, {gain.value:+.2f} over the base model"
    text += "." if gain.low is None else f" (95% interval {gain.low:+.2f} to {gain.high:+.2f})."
    clear, pairs = [], 0
    for ours, theirs in itertools.combinations(last[2:], 2):
        difference = reward_difference(run, ours, theirs, seed)
        if difference is None or difference.low is None:
            continue
        pairs += 1
        if difference.low > 0 or difference.high < 0:
            better, worse = (ours, theirs) if difference.low > 0 else (theirs, ours)
            clear.append(f"{better.label} above {worse.label}")
    if pairs:
        text += f" Pairs of samplers whose paired difference excludes 0: {', '.join(clear) or 'none'} (of {pairs})."
    return text


def markdown(table: list[list[str]]) -> str:
    """A table in Markdown, its columns aligned so that it is read as easily in a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = [table[0], ["-" * width for width in widths], *table[1:]]
    lines = [" | ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def summary_csv(rows: dict[Model, Row]) -> str:
    """The table with every bound in a column of its own; an empty field is missing."""
    header = [f"{column}{end}" for column in COLUMNS for end in ("", "_low", "_high")]
    lines = [["sampler", "iteration", *header]]
    for model, row in rows.items():
        values = [value for column in COLUMNS for value in (row[column] or (None, None, None))]
        lines.append([model.label, model.iteration, *values])
    return csv_text(lines)


def win_csv(rows: dict[tuple[str, Model, Model], Estimate]) -> str:
    """Every win rate, one a line."""
    lines = [["judge", "sampler", "iteration", "against_sampler", "against_iteration", "win_rate", "low", "high"]]
    lines += [[judge, *ours, *theirs, *estimate] for (judge, ours, theirs), estimate in rows.items()]
    return csv_text(lines)


def csv_text(lines: list[list]) -> str:
    """Rows as CSV."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()
