"""The rewards of a sequence-classification model, for get_rewards.py: texts, token file, batches, engines."""

import array
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from annotate_data.texts import check_template, instance_texts
from common import scale_out
from common.models import choose_dtype
from common.provenance import model_inputs
from common.records import writing


class ModelRewards:
    """The rewards of the model that the command line names.

    Attributes:
        settings: what decides the scores; the token budget does not.
    """

    unit = "text"

    def __init__(self, args) -> None:
        self.args, self.name = args, args.reward_name_or_path
        self.settings = {
            "reward_name_or_path": self.name,
            "reward_template": args.reward_template,
            "reward_column": args.reward_column,
            "max_length": args.max_length,
            "dtype": choose_dtype(args, [self.name], "scoring", "reward model"),
        }
        self.reading = {
            "max_length": args.max_length,
            "token_budget": args.token_budget,
            "trust_remote_code": args.trust_remote_code,
        }

    def inputs(self) -> list[dict]:
        """What the result's provenance says of the model."""
        return model_inputs({"reward model": self.name})

    def prepare(self, jobs: list) -> None:
        """Encodes the texts of all files, so that what is wrong with one is found before the model loads."""
        from annotate_data.scorer import TextBatches

        self.encoder = TextBatches(self.name, **self.reading)
        check_template(self.args.reward_template, self.encoder.tokenizer, self.name)
        self.tokens = {}
        for job in jobs:
            before = self.encoder.cut
            self.tokens[job.output] = tokens = TokenFile(_folder_of(job.output))
            for ids in self.encoder.encode_all(self._texts(job)):
                tokens.append(ids)
            cut = self.encoder.cut - before
            job.note = f"; {cut} texts were cut to {self.encoder.max_length} tokens" if cut else ""

    def _texts(self, job) -> Iterator[tuple[str, str]]:
        """Yields what the model reads of each response, and the response."""
        policy_template = (job.records.settings.get("generate") or {}).get("template")
        for row, instance in enumerate(job.records):
            where = f"{job.source}: row {row}"
            texts = instance_texts(
                instance, self.args.reward_template, self.encoder.tokenizer, where, policy_template
            )
            yield from zip(texts, instance["responses"], strict=True)

    def scores(self, jobs: list) -> Iterator[tuple]:
        """Yields (job, indices of texts, their scores) as batches are done, by one engine or several."""
        work = [(job, indices) for job in jobs for indices in self._batches(job)]
        if not work:
            return
        batches = (self.tokens[job.output].rows(indices) for job, indices in work)
        for number, scores in self._batch_scores(batches):
            yield *work[number], scores

    def _batches(self, job) -> Iterator[Sequence[int]]:
        from annotate_data.scorer import length_batches

        return length_batches(self.tokens[job.output].lengths(), self.encoder.token_budget, job.scored)

    def _batch_scores(self, batches: Iterator[list[Sequence[int]]]) -> Iterator[tuple[int, list[float]]]:
        from annotate_data.scorer import RewardScorer, ScoringEngine

        options = {"column": self.args.reward_column, "dtype": self.settings["dtype"], **self.reading}
        if self.args.num_engines == 1:
            scorer = RewardScorer(self.name, say=note, **options)
            yield from enumerate(map(scorer.score_rows, batches))
            return
        make_engine = functools.partial(ScoringEngine, self.name, **options)
        engines = scale_out.start(self.args.num_engines)
        for number, (scores, notes) in scale_out.answers(make_engine, list(batches), engines):
            for text in notes:
                note(text)
            yield number, scores

    def text(self, job, i: int) -> str:
        """What a message about the score of text `i` shows."""
        return self.encoder.tokenizer.decode(self.tokens[job.output].rows([i])[0], skip_special_tokens=True)


class TokenFile:
    """Token ids of many texts, in a file without a name; memory holds 8 bytes per text.

    Args:
        folder: where the file goes; 4 bytes per token.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with writing(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (gone with the process)
        self._ends = array.array("q", [0])

    def append(self, ids: list[int]) -> None:
        """Adds a text."""
        with writing(self._folder):
            self._file.write(array.array("i", ids).tobytes())
        self._ends.append(self._ends[-1] + len(ids))

    def lengths(self) -> list[int]:
        """Tokens of each text."""
        with writing(self._folder):
            self._file.flush()
        return [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]

    def rows(self, indices: Sequence[int]) -> list[array.array]:
        """Token ids of some texts, 4 bytes each."""
        found = []
        for i in indices:
            start, end = 4 * self._ends[i], 4 * self._ends[i + 1]
            found.append(array.array("i", os.pread(self._file.fileno(), end - start, start)))
        return found


def _folder_of(output: str) -> Path:
    """The output's folder, or the nearest above it that is there."""
    return next(folder for folder in Path(output).resolve().parents if folder.is_dir())


def note(text: str) -> None:
    """Prints below the bar."""
    print(f"\n{text}", flush=True)
