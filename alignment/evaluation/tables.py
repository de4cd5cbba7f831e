"""The tables and the verdict of one run: estimates per model and per pair of samplers, as Markdown and CSV."""

import csv
import io
import itertools

import numpy as np

from evaluation.run_files import BASE, FIRST, JUDGES, KL, TEST, TRAIN, Model, Run, trajectory
from evaluation.stats import (
    Curve,
    Effect,
    Estimate,
    Matched,
    distinct,
    holm,
    kl_estimate,
    matched_kl,
    mean_effect,
    rate_of_wins,
    wilson,
    wins,
)

# Column → (heading, digits, whether it is a share that is shown in percent).
COLUMNS = {
    "test_reward": ("reward, test prompts", 2, False),
    "test_gain": ("gain over base", 2, False),
    "win_rate": ("win rate against base", 1, True),
    "judge_reward": ("judge's reward", 2, False),
    "judge_win_rate": ("win rate by the judge", 1, True),
    "kl": ("KL from base", 2, False),
    "published_kl": ("KL as published", 2, False),
    "kl_reward": ("reward where KL is measured", 2, False),
    "value": ("value there: reward − (β / margin scale)·KL", 2, False),
    "length": ("tokens per response", 1, False),
    "cut": ("cut at the limit", 1, True),
    "different": ("different responses", 1, True),
    "distinct_1": ("distinct-1", 3, False),
    "distinct_2": ("distinct-2", 3, False),
    "train_reward": ("reward, train prompts", 2, False),
}
OPTIONAL = ("published_kl", "kl_reward", "value")  # left out where no model has them
MISSING = "missing"

# A model has collapsed where its diversity is below this share of the base model's. Healthy 135M runs kept 0.9, one
# that had collapsed to refusals a third.
LOST_DIVERSITY = 0.5
# Nats per token. Healthy 135M runs had 0.03 to 0.14, a collapsed one 0.21.
RUNAWAY_KL = 0.15
SEEDS_DIFFER = (
    "This is one training run. Seeds differ by more than these intervals, which are over prompts only: in eight "
    "seeds of a 135M model such an interval excluded 0 with probability 0.14 to 0.32 for samplers that do not "
    "differ (docs/results.md). So nothing here says which sampler is better; sample_ablation.sh compares them over "
    "seeds."
)

Row = dict[str, Estimate | None]


def summary_row(run: Run, model: Model, beta: float) -> Row:
    """Return every column of a model; None where a file is missing. `beta` is the price of a nat, in reward."""
    row: Row = dict.fromkeys(COLUMNS)
    columns = {"train_reward": ("rewards", TRAIN), "test_reward": ("rewards", TEST), "judge_reward": ("judge", TEST)}
    for column, key in columns.items():
        if (*key, model) in run.answers:
            row[column] = mean_effect(run.answers[*key, model].rewards).interval
    for column, judge in {"win_rate": "rewards", "judge_win_rate": "judge"}.items():
        row[column] = win_rate(run, judge, model, BASE)
    gain = reward_difference(run, model, BASE)
    row |= {"test_gain": gain and gain.interval, **_text_columns(run, model), **_kl_columns(run, model, beta)}
    if model == BASE:  # beside itself
        row |= {"test_gain": gain and Estimate(0.0), "kl": Estimate(0.0)}
        row |= {c: row[c] and Estimate(0.5) for c in ("win_rate", "judge_win_rate")}
    return row


def _text_columns(run: Run, model: Model) -> Row:
    test = run.test(model)
    if not test:
        return {}
    shares = {"different": len(set(test.texts)) / len(test.texts)}
    shares |= {f"distinct_{n}": distinct(test.texts, n) for n in (1, 2)}
    row = {"length": mean_effect(test.tokens.mean(axis=1)).interval}
    row["cut"] = wilson(float(test.cut.mean()), len(test.cut))
    return row | {name: None if share is None else Estimate(share) for name, share in shares.items()}


def _kl_columns(run: Run, model: Model, beta: float) -> Row:
    row: Row = {}
    if model in run.kl:
        row["kl"] = kl_estimate(kl_of(run, model)[None])
        if "published_kl" in run.kl[model]:  # get_kl.py --published_estimator
            count = len(run.kl[model]["kl_of_prompts"])
            stderr = run.kl[model].get("published_stderr")
            row["published_kl"] = Effect(run.kl[model]["published_kl"], stderr, count - 1).interval
    if (values := value_of(run, model, beta)) is not None:
        rewards = run.answers["rewards", KL, model].rewards
        row |= {"kl_reward": mean_effect(rewards).interval, "value": mean_effect(values).interval}
    return row


