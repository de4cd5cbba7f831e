"""Log-linear policies whose features many prompts share: does the samplers' separation survive?

Reads nothing. Exact gradients over all prompts and pairs; every sampler at a step size tuned for it on other
instances, see bandit/linear.py. Writes into --output_dir: summary.csv (updates to 1e-3 of the gap, final gap,
condition number), trajectories.npz ('<variant>/<d>/<sampler>/<series>' [instances, T]), config.json and
linear_{value_diff,param_diff}.{pdf,png}. In minutes:

    python bandit/examples/linear.py
"""

import argparse
import os
import sys
from contextlib import nullcontext
from functools import partial
from multiprocessing import Pool
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the work is divided between processes
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bandit

bandit.require("numpy", "numba", "matplotlib")  # isort: split

import numpy as np

from bandit import linear, outputs
from bandit.samplers import get_sampler
from bandit.settings import BadInput, OneLineParser, at_least, positive
from bandit.summary import to_csv, to_table

SAMPLERS = ["DPO-Unif", "DPO-Mix-R", "DPO-Mix-P*", "online", "mixp", "pilaf", "best-worst"]
SETTINGS = (
    "samplers", "variants", "dims", "num_prompts", "num_actions", "beta", "num_envs", "num_tuning", "num_iter",
    "seed",
)  # fmt: skip


def make_parser() -> OneLineParser:
    table = "\n".join(f"  {name:13} {variant.about}" for name, variant in linear.VARIANTS.items())
    parser = OneLineParser(
        prog="linear.py", description=__doc__, epilog=f"variants:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--samplers",
        nargs="+",
        metavar="NAME",
        default=SAMPLERS,
        help="names of tabular.py's table (default: 7)",
    )
    add("--variants", nargs="+", choices=list(linear.VARIANTS), default=list(linear.VARIANTS), metavar="NAME",
        help="rows of the table below (default: all)")  # fmt: skip
    add("--dims", nargs="+", type=at_least(1), metavar="D", help="numbers of features, at most prompts x (|Y| - 1), "
        "which is the tabular case (default: that, 10 |Y|, 2 |Y| and |Y| / 2)")  # fmt: skip
    add(
        "--num_prompts",
        type=at_least(1),
        default=50,
        metavar="X",
        help="prompts sharing the features (default 50)",
    )
    add(
        "--num_actions",
        type=at_least(2),
        default=10,
        metavar="N",
        help="|Y|, responses per prompt (default 10)",
    )
    add("--beta", type=positive, default=1.0, help="KL strength, in units of reward (default 1)")
    add("--num_envs", type=at_least(1), default=20, metavar="E", help="instances (default 20)")
    add("--num_tuning", type=at_least(1), default=5, metavar="E", help="instances on which step sizes are tuned "
        "(default 5)")  # fmt: skip
    add("--num_iter", type=at_least(2), default=201, metavar="T", help="length of the series: the states "
        "after 0 ... T - 1 updates (default 201)")  # fmt: skip
    add("--seed", type=at_least(0), default=1, help="seed of features and rewards (default 1)")
    add("--num_workers", type=at_least(1), default=os.cpu_count(), help="processes; changes no result (default: the "
        "machine's cores)")  # fmt: skip
    add("--output_dir", type=Path, default=outputs.RESULTS / "linear", metavar="DIR",
        help="default bandit/results/linear")  # fmt: skip
    add("--overwrite", action="store_true", help="replace results of other settings in DIR (default: refuse)")
    return parser


def resolve(args: argparse.Namespace) -> dict:
    """The settings, checked and without repetitions.

    Raises:
        BadInput: a sampler is unknown, or there are more features than directions.
    """
    config = {key: getattr(args, key) for key in SETTINGS}
    largest = linear.num_directions(args.num_prompts, args.num_actions)
    usual = (largest, 10 * args.num_actions, 2 * args.num_actions, args.num_actions // 2)
    config["dims"] = args.dims or sorted({d for d in usual if d <= largest}, reverse=True)
    for key in ("samplers", "variants", "dims"):
        config[key] = list(dict.fromkeys(config[key]))
    for name in config["samplers"]:
        try:
            get_sampler(name)
        except ValueError as error:
            raise BadInput(f"argument --samplers: {error}") from None
    for d in config["dims"]:
        if d > largest:
            raise BadInput(f"argument --dims: {d}, but prompts x (|Y| - 1) is {largest}")
    if min(config["dims"]) == largest and all(linear.VARIANTS[v].outside for v in config["variants"]):
        raise BadInput(f"argument --dims: with {largest} features no rewards are outside the span")
    return config


def compute(config: dict, num_workers: int) -> dict:
    """{(variant, d): {sampler: series}}, with a progress bar."""
    sizes = config["num_prompts"], config["num_actions"]
    jobs = [
        (variant, d)
        for variant in config["variants"]
        for d in config["dims"]
        if not linear.VARIANTS[variant].outside or d < linear.num_directions(*sizes)
    ]
    job = partial(
        linear.evaluate, names=config["samplers"], sizes=sizes,
        **{key: config[key] for key in ("beta", "num_envs", "num_tuning", "num_iter", "seed")},
    )  # fmt: skip
    with Pool(num_workers) if num_workers > 1 else nullcontext() as pool:
        done = pool.imap(job, jobs) if pool else map(job, jobs)
        results, show = {}, outputs.progress_bar(len(jobs), "problem")
        for (variant, d), found in zip(jobs, done, strict=True):
            results[variant, d] = found
            show(f"{variant}, d = {d}", 1)
        return results


def write(folder: Path, config: dict, results: dict) -> None:
    """All files of one run, and the summary on the screen."""
    from bandit.linear_plots import save_figures  # matplotlib loads slowly, and wrong input should fail fast

    rows = linear.to_rows(results)
    arrays = {
        f"{variant}/{d}/{name}/{key}": values
        for (variant, d), samplers in results.items()
        for name, found in samplers.items()
        for key, values in found.items()
    }
    outputs.save_config(folder, config, {})
    outputs.save(folder / "trajectories.npz", lambda target: np.savez(target, **arrays))
    outputs.save_text(folder / "summary.csv", to_csv(rows))
    save_figures(results, (config["num_prompts"], config["num_actions"]), folder, outputs.save)
    print(to_table(rows))
    print(f"wrote {folder}")


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    try:
        config = resolve(args)
        outputs.prepare(args.output_dir, config, args.overwrite)
    except BadInput as error:
        parser.error(str(error))
    write(args.output_dir, config, compute(config, args.num_workers))


if __name__ == "__main__":
    main()
