"""The logits processor by which vLLM checks every request and tells of changes in its batch.

It leaves the logits alone, since the model mixes them: penalties, biases and grammars come after that.
"""

import functools

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from vllm_logit_mixture.weights import BatchWeights, batch_weights, mixture_of


def follow(weights: BatchWeights, update: BatchUpdate) -> None:
    """Follow the first runner's changes to its batch, in the order that vLLM documents: removed, added, moved."""
    rows = weights.rows
    for slot, params, _, _ in update.added:  # a slot without a request needs no row
        weights.put(slot, mixture_of(params.extra_args, weights.models))
    for source, target, direction in update.moved:
        if direction == MoveDirectionality.SWAP:
            rows[[source, target]] = rows[[target, source]]
        else:
            rows[target] = rows[source]
    weights.settle(slice(update.batch_size))


class MixtureWeights(LogitsProcessor, LogitsProcessorV2):
    """Of both runners' kinds, so that either accepts it; the second one's changes come through `runner_v2`."""

    models: int

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        mixture_of(sampling_params.extra_args, cls.models)
        if sampling_params.prompt_logprobs is not None or sampling_params.prompt_logprob_token_ids is not None:
            raise ValueError("prompt_logprobs: the logit mixture has none (its weights belong to batch slots)")

    def __init__(self, vllm_config: VllmConfig, device: object, is_pin_memory: bool | None = None) -> None:
        # The second runner gives its request state in the place of a device, and nothing else.
        is_first = is_pin_memory is not None
        self.weights = batch_weights(vllm_config, device, is_pin_memory) if is_first else None

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is not None:
            follow(self.weights, batch_update)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False

    def apply(self, logits: torch.Tensor, ctx: object = None) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True


@functools.cache
def __getattr__(name: str) -> type[MixtureWeights]:
    """`MixtureOf3` is the class for three models: vLLM names a processor by module and class, and by nothing else."""
    count = name.removeprefix("MixtureOf")
    if count == name or not count.isdigit():
        raise AttributeError(name)
    return type(name, (MixtureWeights,), {"models": int(count), "__module__": __name__})
