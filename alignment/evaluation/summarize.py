"""Tables, figures and one report page from a run's evaluation files; what is not there yet is shown as missing.

Reads   RUN_DIR/data/test_data_with_{rewards,judge}_iter{0|1}_{label}_{iteration}.json (0 = test prompts, 1 = train
        prompts) and RUN_DIR/results/kl_{label}_{iteration}.json; the label of the base model (iteration 0) is `base`,
        that of the shared first iteration `iter1`, else it is the sampler's name.
Writes  RUN_DIR/results/: summary.md, summary.csv, win_rates.csv, report.html, and the figures as PNG and PDF.

    python alignment/evaluation/summarize.py --run_dir alignment/runs/quickstart --samplers online mixp --iterations 3
"""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / "alignment"), str(PROJECT)]  # the samplers' colours are the bandit's

from common.cli import Parser, UserError, natural, positive_int, run
from common.records import write_atomic, writing


def parser() -> Parser:
    """The command line."""
    flags = Parser(__doc__)
    flags.add("--run_dir", "folder of the run", required=True)
    flags.add("--samplers", "names, in the order of the table", nargs="+", required=True)
    flags.add("--iterations", "how many iterations the run has", type=positive_int, required=True)
    flags.add("--seed", "of the bootstrap", type=natural, default=0)
    return flags


def main() -> None:
    args = parser().parse_args()
    from evaluation.run_files import all_models, checked_samplers, read_run
    from evaluation.tables import (
        markdown,
        pair_table,
        summary_csv,
        summary_rows,
        summary_table,
        verdict,
        win_csv,
        win_rows,
    )

    run_dir = Path(args.run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder")
    samplers = checked_samplers(args.samplers)
    models = all_models(samplers, args.iterations)
    data = read_run(run_dir, models)
    rows = summary_rows(data, models, args.seed)
    table, pairs = summary_table(rows), pair_table(data, samplers, args.iterations, args.seed)
    words = verdict(data, samplers, args.iterations, args.seed)
    results = run_dir / "results"
    with writing(results):
        results.mkdir(exist_ok=True)
    write_atomic(results / "summary.csv", summary_csv(rows))
    write_atomic(results / "win_rates.csv", win_csv(win_rows(data, models, args.seed)))
    write_atomic(results / "summary.md", f"{markdown(table)}\n{markdown(pairs)}\n{words}\n")
    write_report(data, rows, samplers, args, (table, pairs, words))
    print(f"\n{markdown(short(table))}\n{words}\n\nTables, figures and the report page: {results}/report.html")


def short(table: list[list[str]]) -> list[list[str]]:
    """The table's first columns, as wide as a terminal."""
    return [row[:8] for row in table]


def write_report(data, rows, samplers: list[str], args, texts: tuple) -> None:
    """Draws the figures and writes the page that holds everything."""
    from evaluation.figures import save_figures
    from evaluation.report import page

    results = Path(args.run_dir) / "results"
    table, pairs, words = texts
    tables = {
        "Every model": (
            "Mean [95% interval] over prompts. Gains and win rates are paired, prompt by prompt, against the base "
            "model; ties count half. Lengths and shares are of the responses to the test prompts.",
            table,
        ),
        "Sampler against sampler": (
            "The last iteration on the same test prompts, and both at equal KL: rewards are interpolated along each "
            "sampler's reward-KL curve from iteration 1 on.",
            pairs,
        ),
    }
    with writing(results):
        figures = save_figures(data, rows, samplers, args.iterations, results, args.seed)
    title = f"Evaluation of {Path(args.run_dir).resolve().name}"
    write_atomic(results / "report.html", page(title, words, tables, figures, data.settings))


if __name__ == "__main__":
    run(main)
