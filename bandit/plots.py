"""The three figures: parameter difference, value, value gap against updates."""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bandit import theory
from bandit.palette import color_of

# file name -> (series, axis label, log axis)
FIGURES = {
    "param_diff": ("param_diff", r"parameter difference  mean $|\delta(y, y')|$", True),
    "value": ("value", r"regularised value  $V(\pi_\theta)$", False),
    "value_diff": ("value_diff", r"value gap  $V^\star - V(\pi_\theta)$", True),
}

# Exact curves are few and end at rounding: thick, dashed. Sampled ones are noisy: thin, solid.
STYLES = {
    "exact": {"linestyle": (0, (4, 1.5)), "linewidth": 2.2},
    "sampled": {"linestyle": "-", "linewidth": 0.9},
}

STYLE = {
    "font.family": "serif",
    "font.serif": ["STIXGeneral", "DejaVu Serif"],
    "mathtext.fontset": "stix",
    "font.size": 10,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}

Results = Mapping[tuple[str, str], Mapping[str, np.ndarray]]


def _positive(values: np.ndarray, log: bool) -> np.ndarray:
    """A zero cannot be drawn on a log axis: leave a hole there."""
    return np.where(values > 0, values, np.nan) if log else values


def draw_curve(axes: Axes, values: np.ndarray, name: str, mode: str, label: str, log: bool, **style: object) -> None:
    """Median of values [envs, T] and, with several environments, the 10-90% band; `style` goes before the mode's."""
    updates = np.arange(values.shape[1])
    color = color_of(name)
    if len(values) > 1:
        low, high = np.quantile(values, [0.1, 0.9], axis=0)
        axes.fill_between(updates, _positive(low, log), _positive(high, log), color=color, alpha=0.12, linewidth=0)
    median = _positive(np.median(values, axis=0), log)
    axes.plot(updates, median, color=color, label=label, **{**STYLES[mode], **style})


def draw_theory(axes: Axes, results: Results, settings: Mapping) -> None:
    """The theorems' bounds (with lr `theory`) and the noise floor (sampled gradients at a constant lr)."""
    exact = [name for name, mode in results if mode == "exact"]
    if settings["lr"] == "theory":
        for name in exact:
            limits = theory.bound(name, settings["num_iter"])
            limits = np.where(limits > 1e-18, limits, np.nan)
            axes.plot(limits, color=color_of(name), linestyle=":", linewidth=1.3, label=f"{name}, bound")
    if any(mode == "sampled" for _, mode in results) and not isinstance(settings["lr"], str):
        floor = theory.noise_floor(settings["beta"], settings["lr"], settings["num_samples"], settings["num_actions"])
        axes.axhline(floor, color="black", linestyle=":", linewidth=1.2, label="predicted noise floor")


def draw_figure(results: Results, figure: str, settings: Mapping, with_theory: bool) -> plt.Figure:
    """One figure from the results of all samplers and modes."""
    series, label, log = FIGURES[figure]
    modes = {mode for _, mode in results}
    crowded = len(results) > 3 or settings["num_envs"] > 1
    canvas, axes = plt.subplots(figsize=(6.4, 3.2) if crowded else (4.6, 3.2))
    if log:
        axes.set_yscale("log")
    for (name, mode), values in results.items():
        text = name if len(modes) == 1 else f"{name}, {mode}"
        draw_curve(axes, values[series], name, mode, text, log)
    if with_theory and figure == "param_diff":
        draw_theory(axes, results, settings)
    axes.set_xlabel("updates")
    axes.set_ylabel(label)
    axes.set_xlim(0, max(1, settings["num_iter"] - 1))
    axes.margins(x=0)
    beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if crowded else {}
    axes.legend(frameon=False, title=_title(settings, modes), title_fontsize=8, alignment="left", **beside)
    return canvas


def _title(settings: Mapping, modes: set[str]) -> str:
    lr = settings["lr"] if isinstance(settings["lr"], str) else f"{settings['lr']:g}"
    parts = [rf"$|Y|={settings['num_actions']}$, $\beta={settings['beta']:g}$, lr {lr}"]
    if "sampled" in modes:
        parts.append(f"{settings['num_samples']} pairs per update")
    if settings["num_envs"] > 1:
        parts.append(f"median and 10–90% of {settings['num_envs']} rewards")
    if settings["lr"] == "theory":
        parts.append(r"Unif: $\alpha=2|Y|^2$")
    return "\n".join(parts)


def save_figures(
    results: Results,
    settings: Mapping,
    with_theory: bool,
    folder: Path,
    save: Callable[[Path, Callable], None],
) -> None:
    """Writes folder/tabular_DPO_<figure>.pdf and .png through save(path, write to a path)."""
    with plt.rc_context(STYLE):
        for figure in FIGURES:
            canvas = draw_figure(results, figure, settings, with_theory)
            save_both(canvas, folder / f"tabular_DPO_{figure}", save)


def save_both(canvas: plt.Figure, path: Path, save: Callable[[Path, Callable], None]) -> None:
    """Writes a figure to path.pdf and path.png through save(path, write to a path), the same bytes each time."""
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", None)):
        save(
            path.with_name(f"{path.name}.{suffix}"),
            lambda target, metadata=metadata: canvas.savefig(target, metadata=metadata),
        )
    plt.close(canvas)
