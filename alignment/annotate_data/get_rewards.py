"""Scores every response of a data file with a reward model.

Reads:   a data file of generate.py, or any JSON of the form {"instances": [{"prompt", "responses": [K]}]}.
Writes:  the same file with `rewards` [K] in every instance; while it runs, a journal beside it, from which a second
         run of the same command continues.

    python alignment/annotate_data/get_rewards.py --dataset_name_or_path gen_data.json \\
        --reward_name_or_path sfairXC/FsfairX-LLaMA3-RM-v0.1 --output_file data_with_rewards.json
"""

import contextlib
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from annotate_data.texts import TEMPLATES, check_template, instance_texts
from common import scale_out
from common.cli import Parser, UserError, natural, positive_int, run
from common.journal import is_done, journal
from common.models import default_dtype
from common.provenance import data_inputs, model_inputs, provenance
from common.records import read_provenance, read_records, sha256, write_records


def parser() -> Parser:
    """The command line."""
    flags = Parser(__doc__)
    flags.add("--dataset_name_or_path", "data file(s) with the responses", nargs="+", required=True)
    flags.add("--reward_name_or_path", "reward model: folder or hub name, one label or several", required=True)
    flags.add("--output_file", "where the scored data goes, one for each data file", nargs="+", required=True)
    flags.add(
        "--reward_template",
        "none: the model reads prompt + response as they stand in the file (as published); chat: the reward "
        "model's own chat template over the user's text (`messages` or `raw_prompt` of the instance; its `prompt` "
        "where no policy template was applied) and the response",
        choices=TEMPLATES,
        default="none",
    )
    flags.add("--reward_column", "which label is the reward, where the model has several", type=natural)
    flags.add("--max_length", "tokens kept of a text; without it what the model allows", type=positive_int)
    flags.add(
        "--token_budget",
        "most tokens, padding included, in one batch; without it 16384 where this machine has a GPU, else 2048",
        type=positive_int,
    )
    flags.add("--dtype", "float32 or bfloat16; without it bfloat16 on a GPU", choices=("float32", "bfloat16"))
    scale_out.add_flag(flags)
    flags.add("--trust_remote_code", "run Python code that the model brings along", action="store_true")
    return flags


def main() -> None:
    args = parser().parse_args()
    todo = [(source, output) for source, output in files(args) if not is_annotated(args, source, output)]
    if not todo:
        return
    from annotate_data.scorer import TextBatches

    encoder = TextBatches(args.reward_name_or_path, **reading_options(args))
    check_template(args.reward_template, encoder.tokenizer, args.reward_name_or_path)
    jobs = [Job(args, source, output, encoder) for source, output in todo]
    annotate(args, jobs, model_inputs({"reward model": args.reward_name_or_path}))


def files(args) -> list[tuple[str, str]]:
    """(input, output) of every data file. Raises `UserError` unless there is one output an input."""
    if len(args.dataset_name_or_path) != len(args.output_file):
        raise UserError("--dataset_name_or_path and --output_file must have the same number of values")
    if len(set(args.output_file)) != len(args.output_file):
        raise UserError("--output_file: the same file twice")
    return list(zip(args.dataset_name_or_path, args.output_file, strict=True))


def is_annotated(args, source: str, output: str) -> bool:
    """Whether the output is there already; reads the input, so that a wrong one is refused before a model loads."""
    read_records(source)
    if not is_done(output, "annotate", stage_settings(args, source)):
        return False
    print(f"{output}: already done")
    return True


class Job:
    """One data file that is being scored.

    Attributes:
        texts: (row, response index, text that the reward model reads), in file order.
        book: its journal, in which "row/response index" stands for a text; there from `open` on.
    """

    def __init__(self, args, source: str, output: str, encoder) -> None:
        self.source, self.output, self.encoder = source, output, encoder
        self.instances, self.made_with = read_records(source)
        self.texts = all_texts(self.instances, self.made_with, source, args.reward_template, encoder.tokenizer)
        self.settings = stage_settings(args, source)

    def open(self, stack: contextlib.ExitStack) -> list:
        """Opens the journal until the stack ends; returns the batches that hold texts without a score."""
        self.book = stack.enter_context(journal(self.output, self.settings))
        scored = {i for i in range(len(self.texts)) if self._key(i) in self.book.rows}
        before = self.encoder.cut
        batches = list(self.encoder.batches([text for _, _, text in self.texts], skip=scored))
        self.cut = self.encoder.cut - before
        return batches

    def _key(self, i: int) -> str:
        row, k, _ = self.texts[i]
        return f"{row}/{k}"

    def add(self, indices: list[int], scores: list[float]) -> None:
        """Records the scores of a batch that are not there yet. Raises `UserError` for one that is not finite."""
        for i, score in zip(indices, scores, strict=True):
            row, k, text = self.texts[i]
            if not math.isfinite(score):
                raise UserError(
                    f"{self.source}: row {row}: response {k} was given the score {score} (text {text[:60]!r} …)"
                )
            if self._key(i) not in self.book.rows:
                self.book.add(self._key(i), score)

    def finish(self, models: list[dict]) -> None:
        """Writes the output if every text has its score."""
        if len(self.book.rows) < len(self.texts):
            return
        rows = with_rewards(self.instances, self.book.rows)
        made_from = provenance([], models + data_inputs([self.source]))
        stages = {**read_provenance(self.source), "annotate": made_from}
        write_records(self.output, rows, {**self.made_with, "annotate": self.settings}, stages)
        self.book.close(done=True)
        cut = f"; {self.cut} texts were cut to {self.encoder.max_length} tokens" if self.cut else ""
        print(f"{self.output}: {summary(rows)}{cut}")


