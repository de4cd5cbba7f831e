"""Scores every response of a data file with a reward model, or with a Python function of your own.

Reads:   a data file of generate.py, or any JSON of the form {"instances": [{"prompt", "responses": [K]}]}.
Writes:  the same file with `rewards` [K] in every instance, all other fields untouched; while it runs, a journal
         beside it, from which a second run of the same command continues.

    python alignment/annotate_data/get_rewards.py --dataset_name_or_path gen_data.json \\
        --reward_name_or_path sfairXC/FsfairX-LLaMA3-RM-v0.1 --output_file data_with_rewards.json

    python alignment/annotate_data/get_rewards.py --dataset_name_or_path gen_data.json \\
        --reward_function rules.py:exact_answer --output_file data_with_rewards.json

where rules.py holds, for example,

    def exact_answer(prompt: str, responses: list[str], fields: dict) -> list[float]:
        return [float(response.strip() == fields["answer"]) for response in responses]

It is called once per instance with its other fields, those of the prompts' data set too (generate.py --keep_fields),
and returns one finite number per response.
"""

import array
import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from annotate_data.reward_function import FunctionRewards
from annotate_data.texts import TEMPLATES
from common import scale_out
from common.cli import Parser, UserError, natural, positive_int, run
from common.journal import is_done, journal
from common.provenance import data_inputs, provenance
from common.record_stream import RecordStream
from common.records import sha256, write_records


def parser() -> Parser:
    """The command line."""
    flags = Parser(__doc__)
    flags.add("--dataset_name_or_path", "data file(s) with the responses", nargs="+", required=True)
    flags.add("--reward_name_or_path", "reward model: folder or hub name, one label or several")
    flags.add(
        "--reward_function",
        "instead of a model: FILE.py:NAME, a function (prompt, responses, fields) → one number per response; "
        "the file is run as Python code",
    )
    flags.add("--output_file", "where the scored data goes, one per data file", nargs="+", required=True)
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
    flags.add(
        "--dtype",
        "of the model (default: bfloat16 on a GPU for weights stored in 16 bits, else float32)",
        choices=("float32", "bfloat16"),
    )
    scale_out.add_flag(flags)
    flags.add("--trust_remote_code", "run Python code that the model brings along", action="store_true")
    return flags


# What would change a model's scores; a function has no use for it.
OF_A_MODEL = {
    "reward_template": "none",
    "reward_column": None,
    "max_length": None,
    "dtype": None,
    "trust_remote_code": False,
}


def main() -> None:
    args = parser().parse_args()
    rewards = reward_source(args)
    jobs = [Job(source, output, rewards) for source, output in files(args)]
    jobs = [job for job in jobs if not job.is_done()]
    if jobs:
        rewards.prepare(jobs)
        annotate(rewards, jobs)


def reward_source(args):
    """The model or the function that scores; neither is loaded yet."""
    if (args.reward_name_or_path is None) == (args.reward_function is None):
        raise UserError("one of --reward_name_or_path and --reward_function is needed, and only one")
    if args.reward_function is not None:
        for name, default in OF_A_MODEL.items():
            if getattr(args, name) != default:
                raise UserError(f"--{name}: is for a reward model and has no effect on --reward_function")
        return FunctionRewards(args.reward_function)
    from annotate_data.model_rewards import ModelRewards

    return ModelRewards(args)


def files(args) -> list[tuple[str, str]]:
    """(input, output) of every data file. Raises `UserError` unless there is one output per input."""
    if len(args.dataset_name_or_path) != len(args.output_file):
        raise UserError("--dataset_name_or_path and --output_file must have the same number of values")
    if len(set(args.output_file)) != len(args.output_file):
        raise UserError("--output_file: the same file twice")
    return list(zip(args.dataset_name_or_path, args.output_file, strict=True))


