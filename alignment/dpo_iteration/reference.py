"""Log-probabilities under the reference model: computed once, before training, and kept beside the data.

They never change, so while the policy trains there is no reference model in memory, in no epoch and after no restart.
Every process takes its share of the rows. Under ZeRO-3 they share the model's weights too; otherwise each loads the
whole model for this pass (7B parameters: 14 GB in bf16).
"""

import contextlib
import hashlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import UserError
from common.models import give_memory_back, load_causal_lm
from common.records import read_json, write_json
from dpo_iteration.distributed import free, gather, on_main, say, sharded, shards_models, share, whole_models
from dpo_iteration.response_logps import SEQUENCES, as_scorer, forms_agree, may_share
from dpo_iteration.rows import collate


def cache_path(train_file: str) -> Path:
    """Where the log-probabilities for `train_file` are kept."""
    return Path(f"{train_file}.reference_logps.json")


def add_reference_logps(rows: list[dict], options, training, dtype: str, autocast: bool) -> list[dict]:
    """The rows with `ref_chosen_logps` and `ref_rejected_logps`, from the cache or from the reference model.

    Args:
        options: with `train_dir`, `ref_model`, `trust_remote_code`.
        training: TrainingArguments; `per_device_eval_batch_size` rows are scored at a time.
        dtype, autocast: the precision that the policy trains in, so that equal models give equal numbers.
    """
    path = cache_path(options.train_dir)
    pairs = cached_logps(path, rows, "reference", options.ref_model, options, training, dtype, autocast)
    return [
        {**row, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        for row, (chosen, rejected) in zip(rows, pairs, strict=True)
    ]


def cached_logps(
    path: Path, rows: list[dict], what: str, model: str, options, training, dtype: str, autocast: bool
) -> list[list[float]]:
    """[chosen, rejected] log-probabilities of each row under `model`: from the file `path`, or computed into it."""
    key = on_main(cache_key, rows, model, dtype, autocast)
    pairs = on_main(read_cache, path, what, key)
    if pairs is None:
        say(f"{what} log-probabilities: {len(rows)} pairs under {model}")
        pairs = compute(rows, model, options, training, dtype, autocast)
        on_main(write_cache, path, what, key, pairs)
    return pairs


def cache_key(rows: list[dict], model: str, dtype: str, autocast: bool) -> dict:
    """What the numbers depend on: token ids, weights (names, sizes, dates of the files), precision."""
    ids = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    return {
        "model": model,
        "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "token_ids": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "dtype": dtype,
        "autocast": autocast,
    }


def read_cache(path: Path, what: str, key: dict) -> list[list[float]] | None:
    """The cached [chosen, rejected] values, or None (and one line that says why) where they are not for `key`."""
    if not path.exists():
        return None
    try:
        stored = read_json(path)
    except UserError:
        stored = None
    if not isinstance(stored, dict) or not isinstance(stored.get("settings"), dict):
        say(f"{path}: damaged; computing the {what} log-probabilities again")
        return None
    changed = [name for name in key if stored["settings"].get(name) != key[name]]
    if changed:
        say(f"{path}: made with other {', '.join(changed)}; computing the {what} log-probabilities again")
        return None
    say(f"{what} log-probabilities: read from {path}")
    return stored["logps"]


def write_cache(path: Path, what: str, key: dict, pairs: list[list[float]]) -> None:
    """Writes the cache; a folder that cannot be written costs a repetition, not the run."""
    try:
        write_json(path, {"settings": key, "logps": pairs})
    except UserError as error:
        say(f"{error}; a restart computes the {what} log-probabilities again")


def compute(rows: list[dict], name: str, options, training, dtype: str, autocast: bool) -> list[list[float]]:
    """[chosen, rejected] log-probabilities of each row; the model is gone from memory when this returns."""
    in_shards = shards_models(training)
    with contextlib.nullcontext() if in_shards else whole_models(training):
        model = load_causal_lm(
            name,
            "model",
            dtype,
            trust_remote_code=options.trust_remote_code,
            attn_implementation=options.attn_implementation,
        )
    model = as_scorer(model)
    shares = training.share_prefixes and may_share(model)
    model = sharded(model, dtype, training) if in_shards else model.to(training.device)
    # Rows of like length share a batch.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt_ids"]) + len(rows[i]["chosen_ids"]))
    size = training.per_device_eval_batch_size
    batches = share([order[i : i + size] for i in range(0, len(order), size)], even=in_shards)
    if shares:
        with _precision(training.device, autocast):
            shares = forms_agree(model, _on(training.device, rows[:1]), training.bf16)
    found = []
    quiet = training.disable_tqdm or not training.should_log
    for batch in tqdm(batches, desc="log-probabilities", disable=quiet, mininterval=5):
        sequences = _on(training.device, [rows[i] for i in batch])
        with torch.no_grad(), _precision(training.device, autocast):
            chosen, rejected = model(**sequences, share=shares).chunk(2)
        found += zip(batch, chosen.tolist(), rejected.tolist(), strict=True)
    if in_shards:
        free(model)
    del model
    give_memory_back()
    by_row = {index: [chosen, rejected] for index, chosen, rejected in gather(found)}
    return [by_row[i] for i in range(len(rows))]


def _on(device, rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = collate(rows)
    return {name: batch[name].to(device) for name in SEQUENCES}


def _precision(device, autocast: bool):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast)
