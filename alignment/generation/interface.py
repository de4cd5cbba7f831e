"""What goes into a generation back end and what comes out, the same for vLLM and for transformers."""

import hashlib
from typing import NamedTuple

from common.cli import UserError


class Request(NamedTuple):
    """One response to sample.

    Attributes:
        key: names the request in the output; any string.
        prompt_ids: token ids of the prompt.
        weights: (w_policy, w_reference), see `samplers`.
        seed: of this request's own random stream; its response does not depend on what else is in the batch.
    """

    key: str
    prompt_ids: list[int]
    weights: tuple[float, float]
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


class EngineDied(UserError):
    """The engine lost the process in which it ran; a fresh engine may go on."""


class Sampling(NamedTuple):
    """What all requests of a call share: temperature (0 = greedy), longest response, ids that end one."""

    temperature: float
    max_new_tokens: int
    stop_token_ids: list[int]


def stream_seed(*parts: int) -> int:
    """A seed for the random stream named by `parts`, e.g. (seed, prompt index, response index); 0 ... 2^63 - 1.

    Hashing keeps the streams independent however the work is divided, which seed + index would not.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