class Job:
    """One data file that is being scored; reads and checks it, so that a wrong one is refused before a model loads.

    Text `i` is response `i % K` of row `i // K`. In the journal "row/response" stands for it.

    Args:
        source, output: the files.
        rewards: a `ModelRewards` or `FunctionRewards`.

    Attributes:
        records: the instances.
        settings: what decides the scores.
        note: what is to be said of the texts in the end.
        journal: there from `open` on; so is
        scored: indices of the texts that had a score then.
    """

    def __init__(self, source: str, output: str, rewards) -> None:
        self.source, self.output, self.rewards = source, output, rewards
        self.records = RecordStream(source)
        self.settings = {"dataset_sha256": sha256(source), **rewards.settings}
        self.note = ""

    def __len__(self) -> int:
        return self.records.count * self.records.responses_each

    def is_done(self) -> bool:
        """Whether the output is there already."""
        done = is_done(self.output, "annotate", self.settings)
        if done:
            print(f"{self.output}: already done")
        return done

    def open(self, stack: contextlib.ExitStack) -> None:
        """Opens the journal until the stack ends."""
        self.journal = stack.enter_context(journal(self.output, self.settings))
        self.scored = {i for i in range(len(self)) if self._key(i) in self.journal.rows}

    def place(self, i: int) -> tuple[int, int]:
        """Row and response index of text `i`."""
        return divmod(i, self.records.responses_each)

    def indices_of(self, row: int) -> range:
        """Indices of a row's texts."""
        return range(row * self.records.responses_each, (row + 1) * self.records.responses_each)

    def _key(self, i: int) -> str:
        row, k = self.place(i)
        return f"{row}/{k}"

    def add(self, indices: Sequence[int], scores: list[float]) -> int:
        """Records scores that are not there yet; how many. Raises `UserError`, before, if one is not finite."""
        for i, score in zip(indices, scores, strict=True):
            if not math.isfinite(score):
                row, k = self.place(i)
                text = self.rewards.text(self, i)[:60]
                raise UserError(
                    f"{self.source}: row {row}: response {k} was given the score {score} (text {text!r} …)"
                )
        found = dict(zip(map(self._key, indices), scores, strict=True))
        new = {key: score for key, score in found.items() if key not in self.journal.rows}
        for key, score in new.items():
            self.journal.add(key, score)
        return len(new)

    def finish(self, inputs: list[dict]) -> None:
        """Writes the output if every text has its score."""
        if len(self.journal.rows) < len(self):
            return
        made_from = provenance([], inputs + data_inputs([self.source]))
        settings = {**self.records.settings, "annotate": self.settings}
        every = array.array("d")
        write_records(
            self.output, self._with_rewards(every), settings, {**self.records.provenance, "annotate": made_from}
        )
        self.journal.close(done=True)
        print(f"{self.output}: {summary(every, self.records.responses_each)}{self.note}")

    def _with_rewards(self, every: array.array) -> Iterator[dict]:
        """Yields the instances with their `rewards`, which are added to `every`."""
        for row, instance in enumerate(self.records):
            rewards = [self.journal.rows[self._key(i)] for i in self.indices_of(row)]
            every.extend(rewards)
            yield {**instance, "rewards": rewards}


def annotate(rewards, jobs: list[Job]) -> None:
    """Scores the files; each score is in its file's journal as soon as its batch is done."""
    from tqdm import tqdm

    inputs = rewards.inputs()
    with contextlib.ExitStack() as stack:
        for job in jobs:
            job.open(stack)
        # The bar goes to standard output: standard error is for the one line of an error.
        bar = tqdm(desc="scoring", unit=rewards.unit, file=sys.stdout, mininterval=1)
        stack.callback(bar.close)
        bar.total, bar.n = sum(map(len, jobs)), sum(len(job.journal.rows) for job in jobs)
        for job in jobs:
            job.finish(inputs)
        for job, indices, scores in rewards.scores(jobs):
            bar.update(job.add(indices, scores))
            job.finish(inputs)
        if bar.n < bar.total:
            raise UserError("scoring ended before all texts had a score; the same command continues from here")


def summary(every: Sequence[float], responses_each: int) -> str:
    """Mean and best-of-K reward of all rewards in file order, K (`responses_each`) per prompt."""
    prompts = len(every) // responses_each
    best = sum(max(every[i * responses_each : (i + 1) * responses_each]) for i in range(prompts))
    return (
        f"{prompts} prompts, {len(every)} responses: mean reward {sum(every) / len(every):.4f}, "
        f"best-of-K reward {best / prompts:.4f}"
    )


if __name__ == "__main__":
    run(main)
