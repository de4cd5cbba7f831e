"""The mixture weights of every request in the batch, kept in step with vLLM's batch slots."""

import math
import weakref

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

KEY = "mixture"
_of_engine: dict[int, "BatchWeights"] = {}  # by the id of the engine's configuration, for as long as that lives


class BatchWeights:
    """One row (w_policy, w_reference) a batch slot, float32 [slots, 2]; a free slot has the policy alone."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.rows = torch.tensor([1.0, 0.0]).repeat(slots, 1)
        self.on_device = self.rows.to(device, copy=True)

    def update(self, update: BatchUpdate) -> None:
        """Follows vLLM's changes to its batch, in the order that it documents: removed, added, moved."""
        rows = self.rows
        for slot in update.removed:
            rows[slot] = torch.tensor([1.0, 0.0])
        for slot, params, _, _ in update.added:
            rows[slot] = torch.tensor(mixture_of(params))
        for source, target, direction in update.moved:
            if direction == MoveDirectionality.SWAP:
                rows[[source, target]] = rows[[target, source]]
            else:
                rows[target] = rows[source]
        self.on_device.copy_(rows)


def mixture_of(params: SamplingParams) -> tuple[float, float]:
    """(w_policy, w_reference) of a request. Raises `ValueError` unless it has two finite weights."""
    weights = (params.extra_args or {}).get(KEY)
    try:
        policy, reference = (float(weight) for weight in weights)
    except (TypeError, ValueError):
        policy = reference = math.nan
    if not (math.isfinite(policy) and math.isfinite(reference)):
        raise ValueError(f"SamplingParams.extra_args[{KEY!r}] must be [w_policy, w_reference], not {weights!r}")
    return policy, reference


def batch_weights(vllm_config: VllmConfig, device: torch.device | str) -> BatchWeights:
    """The engine's one `BatchWeights`: the processor below writes it, the model's `compute_logits` reads it.

    Both are made by vLLM and know each other only through the configuration object that they were made from.
    """
    key = id(vllm_config)
    if key not in _of_engine:
        _of_engine[key] = BatchWeights(vllm_config.scheduler_config.max_num_seqs, torch.device(device))
        weakref.finalize(vllm_config, _of_engine.pop, key)
    return _of_engine[key]


class MixtureWeights(LogitsProcessor):
    """Carries the weights from requests to the model; it leaves the logits alone, since the model mixes them."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        mixture_of(sampling_params)
        if sampling_params.prompt_logprobs is not None:
            raise ValueError(
                "prompt_logprobs: not supported by the logit mixture (its weights belong to batch slots)"
            )

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.weights = batch_weights(vllm_config, device)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is not None:
            self.weights.update(batch_update)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True
