"""Online DPO on a bandit, with exact or sampled gradients, for any set of samplers.

Reads nothing, or rewards and reference log-probabilities from .npy files. Writes into --output_dir: trajectories.npz,
config.json, summary.csv and tabular_DPO_{param_diff,value,value_diff}.{pdf,png}; with --preset theory bounds.csv and
config.json instead. The paper's figure with exact gradients:

    python bandit/examples/tabular.py
"""

import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bandit

bandit.require("numpy", "numba", "matplotlib")  # isort: split

import numpy as np

from bandit import outputs, presets, settings, theory
from bandit.problem import Bandit, make_bandit
from bandit.samplers import get_sampler
from bandit.simulate import Diverged, simulate
from bandit.steps import largest_stable_lr, matched_lr
from bandit.summary import summarize, to_csv, to_table


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def step_sizes(bandit: Bandit, config: dict) -> dict[str, dict]:
    """Medians over environments of lr* and the stability limit; warns where the given lr exceeds the limit."""
    table = {}
    for name in config["samplers"]:
        sampler = get_sampler(name)
        limit = largest_stable_lr(sampler, bandit)
        start = matched_lr(sampler, bandit, np.zeros_like(bandit.rewards))
        end = matched_lr(sampler, bandit, bandit.rewards)
        table[name] = {
            "matched_lr_at_start": float(np.median(start)),
            "matched_lr_at_optimum": float(np.median(end)),
            "largest_stable_lr": float(np.median(limit)),
        }
        unstable = 0 if isinstance(config["lr"], str) else int((config["lr"] > limit).sum())
        if unstable:
            warn(
                f"lr {config['lr']:g} is unstable for {name} in {unstable} of {len(limit)} environments: "
                f"above {limit.min():.3g} (2 lr* for the mixtures) exact updates do not converge"
            )
    return table


def run(config: dict, folder: Path, overwrite: bool, with_theory: bool) -> None:
    """One set of trajectories: load, simulate every sampler in every mode, write results."""
    rewards, log_ref = settings.load_arrays(config)
    outputs.prepare(folder, config, overwrite)
    bandit = make_bandit(rewards, config["beta"], log_ref, np.dtype(config["dtype"]))
    in_unit = rewards.min() >= 0 and rewards.max() <= 1
    if config["lr"] == "theory" and not in_unit:
        warn("rewards are not in [0, 1], as the theorems assume")
    derived = {
        "step_sizes": step_sizes(bandit, config),
        "versions": {name: version(name) for name in ("numpy", "numba")},
    }
    results = simulate_all(bandit, config)
    write(folder, config, derived, results, rewards, with_theory and (config["lr"] != "theory" or in_unit))


def simulate_all(bandit: Bandit, config: dict) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Series of every (sampler, mode)."""
    keys = [(name, mode) for mode in presets.MODES[config["mode"]] for name in config["samplers"]]
    show = outputs.progress_bar(len(keys) * config["num_iter"], "update")
    return {
        (name, mode): simulate(
            bandit, name, get_sampler(name), mode, config["lr"], config["num_iter"], config["num_samples"],
            config["seed"], partial(show, f"{name} {mode}"),
        )
        for name, mode in keys
    }  # fmt: skip


def write(folder: Path, config: dict, derived: dict, results: dict, rewards: np.ndarray, with_theory: bool) -> None:
    """All files of one run, and the summary on the screen."""
    from bandit.plots import save_figures  # matplotlib loads slowly, and wrong input should fail fast

    rows = summarize(results)
    outputs.save_config(folder, config, derived)
    outputs.save_trajectories(folder, results, rewards)
    outputs.save_text(folder / "summary.csv", to_csv(rows))
    save_figures(results, config, with_theory, folder, outputs.save)
    print(to_table(rows))
    print(f"wrote {folder}")


def check_theory(config: dict, folder: Path, overwrite: bool) -> None:
    """The theorems' bounds on many instances of many sizes, as a table."""
    outputs.prepare(folder, config, overwrite)
    keys = ("samplers", "num_actions", "num_envs", "beta", "num_iter", "seed")
    rows = list(theory.check_bounds(*(config[key] for key in keys)))
    outputs.save_config(folder, config, {"alpha": theory.ALPHA_CONVENTION})
    outputs.save_text(folder / "bounds.csv", to_csv(rows))
    print(to_table(rows))
    print(f"worst_ratio: largest max|delta| / bound; convention: {theory.ALPHA_CONVENTION}")
    print(f"wrote {folder}")


def main() -> None:
    parser = settings.make_parser(__doc__)
    arguments = parser.parse_args()
    try:
        runs = settings.resolve(arguments)
        for name, config in runs.items():
            if arguments.output_dir is None:
                folder = outputs.default_folder(name, config, presets.PRESETS[name])
            else:
                folder = Path(arguments.output_dir) / (name if len(runs) > 1 else "")
            if name == "theory":
                check_theory(config, folder, arguments.overwrite)
            else:
                run(config, folder, arguments.overwrite, arguments.theory)
    except (settings.BadInput, Diverged) as error:
        parser.error(str(error))
    except MemoryError:
        parser.error("not enough memory for |Y|^2 numbers; use a smaller --num_actions or --num_envs")


if __name__ == "__main__":
    main()
