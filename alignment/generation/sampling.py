"""From a sampler's row to requests, and from responses to a data file's instances. The rows: bandit/mixtures.py.

Here too what goes into a back end and what comes out, the same for vLLM and for transformers, and its choice.
"""

import argparse
import hashlib
import json
import math
import random
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from bandit.mixtures import WITHIN, Mixture, WeightPair, WeightPairs, get_mixture
from common.adapters import whole_model
from common.cli import Parser, UserError, fraction, positive_int
from common.models import context_length
from generation.prompts import Prompt


class Request(NamedTuple):
    """One response to sample.

    Attributes:
        key: names the request in the output; any string.
        prompt_ids: token ids of the prompt.
        weights: one per model, (w_policy, w_second[, w_third]), see bandit/mixtures.py.
        seed: of this request's own random stream; its response does not depend on what else is in the batch.
    """

    key: str
    prompt_ids: list[int]
    weights: tuple[float, ...]
    seed: int


class Response(NamedTuple):
    """A finished response.

    Attributes:
        key: of its request.
        token_ids: the sampled ids; where a stop token ended it, that is the last one.
        stop_reason: `stop` (a stop token was sampled) or `length` (max_new_tokens was reached).
    """

    key: str
    token_ids: list[int]
    stop_reason: str


class Sampling(NamedTuple):
    """What all requests of a call share: temperature (0 = greedy), longest response, ids that end one."""

    temperature: float
    max_new_tokens: int
    stop_token_ids: list[int]


class EngineDied(UserError):
    """The engine lost the process in which it ran; a fresh engine may go on."""


# ---- samplers: which weights a response is sampled with


def sampler_by_name(name: str) -> Mixture:
    """Return a row of the table, or the family's member `mix_A_B_P`. Raises `UserError` for an unknown name."""
    try:
        return get_mixture(name)
    except ValueError as error:
        raise UserError(f"{error}; or give --pairs") from None


def sampler_from_json(text: str) -> Mixture:
    """Return the row written as '[[p, [w, w], [w, w]], ...]'. Raises `UserError` if that is not a sampler.

    A third weight is that of the policy of the iteration before.
    """
    pairs = pairs_from_json(text)
    third = "previous" if len(pairs[0].first) == 3 else None
    return Mixture(lambda beta: pairs, "--pairs", choose=WITHIN if len(pairs) > 1 else "max_min", third_model=third)


def pairs_from_json(text: str) -> WeightPairs:
    """Return the pairs written as '[[p, [w, w], [w, w]], ...]'. Raises `UserError` if they are not a sampler's."""
    try:
        rows = tuple(
            WeightPair(float(p), *(tuple(map(float, side)) for side in (first, second)))
            for p, first, second in json.loads(text)
        )
    except (ValueError, TypeError):
        raise UserError(f"--pairs {text!r}: not of the form [[p, [w, w], [w, w]], ...]") from None
    lengths = {len(side) for row in rows for side in (row.first, row.second)}
    if len(lengths) > 1 or not lengths <= {2, 3}:
        raise UserError(f"--pairs {text!r}: needs two weights everywhere, or three everywhere")
    numbers = [value for row in rows for value in (row.probability, *row.first, *row.second)]
    if not rows or not all(math.isfinite(value) for value in numbers):
        raise UserError(f"--pairs {text!r}: needs at least one row, of finite numbers")
    if any(row.probability <= 0 for row in rows) or abs(sum(row.probability for row in rows) - 1) > 1e-6:
        raise UserError(f"--pairs {text!r}: the probabilities must be above 0 and sum to 1")
    return rows


def as_settings(pairs: Iterable[WeightPair]) -> list[list]:
    """Return the pairs as JSON: the form that `pairs_from_json` reads."""
    return [[row.probability, list(row.first), list(row.second)] for row in pairs]


def models_needed(pairs: WeightPairs) -> tuple[bool, ...]:
    """Return whether each model is needed. One is enough only if every response is from it alone."""
    sides = {side for row in pairs for side in (row.first, row.second)}
    count = len(pairs[0].first)
    if len(sides) == 1 and sorted(*sides) == [0] * (count - 1) + [1]:
        return tuple(weight == 1 for weight in sides.pop())
    return (True,) * count


