"""The working folder of a run: where it continues after a kill, and how its result gets its name.

`DIR.partial` holds the settings and the Trainer's checkpoints. The finished model is written inside it and renamed
to `DIR`: `DIR` is there whole or not at all.
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, TrainerCallback

from common.cli import UserError
from common.journal import refuse_other_settings
from common.models import load_causal_lm
from common.records import read_json, rename_flushed, write_json
from dpo_iteration.distributed import on_main, whole_models


def work_dir(output_dir: str) -> Path:
    """The working folder of `output_dir`."""
    return Path(str(Path(output_dir)) + ".partial")


def is_done(output_dir: str, settings: dict) -> bool:
    """Whether `output_dir` holds the result of these settings; raises `UserError` where it holds anything else."""
    output = Path(output_dir)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    stored = read_json(output / "settings.json") if (output / "settings.json").is_file() else None
    refuse_other_settings(output, stored.get("train") if isinstance(stored, dict) else None, settings)
    shutil.rmtree(work_dir(output_dir), ignore_errors=True)
    return True


def open_work(output_dir: str, settings: dict, data_settings: dict, made_from: Callable[[], dict]):
    """Makes or reopens the working folder and locks it; returns the lock, to be kept until the end.

    Args:
        output_dir: where the result goes.
        settings: what is compared when a run continues.
        data_settings: those of the data file, kept with the result.
        made_from: computes the provenance, once a run: it reads the models.
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
        refuse_other_settings(folder, read_json(record).get("train"), settings)
    else:
        provenance = {"train": made_from()}
        write_json(record, {"train": settings, "data": data_settings, "provenance": provenance})
    return lock


def newest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in `folder`; torn ones (the process was killed while saving) are removed."""
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
    """Makes the errors of a full disk, of which each library has its own, one `UserError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch gives no reason; a checkpoint that failed has left no room.
        if "No space left" in str(error) or shutil.disk_usage(work_dir(output_dir)).free < 2**20:
            raise UserError(f"{work_dir(output_dir)}: cannot write (No space left on device)") from None
        raise


class NoCheckpointAtTheEnd(TrainerCallback):
    """The Trainer saves weights and optimizer after the last step, just before the finished model is written."""

    def on_step_end(self, args, state, control, **kwargs):
        """Cancels that checkpoint."""
        if state.global_step >= state.max_steps:
            control.should_save = False


def publish(trainer, options, output_dir: str, dtype: str) -> None:
    """Writes model, tokenizer, trainer state and settings, gives them their name and removes the working folder."""
    folder = work_dir(output_dir)
    final, raw = folder / "final", folder / "weights"
    trainer.save_model(str(raw))  # all processes take part: shards are gathered
    with whole_models(trainer.args):
        on_main(_write_final, trainer, options, raw, final, dtype)
    on_main(_rename, final, Path(output_dir), folder)


def _write_final(trainer, options, raw: Path, final: Path, dtype: str) -> None:
    shutil.rmtree(final, ignore_errors=True)
    remote = options.trust_remote_code
    if options.use_lora:
        from peft import PeftModel

        base = load_causal_lm(options.model_name_or_path, "--model_name_or_path", "float32", remote)
        PeftModel.from_pretrained(base, raw).merge_and_unload().to(getattr(torch, dtype)).save_pretrained(final)
        shutil.copytree(raw, final / "adapter", ignore=shutil.ignore_patterns("training_args.bin"))
    else:
        model = load_causal_lm(str(raw), "trained model", dtype, remote)
        model.config.use_cache = True  # the Trainer turned it off for training
        make_savable(model)
        model.save_pretrained(final)
    AutoTokenizer.from_pretrained(options.model_name_or_path, trust_remote_code=remote).save_pretrained(final)
    trainer.state.save_to_json(str(final / "trainer_state.json"))
    shutil.copy(final.parent / "settings.json", final / "settings.json")
    for i, events in enumerate(sorted((final.parent / "runs").rglob("events.*"))):
        (final / "runs").mkdir(exist_ok=True)
        # Tensorboard's own names hold the machine's.
        shutil.copy(events, final / "runs" / f"events.out.tfevents.{i}")


def _rename(final: Path, output: Path, folder: Path) -> None:
    rename_flushed(final, output)  # onto nothing or an empty folder
    shutil.rmtree(folder)


def make_savable(model) -> None:
    """Repairs a published generation config that is refused on saving (temperature set, sampling off)."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
