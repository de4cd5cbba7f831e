"""The mixture model: causal language models side by side, each with its own layers in the paged KV cache."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import has_inner_state, supports_multimodal
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.config import get_config
from vllm.utils.platform_utils import is_pin_memory_available

from vllm_logit_mixture.check import check_options
from vllm_logit_mixture.weights import batch_weights, mix, other_models

OTHER = "mixture."  # prefix of the other models' weights, before their number


@support_torch_compile
class Models(nn.Module):
    """All models in one module, so that torch.compile and CUDA graphs see one forward pass."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        trust = vllm_config.model_config.trust_remote_code
        own = copy.deepcopy(vllm_config.model_config.hf_config)
        own.architectures = own.mixture_own_architectures
        configs = [own, *(get_config(name, trust_remote_code=trust) for name in other_models(vllm_config))]
        self.widths = [config.get_text_config().hidden_size for config in configs]
        self.vocabularies = [config.get_text_config().vocab_size for config in configs]
        # vLLM reads a layer's number from its name, so the models' own numbers must not stand alone.
        self.each = nn.ModuleList(
            init_vllm_registered_model(vllm_config, hf_config=config, prefix=maybe_prefix(prefix, f"model{i}"))
            for i, config in enumerate(configs)
        )
        self._compile_only_as_a_whole()

    def _compile_only_as_a_whole(self) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "do_not_compile"):
                module.do_not_compile = True

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states of all models, concatenated: [tokens, sum of the models' widths]."""
        return torch.cat([model(input_ids, positions) for model in self.each], dim=-1)


class LogitMixtureForCausalLM(nn.Module):
    """Weighted sums of the models' logits, with the weights of each request.

    The first model is the engine's `model`; the folders of the others are `mixture_models` in its configuration.
    Where nothing is compiled or captured, a model that no request of the batch weighs is not computed.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        _check(vllm_config)
        self.models = Models(vllm_config=vllm_config, prefix=prefix)
        for name, model in zip(_names(vllm_config), self.models.each, strict=True):
            if has_inner_state(model) or supports_multimodal(model):
                raise ValueError(f"{name}: the logit mixture holds attention models of text only")
        self.weights = batch_weights(vllm_config, vllm_config.device_config.device, is_pin_memory_available())
        self.may_leave_out = _may_leave_out(vllm_config)
        self.computed = list(range(len(self.models.each)))  # in the last forward pass
        self.secondary_weights = [
            DefaultModelLoader.Source(name, revision=None, prefix=f"{OTHER}{i}.", fall_back_to_pt=False)
            for i, name in enumerate(other_models(vllm_config), 1)
        ]

    @classmethod
    def get_model_state_cls(cls) -> type:
        """Return what vLLM's second model runner asks a model for."""
        from vllm_logit_mixture.runner_v2 import MixtureState

        return MixtureState

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.models.each[0].embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the last hidden states, concatenated, of the models that were computed."""
        if not self.may_leave_out or len(self.weights.weighed) == len(self.models.each):
            self.computed = list(range(len(self.models.each)))
            return self.models(input_ids, positions)
        self.computed = list(self.weights.weighed)
        hidden = [self.models.each[i](input_ids, positions) for i in self.computed]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=-1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the mixed logits, float32 [rows, vocabulary]; None on tensor-parallel ranks that do not sample.

        `hidden_states` has one row per request of the batch, in the order of `BatchWeights.of_rows`.
        """
        rows = self.weights.of_rows(len(hidden_states))
        weights, logits = rows[:, self.computed], []
        parts = hidden_states.split([self.models.widths[i] for i in self.computed], dim=-1)
        for column, (i, part) in enumerate(zip(self.computed, parts, strict=True)):
            # Of a request that does not weigh it the model has not seen all tokens: nothing of that may come through.
            part = part.masked_fill(weights[:, column, None] == 0, 0)
            logits.append(self.models.each[i].compute_logits(part))
        if logits[0] is None:
            return None
        mixed = mix(self._of_one_width(logits), weights, None if self.weights.plain else rows[:, -1])
        own = self.models.vocabularies[0]
        # Ids that not every model knows belong to no token.
        return nn.functional.pad(mixed, (0, own - mixed.shape[-1]), value=-torch.inf)

    def _of_one_width(self, logits: list[torch.Tensor]) -> list[torch.Tensor]:
        narrowest = min(self.models.vocabularies)
        return [one[:, :narrowest] for one in logits]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take the first model's weights under their own names, the others' with `mixture.` and their number."""
        renamed = (
            (f"models.each.{name.removeprefix(OTHER) if name.startswith(OTHER) else f'0.{name}'}", tensor)
            for name, tensor in weights
        )
        return AutoWeightsLoader(self).load_weights(renamed)


def _names(vllm_config: VllmConfig) -> list[str]:
    return [vllm_config.model_config.model, *other_models(vllm_config)]


def _check(vllm_config: VllmConfig) -> None:
    """Raise `ValueError` for an engine that cannot mix."""
    model = vllm_config.model_config
    check_options(
        {
            "pipeline_parallel_size": vllm_config.parallel_config.pipeline_parallel_size,
            "speculative_config": vllm_config.speculative_config,
            "enable_lora": vllm_config.lora_config is not None,
            "quantization": model.quantization,
            "kv_transfer_config": vllm_config.kv_transfer_config,
            "enable_prompt_embeds": model.enable_prompt_embeds,
        }
    )
    for name in other_models(vllm_config):
        config = get_config(name, trust_remote_code=model.trust_remote_code).get_text_config()
        room = getattr(config, "max_position_embeddings", None)
        if room is not None and room < model.max_model_len:
            raise ValueError(f"{name}: reads {room} tokens, max_model_len is {model.max_model_len}")


def _may_leave_out(vllm_config: VllmConfig) -> bool:
    """Whether a step may compute fewer models: nothing is captured, and no other replica computes in step."""
    compilation = vllm_config.compilation_config
    return (
        compilation.mode in (None, CompilationMode.NONE)
        and compilation.cudagraph_mode in (None, CUDAGraphMode.NONE)
        and vllm_config.parallel_config.data_parallel_size == 1
    )