def check_count(pairs: WeightPairs, count: int) -> None:
    """Raise `UserError` if K = `count` responses cannot be split evenly over the two sides of the pairs."""
    if count % 2 and any(row.first != row.second for row in pairs):
        raise UserError(f"--K {count}: must be even, since this sampler's pairs have two different sides")


class Assignment(NamedTuple):
    """Where one response comes from: index of the row of the sampler's pairs, and its weights."""

    row: int
    weights: tuple[float, ...]


def assign_rows(pairs: WeightPairs, count: int, seed: int) -> list[Assignment]:
    """Return the distributions of a prompt's K = `count` responses.

    Responses j and j + ceil(K/2) are one pair. Its row is drawn from the sampler's probabilities; the first half of
    the responses takes the first weights, the second half the second ones.
    """
    half = math.ceil(count / 2)
    rows = random.Random(seed).choices(range(len(pairs)), [row.probability for row in pairs], k=half)
    firsts = [Assignment(row, pairs[row].first) for row in rows]
    seconds = [Assignment(row, pairs[row].second) for row in rows]
    return (firsts + seconds)[:count]


# ---- the plan: which responses a data file needs


def stream_seed(*parts: int) -> int:
    """Return a seed, 0 ... 2^63 - 1, for the random stream named by `parts`: (seed, prompt index, response index).

    Hashing keeps the streams independent however the work is divided, which seed + index would not.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Plan(NamedTuple):
    """K = `count` responses for each of `prompts`.

    Attributes:
        prompts: a slice of the data set.
        start: number of the first of them in the whole, so that a prompt has the same seeds in every slice.
        pairs: the sampler's.
        count: responses per prompt.
        seed: of the run.
    """

    prompts: Sequence[Prompt]
    start: int
    pairs: WeightPairs
    count: int
    seed: int

    def assignments(self, index: int) -> list[Assignment]:
        """Return the distributions of the responses to prompt number `index`."""
        return assign_rows(self.pairs, self.count, stream_seed(self.seed, index))

    def prompt(self, key: str) -> Prompt:
        """Return the prompt of the request `key`."""
        return self.prompts[int(key.split(".")[0]) - self.start]

    def requests(self, done: Container[str]) -> Iterator[Request]:
        """Yield the requests whose responses are not in `done`, in the prompts' order."""
        for index, prompt in enumerate(self.prompts, self.start):
            for j, (_, weights) in enumerate(self.assignments(index)):
                if (key := f"{index}.{j}") not in done:
                    yield Request(key, list(prompt.token_ids), weights, stream_seed(self.seed, index, j))

    def instances(self, rows: Mapping[str, dict]) -> Iterator[dict]:
        """Yield the data file's instances, in the prompts' order, one at a time.

        Args:
            rows: request key → {"text", "ids", "stop_reason"}.
        """
        for index, prompt in enumerate(self.prompts, self.start):
            responses = [rows[f"{index}.{j}"] for j in range(self.count)]
            yield {
                "prompt": prompt.text,
                "raw_prompt" if isinstance(prompt.raw, str) else "messages": prompt.raw,
                "responses": [response["text"] for response in responses],
                "response_ids": [response["ids"] for response in responses],
                "pairs": [assignment.row for assignment in self.assignments(index)],
                "stop_reasons": [response["stop_reason"] for response in responses],
                "num_tokens": [len(response["ids"]) for response in responses],
                **({"fields": prompt.fields} if prompt.fields else {}),
            }


# ---- back ends: what samples


