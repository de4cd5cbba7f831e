"""Figure of the log-linear policies: a row for each kind of problem, a column for each number of features."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bandit.palette import line_of
from bandit.plots import FIGURES, STYLE, draw_curve, save_both

Runs = dict[tuple[str, int], dict[str, dict[str, np.ndarray]]]

# Below this a gap is rounding.
LOWEST = 1e-12


def title(d: int, num_prompts: int, num_actions: int) -> str:
    """The number of features in words."""
    if d == num_prompts * (num_actions - 1):
        return f"$d={d}$: tabular"
    return rf"$d={d}={d / num_actions:g}\,|Y|$"


def end_of(samplers: dict[str, dict[str, np.ndarray]], series: str) -> int:
    """The update at which the last sampler's median is rounding, or the last one."""
    medians = np.array([np.median(found[series], axis=0) for found in samplers.values()])
    return int(np.max([min(np.flatnonzero(row <= LOWEST), default=len(row) - 1) for row in medians]))


def draw_panel(axes: Axes, samplers: dict[str, dict[str, np.ndarray]], series: str) -> None:
    """All samplers of one kind of problem, until they have arrived."""
    axes.set_yscale("log")
    for name, found in samplers.items():
        values = np.maximum(found[series], LOWEST)
        draw_curve(axes, values, name, "sampled", name, True, linestyle=line_of(name), linewidth=1.2)
    axes.set_xlim(0, max(1, end_of(samplers, series)))


def draw_figure(results: Runs, series: str, sizes: tuple[int, int]) -> plt.Figure:
    """One series of `FIGURES` of all samplers; results by (variant, d), sizes = prompts, |Y|."""
    variants, dims = (list(dict.fromkeys(part)) for part in zip(*results, strict=True))
    canvas, grid = plt.subplots(
        len(variants), len(dims), figsize=(2.2 * len(dims) + 0.6, 1.9 * len(variants) + 0.8), sharey="row",
        squeeze=False,
    )  # fmt: skip
    for (row, variant), (column, d) in product(enumerate(variants), enumerate(dims)):
        axes = grid[row, column]
        if (variant, d) in results:
            draw_panel(axes, results[variant, d], series)
        else:
            axes.set_visible(False)
            for right in grid[row, column + 1 : column + 2]:
                right.tick_params(labelleft=True, which="both")
        axes.set_title(f"{variant}, {title(d, *sizes)}", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("updates")
    canvas.supylabel(FIGURES[series][1], fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=8)
    return canvas


def save_figures(results: Runs, sizes: tuple[int, int], folder: Path, save: Callable[[Path, Callable], None]) -> None:
    """Writes linear_{value_diff,param_diff}.{pdf,png} through save(path, write to a path)."""
    with plt.rc_context({**STYLE, "savefig.dpi": 130}):
        for series in ("value_diff", "param_diff"):
            save_both(draw_figure(results, series, sizes), folder / f"linear_{series}", save)
