"""A vLLM plugin: one engine holds several models of one vocabulary and samples from weighted sums of their logits.

Every request brings its own weights, one per model, `SamplingParams(extra_args={"mixture": [1.5, -0.5]})`, so one
engine serves any mixture, and several of them in one continuous batch. `engine_options` gives what `vllm.LLM` needs.
"""

import multiprocessing
import os
import threading

__version__ = "0.2.0"
ARCHITECTURE = "LogitMixtureForCausalLM"


class MixtureError(ValueError):
    """Models or options that one mixture engine cannot hold. Its text is one line that says which and why."""


def register() -> None:
    """Make the architecture known to vLLM; called in each of its processes through the plugin's entry point."""
    from vllm import ModelRegistry

    from vllm_logit_mixture.prefix_cache import salt_requests

    _end_with_parent()
    salt_requests()
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")


def _end_with_parent() -> None:
    """End this process, if it is one of vLLM's own, when the one that started it has died.

    vLLM's engine process would outlive a killed script for ever, and with it what it holds of the GPU's memory.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def engine_options(models: list[str], trust_remote_code: bool = False) -> dict:
    """Return the keyword arguments for `vllm.LLM` that make it an engine of these models.

    Args:
        models: folders or names; the first is the engine's own, whose tokenizer and chat template it uses.
        trust_remote_code: run code that comes with a model.

    Returns:
        {"model", "hf_overrides", "logits_processors"}. The other models' paths travel in the first one's
        configuration, so they are part of the hash that names vLLM's compile cache.

    Raises:
        MixtureError: these models cannot be mixed.
    """
    from vllm_logit_mixture.check import check_models

    configs = check_models(models, trust_remote_code)
    return {
        "model": models[0],
        "hf_overrides": {
            "architectures": [ARCHITECTURE],
            "mixture_own_architectures": configs[0].architectures,
            "mixture_models": list(models[1:]),
        },
        "logits_processors": [f"{__name__}.processor:MixtureOf{len(models)}"],
    }
