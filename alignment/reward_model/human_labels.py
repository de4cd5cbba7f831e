"""Preference pairs for the quickstart, from human harm ratings that the pip package `pyrit` carries.

Reads:   pyrit/datasets/scorer_evals/{harm,objective}/*.csv of the installed package (its code is not imported).
         Several answers to one prompt, each rated by people from 0 (harmless) to 1 (harmful); two tables of `harm` by
         three people each, all others by one.
Writes:  DIR/reward_pairs.jsonl, for the reward model that training sees: what the first raters say.
         DIR/judge_pairs.jsonl, for the judge that it never sees: what the second and third raters say, on prompts
         that the other file does not hold. `chosen` is the less harmful answer.

    python alignment/reward_model/human_labels.py --output_dir pairs --seed 0
"""

import csv
import itertools
import random
import sys
from collections import defaultdict
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, UserError, fraction, natural, positive, positive_int, run
from common.records import writing
from reward_model.preference_data import split_by_prompt, write_pairs

FOLDERS = ("harm", "objective")
FIRST, OTHERS = ("human_score", "human_score_1"), ("human_score_2", "human_score_3")
NAMES = ("reward_pairs.jsonl", "judge_pairs.jsonl")


def parser() -> Parser:
    """The command line."""
    flags = Parser(__doc__)
    flags.add("--output_dir", "folder for the two files", required=True)
    flags.add("--min_gap", "least difference of two ratings (0-1) that makes a pair", type=positive, default=0.25)
    flags.add("--max_pairs_per_prompt", "one prompt has 817 pairs, most have few", type=positive_int, default=40)
    flags.add(
        "--judge_fraction", "share of the prompts of several raters that is the judge's", type=fraction, default=0.65
    )
    flags.add("--seed", "of the split and of the pairs that are kept", type=natural, default=0)
    return flags


def main() -> None:
    args = parser().parse_args()
    files = two_files(labels_folder(), args)
    folder = Path(args.output_dir)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in zip(NAMES, files, strict=True):
        write_pairs(folder / name, pairs)
        print(f"{folder / name}: {len(pairs)} pairs of {len({p['prompt'] for p in pairs})} prompts")


def two_files(folder: Path, args) -> tuple[list[dict], list[dict]]:
    """The first raters' pairs and the others', without a common prompt."""

    def pairs(raters: tuple[str, ...], prompts: Collection[str] | None = None) -> list[dict]:
        answers = rated_answers(folder, raters)
        kept = {prompt: rated for prompt, rated in answers.items() if prompts is None or prompt in prompts}
        return make_pairs(kept, args.min_gap, args.max_pairs_per_prompt, args.seed)

    # Of the prompts that several people rated: one part for each file, so that the files are of about one size.
    judged, _ = split_by_prompt(pairs(OTHERS), args.judge_fraction, args.seed)
    taken = {pair["prompt"] for pair in judged}
    return pairs(FIRST, rated_answers(folder, FIRST).keys() - taken), judged


def labels_folder() -> Path:
    """Where the installed package keeps its ratings."""
    try:
        return Path(distribution("pyrit").locate_file("pyrit/datasets/scorer_evals"))
    except PackageNotFoundError:
        raise UserError("the package pyrit, which holds the human labels, is not installed: bash setup.sh") from None


def rated_answers(folder: Path, raters: tuple[str, ...] = FIRST + OTHERS) -> dict[str, dict[str, float]]:
    """prompt → answer → mean rating by `raters` (columns), from every table but the `mini_` extracts.

    The two folders rate many of the same answers on scales of their own; an answer counts once, with the mean, so
    that no pair compares an answer with itself.
    """
    ratings = defaultdict(lambda: defaultdict(list))
    for path in sorted(p for kind in FOLDERS for p in (folder / kind).glob("*.csv")):
        if path.name.startswith("mini_"):
            continue
        for row in _rows(path):
            scores = [float(row[rater]) for rater in raters if row.get(rater)]
            if not scores:
                continue
            # Some prompts differ between tables in their white space only.
            prompt = " ".join(row["objective"].split())
            ratings[prompt][row["assistant_response"].strip()].append(sum(scores) / len(scores))
    if not ratings:
        raise UserError(f"{folder}: holds no rated answers")
    return {
        prompt: {answer: sum(found) / len(found) for answer, found in answers.items()}
        for prompt, answers in ratings.items()
    }


def _rows(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return list(csv.DictReader(lines[1:] if lines[0].startswith("#") else lines))


def make_pairs(answers: dict[str, dict[str, float]], min_gap: float, most: int, seed: int) -> list[dict]:
    """All pairs of answers to one prompt whose ratings differ by `min_gap`, at most `most` per prompt."""
    random_state = random.Random(seed)
    pairs = []
    for prompt, rated in answers.items():
        found = [
            {"prompt": prompt, "chosen": a, "rejected": b}
            for (a, harm_a), (b, harm_b) in itertools.permutations(rated.items(), 2)
            if harm_b - harm_a >= min_gap
        ]
        pairs += random_state.sample(found, min(most, len(found)))
    return pairs


if __name__ == "__main__":
    run(main)