def annotate(args, jobs: list[Job], models: list[dict]) -> None:
    """Scores the files; each score is in its file's journal as soon as its batch is done."""
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        work = [(job, batch) for job in jobs for batch in job.open(stack)]
        # The bar goes to standard output: standard error is for the one line of an error.
        bar = tqdm(desc="scoring", unit="text", file=sys.stdout, mininterval=1)
        stack.callback(bar.close)
        bar.total, bar.n = sum(len(job.texts) for job in jobs), sum(len(job.book.rows) for job in jobs)
        for job in jobs:
            job.finish(models)
        for number, scores in all_scores(args, [batch.rows for _, batch in work]):
            job, batch = work[number]
            before = len(job.book.rows)
            job.add(batch.indices, scores)
            bar.update(len(job.book.rows) - before)
            job.finish(models)
        if bar.n < bar.total:
            raise UserError("scoring ended before all texts had a score; the same command continues from here")


def stage_settings(args, source: str) -> dict:
    """What decides the scores; the token budget does not."""
    return {
        "dataset_sha256": sha256(source),
        "reward_name_or_path": args.reward_name_or_path,
        "reward_template": args.reward_template,
        "reward_column": args.reward_column,
        "max_length": args.max_length,
        "dtype": args.dtype or default_dtype(),
    }


def reading_options(args) -> dict:
    """How the command line wants texts to be read."""
    return {
        "max_length": args.max_length,
        "token_budget": args.token_budget,
        "trust_remote_code": args.trust_remote_code,
    }


def note(text: str) -> None:
    """Prints below the bar."""
    print(f"\n{text}", flush=True)


def all_scores(args, work: list[list[Sequence[int]]]) -> Iterator[tuple[int, list[float]]]:
    """Yields (number of the batch, scores of its token lists) as batches are done, by one scorer or several."""
    from annotate_data.scorer import RewardScorer, ScoringEngine

    options = {"column": args.reward_column, "dtype": args.dtype or default_dtype(), **reading_options(args)}
    if not work:
        return
    if args.num_engines == 1:
        scorer = RewardScorer(args.reward_name_or_path, say=note, **options)
        yield from enumerate(map(scorer.score_rows, work))
        return
    make_engine = functools.partial(ScoringEngine, args.reward_name_or_path, **options)
    engines = scale_out.start(args.num_engines)
    for number, (scores, notes) in scale_out.answers(make_engine, work, engines):
        for text in notes:
            note(text)
        yield number, scores


def all_texts(
    instances: list[dict], settings: dict, source: str, template: str, tokenizer
) -> list[tuple[int, int, str]]:
    """(row, response index, text that the reward model reads), in file order."""
    policy_template = (settings.get("generate") or {}).get("template")
    found = []
    for row, instance in enumerate(instances):
        texts = instance_texts(instance, template, tokenizer, f"{source}: row {row}", policy_template)
        found += [(row, k, text) for k, text in enumerate(texts)]
    return found


def with_rewards(instances: list[dict], scores: dict[str, float]) -> list[dict]:
    """The instances with their `rewards`, from "row/response index" → score."""
    return [
        {**instance, "rewards": [scores[f"{row}/{k}"] for k in range(len(instance["responses"]))]}
        for row, instance in enumerate(instances)
    ]


def summary(instances: list[dict]) -> str:
    """Mean and best-of-K reward."""
    every = [reward for instance in instances for reward in instance["rewards"]]
    best = [max(instance["rewards"]) for instance in instances]
    return (
        f"{len(instances)} prompts, {len(every)} responses: mean reward {sum(every) / len(every):.4f}, "
        f"best-of-K reward {sum(best) / len(best):.4f}"
    )


if __name__ == "__main__":
    run(main)
