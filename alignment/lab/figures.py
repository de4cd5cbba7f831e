"""Figures of the study, from the cells that study.py wrote; a cell that is not there is left out.

Reads   STUDY/<cell>/table.json and values.npz.
Writes  OUTPUT_DIR/lab_main.png, lab_choices.png, lab_ladder.png, lab_where.png, lab_lr.png, lab_reward_kl.png.
        Prints the tables over cells of docs/results.md; table.md in each cell's folder has all of its samplers.

    python alignment/lab/figures.py --study alignment/lab/results --output_dir docs/figures
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from lab.intervals import cross_fitted, interval_text, paired
from scipy import stats

from bandit.palette import color_of, marker_of
from common.cli import Parser, UserError, run

SHOWN = ["gshf", "mixp", "offline", "theory"]
RUNGS = [(learner, optimizer) for learner in ("table", "linear", "transformer") for optimizer in ("sgd", "adam")]
WHERE = {
    "ladder_transformer_adam_0.1": "β = 0.1",
    "main": "β = 0.3",
    "beta_1.0": "β = 1",
    "beta_3.0": "β = 3",
    "quality_-0.7": "q = −0.7",
    "quality_0.7": "q = 0.7",
    "noise_0.2": "20%\nflipped",
    "rounds_15": "15 rounds",
    "rounds_3": "3 rounds",
    "pipeline": "3 rounds ×\n2 epochs",
    "batch_8": "8 labels\nper update",
    "batch_120": "120 labels\nper update",
    "labels_19200": "19,200\nlabels",
    "exact": "exact\ngradients",
}


def main() -> None:
    """Draw every figure."""
    p = Parser(__doc__)
    p.add("--study", "folder that study.py wrote", required=True)
    p.add("--output_dir", "folder of the figures", required=True)
    args = p.parse_args()
    study, output = Path(args.study), Path(args.output_dir)
    if not (study / "main/table.json").exists():
        raise UserError(f"{study}: has no cell `main`")
    output.mkdir(parents=True, exist_ok=True)
    figures = {
        "main": forest,
        "choices": choices,
        "ladder": ladder,
        "where": where,
        "lr": valleys,
        "reward_kl": reward_kl,
    }
    for name, draw in figures.items():
        figure = draw(study)
        if figure is None:
            continue
        figure.savefig(output / f"lab_{name}.png", dpi=130, bbox_inches="tight")
        plt.close(figure)
    print(differences(study))
    for sampler, row in matched_kl(study, "main").items():
        print(f"{sampler}: reward minus online's at equal KL {interval_text(row[0], row[1], row[2])}")


def differences(study: Path) -> str:
    """Return a Markdown table, a cell of the study per line: value gaps minus online's; * for Holm's p below 0.05."""
    samplers = ["online-null", "gshf", "mixp", "theory", "offline"]
    lines = [
        "| cell | seeds | " + " | ".join(f"`{name}`" for name in samplers) + " | `online`'s gap |",
        "|---" * 8 + "|",
    ]
    for path in sorted(study.glob("*/table.json")):
        cell, rows = path.parent.name, rows_of(study, path.parent.name)
        if cell.startswith("choices"):
            continue
        words = [cell, str(len(json.loads(path.read_text())["seeds"]))]
        for row in map(rows.get, samplers):
            star = " *" if row and row["p_holm"] < 0.05 else ""
            words.append(interval_text(row["difference"], row["low"], row["high"]) + star if row else "")
        lines.append("| " + " | ".join(words) + f" | {rows['online']['gap']:.3f} |")
    return "\n".join(lines)


def rows_of(study: Path, cell: str) -> dict[str, dict]:
    """Return a cell's table by sampler; empty if it was not run."""
    path = study / cell / "table.json"
    return {row["sampler"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def error_bar(axis, place, row: dict, sampler: str, across: bool = False, **style) -> None:
    """Draw a difference with its interval: upright at x = place, or `across` at y = place."""
    error = [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
    x, y, which = ([row["difference"]], [place], "xerr") if across else ([place], [row["difference"]], "yerr")
    style = {"fmt": marker_of(sampler), "color": color_of(sampler), "ms": 5, "capsize": 2, which: error} | style
    axis.errorbar(x, y, **style)


def choices(study: Path):
    """Draw the choices among 8 candidates, of transformer and linear policies; nothing where no cell was run."""
    cells = {"choices": "transformer", "choices_linear": "linear"}
    found = {cell: title for cell, title in cells.items() if rows_of(study, cell)}
    return forest(study, found) if found else None


def forest(study: Path, cells: dict[str, str] | None = None):
    """Draw every sampler's value gap minus online's: a panel per cell, with its title, in the order of the first."""
    cells = cells or {"main": ""}
    first = rows_of(study, next(iter(cells)))
    names = sorted((name for name in first if name != "online"), key=lambda name: first[name]["difference"])
    figure, axes = plt.subplots(1, len(cells), figsize=(1.2 + 4.2 * len(cells), 3.6), sharey=True, squeeze=False)
    for axis, (cell, title) in zip(axes[0], cells.items(), strict=True):
        rows = rows_of(study, cell)
        for y, name in enumerate(names):
            error_bar(axis, y, rows[name], name, across=True, fmt="o", ms=4)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("value gap minus online's (right: worse)")
    axes[0, 0].set_yticks(range(len(names)), names)
    return figure


def ladder(study: Path):
    """Draw the rungs, table to transformer, SGD and Adam; one panel per beta."""
    betas = [beta for beta in (0.3, 0.1) if sum(bool(rung_rows(study, rung, beta)) for rung in RUNGS) > 1]
    figure, axes = plt.subplots(1, len(betas), figsize=(5.4 * len(betas), 3.2), squeeze=False)
    for axis, beta in zip(axes[0], betas, strict=True):
        for i, sampler in enumerate(SHOWN):
            labelled = False
            for x, rung in enumerate(RUNGS):
                row = rung_rows(study, rung, beta).get(sampler)
                if row:
                    error_bar(axis, x + 0.13 * (i - 1.5), row, sampler, label=None if labelled else sampler)
                    labelled = True
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xticks(range(len(RUNGS)), [f"{learner}\n{optimizer}" for learner, optimizer in RUNGS], fontsize=7)
        axis.set_xlim(-0.5, len(RUNGS) - 0.5)
        axis.set_title(f"β = {beta}", fontsize=9)
        axis.set_ylabel("value gap minus online's")
    axes[0, 0].legend(fontsize=7)
    return figure


def rung_rows(study: Path, rung: tuple[str, str], beta: float) -> dict[str, dict]:
    """Return the table of one rung of the ladder."""
    name = "main" if (*rung, beta) == ("transformer", "adam", 0.3) else f"ladder_{rung[0]}_{rung[1]}_{beta}"
    return rows_of(study, name)


def where(study: Path):
    """Draw the transformer with Adam over settings."""
    cells = [cell for cell in WHERE if rows_of(study, cell)]
    figure, axis = plt.subplots(figsize=(0.85 * len(cells) + 1.5, 3.4))
    for i, sampler in enumerate(SHOWN):
        for x, cell in enumerate(cells):
            error_bar(
                axis, x + 0.13 * (i - 1.5), rows_of(study, cell)[sampler], sampler, label=None if x else sampler
            )
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(len(cells)), [WHERE[cell] for cell in cells], fontsize=7)
    axis.set_ylabel("value gap minus online's")
    axis.legend(fontsize=7)
    return figure


def load(study: Path, cell: str):
    """Return a cell's arrays and the number of each sampler."""
    data = np.load(study / cell / "values.npz")
    return data, {name: i for i, name in enumerate(data["samplers"].tolist())}


def valleys(study: Path):
    """Draw the value gap against the learning rate: mean and 95% band over seeds."""
    data, index = load(study, "main")
    figure, axis = plt.subplots(figsize=(4.6, 3.2))
    for sampler in ["online", *SHOWN]:
        gaps = data["gap"][index[sampler], :, :, -1]
        mean, half = gaps.mean(axis=1), t_half(gaps)
        axis.plot(data["lrs"], mean, marker=marker_of(sampler), color=color_of(sampler), label=sampler, ms=4)
        axis.fill_between(data["lrs"], mean - half, mean + half, color=color_of(sampler), alpha=0.15, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(data["lrs"], [f"{lr:g}" for lr in data["lrs"]])
    axis.set_xlabel("learning rate")
    axis.set_ylabel("value gap after 150 updates")
    axis.legend(fontsize=7)
    return figure


def t_half(values: np.ndarray) -> np.ndarray:
    """Return half the 95% t-interval of the means over the last axis."""
    count = values.shape[-1]
    return stats.t.ppf(0.975, count - 1) * values.std(axis=-1, ddof=1) / count**0.5


def at_own_lr(data, sampler: int) -> tuple[np.ndarray, np.ndarray]:
    """Return reward and KL [seeds, times] of a sampler at its cross-fitted learning rates."""
    _, used = cross_fitted(data["gap"][sampler, ..., -1])
    seeds = np.arange(len(used))
    return data["reward"][sampler, used, seeds], data["kl"][sampler, used, seeds]


def reward_kl(study: Path):
    """Draw reward against KL along the runs: means over seeds, bands of the reward."""
    data, index = load(study, "main")
    figure, axis = plt.subplots(figsize=(4.6, 3.2))
    for sampler in ["online", *SHOWN]:
        reward, kl = at_own_lr(data, index[sampler])
        mean, half = reward.mean(axis=0), t_half(reward.T)
        x = kl.mean(axis=0)
        axis.plot(x, mean, marker=marker_of(sampler), color=color_of(sampler), label=sampler, ms=3)
        axis.fill_between(x, mean - half, mean + half, color=color_of(sampler), alpha=0.15, lw=0)
    axis.set_xlabel("KL to the reference, nats")
    axis.set_ylabel("expected reward")
    axis.legend(fontsize=7)
    return figure


def matched_kl(study: Path, cell: str) -> dict[str, tuple]:
    """Return intervals of the reward minus online's, seed by seed at the largest KL that both runs reach."""
    data, index = load(study, cell)
    reward, kl = at_own_lr(data, index["online"])
    result = {}
    for sampler in (name for name in index if name != "online"):
        other_reward, other_kl = at_own_lr(data, index[sampler])
        differences = []
        for seed in range(len(reward)):
            common = min(kl[seed].max(), other_kl[seed].max())
            ours, theirs = (
                np.interp(common, [0, *k[order]], [0, *r[order]])
                for k, r in ((other_kl[seed], other_reward[seed]), (kl[seed], reward[seed]))
                for order in (np.argsort(k),)
            )
            differences.append(ours - theirs)
        result[sampler] = paired(np.array(differences))
    return result


if __name__ == "__main__":
    run(main)
