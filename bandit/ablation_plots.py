"""Figures of the ablation: heat maps, lines with bands, dots with bands."""

from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter

from bandit.ablation import Results, Sweep
from bandit.palette import color_of, line_of, marker_of
from bandit.plots import STYLE, save_both

LABELS = {
    "updates_param_diff": r"updates until mean $|\delta|\leq 10^{-3}$",
    "updates_value_diff": r"updates until the value gap is $10^{-3}$ of its start",
    "value_diff": r"value gap $V^\star-V(\pi)$ after the budget",
    "param_diff": r"mean $|\delta|$ after the budget",
    "a": r"$a$: first side $\pi^{1+a}\,\pi_{\mathrm{ref}}^{-a}$",
    "b": r"$b$: second side $\pi^{1-b}\,\pi_{\mathrm{ref}}^{b}$",
    "a=b": r"$a=b$",
    "p": r"$p$, share of mixed pairs",
    "beta": r"$\beta$",
    "num_actions": r"$|Y|$, arms",
    "reward_gap": "spread (std) of the rewards",
    "reference": r"$q$:  $\pi_{\mathrm{ref}}\propto e^{q r}$",
    "label_noise": "share of flipped labels",
    "pairs": "labelled pairs an update",
}
LOG_AXES = {"beta", "num_actions", "reward_gap", "pairs"}

# Members of the family that have a name, as (a, b) at a beta, in the map over a and b.
NAMED = {
    "offline": lambda beta: (-1, 1),
    "online": lambda beta: (0, 0),
    "xpo": lambda beta: (0, 1),
    "mixp": lambda beta: (0.5, 0.5),
    "pilaf": lambda beta: (beta, beta),
    "DPO-Mix-R-2": lambda beta: (beta - 1, beta + 1),
}
NOTES = {"pilaf": "the mixed pair of pilaf", "DPO-Mix-R-2": r"theory: $a=\beta-1,\ b=\beta+1$"}


def number(value: float) -> str:
    """A median in the corner of a cell: short."""
    if not np.isfinite(value):
        return "–"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.2g}".lstrip("0")


def draw_map(axes: Axes, medians: np.ndarray, sweep: Sweep, norm: LogNorm):
    """Medians [ys, xs] as colours and numbers; grey with a dash where the median environment did not arrive."""
    colors = plt.get_cmap("viridis_r").with_extremes(bad="#BBBBBB")
    image = axes.imshow(
        np.where(np.isfinite(medians), medians, np.nan), cmap=colors, norm=norm, origin="lower", aspect="auto"
    )
    for (row, column), value in np.ndenumerate(medians):
        dark = np.isfinite(value) and norm(value) > 0.55
        axes.text(
            column, row, number(value), ha="center", va="center", fontsize=7, color="white" if dark else "black"
        )
    axes.set_xticks(range(len(sweep.x[1])), [f"{value:g}" for value in sweep.x[1]])
    axes.set_yticks(range(len(sweep.y[1])), [f"{value:g}" for value in sweep.y[1]])
    axes.grid(False)
    axes.set_xlabel(LABELS[sweep.x[0]])
    axes.set_ylabel(LABELS[sweep.y[0]])
    return image


def mark_named(axes: Axes, sweep: Sweep, beta: float) -> None:
    """Frames around the cells of samplers that have a name."""
    for name, place in NAMED.items():
        a, b = place(beta)
        if a in sweep.y[1] and b in sweep.x[1]:
            corner = (sweep.x[1].index(b) - 0.46, sweep.y[1].index(a) - 0.46)
            frame = Rectangle(
                corner, 0.92, 0.92, fill=False, linewidth=2.2, edgecolor=color_of(name), label=NOTES.get(name, name)
            )
            axes.add_patch(frame)


def heat_figure(sweep: Sweep, results: Results) -> plt.Figure:
    """One row a panel value, one column an outcome."""
    outcomes = [outcome for outcome in results if outcome != "start"]
    key, values = sweep.panel
    canvas, grid = plt.subplots(
        len(values), len(outcomes), figsize=(4.3 * len(outcomes), 3.1 * len(values) + 0.5), squeeze=False
    )
    for column, outcome in enumerate(outcomes):
        medians = np.quantile(results[outcome], 0.5, axis=-1, method="inverted_cdf")
        finite = medians[np.isfinite(medians) & (medians > 0)]
        norm = LogNorm(finite.min(), finite.max() * 1.0001) if finite.size else LogNorm(1, 10)
        for row, value in enumerate(values):
            axes = grid[row, column]
            image = draw_map(axes, medians[row], sweep, norm)
            title = f"{LABELS[key]} = {value:g}" if len(values) > 1 else ""
            axes.set_title(f"{LABELS[outcome]}\n{title}".strip() if row == 0 else title, fontsize=9)
            canvas.colorbar(image, ax=axes, pad=0.01)
            if {sweep.x[0], sweep.y[0]} == {"a", "b"}:
                mark_named(axes, sweep, value)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if handles:
        canvas.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=7.5)
    return canvas


