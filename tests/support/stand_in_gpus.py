"""Scores two models that are spread over GPUs which exist as names only, and stops where a number would be read.

Tensors have a shape and a device but no values; torch raises where two of them that meet are on different devices.
A program of its own: torch's stand-in back end stays registered. Prints `reached the end` if no devices met.
"""

import sys

import accelerate.hooks
import torch
from tiny import tiny_config, tiny_tokenizer
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import LlamaForCausalLM

from evaluation.kl import LanguageModel, Sequence, score_sequences

PARTS = "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"


def spread(gpus: list[int]) -> LlamaForCausalLM:
    """Return a model with accelerate's hooks, each of `PARTS` on its GPU."""
    model = LlamaForCausalLM(tiny_config(tiny_tokenizer())).eval()
    devices = {part: torch.device(f"standin:{gpu}") for part, gpu in zip(PARTS, gpus, strict=True)}
    for part, device in devices.items():
        for module in model.get_submodule(part).modules():
            for name, weight in module.named_parameters(recurse=False):
                module._parameters[name] = torch.nn.Parameter(torch.empty(weight.shape, device=device))
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(buffer.shape, device=device)
    offload = dict.fromkeys(PARTS, False)
    execution = {**devices, "": devices[PARTS[0]]}
    accelerate.hooks.attach_align_device_hook_on_blocks(model, execution, offload=offload)
    return model


def main(has_plain_head: bool) -> None:
    make = torch.tensor
    _setup_privateuseone_for_python_backend("standin")
    accelerate.hooks.set_module_tensor_to_device = lambda *_, **__: None  # the weights are in place
    torch.tensor = lambda values, device=None: make(values).to(device or "cpu")  # values cannot be copied to a name
    LanguageModel._has_plain_head = lambda self: has_plain_head  # reads a number
    with FakeTensorMode():
        models = [LanguageModel(spread(gpus)) for gpus in ([0, 0, 1, 1, 1, 1], [1, 1, 2, 2, 2, 3])]
        try:
            score_sequences(*models, [Sequence([1, 5, 6], [8, 9, 2], True), Sequence([1], [5], False)], 0.7, [], True)
        except DataDependentOutputException:  # the sums, at the end
            print("reached the end")


if __name__ == "__main__":
    main(sys.argv[1] == "plain")
