"""What several processes need: one that decides and writes, parts of the work, models that only score.

Started by `accelerate launch`, every process runs the same script; in a plain process all of this does nothing.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from common.cli import UserError

T = TypeVar("T")


def say(line: str) -> None:
    """Print one line, once."""
    if PartialState().is_main_process:
        print(line, flush=True)


def on_main(work: Callable[..., T], *arguments: object) -> T:
    """Return `work(*arguments)`, done by the first process; all processes get its result, or its `UserError`."""
    result, error = None, None
    if PartialState().is_main_process:
        try:
            result = work(*arguments)
        except UserError as raised:
            error = str(raised)
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise UserError(error)
    return result


def share(items: list, even: bool = False) -> list:
    """Return this process's part of a list; `even`: as much as every other one has, with repetitions."""
    state = PartialState()
    if even:
        items = list(itertools.islice(itertools.cycle(items), len(items) + -len(items) % state.num_processes))
    return items[state.process_index :: state.num_processes]


def shards_models(training: TrainingArguments) -> bool:
    """Return whether the processes share the weights of each model, by ZeRO-3."""
    return training.deepspeed_plugin is not None and training.deepspeed_plugin.zero_stage == 3


def sharded(model: torch.nn.Module, dtype: str, training: TrainingArguments) -> torch.nn.Module:
    """Return a model that only scores as an engine of DeepSpeed: ZeRO-3 gathers a layer's weights when it runs.

    All processes must run it equally often. `free` ends it.
    """
    import deepspeed

    zero = training.deepspeed_plugin.deepspeed_config["zero_optimization"]
    kept = {key: value for key, value in zero.items() if value != "auto" and key != "offload_optimizer"}
    options = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype == "bfloat16"}}
    engine = deepspeed.initialize(model=model, config={"zero_optimization": kept, **options})[0]
    engine.eval()
    return engine


def free(engine: torch.nn.Module) -> None:
    """End an engine of `sharded`. The shards are emptied here: DeepSpeed keeps the module in a list for ever."""
    engine.destroy()
    for parameter in engine.module.parameters():
        parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)


@contextlib.contextmanager
def whole_models(training: TrainingArguments) -> Iterator[None]:
    """Let `from_pretrained` load a whole model in each process, whatever ZeRO-3 or FSDP does to the policy."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    plugin = training.deepspeed_plugin
    if plugin is not None:
        unset_hf_deepspeed_config()
    # With this on, FSDP leaves all processes but the first with empty weights until it shards the model.
    efficient = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    try:
        yield
    finally:
        if efficient is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = efficient
        if plugin is not None:
            plugin.set_deepspeed_weakref()
