"""Rewards that are not a model: a Python function of the user's own, `FILE.py:NAME`.

    def NAME(prompt: str, responses: list[str], fields: dict) -> list[float]:
        '''Return one number per response.

        prompt: the instance's `prompt`, with the policy's template if generation applied one.
        responses: its K responses.
        fields: what else the instance holds, such as `raw_prompt`, `messages`, `response_ids`; and the prompts' data
            set, such as an `answer` to compare with (generate.py --keep_fields), but for names in OF_AN_INSTANCE.
        '''

It is called once per instance, in file order; True and False count as 1 and 0. Nothing here imports torch.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from common.cli import UserError, first_line
from common.provenance import data_inputs
from common.records import sha256

# What generation and annotation say of an instance; a data set's own field of such a name is another thing.
OF_AN_INSTANCE = {"prompt", "raw_prompt", "messages", "responses", "rewards", "fields"} | {
    *("response_ids", "pairs", "stop_reasons", "num_tokens")
}


class FunctionRewards:
    """The rewards of a function that stands in a Python file.

    Args:
        name: `FILE.py:NAME`.

    Attributes:
        settings: what decides the scores: the function's name and what its file holds, wherever it lies.
    """

    unit = "response"

    def __init__(self, name: str) -> None:
        file, _, self.function_name = name.rpartition(":")
        if not file.endswith(".py") or not self.function_name.isidentifier():
            raise UserError(f"--reward_function {name!r}: not of the form FILE.py:NAME")
        self.file = Path(file)
        self.name = f"{self.file.name}:{self.function_name}"
        self.settings = {"reward_function": self.name, "reward_function_sha256": sha256(file)}

    def inputs(self) -> list[dict]:
        """What the result's provenance says of the function."""
        return [{**entry, "what": "reward function"} for entry in data_inputs([str(self.file)])]

    def prepare(self, jobs: list) -> None:
        """Loads the function. Raises `UserError` if the file does not run or has no such function."""
        sys.path.insert(0, str(self.file.resolve().parent))  # as for a script: it may import its neighbours
        spec = importlib.util.spec_from_file_location("reward_function_of_the_user", self.file)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(f"{self.file}: cannot be loaded ({self._reason(error)})") from None
        self.function: Callable = getattr(module, self.function_name, None)
        if not callable(self.function):
            raise UserError(f"{self.file}: has no function {self.function_name!r}")

    def scores(self, jobs: list) -> Iterator[tuple]:
        """Yields (job, indices of an instance's responses, their scores) where a score is missing."""
        for job in jobs:
            for row, instance in enumerate(job.records):
                indices = job.indices_of(row)
                if not job.scored.issuperset(indices):
                    yield job, indices, self._call(instance, f"{job.source}: row {row}")

    def text(self, job, i: int) -> str:
        """What a message about the score of text `i` shows."""
        row, k = job.place(i)
        return next(instance for n, instance in enumerate(job.records) if n == row)["responses"][k]

    def _call(self, instance: dict, where: str) -> list[float]:
        fields = {key: value for key, value in instance.items() if key not in ("prompt", "responses")}
        if isinstance(kept := fields.get("fields"), dict):
            del fields["fields"]
            fields = {key: value for key, value in kept.items() if key not in OF_AN_INSTANCE} | fields
        try:
            found = self.function(instance["prompt"], list(instance["responses"]), fields)
        except (Exception, SystemExit) as error:
            raise UserError(f"{where}: {self.name} failed ({self._reason(error)})") from None
        try:
            numbers = [] if isinstance(found, (str, bytes, dict)) else [_number(value) for value in found]
        except (TypeError, ValueError, OverflowError):
            numbers = []
        if len(numbers) != len(instance["responses"]):
            raise UserError(
                f"{where}: {self.name} returned {str(found)[:60]!r}, not one number per response "
                f"({len(instance['responses'])})"
            )
        return numbers

    def _reason(self, error: BaseException) -> str:
        """Kind and words of an error, and the last line of the user's file that it went through."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == self.file.resolve()]
        kind = type(error).__name__
        words = kind if first_line(error) == kind else f"{kind}: {first_line(error)}"
        return f"{words}; line {lines[-1]}" if lines else words


def _number(value: object) -> float:
    """The value as a float; numbers of numpy and torch count, text does not."""
    if isinstance(value, (str, bytes)):
        raise TypeError
    return float(value)