def kl_of(run: Run, model: Model) -> np.ndarray:
    """Return the KL of each KL prompt, [P]."""
    return np.array(run.kl[model]["kl_of_prompts"], dtype=float)


def value_of(run: Run, model: Model, beta: float) -> np.ndarray | None:
    """Return reward - beta · KL of each KL prompt [P], both of the same responses; None where a file is missing."""
    answers = run.answers.get(("rewards", KL, model))
    if answers is None or (model != BASE and model not in run.kl):
        return None
    return answers.rewards - (0.0 if model == BASE else beta * kl_of(run, model))


def win_rate(run: Run, judge: str, ours: Model, theirs: Model) -> Estimate | None:
    """Return the share of test prompts on which `judge` gives `ours` the higher score, ties half; None if missing."""
    found = [run.test(model, judge) for model in (ours, theirs)]
    return None if None in found else rate_of_wins(wins(found[0].rewards, found[1].rewards)[None])


def win_rows(run: Run, models: list[Model]) -> dict[tuple[str, Model, Model], Estimate]:
    """Return (judge, ours, theirs) → win rate, for every ordered pair of models that both have answers."""
    pairs = itertools.product(JUDGES, itertools.permutations(models, 2))
    found = {(judge, *pair): win_rate(run, judge, *pair) for judge, pair in pairs}
    return {key: estimate for key, estimate in found.items() if estimate is not None}


def reward_difference(run: Run, ours: Model, theirs: Model) -> Effect | None:
    """Return the mean difference of the training reward, paired over the test prompts."""
    found = [run.test(model) for model in (ours, theirs)]
    return None if None in found else mean_effect(found[0].rewards - found[1].rewards)


def curve(run: Run, sampler: str, iterations: int) -> Curve | None:
    """Return the sampler's own models with rewards and a KL; None if there is none.

    The shared iteration 1 is not among them: there all samplers are equal, which would pull differences towards 0.
    The rewards are of the responses that the KL was measured on where all have them, else of the test prompts.
    """
    own = [m for m in trajectory(sampler, iterations)[2:] if m in run.kl]
    paired = bool(own) and all(("rewards", KL, m) in run.answers for m in own)
    part = KL if paired else TEST
    models = [m for m in own if ("rewards", part, m) in run.answers]
    if not models:
        return None
    rewards = np.stack([run.answers["rewards", part, m].rewards for m in models])
    return Curve(rewards, np.stack([kl_of(run, m) for m in models]), paired)


def last_models(run: Run, samplers: list[str], iterations: int, given: list[str] = ()) -> list[Model]:
    """Return the base model, iteration 1, all samplers' models of the last evaluated iteration, and those given."""
    own = [Model(sampler, n) for n in range(2, iterations + 1) for sampler in samplers]
    last = max((m.iteration for m in own if run.test(m)), default=iterations)
    shared = [FIRST] if samplers else []
    return [BASE, *shared, *(m for m in own if m.iteration == last), *(Model(name, None) for name in given)]


def pair_table(run: Run, models: list[Model], iterations: int, seed: int) -> list[list[str]]:
    """Return the last models against each other, and their samplers at matched KL, as texts, heading first."""
    heading = ["models", "reward difference", "win rate", "win rate by the judge"]
    matched = ["common KL", "difference at its end", "average difference over it"] if iterations > 1 else []
    table = [[*heading, *matched]]
    for ours, theirs in itertools.combinations(models, 2):
        apart = reward_difference(run, ours, theirs)
        rates = [cell(win_rate(run, judge, ours, theirs), 1, percent=True) for judge in JUDGES]
        cells = [f"{ours.label} against {theirs.label}", cell(apart and apart.interval), *rates]
        table.append(cells + (_matched_cells(run, ours, theirs, iterations, seed) if matched else []))
    return table


def _matched_cells(run: Run, ours: Model, theirs: Model, iterations: int, seed: int) -> list[str]:
    if None in (ours.iteration, theirs.iteration):
        return ["one model each", "", ""]
    curves = [curve(run, model.label, iterations) for model in (ours, theirs)]
    if None in curves:
        return [MISSING, "", ""]
    found: Matched | None = matched_kl(*curves, seed)
    if found is None:
        return ["no common range", "", ""]
    return [f"{found.low:.2f} to {found.kl:.2f}", cell(found.at), cell(found.average)]


