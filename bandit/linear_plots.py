"""Figure of the log-linear policies: a row for each kind of problem, a column for each number of features."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bandit.plots import FIGURES, STYLE, draw_curve, save_both

Runs = dict[tuple[str, int], dict[str, dict[str, np.ndarray]]]

# Below this a gap is rounding.
LOWEST = 1e-12


def title(d: int, num_prompts: int, num_actions: int) -> str:
    """The number of features in words."""
    if d == num_prompts * (num_actions - 1):
        return f"$d={d}$: tabular"
    return rf"$d={d}={d / num_actions:g}\,|Y|$"


def draw_figure(results: Runs, series: str, sizes: tuple[int, int]) -> plt.Figure:
    """One series of `FIGURES` of all samplers; results by (variant, d), sizes = prompts, |Y|."""
    variants, dims = (list(dict.fromkeys(part)) for part in zip(*results, strict=True))
    canvas, grid = plt.subplots(
        len(variants), len(dims), figsize=(2.2 * len(dims) + 0.6, 1.9 * len(variants) + 0.8),
        sharex=True, sharey="row", squeeze=False,
    )  # fmt: skip
    for (variant, d), samplers in results.items():
        axes = grid[variants.index(variant), dims.index(d)]
        axes.set_yscale("log")
        for name, found in samplers.items():
            draw_curve(axes, np.maximum(found[series], LOWEST), name, "empirical", name, True)
        axes.margins(x=0)
        if variant == variants[0]:
            axes.set_title(title(d, *sizes), fontsize=9)
        if d == dims[0]:
            axes.set_ylabel(f"{variant}\n", fontsize=9)
    canvas.supxlabel("updates", fontsize=9)
    canvas.supylabel(FIGURES[series][1], fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=8)
    return canvas


def save_figures(
    results: Runs, sizes: tuple[int, int], folder: Path, save: Callable[[Path, Callable], None]
) -> None:
    """Writes linear_{value_diff,param_diff}.{pdf,png} through save(path, write to a path)."""
    with plt.rc_context({**STYLE, "savefig.dpi": 130}):
        for series in ("value_diff", "param_diff"):
            save_both(draw_figure(results, series, sizes), folder / f"linear_{series}", save)
