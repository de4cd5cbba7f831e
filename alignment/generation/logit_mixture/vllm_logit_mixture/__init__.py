"""A vLLM plugin: one engine holds a policy and a reference and samples from weighted sums of their logits.

Every request brings its own two weights, `SamplingParams(extra_args={"mixture": [w_policy, w_reference]})`, so one
engine serves any mixture, and several of them in one continuous batch. `engine_options` gives what `vllm.LLM` needs.
"""

import multiprocessing
import os
import threading

ARCHITECTURE = "LogitMixtureForCausalLM"


def register() -> None:
    """Makes the architecture known to vLLM; called in each of its processes through the plugin's entry point."""
    from vllm import ModelRegistry

    _end_with_parent()
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")


def _end_with_parent() -> None:
    """Ends this process, if it is one of vLLM's own, when the one that started it has died.

    vLLM's engine process would outlive a killed script for ever, and with it what it holds of the GPU's memory.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def engine_options(policy: str, reference: str, policy_architectures: list[str]) -> dict:
    """Keyword arguments for `vllm.LLM` that make it an engine of both models.

    Args:
        policy, reference: model folders; both must have the same vocabulary (the caller checks it).
        policy_architectures: of the policy's own configuration, since the override hides them.

    Returns:
        {"model", "hf_overrides", "logits_processors"}. The reference's path travels in the model's configuration,
        so it is part of the hash that names vLLM's compile cache.
    """
    return {
        "model": policy,
        "hf_overrides": {
            "architectures": [ARCHITECTURE],
            "mixture_policy_architectures": policy_architectures,
            "mixture_reference": reference,
        },
        "logits_processors": [f"{__name__}.weights:MixtureWeights"],
    }
