"""Sweeps of samplers over the bandit's settings: when does mixing help, when does it hurt, how should it scale?

Reads nothing. Every sampler runs at step sizes tuned for it, see bandit/tuned.py; the sweeps are the table in
bandit/ablation.py. Writes into --output_dir: results.csv (medians, 10% and 90% over environments), results.npz
('<sweep>/<outcome>' [panels, ys, xs, envs]), config.json and the figures as PDF and PNG. All of it, in minutes:

    python bandit/examples/ablation.py
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the work is divided between processes
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bandit

bandit.require("numpy", "numba", "matplotlib")  # isort: split

import numpy as np

from bandit import ablation, outputs
from bandit.settings import BadInput, OneLineParser, at_least
from bandit.summary import to_csv

FOLDER = outputs.RESULTS / "ablation"


def make_parser() -> OneLineParser:
    table = "\n".join(
        f"  {name:16} {sweep.about}: {sweep.x[0]} x {sweep.y[0]}" for name, sweep in ablation.SWEEPS.items()
    )
    parser = OneLineParser(
        prog="ablation.py",
        description=__doc__,
        epilog=f"sweeps:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--sweeps", nargs="+", metavar="NAME", choices=list(ablation.SWEEPS), default=list(ablation.SWEEPS),
        help="rows of the table below (default: all)")  # fmt: skip
    add("--num_envs", type=at_least(1), default=100, help="environments a cell (default 100)")
    add("--num_tuning", type=at_least(1), default=20, help="more environments, on which each cell's step size is "
        "tuned (default 20)")  # fmt: skip
    add("--quick", action="store_true", help="every other value of each axis (default: all values)")
    add("--seed", type=at_least(0), default=1, help="seed of rewards and samples (default 1)")
    add("--num_workers", type=at_least(1), default=os.cpu_count(), help="processes; changes no result (default: the "
        "machine's cores)")  # fmt: skip
    add("--output_dir", type=Path, default=FOLDER, metavar="DIR", help="default bandit/results/ablation")
    add("--overwrite", action="store_true", help="replace results of other settings in DIR (default: refuse)")
    return parser


def compute(sweeps: dict, args: argparse.Namespace) -> tuple[dict, dict]:
    """All cells, with a progress bar."""
    show = outputs.progress_bar(int(sum(np.prod(sweep.shape) for sweep in sweeps.values())), "cell")
    return ablation.compute(
        sweeps, args.num_envs, args.num_tuning, args.seed, args.num_workers, lambda name: show(name, 1)
    )


def write(folder: Path, config: dict, sweeps: dict, results: dict, steps: dict) -> None:
    """All files of one run."""
    from bandit.ablation_plots import (
        save_figures,  # matplotlib loads slowly, and wrong input should fail fast
    )

    edge = ablation.share_at_the_edge(sweeps, steps)
    outputs.save_config(folder, config, {"share_of_steps_at_the_edge_of_the_grid": edge})
    arrays = {f"{name}/{key}": values for name, found in results.items() for key, values in found.items()}
    outputs.save(folder / "results.npz", lambda target: np.savez_compressed(target, **arrays))
    table = [row for name in sweeps for row in ablation.to_rows(name, sweeps[name], results[name], steps[name])]
    outputs.save_text(folder / "results.csv", to_csv(table))
    save_figures(sweeps, results, folder, outputs.save)
    print(f"{len(table)} results; {100 * edge:.1f}% of the tuned steps are at the edge of their grid")
    print(f"wrote {folder}")


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    sweeps = {name: ablation.SWEEPS[name] for name in dict.fromkeys(args.sweeps)}
    if args.quick:
        sweeps = {name: sweep.coarse() for name, sweep in sweeps.items()}
    config = {key: getattr(args, key) for key in ("num_envs", "num_tuning", "quick", "seed")}
    config |= {"sweeps": list(sweeps), "defaults": ablation.DEFAULTS}
    try:
        outputs.prepare(args.output_dir, config, args.overwrite)
    except BadInput as error:
        parser.error(str(error))
    write(args.output_dir, config, sweeps, *compute(sweeps, args))


if __name__ == "__main__":
    main()