def add_engine_flags(p: Parser) -> None:
    """Add the flags that say what samples, and how much."""
    p.add("--max_new_tokens", "longest response, tokens", type=positive_int, default=128)
    p.add("--backend", "what samples", choices=["vllm", "hf"], default="vllm")
    p.add(
        "--dtype",
        "of the models that sample (default: bfloat16 on a GPU for weights stored in 16 bits, else float32)",
        choices=["float32", "bfloat16"],
    )
    p.add("--max_num_seqs", "responses sampled at a time", type=positive_int, default=64)
    p.add("--tensor_parallel_size", "GPUs that share a model (vllm)", type=positive_int, default=1)
    p.add("--gpu_memory_utilization", "share of GPU memory for the engine (vllm)", type=fraction, default=0.9)
    p.add(
        "--compile",
        "what vLLM compiles at each start: nothing, CUDA graphs (seconds), or all of the model (minutes)",
        choices=["eager", "cudagraphs", "inductor"],
        default="eager",
    )
    p.add("--trust_remote_code", "run code that comes with a model", action="store_true")


def check_temperature(backend: str, temperature: float, name: str = "--temperature") -> None:
    """Raise `UserError` for temperatures that vLLM would change or refuse; `name` is what the user wrote."""
    low, high = 0.01, 2
    if backend == "vllm" and (0 < temperature < low or temperature > high):
        raise UserError(
            f"{name} {temperature:g}: vLLM samples at 0 (greedy) and from {low} to {high} only, hf at any"
        )


def longest_prompt(args: argparse.Namespace, models: dict[str, tuple]) -> int:
    """Return how many tokens a prompt may have, so that the longest response fits behind it; says what limits it.

    Args:
        models: what a model is and its name → (configuration, tokenizer).

    Raises:
        UserError: no prompt fits.
    """
    longest = args.max_input_length
    for what, (config, tokenizer) in models.items():
        room = context_length(config, tokenizer)
        if room is None or longest + args.max_new_tokens <= room:
            continue
        longest = room - args.max_new_tokens
        if longest < 1:
            raise UserError(
                f"--max_new_tokens {args.max_new_tokens}: no room for a prompt in the {room} tokens of {what}"
            )
        print(
            f"prompts of more than {longest} tokens are left out: {what} reads {room}, --max_new_tokens of them new"
        )
    return longest


def load_generator(args: argparse.Namespace, models: Sequence[str | None], longest: int):
    """Return the back end of the command line, with its models loaded, in this process.

    Args:
        args: flags of the script.
        models: folders or names, in the order of the weights; None for one that no request needs.
        longest: prompt, in tokens.
    """
    trust = args.trust_remote_code
    policy, second, *others = (name and whole_model(name, "model", trust) for name in models)
    shared = {"dtype": args.dtype, "max_num_seqs": args.max_num_seqs, "trust_remote_code": trust, "others": others}
    if args.backend == "hf":
        from generation.backend_hf import HFGenerator

        return HFGenerator(policy, second, **shared)
    from generation.backend_vllm import VLLMGenerator

    return VLLMGenerator(
        policy,
        second,
        max_length=longest + args.max_new_tokens,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        compile=args.compile,
        **shared,
    )


class Engines:
    """The back ends of command lines in turn: an engine that differs in nothing but its first model is kept.

    Args:
        start: makes a back end, called as `load_generator` is.
    """

    def __init__(self, start=load_generator) -> None:
        self.start, self.last, self.kind = start, None, None

    def load(self, args: argparse.Namespace, models: Sequence[str | None], longest: int):
        """Return the back end for these models; the one that was returned before is of no more use."""
        first, *others = filter(None, models)
        flags = ("backend", "dtype", "max_num_seqs", "tensor_parallel_size", "gpu_memory_utilization", "compile")
        flags += ("trust_remote_code", "num_engines")
        kind = [others, longest + args.max_new_tokens, *(getattr(args, name, None) for name in flags)]
        if kind != self.kind or not self._exchange(first):
            self.close()
            self.last, self.kind = self.start(args, models, longest), kind
        return self.last

    def close(self) -> None:
        """End the engine that was kept, if there is one."""
        if self.last is not None:
            self.last.close()
        self.last = self.kind = None

    def _exchange(self, first: str) -> bool:
        """Return whether the engine could take the weights of another first model, and now has them."""
        if not hasattr(self.last, "reload_weights"):
            return False
        try:
            self.last.reload_weights(first)
        except UserError:
            return False
        print(f"the engine that runs takes the weights of {first}")
        return True
