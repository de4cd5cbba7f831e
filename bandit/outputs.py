"""Result folders: checked before a run, written whole after it."""

import errno
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bandit.presets import MODE_KEYS
from bandit.settings import BadInput

RESULTS = Path(__file__).parent / "results"


def default_folder(name: str, settings: dict, preset: dict) -> Path:
    """bandit/results/<preset>, with a hash of the settings where they are not the preset's own."""
    if settings == preset:
        return RESULTS / name
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return RESULTS / f"{name}-{digest}"


def prepare(folder: Path, settings: dict, overwrite: bool) -> None:
    """Creates the folder and makes sure that it can be written and holds no results of other settings.

    Raises:
        BadInput: it cannot, or it does and overwrite is False.
    """
    config = folder / "config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        stored = json.loads(config.read_text())["settings"] if config.exists() else None
    except OSError as error:
        raise BadInput(f"argument --output_dir: {folder}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"argument --output_dir: {config} is not a configuration of this script") from None
    if stored in (None, settings) or overwrite:
        return
    changed = [key for key in {**stored, **settings} if stored.get(key) != settings.get(key)]
    differences = ", ".join(f"{key} {stored.get(key)} -> {settings.get(key)}" for key in changed)
    raise BadInput(
        f"argument --output_dir: {folder} holds results of other settings ({differences}); "
        "choose another folder or add --overwrite"
    )


def progress_bar(total: int, unit: str) -> Callable[[str, int], None]:
    """A line on a terminal that a call (label, how many more are done) moves; silent where there is no terminal."""
    began = shown = time.monotonic()
    done = 0

    def show(label: str, more: int) -> None:
        nonlocal done, shown
        done += more
        now = time.monotonic()
        if sys.stderr.isatty() and (now - shown > 0.2 or done == total):
            shown, end = now, "\n" if done == total else ""
            text = f"{done / total:4.0%} of {total} {unit}s, {now - began:.0f} s, {label}"
            print(f"\r{text:78.78}", end=end, file=sys.stderr, flush=True)

    return show


def save(path: Path, write: Callable[[Path], object]) -> None:
    """Call write on a temporary name beside path, then rename: path is never half written, and on the disk then."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot flush folders
            raise
    finally:
        os.close(descriptor)


def save_text(path: Path, text: str) -> None:
    save(path, lambda target: target.write_text(text))


def save_config(folder: Path, settings: dict, derived: dict) -> None:
    save_text(folder / "config.json", json.dumps({"settings": settings, "derived": derived}, indent=2) + "\n")


def save_trajectories(
    folder: Path, results: dict[tuple[str, str], dict[str, np.ndarray]], rewards: np.ndarray
) -> None:
    """trajectories.npz: '<sampler>/<mode>/<series>' [envs, T] and 'rewards' [envs, |Y|], float64."""
    arrays = {
        f"{name}/{MODE_KEYS[mode]}/{key}": values
        for (name, mode), series in results.items()
        for key, values in series.items()
    }
    # The temporary name must end in .npz, or numpy would add it.
    save(folder / "trajectories.npz", lambda target: np.savez(target, rewards=rewards, **arrays))
