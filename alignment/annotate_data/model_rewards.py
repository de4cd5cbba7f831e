"""The rewards of a sequence-classification model, for get_rewards.py: texts, token file, batches, engines."""

import array
import functools
import itertools
from collections.abc import Iterator, Sequence

from annotate_data.texts import check_template, instance_texts
from common import scale_out
from common.models import choose_dtype, weights_of
from common.provenance import model_inputs
from common.spool import Spool


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
            "reward_weights": weights_of({"reward model": self.name}),
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
            self.tokens[job.output] = tokens = TokenFile(job.output)
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
        from annotate_data.scorer import RewardScorer, ScoringEngine

        work = self._work(jobs)
        first = next(work, None)
        if first is None:
            return
        work = itertools.chain([first], work)
        options = {"column": self.args.reward_column, "dtype": self.settings["dtype"], **self.reading}
        if self.args.num_engines == 1:
            scorer = RewardScorer(self.name, say=note, **options)
            for job, indices in work:
                yield job, indices, scorer.score_rows(self.tokens[job.output].rows(indices))
            return
        make_engine = functools.partial(ScoringEngine, self.name, **options)
        engines, every = scale_out.start(self.args.num_engines), list(work)
        batches = [self.tokens[job.output].rows(indices) for job, indices in every]
        for number, (scores, notes) in scale_out.answers(make_engine, batches, engines):
            for text in notes:
                note(text)
            yield *every[number], scores

    def _work(self, jobs: list) -> Iterator[tuple]:
        """Yields (job, indices of texts) per batch that has a text without a score."""
        from annotate_data.scorer import length_batches

        for job in jobs:
            lengths = self.tokens[job.output].lengths()
            for indices in length_batches(lengths, self.encoder.token_budget, job.scored):
                yield job, indices

    def text(self, job, i: int) -> str:
        """What a message about the score of text `i` shows."""
        return self.encoder.tokenizer.decode(self.tokens[job.output].rows([i])[0], skip_special_tokens=True)


class TokenFile(Spool):
    """Token ids of many texts, 4 bytes each."""

    def append(self, ids: list[int]) -> None:
        """Add a text."""
        super().append(array.array("i", ids).tobytes())

    def lengths(self) -> array.array:
        """Return the tokens of each text."""
        return array.array("i", (size // 4 for size in self.sizes()))

    def rows(self, indices: Sequence[int]) -> list[array.array]:
        """Return the token ids of some texts."""
        return [array.array("i", self.read(i)) for i in indices]


def note(text: str) -> None:
    """Prints below the bar."""
    print(f"\n{text}", flush=True)
