"""The study: which sampler, for which learner, where. All cells of docs/results.md; a finished cell is not run again.

Reads   nothing.
Writes  OUTPUT_DIR/<cell>/ for every cell, see run_lab.py.

    OMP_NUM_THREADS=1 python alignment/lab/study.py --output_dir alignment/lab/results --compile
"""

import dataclasses
import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import torch
from lab.environment import Setting
from lab.run_lab import LRS, markdown, run_cell

from common.cli import Parser, UserError, run

FEW = ["online", "online-null", "gshf", "mixp", "theory", "offline"]
ALL = [*FEW, "pilaf", "simplemix", "theory-mix", "nash-md", "temperature", "history", "xpo-bonus", "selm"]
CHOICES = ["online", "online-null", "random-pairs", "best-worst", "best-sweet", "implicit-best-worst"]
DESIGNS = ["d-optimal", "g-optimal", "v-optimal", "g-hybrid"]


class Cell(NamedTuple):
    """One cell: its setting, the samplers, the learning rates (none: run_lab.LRS)."""

    setting: Setting
    samplers: list[str]
    lrs: list[float] | None = None


def grid(lowest: float, count: int = 5) -> list[float]:
    """Return learning rates of factor 2."""
    return [lowest * 2**i for i in range(count)]


# Grids of the ladder that are not run_lab.LRS: a gradient of the loss is in proportion to beta, so that SGD's best
# rate grows as beta falls; in the table that of a side from the reference is 32 times online's.
LADDER_LRS = {
    ("table", "sgd", 0.1): grid(100.0, 12),
    ("linear", "sgd", 0.1): grid(10.0, 9),
    ("transformer", "sgd", 0.3): grid(0.125),
    ("transformer", "sgd", 0.1): grid(0.375),
}


def ladder() -> dict[str, Cell]:
    """Return table, linear and transformer, each with SGD and Adam, at two values of beta."""
    cells = {}
    for beta, learner, optimizer in product((0.3, 0.1), ("table", "linear", "transformer"), ("sgd", "adam")):
        setting = Setting(learner=learner, optimizer=optimizer, beta=beta)
        lrs = LADDER_LRS.get((learner, optimizer, beta))
        cells[f"ladder_{learner}_{optimizer}_{beta}"] = Cell(setting, FEW, lrs)
    del cells["ladder_transformer_adam_0.3"]  # that is `main`
    return cells


ADAM = grid(0.001)
EXACT = ["online", "gshf", "mixp", "theory", "offline"]
CELLS = {
    "main": Cell(Setting(), ALL),
    **ladder(),
    "pipeline": Cell(Setting(updates=300, iterations=3, epochs=2, restart=True), FEW, ADAM),
    **{f"beta_{b}": Cell(Setting(beta=b), FEW, grid(0.0005)) for b in (1.0, 3.0)},
    **{f"quality_{q}": Cell(Setting(quality=q), FEW, ADAM) for q in (-0.7, 0.7)},
    "noise_0.2": Cell(Setting(label_noise=0.2), FEW, ADAM),
    "rounds_3": Cell(Setting(iterations=3), FEW, ADAM),
    "rounds_15": Cell(Setting(iterations=15), FEW, ADAM),
    "choices": Cell(Setting(), [*CHOICES, *DESIGNS], ADAM),
    "choices_linear": Cell(Setting(learner="linear"), [*CHOICES, *DESIGNS], grid(0.025)),
    # Labels per update at 4,800 labels.
    "batch_8": Cell(Setting(updates=600, pairs=8), FEW, grid(0.0005)),
    "batch_120": Cell(Setting(updates=40, pairs=120), FEW, grid(0.002)),
    # No labels, no noise: what is left is curvature.
    "exact": Cell(Setting(pairs=0), EXACT, grid(0.002, 4)),
    "exact_table": Cell(Setting(pairs=0, learner="table", optimizer="sgd"), EXACT, grid(800.0, 9)),
    "labels_19200": Cell(Setting(updates=600), FEW, ADAM),
}


def main() -> None:
    """Run the cells that are not there yet, in order."""
    p = Parser(__doc__)
    p.add("--output_dir", "folder of the cells", required=True)
    p.add("--seeds", "environments per cell", type=int, default=50)
    p.add("--cells", f"which: {', '.join(CELLS)} (default: all)", nargs="+", default=None)
    p.add("--compile", "compile the transformer", action="store_true")
    p.add("--threads", "threads of torch", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.cells or CELLS:
        if name not in CELLS:
            raise UserError(f"--cells {name}: one of {', '.join(CELLS)}")
        run_once(name, CELLS[name], list(range(args.seeds)), args.compile, Path(args.output_dir) / name)


def run_once(name: str, cell: Cell, seeds: list[int], compiled: bool, folder: Path) -> None:
    """Run a cell unless its table is there; one of other settings is refused."""
    done = folder / "table.json"
    if done.exists():
        found = json.loads(done.read_text())
        if (found["setting"], found["seeds"]) != (dataclasses.asdict(cell.setting), seeds):
            raise UserError(f"{folder}: holds other settings or seeds; remove it or name another --output_dir")
        print(f"{name}: already done", flush=True)
        return
    start = time.time()
    lrs = cell.lrs or LRS[cell.setting.learner, cell.setting.optimizer]
    rows = run_cell(cell.setting, cell.samplers, lrs, seeds, compiled, folder)
    print(f"## {name}: {time.time() - start:.0f} s\n{markdown(rows)}\n", flush=True)


if __name__ == "__main__":
    run(main)
