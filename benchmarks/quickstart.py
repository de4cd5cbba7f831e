"""Where the quickstart's time goes: its stages as bars, and what of them is start-up.

Reads   RUN_DIR/stage_seconds.tsv, which the drivers write, and that of a second run of the same stages on next to no
        work: a stage's time there is its start-up (Python, imports, models, engine).
Writes  docs/figures/quickstart_time.png (--figure); prints a Markdown table.

    bash quickstart.sh SAMPLERS="online mixp" ITERS=2
    bash quickstart.sh SAMPLERS="online mixp" ITERS=2 RUN_DIR=/tmp/least TRAIN_END=2 TEST_END=401 EVAL_TRAIN_END=1 \\
        KL_PROMPTS=1 MAX_NEW_TOKENS=4 EPOCHS=1
    python benchmarks/quickstart.py --run_dir alignment/runs/quickstart --least_run_dir /tmp/least
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

from benchmarks.harness import PROJECT, Row, report

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ALLOWED = 0.15  # of all time, for start-up


def stage_seconds(run_dir: Path) -> dict[str, list[float]]:
    """Kind of stage → seconds of each of its runs, in the order in which the kinds first ran."""
    path = run_dir / "stage_seconds.tsv"
    if not path.is_file():
        sys.exit(f"quickstart.py: error: {path}: no such file; quickstart.sh writes it")
    kinds = defaultdict(list)
    for line in path.read_text().splitlines():
        stage, seconds = line.split("\t")
        kinds[stage.split()[0]].append(float(seconds))  # "train 2 mixp" is one of "train"
    return kinds


def draw(work: dict[str, float], start_up: dict[str, float], path: Path) -> None:
    """Horizontal bars: start-up and work of each kind of stage."""
    figure, ax = plt.subplots(figsize=(7, 0.45 * len(work) + 1), layout="constrained")
    names = list(work)
    ax.barh(names, [start_up[n] for n in names], color="#7F7F7F", label="start-up")
    ax.barh(names, [work[n] for n in names], left=[start_up[n] for n in names], color="#0072B2", label="work")
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("seconds, all runs of the stage")
    ax.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--run_dir", type=Path, required=True, help="folder of a finished run")
    flags.add_argument("--least_run_dir", type=Path, required=True, help="the same stages on next to no work")
    flags.add_argument("--figure", type=Path, default=PROJECT / "docs/figures/quickstart_time.png")
    args = flags.parse_args()
    whole, least = stage_seconds(args.run_dir), stage_seconds(args.least_run_dir)
    if {n: len(t) for n, t in whole.items()} != {n: len(t) for n, t in least.items()}:
        sys.exit("quickstart.py: error: the two runs have other stages")
    # Without assets that were there already.
    whole = {name: times for name, times in whole.items() if sum(times)}
    total = sum(map(sum, whole.values()))
    start_up = {name: min(sum(least[name]), sum(times)) for name, times in whole.items()}
    work = {name: sum(times) - start_up[name] for name, times in whole.items()}
    draw(work, start_up, args.figure)
    rows = [line(f"{name}, {len(whole[name])} times", sum(whole[name]), start_up[name]) for name in whole]
    rows.append(line("all", total, sum(start_up.values()))._replace(to_reach=f"<= {ALLOWED:.0%}"))
    words = "Baseline: the stage's time. Ours: of it start-up, which is what it takes on next to no work."
    report("Quickstart", words, rows)


def line(case: str, seconds: float, start_up: float) -> Row:
    """A row of the table."""
    return Row(case, f"{seconds:.0f} s", f"{start_up:.0f} s", f"{start_up / seconds:.0%}")


if __name__ == "__main__":
    main()
