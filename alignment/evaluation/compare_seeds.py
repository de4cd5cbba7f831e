"""One table and one figure from run folders that differ in their seed only: which differences of samplers are real.

Reads   RUN_DIR/seed_N/data and results, as summarize.py does, for every seed N.
Writes  RUN_DIR/results/: seeds.md, seeds.csv, report.html, reward_vs_kl_over_seeds.{png,pdf}.

    python alignment/evaluation/compare_seeds.py --run_dir alignment/runs/ablation --seeds 1 2 3 \\
        --samplers online mixp --iterations 2
"""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / "alignment"), str(PROJECT)]  # the samplers' colours are the bandit's

from common.cli import Parser, UserError, natural, positive_int, run
from common.records import write_atomic, writing

NOTE = (
    "Means over seeds with 95% intervals: (seeds) Student's t over training seeds, for these prompts; (prompts) a "
    "paired bootstrap over prompts, for these seeds. A difference is called clear only where both exclude 0."
)
CAPTION = (
    "Mean reward on the test prompts against the KL from the base. Thin: the seeds' curves, from the base model "
    "through the shared iteration 1 to the last model (dot); band: their range; thick: their mean, where all reach."
)


def parser() -> Parser:
    """The command line."""
    flags = Parser(__doc__)
    flags.add("--run_dir", "folder that holds seed_N", required=True)
    flags.add("--seeds", "which N", type=natural, nargs="+", required=True)
    flags.add("--samplers", "names; all are compared with the first", nargs="+", required=True)
    flags.add("--iterations", "how many iterations the runs have", type=positive_int, required=True)
    flags.add("--seed", "of the bootstrap", type=natural, default=0)
    return flags


def main() -> None:
    args = parser().parse_args()
    if args.iterations < 2:
        raise UserError("--iterations: samplers differ from iteration 2 on")
    from evaluation.figures import save_figure
    from evaluation.report import page
    from evaluation.run_files import all_models, checked_samplers, read_run
    from evaluation.seeds import check_same_settings, table, verdict
    from evaluation.tables import csv_text, markdown

    run_dir, samplers = Path(args.run_dir), checked_samplers(args.samplers)
    models = all_models(samplers, args.iterations)
    folders = [run_dir / f"seed_{seed}" for seed in dict.fromkeys(args.seeds)]
    runs = [read_run(folder, models) for folder in folders]
    check_same_settings(dict(zip(folders, runs, strict=True)))
    rows = table(runs, samplers, args.iterations, args.seed)
    words = verdict(runs, samplers, args.iterations, args.seed)
    results = run_dir / "results"
    with writing(results):
        results.mkdir(exist_ok=True)
        figure = reward_vs_kl(runs, samplers, args.iterations)
        figures = save_figure(figure, "reward_vs_kl_over_seeds", CAPTION, results) if figure else {}
    write_atomic(results / "seeds.md", f"{markdown(rows)}\n{words}\n{NOTE}\n")
    write_atomic(results / "seeds.csv", csv_text(rows))
    title = f"{len(runs)} seeds of {run_dir.resolve().name}"
    tables = {f"After iteration {args.iterations}": (NOTE, rows)}
    write_atomic(results / "report.html", page(title, words, tables, figures, runs[0].settings))
    print(f"\n{markdown(rows)}\n{words}\n\nTable, figure and the report page: {results}/report.html")


def reward_vs_kl(runs: list, samplers: list[str], iterations: int):
    """A panel for each judge that scored every seed; None while there is none."""
    from evaluation.figures import JUDGE_NAMES, band_panels
    from evaluation.seeds import band, curves

    found = {
        name: {s: c for s in samplers if (c := curves(runs, judge, s, iterations)) is not None}
        for judge, name in JUDGE_NAMES.items()
    }
    panels = {
        name: {sampler: (band(*curve), *curve) for sampler, curve in lines.items()}
        for name, lines in found.items()
        if lines
    }
    return band_panels(panels) if panels else None


if __name__ == "__main__":
    run(main)
