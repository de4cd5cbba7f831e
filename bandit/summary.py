"""The CSV summary: when each sampler reaches which accuracy, and how fast it converges."""

import csv
import io

import numpy as np

from bandit.presets import MODE_KEYS

THRESHOLDS = (1e-2, 1e-4, 1e-8)

# Below this the error of rewards of order 1 is rounding in float64.
FLOOR = 1e-13


def first_below(errors: np.ndarray, threshold: float) -> float:
    """First update after which errors [T] is <= threshold; NaN if none."""
    below = np.flatnonzero(errors <= threshold)
    return float(below[0]) if below.size else np.nan


def order_and_rate(errors: np.ndarray) -> tuple[float, float]:
    """Local order p of e' ~ C e^p and the last ratio e' / e, from the last three errors [T] above rounding.

    p = log(e3 / e2) / log(e2 / e1). Both are NaN if these three do not fall: no convergence to fit.
    """
    usable = np.flatnonzero(errors <= FLOOR)
    last = errors[: usable[0] if usable.size else None][-3:]
    if len(last) < 3 or not last[0] > last[1] > last[2]:
        return np.nan, np.nan
    first, second = np.log(last[1] / last[0]), np.log(last[2] / last[1])
    return float(second / first), float(last[2] / last[1])


def _median(values: list[float]) -> float | str:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.median(finite)) if finite else ""


def summarize(results: dict[tuple[str, str], dict[str, np.ndarray]]) -> list[dict]:
    """One row per (sampler, mode): medians over environments; an empty cell is a figure that does not exist."""
    rows = []
    for (name, mode), series in results.items():
        errors = series["param_diff"]
        row = {"sampler": name, "mode": MODE_KEYS[mode], "envs": len(errors)}
        for threshold in THRESHOLDS:
            reached = [first_below(error, threshold) for error in errors]
            row[f"updates_to_{threshold:.0e}"] = _median(reached)
            row[f"share_reaching_{threshold:.0e}"] = float(np.mean(np.isfinite(reached)))
        fits = [order_and_rate(error) for error in errors] if mode == "exact" else [(np.nan, np.nan)]
        row["order"], row["rate"] = (_median(list(column)) for column in zip(*fits, strict=True))
        row["final_param_diff"] = _median(list(errors[:, -1]))
        row["final_value_diff"] = _median(list(series["value_diff"][:, -1]))
        rows.append(row)
    return rows


def to_csv(rows: list[dict]) -> str:
    """Rows of equal keys as CSV text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_table(rows: list[dict]) -> str:
    """The same rows for a terminal, columns aligned."""
    cells = [list(rows[0]), *([_short(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
