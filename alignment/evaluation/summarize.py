"""Tables, figures and one report page from a run's evaluation files; what is not there yet is shown as missing.

Reads   RUN_DIR/eval/{test,train,kl}_prompts/{model}_{rewards,judge}.json and RUN_DIR/results/kl_{model}.json, where
        {model} is base_iter0, shared_iter1, {sampler}_iter{n}, or the name of a given checkpoint; scripts/names.py.
Writes  RUN_DIR/results/: summary.md, summary.csv, win_rates.csv, report.html, and the figures as PNG and PDF.

    python alignment/evaluation/summarize.py --run_dir alignment/runs/quickstart --samplers online mixp --iterations 3
    python alignment/evaluation/summarize.py --run_dir alignment/runs/published --models alpaca-7b-iter-1 mixp-iter-3
"""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / "alignment"), str(PROJECT)]  # the samplers' colours are the bandit's

from common.cli import Parser, UserError, natural, non_negative, positive, positive_int, run
from common.records import write_atomic, writing

NOTES = {
    "Every model": (
        "Mean [95% interval] over prompts, Student's; win rates: Wilson's, ties count half; KL: on the logarithmic "
        "scale. Gains and win rates are paired, prompt by prompt, against the base model. Lengths and shares are of "
        "the responses to the test prompts; distinct-n is the share of different words and word pairs."
    ),
    "Model against model": (
        "The last models on the same test prompts, training reward; and samplers at equal KL: rewards are "
        "interpolated along each sampler's own models (BCa bootstrap). Intervals are over prompts only."
    ),
}


def parser() -> Parser:
    """Return the command line."""
    flags = Parser(__doc__)
    flags.add("--run_dir", "folder of the run", required=True)
    flags.add("--samplers", "names, in the order of the table", nargs="+", default=[])
    flags.add("--iterations", "how many iterations the run has; needed with --samplers", type=positive_int)
    flags.add("--models", "names of given checkpoints that stand beside the base model", nargs="+", default=[])
    flags.add("--beta", "of training; the value is reward - (beta / margin scale) KL", type=non_negative, default=0.1)
    flags.add("--margin_scale", "of training: what rewards were multiplied with", type=positive, default=1.0)
    flags.add("--seed", "of the bootstrap", type=natural, default=0)
    return flags


def main() -> None:
    args = parser().parse_args()
    if not args.samplers and not args.models:
        raise UserError("--samplers or --models: at least one name is needed")
    if args.samplers and args.iterations is None:
        raise UserError("--iterations: needed with --samplers")
    from evaluation import tables
    from evaluation.figures import save_figures
    from evaluation.report import page
    from evaluation.run_files import BASE, FIRST, all_models, checked_names, read_run

    run_dir, iterations = Path(args.run_dir), args.iterations or 1
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder")
    samplers, given = checked_names("--samplers", args.samplers), checked_names("--models", args.models)
    models = all_models(samplers, iterations, given)
    data = read_run(run_dir, models)

    rows = {model: tables.summary_row(data, model, args.beta / args.margin_scale) for model in models}
    last = tables.last_models(data, samplers, iterations, given)
    compared = [m for m in last if m not in (BASE, FIRST)]
    table, pairs = tables.summary_table(rows), tables.pair_table(data, compared, iterations, args.seed)
    words, warned = tables.verdict(data, last), tables.warnings(data, models)

    results = run_dir / "results"
    with writing(results):
        results.mkdir(exist_ok=True)
        figures = save_figures(data, rows, samplers, iterations, last, results)
    write_atomic(results / "summary.csv", tables.summary_csv(rows))
    write_atomic(results / "win_rates.csv", tables.win_csv(tables.win_rows(data, models)))
    text = "\n".join(warned + words)
    write_atomic(results / "summary.md", f"{tables.markdown(table)}\n{tables.markdown(pairs)}\n{text}\n")
    noted = {heading: (note, found) for (heading, note), found in zip(NOTES.items(), (table, pairs), strict=True)}
    title = f"Evaluation of {run_dir.resolve().name}"
    write_atomic(results / "report.html", page(title, words, warned, noted, figures, data, last))
    short = [line[:7] for line in table]  # as wide as a terminal
    print(f"\n{tables.markdown(short)}\n{text}\n\nTables, figures and the report page: {results}/report.html")


if __name__ == "__main__":
    run(main)
