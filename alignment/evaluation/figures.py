"""The figures of an evaluation, each as PNG and PDF. Colours are the samplers' own in every figure of the project."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from bandit.palette import color_of
from evaluation.run_files import BASE, FIRST, JUDGES, Model, Run, trajectory
from evaluation.stats import Estimate
from evaluation.tables import Row, win_rate

SHARED_COLOR = "#777777"


def save_figures(
    run: Run, rows: dict[Model, Row], samplers: list[str], iterations: int, last: list[Model], folder: Path
) -> dict:
    """Draw every figure for which there are data; return name → (caption, PNG path), the main one first."""
    given = [m for m in rows if m.iteration is None]
    drawings = {
        "reward_vs_kl": (
            reward_vs_kl(rows, samplers, iterations, given),
            "Mean reward against the KL from the base model; lines join the iterations. Bars: 95% over prompts.",
        ),
        "reward_vs_iteration": (
            reward_vs_iteration(rows, samplers, iterations),
            "Mean reward after each iteration; iteration 1 is shared (grey). Bars: 95% intervals over prompts. All "
            "models answer the same prompts: their paired differences (tables) are tighter than these bars.",
        ),
        "win_rates": (
            win_rates(run, last),
            "Share of test prompts on which the row's model scores higher than the column's (%); ties count half.",
        ),
        "reward_distributions": (
            reward_distributions(run, last),
            "Scores of the responses to the test prompts; the line is the mean.",
        ),
    }
    saved = {}
    for name, (figure, caption) in drawings.items():
        if figure is not None:
            saved |= save_figure(figure, name, caption, folder)
    return saved


def save_figure(figure, name: str, caption: str, folder: Path) -> dict:
    """Write one figure as PNG and PDF and close it; return {name: (caption, PNG path)}."""
    for ending in ("png", "pdf"):
        # No date in the file: the same results give the same bytes.
        metadata = {"CreationDate": None} if ending == "pdf" else None
        figure.savefig(folder / f"{name}.{ending}", dpi=160, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
    return {name: (caption, folder / f"{name}.png")}


def _bars(estimates: list[Estimate]) -> np.ndarray:
    """Return error bar lengths [2, M]; 0 where there is no interval."""
    bounds = [(e.value - e.low, e.high - e.value) if e.low is not None else (0, 0) for e in estimates]
    return np.maximum(np.array(bounds).T, 0)


def _color(model: Model) -> str:
    """Return the sampler's colour, a given checkpoint's own, grey for what all samplers share."""
    return SHARED_COLOR if model in (BASE, FIRST) else color_of(model.label)


def _axes(count: int, width: float, height: float):
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False, layout="constrained")
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def reward_vs_iteration(rows: dict[Model, Row], samplers: list[str], iterations: int):
    """Draw one panel for each kind of score that is there, one line per sampler; None while there is none."""
    titles = {
        "test_reward": "test prompts",
        "train_reward": "train prompts",
        "judge_reward": "test prompts, second judge",
    }
    shown = [c for c in titles if any(row[c] for row in rows.values())]
    if not shown or not samplers:
        return None
    figure, axes = _axes(len(shown), 4.4, 3.6)
    for ax, column in zip(axes, shown, strict=True):
        for i, sampler in enumerate(samplers):
            # Side by side, so that the bars of the samplers can be told apart.
            shift = 0.06 * (i - (len(samplers) - 1) / 2)
            models = [m for m in trajectory(sampler, iterations) if rows[m][column]]
            x = [m.iteration + (shift if m.iteration > 1 else 0) for m in models]
            _line(ax, sampler, models, x, [rows[m][column] for m in models])
        ax.set(title=titles[column], xlabel="iteration", xticks=range(iterations + 1))
    axes[0].set_ylabel("mean reward")
    axes[-1].legend(frameon=False)
    return figure


def _line(ax, sampler: str, models: list[Model], x: list[float], estimates: list[Estimate], xerr=None) -> None:
    """Draw a sampler's points with their bars, joined by a line; what all samplers share is grey."""
    y, yerr = [e.value for e in estimates], _bars(estimates)
    ax.plot(x, y, color=color_of(sampler), label=sampler, linewidth=1.4)
    shared = sum(m in (BASE, FIRST) for m in models)
    ax.plot(x[:shared], y[:shared], color=SHARED_COLOR, linewidth=1.4)
    for k, model in enumerate(models):
        bars = {"yerr": yerr[:, k : k + 1], "xerr": None if xerr is None else xerr[:, k : k + 1]}
        ax.errorbar(x[k], y[k], **bars, fmt="o", color=_color(model), capsize=2.5, elinewidth=0.9, markersize=5)


