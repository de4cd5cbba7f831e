"""What several processes need: one that decides and writes, and models loaded whole where ZeRO-3 would shard them.

Started by `accelerate launch`, every process runs the same script; in a plain process all of this does nothing.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from common.cli import UserError


def say(line: str) -> None:
    """Prints one line, once."""
    if PartialState().is_main_process:
        print(line, flush=True)


def on_main(work: Callable, *arguments):
    """`work(*arguments)`, done by the first process; all processes get its result, or its `UserError`."""
    result = error = None
    if PartialState().is_main_process:
        try:
            result = work(*arguments)
        except UserError as raised:
            error = str(raised)
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise UserError(error)
    return result


def share(items: list) -> list:
    """This process's part of a list of things to do."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def gather(items: list) -> list:
    """The lists of all processes, joined."""
    return gather_object(items)


@contextlib.contextmanager
def whole_models(training) -> Iterator[None]:
    """Inside, `from_pretrained` loads a whole model in each process, whatever ZeRO-3 or FSDP does to the policy."""
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
