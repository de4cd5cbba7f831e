"""Log-probabilities under models that do not change: computed once, before training, and kept beside the data.

While the policy trains there is no reference model in memory, in no epoch and after no restart. Every process takes
its share of the rows. Under ZeRO-3 they share the model's weights too; otherwise each loads the whole model for this
pass (7B parameters: 14 GB in bf16).

The choice implicit_max_min needs more of them: implicit rewards beta log(pi(y|x) / pi_ref(y|x)) of all candidates.
DPO's policy is its own reward model (Rafailov et al. 2023, arXiv 2305.18290, eq. 5); pi is the policy that training
starts from, the one that the responses were sampled from.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from common.adapters import whole_model
from common.cli import UserError
from common.models import give_memory_back, load_causal_lm
from common.records import read_json, write_json
from dpo_iteration.distributed import free, on_main, say, sharded, shards_models, share, whole_models
from dpo_iteration.logps import SEQUENCES, as_scorer, forms_agree, may_share
from dpo_iteration.options import DataOptions, DPOTrainingArguments
from dpo_iteration.rows import Encoder, collate, open_rows, write_rows

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
Precision = tuple[str, bool]  # dtype of the weights, whether autocast runs above them


def cache_path(train_file: str) -> Path:
    """Return where the log-probabilities for `train_file` are kept."""
    return Path(f"{train_file}.reference_logps.json")


def add_reference_logps(
    rows: datasets.Dataset, options: DataOptions, training: DPOTrainingArguments, precision: Precision
) -> datasets.Dataset:
    """Return the rows with `ref_chosen_logps` and `ref_rejected_logps`, from the cache or from the reference model.

    Args:
        training: `per_device_eval_batch_size` rows are scored at a time.
        precision: what the policy trains in, so that equal models give equal numbers.
    """
    path = cache_path(options.train_file)
    logps = cached_logps(path, rows, "reference", options.ref_model, options, training, precision)
    return rows.add_column("ref_chosen_logps", logps[:, 0]).add_column("ref_rejected_logps", logps[:, 1])


def cached_logps(
    path: Path,
    rows: datasets.Dataset,
    what: str,
    model: str,
    options: DataOptions,
    training: DPOTrainingArguments,
    precision: Precision,
) -> np.ndarray:
    """Return [rows, 2] log-probabilities, chosen and rejected: from the file `path`, or computed into it."""
    key = on_main(cache_key, rows, model, precision)
    logps = on_main(read_cache, path, what, key)
    if logps is None:
        say(f"{what} log-probabilities: {len(rows)} pairs under {model}")
        logps = compute(rows, model, options, training, precision)
        on_main(write_cache, path, what, key, logps)
    return logps


def cache_key(rows: datasets.Dataset, model: str, precision: Precision) -> dict:
    """Return what the numbers depend on: token ids, weights (names, sizes, dates of the files), precision."""
    ids = hashlib.sha256()
    for batch in rows.select_columns(list(IDS)).iter(1000):
        ids.update(json.dumps([batch[name] for name in IDS]).encode())
    folder = Path(whole_model(model, "model"))  # of an adapter, the merged weights
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return {
        "model": model,
        "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "token_ids": ids.hexdigest(),
        "dtype": precision[0],
        "autocast": precision[1],
    }


def read_cache(path: Path, what: str, key: dict) -> np.ndarray | None:
    """Return the cached [rows, 2] values, or None (and one line that says why) where they are not for `key`."""
    if not path.exists():
        return None
    try:
        stored = read_json(path)
        settings, logps = stored["settings"], np.array(stored["logps"], float).reshape(-1, 2)
    except (UserError, TypeError, KeyError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        say(f"{path}: damaged; computing the {what} log-probabilities again")
        return None
    changed = [name for name in key if settings.get(name) != key[name]]
    if changed:
        say(f"{path}: made with other {', '.join(changed)}; computing the {what} log-probabilities again")
        return None
    say(f"{what} log-probabilities: read from {path}")
    return logps


def write_cache(path: Path, what: str, key: dict, logps: np.ndarray) -> None:
    """Write the cache; a folder that cannot be written costs a repetition, not the run."""
    try:
        write_json(path, {"settings": key, "logps": logps.tolist()})
    except UserError as error:
        say(f"{error}; a restart computes the {what} log-probabilities again")


def compute(
    rows: datasets.Dataset, name: str, options: DataOptions, training: DPOTrainingArguments, precision: Precision
) -> np.ndarray:
    """Return [rows, 2] log-probabilities, chosen and rejected; the model is gone from memory afterwards."""
    dtype, autocast = precision
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
    shares = options.share_prefixes and may_share(model)
    model = sharded(model, dtype, training) if in_shards else model.to(training.device)
    # Rows of like length share a batch.
    order = np.argsort(rows.data.column("length").to_numpy(), kind="stable")
    size = training.per_device_eval_batch_size
    batches = share([order[i : i + size] for i in range(0, len(order), size)], even=in_shards)
    if shares:
        with _precision(training.device, autocast):
            shares = forms_agree(model, _on(training.device, [rows[0]]))
    found = []
    quiet = training.disable_tqdm or not training.should_log
    for batch in tqdm(batches, desc="log-probabilities", disable=quiet, mininterval=5):
        sequences = _on(training.device, [rows[int(i)] for i in batch])
        with torch.no_grad(), _precision(training.device, autocast):
            logps = model(**sequences, share=shares)
        found.append((batch, logps.view(2, -1).T.double().cpu().numpy()))
    if in_shards:
        free(model)
    del model
    give_memory_back()
    every = np.empty((len(rows), 2))
    for batch, logps in gather_object(found):
        every[batch] = logps
    return every


def _on(device: torch.device, rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = collate(rows)
    return {name: batch[name].to(device) for name in SEQUENCES}


def _precision(device: torch.device, autocast: bool) -> contextlib.AbstractContextManager:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast)


# --- Implicit rewards ---------------------------------------------------------------------------------------------


def implicit_rewards(
    instances: Iterable[dict],
    responses_each: int,
    encoder: Encoder,
    folder: Path,
    options: DataOptions,
    training: DPOTrainingArguments,
    precision: Precision,
) -> np.ndarray:
    """Return implicit rewards [prompts, K] of all responses; `instances` is read in the first process only."""
    file = folder / "candidates.arrow"
    on_main(lambda: write_rows(file, candidate_rows(instances, encoder)))
    rows = open_rows(file)
    names = {"policy": options.model_name_or_path, "reference": options.ref_model}
    policy, reference = (
        cached_logps(
            Path(f"{options.train_file}.candidates_{what}_logps.json"), rows, what, name, options, training, precision
        )
        for what, name in names.items()
    )
    width = responses_each + responses_each % 2
    return (options.beta * (policy - reference)).reshape(-1, width)[:, :responses_each]


def candidate_rows(instances: Iterable[dict], encoder: Encoder) -> Iterator[dict]:
    """Yield all responses two by two, as rows of which both are scored; an odd last one stands in its row twice."""
    for instance in instances:
        prompt = encoder.prompt(instance)
        last = len(instance["responses"]) - 1
        ids = [encoder.response(instance, k, encoder.max_length - len(prompt)) for k in range(last + 1)]
        for k in range(0, last + 1, 2):
            pair = ids[k], ids[min(k + 1, last)]
            yield {
                "prompt": "",
                "prompt_ids": prompt,
                "chosen_ids": pair[0],
                "rejected_ids": pair[1],
                "length": len(prompt) + max(map(len, pair)),
                "margin": 0.0,
            }
