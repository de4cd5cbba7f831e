"""LoRA adapters: merged with their base into whole weights, which every stage and both back ends can read.

A folder with `adapter_config.json` holds an adapter. It is merged once; the merged model is kept in the Hugging Face
cache, under a name made from the content of adapter and base, so that a changed one is merged anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError, first_line
from common.provenance import fingerprint, folder_sha256
from common.records import read_json, writing

if TYPE_CHECKING:  # torch and what builds on it are loaded where an adapter is merged
    import torch
    from peft import PeftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def whole_model(name: str, what: str, trust_remote_code: bool = False) -> str:
    """Return the name of a model with whole weights: a merged copy of an adapter, anything else unchanged.

    Args:
        name: a folder or a hub name.
        what: what the model is to the stage, for error messages.

    Raises:
        UserError: the folder is ambiguous, or its adapter cannot be fetched or merged.
    """
    folder = Path(name) if Path(name).exists() else hub_folder(name, what)
    if folder is None or not (folder / CONFIG).is_file():
        return name
    base = base_of(folder, what, trust_remote_code)
    merged = cache() / content_key(folder, base, (_stamps(folder), _stamps(Path(base))))
    if not merged.is_dir():
        with only_one(merged):
            if not merged.is_dir():
                _merge_into(merged, base, folder, what, trust_remote_code)
    return str(merged)


@functools.cache  # one look at the hub per process
def hub_folder(name: str, what: str) -> Path | None:
    """Return the cached folder of an adapter on the hub; None if the name is not one.

    Offline the cache answers: what it does not hold is no adapter. A network that fails answers nothing.

    Raises:
        UserError: the hub cannot be asked; or it is an adapter, and one of its files cannot be had.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_download(name, CONFIG)
    except HFValidationError:  # a folder that is not there, as the loader says
        return None
    except Exception as error:  # the hub's, the network's, a proxy's
        cause = error.__cause__ or error
        answer = getattr(getattr(cause, "response", None), "status_code", None)
        # No such file or model, or one that needs a token. The cache remembers what the hub said it does not have.
        if answer in (401, 403, 404) or constants.HF_HUB_OFFLINE or try_to_load_from_cache(name, CONFIG) is not None:
            return None
        raise UserError(
            f"{what} {name}: the hub does not say whether it is an adapter ({first_line(cause)}); "
            "try again, or set HF_HUB_OFFLINE=1 to use what the cache holds"
        ) from None
    try:
        hf_hub_download(name, WEIGHTS)
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    except Exception as error:
        raise UserError(f"{what} {name}: an adapter whose {WEIGHTS} cannot be had ({first_line(error)})") from None


@functools.cache
def content_key(folder: Path, base: str, stamps: tuple) -> str:
    """Return a name for adapter and base: a hash of every byte of both, read once per process and state of the files.

    Args:
        stamps: what tells that the files are still the same.
    """
    content = [folder_sha256(folder), fingerprint(base, "model")]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _stamps(folder: Path) -> tuple:
    """Return (path, size, date) of a folder's files; nothing for a hub's name."""
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files)


def cache() -> Path:
    """Return the folder of merged models."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "merged_adapters"


def base_of(folder: Path, what: str, trust_remote_code: bool = False) -> str:
    """Return the base model of an adapter's folder, whole. Raise `UserError` for a folder that is ambiguous."""
    named = f"{what} {folder}"
    whole = sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if whole:
        raise UserError(f"{named}: holds an adapter and whole weights ({whole[0].name}); move one of them away")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{named}: {CONFIG} without {WEIGHTS}; pickled weights are not loaded")
    config = read_json(folder / CONFIG)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise UserError(f"{named}: {CONFIG} names no base model")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{named}: an adapter for {config['task_type']}, not for a causal language model")
    if not Path(base).is_dir() and (folder / base).is_dir():
        base = str(folder / base)
    if Path(base).resolve() == folder.resolve():
        raise UserError(f"{named}: is named as its own base model")
    return whole_model(base, f"{named}: base model", trust_remote_code)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Let one process at a time make `folder`; the others wait."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{folder}.lock", "w")  # noqa: SIM115 (held until the end of the block)
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _merge_into(merged: Path, base: str, folder: Path, what: str, trust_remote_code: bool) -> None:
    from transformers import AutoTokenizer

    from common.models import load_causal_lm

    unfinished = merged.with_name(merged.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    named = f"{what} {folder}"
    print(f"{named}: merging the adapter with its base {base} into {merged}", flush=True)
    model = load_causal_lm(base, f"{named}: base model", "float32", trust_remote_code)
    tokenizer = folder if (folder / "tokenizer_config.json").is_file() else base
    with writing(merged):
        save_merged(model, folder, unfinished, "float32", named, trust_remote_code)
        AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code).save_pretrained(unfinished)
        unfinished.rename(merged)


def save_merged(
    model: torch.nn.Module, adapter: Path, folder: Path, dtype: str, what: str, trust_remote_code: bool = False
) -> None:
    """Write base and adapter as whole weights.

    Args:
        model: the base, in float32; it is used up.
        adapter: the adapter's folder.
        folder: where the merged model goes.
        dtype: type of its weights.

    Raises:
        UserError: the adapter does not fit, or the merged model computes other logits than base and adapter.
    """
    import torch
    from peft import PeftModel

    from common.models import load_causal_lm, make_savable

    try:
        adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    except Exception as error:  # peft raises many kinds, whatever of an adapter does not fit
        raise UserError(f"{what}: the adapter cannot be loaded on its base ({first_line(error)})") from None
    wanted = _logits(adapted)
    _untie(adapted)
    whole = adapted.merge_and_unload()
    refuse_other_logits(wanted, _logits(whole), f"{what}: merging")
    whole = whole.to(getattr(torch, dtype))
    make_savable(whole)
    whole.save_pretrained(folder)
    rounded = _logits(whole.float())
    del model, adapted, whole
    saved = load_causal_lm(str(folder), what, "float32", trust_remote_code)
    refuse_other_logits(rounded, _logits(saved), f"{what}: saving")


def _untie(adapted: PeftModel) -> None:
    """Give head and embedding weights of their own where an adapter changes one of them: one matrix holds no two."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    model = adapted.get_base_model()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not any(isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for layer in (head, embedding)):
        return
    layer = getattr(head, "base_layer", getattr(head, "original_module", head))
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _logits(model: torch.nn.Module) -> torch.Tensor:
    """Return a model's float32 logits [1, T, V] on a few of its tokens."""
    import torch

    count = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(count, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def refuse_other_logits(wanted: torch.Tensor, got: torch.Tensor, what: str) -> None:
    """Raise `UserError` unless two models' logits are equal to rounding."""
    off = (wanted - got).abs().max().item() if wanted.shape == got.shape else float("inf")
    if not off <= 1e-3 * (1 + wanted.abs().max().item()):
        raise UserError(f"{what} changed the model: its logits are up to {off:.3g} off base and adapter")