def reward_vs_kl(rows: dict[Model, Row], samplers: list[str], iterations: int, given: list[Model]):
    """Draw reward against KL; None while no trained model has a KL.

    The rewards are of the responses that the KL was measured on where all have them, else of the test prompts.
    """
    with_kl = {m for m, row in rows.items() if row["kl"]}
    column = "kl_reward" if all(rows[m]["kl_reward"] for m in with_kl) else "test_reward"
    usable = {m for m in with_kl if rows[m][column]}
    if not usable - {BASE}:
        return None
    figure, [ax] = _axes(1, 6.4, 4.4)
    lines = {sampler: trajectory(sampler, iterations) for sampler in samplers}
    lines |= {m.label: [m] for m in [*([] if samplers else [BASE]), *given]}
    for i, (name, line) in enumerate(lines.items()):
        models = [m for m in line if m in usable]
        kl, rewards = ([rows[m][c] for m in models] for c in ("kl", column))
        _line(ax, name, models, [e.value for e in kl], rewards, xerr=_bars(kl))
        for model, x, y in zip(models, kl, rewards, strict=True):
            # Every sampler writes in its own corner of the point, so that neighbours stay legible.
            corner = (6, -13) if model in (BASE, FIRST) else ((6, 6), (6, -13), (-12, 6), (-12, -13))[i % 4]
            text = "base" if model == BASE else model.label if model.iteration is None else str(model.iteration)
            at = {"xy": (x.value, y.value), "xytext": corner, "textcoords": "offset points"}
            ax.annotate(text, **at, fontsize=9, color=_color(model))
    where = "same responses" if column == "kl_reward" else "test prompts"
    ax.set(xlabel="KL from the base model (nats per response)", ylabel=f"mean reward, {where}")
    ax.legend(frameon=False)
    return figure


def band_panels(panels: dict[str, dict[str, tuple]]):
    """Draw reward against KL over seeds, one panel per judge.

    Args:
        panels: title → sampler → (`compare_seeds.Band`, KL [S, M] and reward [S, M] of the seeds' models).
    """
    figure, axes = _axes(len(panels), 5.2, 4.2)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for sampler, (band, kl, rewards) in lines.items():
            color = color_of(sampler)
            ax.fill_between(band.kl, band.low, band.high, color=color, alpha=0.1, linewidth=0)
            ax.plot(kl.T, rewards.T, color=color, linewidth=0.7, alpha=0.7)
            ax.plot(band.kl, band.mean, color=color, linewidth=2, label=sampler)
            ax.plot(kl[:, -1], rewards[:, -1], "o", color=color, markersize=5)
        ax.set(title=title, xlabel="KL from the base model (nats per response)")
    axes[0].set_ylabel("mean reward")
    axes[0].legend(frameon=False)
    return figure


def win_rates(run: Run, models: list[Model]):
    """Draw a matrix for each judge; None while fewer than two models have answers."""
    panels = {judge: [m for m in models if run.test(m, judge)] for judge in JUDGES}
    panels = {judge: there for judge, there in panels.items() if len(there) > 1}
    if not panels:
        return None
    side = 1.5 + 0.8 * max(map(len, panels.values()))
    figure, axes = _axes(len(panels), side + 1, side)
    for ax, (judge, there) in zip(axes, panels.items(), strict=True):
        values = np.full((len(there), len(there)), np.nan)
        for i, ours in enumerate(there):
            for j, theirs in enumerate(there):
                if i != j:
                    values[i, j] = win_rate(run, judge, ours, theirs).value
                    ink = "white" if abs(values[i, j] - 0.5) > 0.3 else "black"
                    ax.text(j, i, f"{100 * values[i, j]:.0f}", ha="center", va="center", color=ink)
        ax.imshow(values, cmap="RdBu", vmin=0, vmax=1)
        names = [model.short for model in there]
        ax.set_xticks(range(len(there)), names, rotation=35, ha="right")
        ax.set_yticks(range(len(there)), names)
        ax.set_title(f"wins of row against column (%)\n{JUDGES[judge]}", fontsize=11)
    return figure


def reward_distributions(run: Run, models: list[Model]):
    """Draw a violin for every model, a panel for each judge."""
    panels = {judge: [m for m in models if run.test(m, judge)] for judge in JUDGES}
    panels = {judge: there for judge, there in panels.items() if there}
    if not panels:
        return None
    figure, axes = _axes(len(panels), 1.5 + 0.75 * max(map(len, panels.values())), 3.8)
    for ax, (judge, there) in zip(axes, panels.items(), strict=True):
        values = [run.test(model, judge).rewards for model in there]
        parts = ax.violinplot(values, showmeans=True, showextrema=False, widths=0.8)
        for body, model in zip(parts["bodies"], there, strict=True):
            body.set(facecolor=_color(model), alpha=0.55)
        parts["cmeans"].set_color("black")
        ax.set_xticks(range(1, len(there) + 1), [m.short for m in there], rotation=35, ha="right")
        ax.set_title(JUDGES[judge], fontsize=11)
    axes[0].set_ylabel("score, test prompts")
    return figure
