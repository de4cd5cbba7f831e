"""The working folder of a run: where it continues after a kill, and how its result gets its name.

`DIR.partial` holds the settings and the Trainer's checkpoints. The finished model is written inside it and renamed
to `DIR`: `DIR` is there whole or not at all.
"""

import contextlib
import fcntl
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.adapters import save_merged, whole_model
from common.cli import UserError
from common.journal import refuse_other_settings
from common.models import make_savable
from common.records import read_json, rename_flushed, write_json
from dpo_iteration.distributed import on_main, whole_models
from dpo_iteration.options import DataOptions
from dpo_iteration.policy import load_base


def work_dir(output_dir: str) -> Path:
    """Return the working folder of `output_dir`."""
    return Path(str(Path(output_dir)) + ".partial")


def is_done(output_dir: str, settings: dict, exactly: bool = False) -> bool:
    """Return whether `output_dir` holds the result of these settings; anything else there is a `UserError`.

    Args:
        exactly: how a step's pairs are divided is a setting too, see `training_settings`.
    """
    output = Path(output_dir)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    stored = read_json(output / "settings.json") if (output / "settings.json").is_file() else None
    refuse_other_settings(output, *(training_settings(one, exactly) for one in (stored, {"train": settings})))
    shutil.rmtree(work_dir(output_dir), ignore_errors=True)
    return True


def training_settings(record: object, exactly: bool) -> dict | None:
    """Return what a record says of the training, without how a step's pairs are divided unless `exactly`.

    How they are divided among processes and passes changes a result of our trainer by rounding alone. So what is
    finished, or has not begun, may continue on other GPUs; not where incomplete batches are dropped, nor with TRL.
    """
    stored = record.get("train") if isinstance(record, dict) else None
    if exactly or not isinstance(stored, dict) or stored.get("dataloader_drop_last"):
        return stored
    settings = dict(stored)
    parts = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
    return settings | {"pairs_per_step": math.prod(settings.pop(name, 1) for name in parts)}


def open_work(
    output_dir: str, settings: dict, data_settings: dict, made_from: Callable[[], dict], exactly: bool = False
) -> TextIO:
    """Make or reopen the working folder and lock it; return the lock, to be kept until the end.

    Args:
        output_dir: where the result goes.
        settings: what is compared when a run continues.
        data_settings: those of the data file, kept with the result.
        made_from: computes the provenance, once per run: it reads the models.
        exactly: as for `is_done`; where there is a checkpoint it is always so.
    """
    folder = work_dir(output_dir)
    record = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115 (held until the process ends)
    except OSError as error:
        raise UserError(f"{folder}: cannot write ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is training here") from None
    except OSError as error:  # a file system without locks
        raise UserError(f"{folder}: cannot be locked ({error.strerror})") from None
    if record.exists():
        stored, now = read_json(record), {"train": settings}
        exactly |= newest_checkpoint(folder) is not None
        refuse_other_settings(folder, *(training_settings(one, exactly) for one in (stored, now)))
        write_json(record, stored | now)
    else:
        provenance = {"train": made_from()}
        write_json(record, {"train": settings, "data": data_settings, "provenance": provenance})
    return lock


def lock_work(*work) -> list[TextIO]:
    """Open the working folder in the first process; the lock is held as long as the result is."""
    locks: list[TextIO] = []
    on_main(lambda: locks.append(open_work(*work)))
    return locks


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint in `folder`; torn ones (of a process killed while saving) are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text())  # written last
            return str(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return None


@contextlib.contextmanager
def saving(output_dir: str) -> Iterator[None]:
    """Make the errors of a full disk, of which each library has its own, one `UserError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch gives no reason; a checkpoint that failed has left no room.
        if "No space left" in str(error) or shutil.disk_usage(work_dir(output_dir)).free < 2**20:
            raise UserError(f"{work_dir(output_dir)}: cannot write (No space left on device)") from None
        raise


def give_up(output_dir: str) -> None:
    """Remove the working folder of a run that was refused, unless an earlier start has left a checkpoint there."""
    folder = work_dir(output_dir)
    if newest_checkpoint(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)


class Checkpoints(TrainerCallback):
    """Checkpoints by time, where that is asked for; none after the last step, when the finished model is written.

    Args:
        minutes: between checkpoints; 0: the Trainer's own arguments say when.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes, self.last = minutes, time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Decide in the first process, for all."""
        if self.minutes:
            (due,) = broadcast_object_list([time.monotonic() - self.last >= 60 * self.minutes])
            control.should_save |= due
            if due:
                self.last = time.monotonic()
        if state.global_step >= state.max_steps:
            control.should_save = False


def publish(trainer: Trainer, options: DataOptions, output_dir: str, dtype: str) -> None:
    """Write model, tokenizer, trainer state and settings, give them their name and remove the working folder."""
    folder = work_dir(output_dir)
    weights = gathered_weights(trainer)  # all processes take part
    with whole_models(trainer.args):
        on_main(_write_final, trainer, weights, options, folder / "final", dtype)
    on_main(_rename, folder / "final", Path(output_dir), folder)


def gathered_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the trained weights by name, in the first process whole ones; with an adapter perhaps only its own."""
    if not trainer.is_deepspeed_enabled:
        return trainer.accelerator.get_state_dict(trainer.model)
    engine = trainer.deepspeed
    if hasattr(trainer.model, "peft_config") and engine.zero_optimization_stage() == 3:
        return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    return trainer.accelerator.get_state_dict(engine)


def _write_final(
    trainer: Trainer, weights: dict[str, torch.Tensor], options: DataOptions, final: Path, dtype: str
) -> None:
    shutil.rmtree(final, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    remote = options.trust_remote_code
    if options.use_lora:
        model.peft_config["default"].base_model_name_or_path = options.model_name_or_path
        model.save_pretrained(final / "adapter", state_dict=weights, save_embedding_layers=False)
        save_merged(load_base(options), final / "adapter", final, dtype, "the trained model", remote)
    else:
        _save_whole(model, weights, final, dtype)
    tokenizer = whole_model(options.model_name_or_path, "--model_name_or_path", remote)
    AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=remote).save_pretrained(final)
    trainer.state.save_to_json(str(final / "trainer_state.json"))
    shutil.copy(final.parent / "settings.json", final / "settings.json")
    for i, events in enumerate(sorted((final.parent / "runs").rglob("events.*"))):
        (final / "runs").mkdir(exist_ok=True)
        # Tensorboard's own names hold the machine's.
        shutil.copy(events, final / "runs" / f"events.out.tfevents.{i}")


def _save_whole(model: torch.nn.Module, weights: dict[str, torch.Tensor], final: Path, dtype: str) -> None:
    """Write a model's weights once, in their final type."""
    cast: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
    kept = {
        name: cast.setdefault(weight.data_ptr(), weight.to(getattr(torch, dtype)))
        for name, weight in weights.items()
        if weight.is_floating_point()
    }
    make_savable(model)
    model.save_pretrained(final, state_dict={**weights, **kept})
    config = read_json(final / "config.json")
    # The weights' type; and the Trainer turned the cache off for training.
    write_json(final / "config.json", {**config, "dtype": dtype, "use_cache": True})


def _rename(final: Path, output: Path, folder: Path) -> None:
    rename_flushed(final, output)  # onto nothing or an empty folder
    shutil.rmtree(folder)
