"""The lab: online DPO of small transformers on which everything is enumerated. One cell: one setting, many runs.

Reads   nothing; environments are drawn from the seeds.
Writes  OUTPUT_DIR: values.npz (value gap, reward, KL of all samplers x lrs x seeds x times), table.json, table.md.

    python alignment/lab/run_lab.py --samplers online online-null gshf mixp offline --seeds 10 --output_dir lab
    python alignment/lab/run_lab.py --learner table --optimizer sgd --lrs 50 100 200 400 --output_dir lab_table

Every sampler of bandit/mixtures.py is known by name, and those of `LAB_ONLY` in sampling.py. Each sampler's value gap
is at its own learning rate, cross-fitted over seeds; differences are paired with `online`; Holm over samplers.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import numpy as np
import torch
from lab.environment import Setting, make_environment
from lab.intervals import Comparison, compare, interval_text
from lab.sampling import LAB_ONLY, lab_sampler
from lab.train import OPTIMIZERS, run_all

from bandit.mixtures import MIXTURES
from common.cli import Parser, UserError, run
from dpo_iteration.losses import LOSSES

LEARNERS = ("table", "linear", "transformer")
# Grids of factor 2 that hold the best lr of every sampler of the study; wide where runs cost little.
LRS = {
    ("table", "sgd"): [25.0 * 2**i for i in range(9)],
    ("table", "adam"): [0.05 * 2**i for i in range(9)],
    ("linear", "sgd"): [2.5 * 2**i for i in range(9)],
    ("linear", "adam"): [0.0125 * 2**i for i in range(9)],
    ("transformer", "sgd"): [0.125 * 2**i for i in range(5)],
    ("transformer", "adam"): [0.001 * 2**i for i in range(6)],
}


def main() -> None:
    """Settings -> environments -> runs -> table."""
    args = parser().parse_args()
    setting = checked(Setting(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Setting)}))
    lrs = args.lrs or LRS[setting.learner, setting.optimizer]
    check_samplers(args.samplers, setting.pairs)
    torch.set_num_threads(args.threads)
    rows = run_cell(setting, args.samplers, lrs, list(range(args.first_seed, args.first_seed + args.seeds)),
                    args.compile, Path(args.output_dir))  # fmt: skip
    print(markdown(rows))


def parser() -> Parser:
    """Return the flags: those of a cell, and one for each field of `Setting`."""
    p = Parser(__doc__)
    names = ", ".join([*MIXTURES, *LAB_ONLY])
    about = f"names: {names}, mix_A_B_P; NAME-null: NAME with other random numbers"
    p.add("--samplers", about, nargs="+", default=["online", "online-null", "gshf", "offline"])
    p.add("--lrs", "learning rates (default: a grid that suits learner and optimizer)", nargs="+", type=float)
    p.add("--seeds", "number of environments", type=int, default=10)
    p.add("--first_seed", "first environment", type=int, default=0)
    p.add("--threads", "threads of torch", type=int, default=1)
    p.add("--compile", "compile the transformer: half the time per run, after half a minute", action="store_true")
    p.add("--output_dir", "folder of the results", required=True)
    for f in dataclasses.fields(Setting):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "default": f.default}
        p.add(f"--{f.name}", f.metadata["help"], **kind)
    return p


def checked(setting: Setting) -> Setting:
    """Return the setting.

    Raises:
        UserError: naming the flag whose value cannot be.
    """
    for flag, value, known in (
        ("learner", setting.learner, LEARNERS),
        ("optimizer", setting.optimizer, OPTIMIZERS),
        ("loss", setting.loss, LOSSES),
    ):
        if value not in known:
            raise UserError(f"--{flag} {value}: one of {', '.join(known)}")
    rounds = setting.iterations or setting.updates
    problems = {
        "--prompts: from 1 to --vocabulary": not 1 <= setting.prompts <= setting.vocabulary,
        "--width must be divisible by --heads": setting.width % setting.heads,
        "--updates must be divisible by --iterations": setting.updates % rounds,
        "--epochs must divide the updates of a sampling round": (setting.updates // rounds) % setting.epochs,
        "--quality: from -1 to 1": abs(setting.quality) > 1,
        "--label_noise: from 0 to 0.5": not 0 <= setting.label_noise <= 0.5,
        "--pairs 0: with --loss sigmoid only": not setting.pairs and setting.loss != "sigmoid",
        "--beta and --temperature must be above 0": not (setting.beta > 0 and setting.temperature > 0),
    }
    for problem, holds in problems.items():
        if holds:
            raise UserError(problem)
    return setting


def check_samplers(names: list[str], pairs: int) -> None:
    """Check the names; `online` must be among them, since all are compared with it."""
    for name in names:
        try:
            lab_sampler(name)
        except ValueError as error:
            raise UserError(f"--samplers: {error}; of the lab alone: {', '.join(LAB_ONLY)}") from None
    if not pairs and any(lab_sampler(name).row.candidates > 2 or lab_sampler(name).bonus for name in names):
        raise UserError("--pairs 0: for samplers of two candidates without a bonus only")
    if "online" not in names:
        raise UserError("--samplers: online must be among them, the others are compared with it")


def run_cell(
    setting: Setting, names: list[str], lrs: list[float], seeds: list[int], compiled: bool, output_dir: Path
) -> list[Comparison]:
    """Run one cell and write its files."""
    env = make_environment(setting, seeds)
    values, updates = run_all(setting, env, names, lrs, compiled)
    rows = compare(values[0, ..., -1], names, lrs)
    output_dir.mkdir(parents=True, exist_ok=True)
    what = dict(zip(("gap", "reward", "kl"), values, strict=True))
    np.savez_compressed(output_dir / "values.npz", updates=updates, samplers=names, lrs=lrs, seeds=seeds, **what)
    (output_dir / "table.md").write_text(markdown(rows) + "\n")
    # Last: a cell is done when this file is there.
    done = {"setting": dataclasses.asdict(setting), "seeds": seeds, "lrs": lrs, "rows": [r._asdict() for r in rows]}
    (output_dir / "table.json").write_text(json.dumps(done, indent=1))
    return rows


def markdown(rows: list[Comparison]) -> str:
    """Return the table: value gap, difference from online with interval, Holm's p, lr, share of lrs at the edge."""
    lines = [
        "| sampler | value gap | minus online, 95% | Holm's p | lr | at the grid's edge |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        interval = interval_text(r.difference, r.low, r.high) if r.sampler != "online" else ""
        p = f"{r.p_holm:.2g}" if interval else ""
        lines.append(f"| {r.sampler} | {r.gap:.3f} | {interval} | {p} | {r.lr:g} | {r.at_edge:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