def draw_lines(axes: Axes, sweep: Sweep, results: Results, outcome: str) -> None:
    """Medians over x with 10-90% bands, a line for each value of y; dotted: where every run starts."""
    key, places = sweep.x
    for series, values in zip(sweep.y[1], results[outcome][0], strict=True):
        name = series if isinstance(series, str) else f"$a=b={series:g}$"
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=-1)
        axes.fill_between(places, low, high, color=color_of(name), alpha=0.07, linewidth=0)
        axes.plot(
            places,
            middle,
            color=color_of(name),
            marker=marker_of(name),
            markersize=4,
            linewidth=1.2,
            linestyle=line_of(name),
            label=name,
        )
    if outcome == "value_diff":
        start = np.median(results["start"][0], axis=-1).mean(axis=0)
        axes.plot(places, start, color="#555555", linestyle=":", linewidth=1.2, label="the reference policy")
    axes.set_yscale("log")
    if key in LOG_AXES:
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    axes.set_xlabel(LABELS[key])


def lines_figure(sweeps: dict[str, Sweep], results: dict[str, Results], outcome: str) -> plt.Figure:
    """A panel for each sweep that has the same series."""
    columns = min(3, len(sweeps))
    height = -(-len(sweeps) // columns)
    canvas, grid = plt.subplots(height, columns, figsize=(max(5.0, 3.1 * columns), 2.6 * height + 0.5), squeeze=False)
    for axes, (name, sweep) in zip(grid.flat, sweeps.items(), strict=False):
        draw_lines(axes, sweep, results[name], outcome)
    for axes in list(grid.flat)[len(sweeps) :]:
        axes.set_visible(False)
    canvas.supylabel(LABELS[outcome], fontsize=10)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return canvas


def dots_figure(sweep: Sweep, results: Results) -> plt.Figure:
    """Medians and 10-90% of every sampler: one row an outcome, one column a value of x."""
    outcomes = [outcome for outcome in results if outcome != "start"]
    key, values = sweep.x
    names = sweep.y[1]
    canvas, grid = plt.subplots(
        len(outcomes),
        len(values),
        figsize=(2.1 * len(values) + 1.6, 0.2 * len(names) * len(outcomes) + 1.6),
        sharey=True,
        sharex="row",
        squeeze=False,
    )
    for row, outcome in enumerate(outcomes):
        shown = results[outcome][0]
        end = shown[np.isfinite(shown)].max(initial=1.0)
        for column, value in enumerate(values):
            axes = grid[row, column]
            for place, name in enumerate(names):
                low, middle, high = np.quantile(
                    results[outcome][0, place, column], [0.1, 0.5, 0.9], method="inverted_cdf"
                )
                draw_dot(axes, place, (low, middle, high), end, name)
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(f"{LABELS[key]} = {value:g}", fontsize=9)
        grid[row, len(values) // 2].set_xlabel(LABELS[outcome])
    return canvas


def draw_dot(axes: Axes, place: int, band: tuple[float, float, float], end: float, name: str) -> None:
    """One sampler's 10%, median and 90%. Where they did not arrive the band ends in an arrow at `end`, or the dot is
    missing."""
    low, middle, high = band
    if np.isfinite(low):
        axes.plot([low, min(high, end)], [place, place], color=color_of(name), linewidth=2, alpha=0.4)
        if not np.isfinite(high):
            axes.plot([end], [place], color=color_of(name), marker=">", markersize=4, alpha=0.4)
    if np.isfinite(middle):
        axes.plot([middle], [place], color=color_of(name), marker=marker_of(name), markersize=5)
    else:
        axes.text(
            0.98,
            place,
            "not reached",
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=7,
            color="#555555",
        )


def figures(sweeps: dict[str, Sweep], results: dict[str, Results]) -> Iterator[tuple[str, plt.Figure]]:
    """(file name without suffix, figure) of everything that was computed."""
    for name, sweep in sweeps.items():
        if sweep.kind == "heat":
            yield f"heat_{name}", heat_figure(sweep, results[name])
        elif sweep.kind == "dots":
            yield f"dots_{name}", dots_figure(sweep, results[name])
    for key, file in (("sampler", "lines_samplers"), ("a=b", "lines_family")):
        group = {n: s for n, s in sweeps.items() if s.kind == "lines" and s.y[0] == key}
        for outcome in ("value_diff", "param_diff") if group else ():
            yield f"{file}_{outcome}", lines_figure(group, results, outcome)


def save_figures(
    sweeps: dict[str, Sweep],
    results: dict[str, Results],
    folder: Path,
    save: Callable[[Path, Callable], None],
) -> None:
    """Writes every figure into folder as PDF and PNG through save(path, write to a path)."""
    with plt.rc_context({**STYLE, "savefig.dpi": 130}):
        for name, canvas in figures(sweeps, results):
            save_both(canvas, folder / name, save)
