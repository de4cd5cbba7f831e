"""Blocks of the prefix cache that only some of the models have written are not given to requests that need others.

vLLM finds a block by its tokens. The engine leaves out models that no running request weighs, so the same tokens may
have a block with one model's keys and values and without another's. vLLM's own salt keeps such requests apart.
"""

import functools

from vllm_logit_mixture.weights import KEY, Mixture


def salted(salt: str | None, extra_args: dict | None) -> str | None:
    """Return the salt of a request: its own, and the models that it weighs, if they are not the first alone."""
    weights = (extra_args or {}).get(KEY)
    weighed = Mixture(tuple(weights)).weighed if weights else (0,)
    if weighed == (0,):
        return salt
    return f"{salt or ''}|mixture of {','.join(map(str, weighed))}"


def salt_requests() -> None:
    """Let vLLM's engine salt every request as it arrives, whatever front end it comes from."""
    from vllm.v1.request import Request

    original = Request.from_engine_core_request
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original.__func__)
    def from_engine_core_request(cls, request, *args, **options):
        if request.sampling_params is not None:
            request.cache_salt = salted(request.cache_salt, request.sampling_params.extra_args)
        return original.__func__(cls, request, *args, **options)

    Request.from_engine_core_request = classmethod(from_engine_core_request)
