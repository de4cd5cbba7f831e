"""What a request asks for, the rows that keep it for every batch slot, and the sum itself."""

import math
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import torch

KEY, KIND = "mixture", "mixture_of"
LOGITS, LOG_PROBABILITIES, PROBABILITIES = KINDS = ("logits", "log_probabilities", "probabilities")
LARGEST = 1e6  # of a weight: products with logits stay finite in float32


class Mixture(NamedTuple):
    """A request's weights, one per model, and what they weigh."""

    weights: tuple[float, ...]
    kind: str = LOGITS

    @property
    def weighed(self) -> tuple[int, ...]:
        """The models that this request needs; a request that weighs none still needs one to run."""
        return tuple(i for i, weight in enumerate(self.weights) if weight) or (0,)


def mixture_of(extra_args: Mapping | None, models: int) -> Mixture:
    """Return what a request with these extra arguments asks for; without any it is the first model alone.

    Raises:
        ValueError: the weights are not `models` numbers, or do not suit what they weigh.
    """
    extra = extra_args or {}
    weights, kind = extra.get(KEY), extra.get(KIND, LOGITS)
    if kind not in KINDS:
        raise ValueError(f"{KIND}: must be one of {', '.join(KINDS)}, not {kind!r}")
    if weights is None and KEY not in extra:
        return Mixture((1.0,) + (0.0,) * (models - 1), kind)
    if not isinstance(weights, list | tuple) or len(weights) != models or not all(map(_is_weight, weights)):
        raise ValueError(
            f"{KEY}: must be a list of {models} finite numbers, one per model, none above {LARGEST:g}: {weights!r}"
        )
    if kind == PROBABILITIES and (min(weights) < 0 or not any(weights)):
        raise ValueError(f"{KEY}: weights of probabilities must not be negative, nor all 0: {weights!r}")
    return Mixture(tuple(map(float, weights)), kind)


def _is_weight(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) <= LARGEST


def mix(logits: list[torch.Tensor], weights: torch.Tensor, kinds: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mixtures' logits, float32 [rows, vocabulary]; softmax of them is the mixture's distribution.

    Args:
        logits: of each model, [rows, vocabulary].
        weights: [rows, models].
        kinds: [rows], indices into `KINDS`; None if every row mixes logits, which spares the normalisations.
    """
    logits = [one.float() for one in logits]
    columns = weights[:, :, None].unbind(1)
    total = sum(weight * one for weight, one in zip(columns, logits, strict=True))
    if kinds is None:
        return total
    normalizers = [one.logsumexp(-1, keepdim=True) for one in logits]
    # Products of experts: a constant per row away from the logits' sum, so the same distribution.
    log_probabilities = total - sum(w * z for w, z in zip(columns, normalizers, strict=True))
    # log of sum_i w_i p_i, one model after the other, so that no [rows, models, vocabulary] is held.
    probabilities = torch.full_like(total, -math.inf)
    for weight, one, normalizer in zip(columns, logits, normalizers, strict=True):
        # The other rows' weights may be negative; their result is not used.
        probabilities = torch.logaddexp(probabilities, weight.clamp(min=0).log() + one - normalizer)
    kinds = kinds[:, None]
    total = torch.where(kinds == KINDS.index(LOG_PROBABILITIES), log_probabilities, total)
    return torch.where(kinds == KINDS.index(PROBABILITIES), probabilities, total)


class BatchWeights:
    """The weights of every batch slot, on the host and on the device.

    Attributes:
        rows: [slots, models + 1] float32 on the host: the weights, then the index of the kind.
        on_device: the same where the logits are.
        order: batch row → slot, where the runner reorders rows (the second one); None where row i is slot i.
        weighed: the models that the batch needs; all of them until there is a first batch, for the engine's profile.
        plain: whether the whole batch mixes logits.
    """

    def __init__(self, slots: int, models: int, device: torch.device, pinned: bool = False) -> None:
        self.models, self.pinned = models, pinned
        self.rows = torch.zeros(slots, models + 1)
        self.rows[:, 0] = 1
        self.on_device = self.rows.to(device, copy=True)
        self.order: torch.Tensor | None = None
        self.weighed, self.plain = list(range(models)), True

    def put(self, slot: int, mixture: Mixture) -> None:
        """Give a slot its request's weights."""
        self.rows[slot] = torch.tensor([*mixture.weights, KINDS.index(mixture.kind)])

    def settle(self, batch: torch.Tensor | slice) -> None:
        """Take the batch as it now is, and send the rows to the device.

        Args:
            batch: the slots in use; the others keep rows of requests that are gone.
        """
        used = self.rows[batch]
        self.weighed = (used[:, :-1] != 0).any(0).nonzero().flatten().tolist() or [0]
        self.plain = not used[:, -1].any()
        # A fresh pinned copy: the next change must not reach a transfer that is still under way. Torch keeps the
        # copy's memory until the stream has read it, and nothing waits.
        self.on_device.copy_(self.rows.pin_memory() if self.pinned else self.rows, non_blocking=self.pinned)

    def of_rows(self, count: int) -> torch.Tensor:
        """Return the weights of the first `count` rows of logits, [count, models + 1]."""
        return self.on_device[:count] if self.order is None else self.on_device[self.order[:count]]


_of_engine: dict[int, BatchWeights] = {}  # by the id of the engine's configuration, for as long as that lives


def batch_weights(vllm_config, device: torch.device | str, pinned: bool = False) -> BatchWeights:
    """Return the engine's one `BatchWeights`: the runner's part writes it, the model's `compute_logits` reads it.

    Both are made by vLLM and know each other only through the configuration object that they were made from.
    """
    key = id(vllm_config)
    if key not in _of_engine:
        slots, models = vllm_config.scheduler_config.max_num_seqs, 1 + len(other_models(vllm_config))
        _of_engine[key] = BatchWeights(slots, models, torch.device(device), pinned)
        weakref.finalize(vllm_config, _of_engine.pop, key)
    return _of_engine[key]


def other_models(vllm_config) -> list[str]:
    """Return the folders of the engine's models but for the first, which is the engine's own."""
    return vllm_config.model_config.hf_config.mixture_models