def verdict(run: Run, models: list[Model]) -> list[str]:
    """Return what the test prompts show about the last `models`, and what they do not, in sentences."""
    gains = {m: gain for m in models if m != BASE and (gain := reward_difference(run, m, BASE))}
    if not gains:
        return ["No trained model has been evaluated beside the base model yet."]
    tested = {m: gain for m, gain in gains.items() if gain.p_value is not None}
    adjusted = dict(zip(tested, holm([gain.p_value for gain in tested.values()]), strict=True))
    better = [m for m, p in adjusted.items() if p < 0.05 and gains[m].value > 0]
    worse = [m for m, p in adjusted.items() if p < 0.05 and gains[m].value < 0]
    each = ", ".join(f"{m.short} {gain.value:+.2f}" for m, gain in gains.items())
    words = f"{len(better)} of {len(gains)} trained models answer the test prompts better than the base model"
    words += f", {len(worse)} worse" * bool(worse) + f" (Holm-corrected at 5%). Gains: {each}."
    return [words, SEEDS_DIFFER]


def warnings(run: Run, models: list[Model]) -> list[str]:
    """Return a sentence for each model that has lost its diversity or has run away from the base model."""
    found, base = [], run.test(BASE)
    for model in models:
        test = run.test(model)
        if test and base and (lost := lost_diversity(test.texts, base.texts)):
            found.append(f"{model.title} has collapsed: {lost}.")
        per_token = run.kl.get(model, {}).get("kl_per_token") or 0
        if per_token > RUNAWAY_KL:
            found.append(f"{model.title} is far from the base model: KL {per_token:.2f} nats per token.")
    return found


def lost_diversity(texts: list[str], base: list[str]) -> str | None:
    """Return in what a model's responses are far less diverse than the base model's to the same prompts."""
    measures = {"different responses": lambda t: len(set(t)) / len(t), "distinct-2": lambda t: distinct(t, 2)}
    for name, measure in measures.items():
        here, there = measure(texts), measure(base)
        if here is not None and there is not None and here < LOST_DIVERSITY * there:
            return f"{name} {here:.2f} against {there:.2f} of the base model"
    return None


def cell(estimate: Estimate | None, digits: int = 2, percent: bool = False) -> str:
    """Return `value [low, high]`, or that it is missing."""
    if estimate is None:
        return MISSING
    scale, unit = (100, "%") if percent else (1, "")
    # Adding 0.0 turns the -0.0 that rounding may leave into 0.0.
    value, *bounds = (None if v is None else f"{round(v * scale, digits) + 0.0:.{digits}f}" for v in estimate)
    return f"{value}{unit}" + ("" if None in bounds else f" [{bounds[0]}, {bounds[1]}]")


def summary_table(rows: dict[Model, Row]) -> list[list[str]]:
    """Return the table of all models as texts, heading first."""
    shown = {c: how for c, how in COLUMNS.items() if c not in OPTIONAL or any(row[c] for row in rows.values())}
    table = [["model", *(heading for heading, _, _ in shown.values())]]
    for model, row in rows.items():
        table.append([model.title, *(cell(row[c], digits, percent) for c, (_, digits, percent) in shown.items())])
    return table


def markdown(table: list[list[str]]) -> str:
    """Return a table in Markdown, its columns aligned so that it is read as easily in a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = [table[0], ["-" * width for width in widths], *table[1:]]
    lines = [" | ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def summary_csv(rows: dict[Model, Row]) -> str:
    """Return the table with every bound in a column of its own; an empty field is missing."""
    lines = [["sampler", "iteration", *(f"{column}{end}" for column in COLUMNS for end in ("", "_low", "_high"))]]
    for model, row in rows.items():
        lines.append([*model, *(value for column in COLUMNS for value in (row[column] or (None, None, None)))])
    return csv_text(lines)


def win_csv(rows: dict[tuple[str, Model, Model], Estimate]) -> str:
    """Return every win rate, one per line."""
    lines = [["judge", "sampler", "iteration", "against_sampler", "against_iteration", "win_rate", "low", "high"]]
    lines += [[judge, *ours, *theirs, *estimate] for (judge, ours, theirs), estimate in rows.items()]
    return csv_text(lines)


def csv_text(lines: list[list]) -> str:
    """Return rows as CSV."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()
