"""Which responses a data file needs, and how finished ones become its instances. Pure: no models, no files."""

from collections.abc import Container, Iterator, Mapping
from typing import NamedTuple

from bandit.mixtures import WeightPairs
from generation.interface import Request, stream_seed
from generation.prompts import Prompt
from generation.samplers import Assignment, assign_rows


class Plan(NamedTuple):
    """K = `count` responses for each of `prompts`.

    Attributes:
        prompts: a slice of the data set.
        start: number of the first of them in the whole, so that a prompt has the same seeds in every slice.
        pairs: the sampler's.
        count: responses a prompt.
        seed: of the run.
    """

    prompts: list[Prompt]
    start: int
    pairs: WeightPairs
    count: int
    seed: int

    def assignments(self, index: int) -> list[Assignment]:
        """The distributions of the responses to prompt number `index`."""
        return assign_rows(self.pairs, self.count, stream_seed(self.seed, index))


def requests(plan: Plan, done: Container[str]) -> Iterator[Request]:
    """The requests whose responses are not in `done`, in the prompts' order."""
    for index, prompt in enumerate(plan.prompts, plan.start):
        for j, (_, weights) in enumerate(plan.assignments(index)):
            if (key := f"{index}.{j}") not in done:
                yield Request(key, prompt.token_ids, weights, stream_seed(plan.seed, index, j))


def instances(plan: Plan, rows: Mapping[str, dict]) -> Iterator[dict]:
    """The data file's instances, in the prompts' order, one at a time.

    Args:
        rows: request key → {"text", "ids", "stop_reason"}.
    """
    for index, prompt in enumerate(plan.prompts, plan.start):
        responses = [rows[f"{index}.{j}"] for j in range(plan.count)]
        yield _instance(prompt, plan.assignments(index), responses)


def _instance(prompt: Prompt, assignments: list[Assignment], responses: list[dict]) -> dict:
    return {
        "prompt": prompt.text,
        "raw_prompt" if isinstance(prompt.raw, str) else "messages": prompt.raw,
        "responses": [response["text"] for response in responses],
        "response_ids": [response["ids"] for response in responses],
        "pairs": [assignment.row for assignment in assignments],
        "stop_reasons": [response["stop_reason"] for response in responses],
        "num_tokens": [len(response["ids"]) for response in responses],
    }
