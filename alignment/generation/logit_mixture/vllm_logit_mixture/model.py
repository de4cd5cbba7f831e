"""The mixture model: two causal language models side by side, each with its own layers in the paged KV cache."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.config import get_config

from vllm_logit_mixture.weights import batch_weights

REFERENCE = "reference."


@support_torch_compile
class TwoModels(nn.Module):
    """Both models in one module, so that torch.compile and CUDA graphs see one forward pass."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        own_config = copy.deepcopy(config)
        own_config.architectures = config.mixture_policy_architectures
        self.policy = init_vllm_registered_model(
            vllm_config, hf_config=own_config, prefix=maybe_prefix(prefix, "policy")
        )
        self.reference = init_vllm_registered_model(
            vllm_config,
            hf_config=get_config(
                config.mixture_reference, trust_remote_code=vllm_config.model_config.trust_remote_code
            ),
            prefix=maybe_prefix(prefix, "reference"),
        )
        self._compile_only_as_a_whole()

    def _compile_only_as_a_whole(self) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "do_not_compile"):
                module.do_not_compile = True

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states of both, concatenated: [tokens, hidden of the policy + hidden of the reference]."""
        return torch.cat([self.policy(input_ids, positions), self.reference(input_ids, positions)], dim=-1)


class LogitMixtureForCausalLM(nn.Module):
    """w_policy * logits_policy + w_reference * logits_reference, with the weights of each request.

    The policy is the engine's `model`; the reference's folder is `mixture_reference` in its configuration.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("the logit mixture does not support pipeline parallelism; use tensor parallelism")
        if vllm_config.speculative_config is not None:
            raise ValueError("the logit mixture does not support speculative decoding")
        self.models = TwoModels(vllm_config=vllm_config, prefix=prefix)
        self.policy_width = vllm_config.model_config.hf_config.get_text_config().hidden_size
        self.weights = batch_weights(vllm_config, vllm_config.device_config.device)
        reference = vllm_config.model_config.hf_config.mixture_reference
        self.secondary_weights = [
            DefaultModelLoader.Source(reference, revision=None, prefix=REFERENCE, fall_back_to_pt=False)
        ]

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.models.policy.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.models(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Mixed logits, float32 [requests, vocabulary]; None on tensor-parallel ranks that do not sample.

        `hidden_states` has one row a request in the order of the batch slots, so row i takes slot i's weights.
        """
        hidden = hidden_states.split([self.policy_width, hidden_states.shape[-1] - self.policy_width], dim=-1)
        logits_policy = self.models.policy.compute_logits(hidden[0].contiguous())
        logits_reference = self.models.reference.compute_logits(hidden[1].contiguous())
        if logits_policy is None:
            return None
        weights = self.weights.on_device[: len(logits_policy)]
        return weights[:, :1] * logits_policy.float() + weights[:, 1:] * logits_reference.float()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Takes the policy's weights under their own names and the reference's with the prefix `reference.`."""
        renamed = (
            (f"models.{name}" if name.startswith(REFERENCE) else f"models.policy.{name}", tensor)
            for name, tensor in weights
        )
        return AutoWeightsLoader(self).load_weights(renamed)
