"""From the data file to tokenized rows: which pairs, which ids, what is refused before a model is loaded."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import TrainingArguments

from common.adapters import whole_model
from common.cli import UserError
from common.models import (
    check_same_vocabulary,
    context_length,
    load_config,
    load_tokenizer,
    tokenizer_fingerprint,
)
from common.record_stream import RecordStream
from common.records import check_response_ids
from dpo_iteration import checkpoints
from dpo_iteration.distributed import on_main, say, whole_models
from dpo_iteration.options import DataOptions
from dpo_iteration.pairs import CHOOSE_TYPES, choose_all
from dpo_iteration.policy import check_adapter, precision
from dpo_iteration.reference import implicit_rewards
from dpo_iteration.rows import Encoder, build_rows, open_rows, write_rows


def read_data(options: DataOptions) -> RecordStream:
    """Return the data file, checked; a choice of pairs that is left to the sampler is looked up there."""
    needed = ("responses", "rewards")
    data = on_main(RecordStream, options.train_file, needed)
    if options.choose_type == "sampler":
        options.choose_type = data.settings.get("generate", {}).get("choose_type") or "max_min"
        if options.choose_type not in CHOOSE_TYPES:
            raise UserError(f"{options.train_file}: its sampler's choose_type {options.choose_type!r} is unknown")
    if options.choose_type == "mixed_max_min":  # it looks at the component that a response came from
        return on_main(RecordStream, options.train_file, (*needed, "pairs"))
    return data


def make_encoder(options: DataOptions, training: TrainingArguments, data: RecordStream) -> Encoder:
    """Return what turns the data into token ids; refuse, before anything is made, two models that do not fit."""
    names = {"--model_name_or_path": options.model_name_or_path, "--ref_model": options.ref_model}
    with whole_models(training):  # an adapter is merged once, by the first process
        for what, name in names.items():
            on_main(whole_model, name, what, options.trust_remote_code)
        if options.use_lora:
            on_main(check_adapter, options)
    trust = options.trust_remote_code
    models = {
        f"{what} {name}": (load_config(name, what, trust), load_tokenizer(name, what, trust))
        for what, name in names.items()
    }
    check_same_vocabulary(models)
    config, tokenizer = next(iter(models.values()))
    if why := data.why_not_ids_of(tokenizer_fingerprint(tokenizer)):
        say(f"{options.train_file}: {why}; the responses' text is encoded")
    contexts = [context_length(*model) for model in models.values()]
    return Encoder(
        tokenizer,
        options.max_prompt_length,
        options.max_length,
        sampled=not why,
        vocabulary=config.get_text_config().vocab_size,
        context=min((c for c in contexts if c), default=None),
    )


def instances(data: RecordStream, encoder: Encoder, implicit: np.ndarray | None = None) -> Iterator[dict]:
    """Yield the instances of the data file as training uses them.

    Args:
        implicit: [prompts, K], their implicit rewards.
    """
    for row, instance in enumerate(data):
        if not encoder.sampled:
            instance.pop("response_ids", None)
        else:
            check_response_ids(f"{data.path}: row {row}", instance, encoder.vocabulary)
        yield instance if implicit is None else {**instance, "implicit_rewards": implicit[row].tolist()}


def make_rows(
    options: DataOptions, training: TrainingArguments, data: RecordStream, encoder: Encoder
) -> datasets.Dataset:
    """Choose the pairs and tokenize them; what cannot be trained on is refused before a model is loaded."""
    folder, implicit = checkpoints.work_dir(training.output_dir), None
    if options.choose_type == "implicit_max_min":
        source = instances(data, encoder)
        scored = source, data.responses_each, encoder, folder, options, training, precision(options, training)
        implicit = implicit_rewards(*scored)
    encoder.counts.clear()

    def write() -> None:
        try:
            _write_rows(options, training, data, encoder, implicit, folder / "rows.arrow")
        except UserError:
            checkpoints.give_up(training.output_dir)
            raise

    on_main(write)
    return open_rows(folder / "rows.arrow")


def _write_rows(
    options: DataOptions,
    training: TrainingArguments,
    data: RecordStream,
    encoder: Encoder,
    implicit: np.ndarray | None,
    path: Path,
) -> None:
    dropped: Counter = Counter()
    pairs = choose_all(
        instances(data, encoder, implicit),
        options.train_file,
        options.choose_type,
        training.seed,
        options.length_penalty,
        label_seed=options.label_seed if options.labels == "sampled" else None,
        margin_scale=options.margin_scale,
        label_noise=options.label_noise,
        dropped=dropped,
    )
    count = write_rows(path, build_rows(encoder, pairs, options.margin_scale, options.label_noise))
    report(data, count, dropped, encoder)
    if not count:
        raise UserError(f"{options.train_file}: no prompt has two different responses with unequal rewards")
    rows = open_rows(path)
    if pc.min(pc.list_value_length(rows.data.column("prompt_ids"))).as_py() == 0:
        raise UserError(f"{options.train_file}: a prompt has no tokens, so nothing predicts its responses")
    if options.eval_fraction and len(rows.unique("prompt")) < 2:
        raise UserError(f"--eval_fraction {options.eval_fraction}: there is only one prompt")
    longest = pc.max(rows.data.column("length")).as_py()
    if encoder.context is not None and longest > encoder.context:
        raise UserError(
            f"--max_length {options.max_length}: a row has {longest} tokens, the models read {encoder.context}"
        )


def report(data: RecordStream, count: int, dropped: Counter, encoder: Encoder) -> None:
    """Print what became of the prompts."""
    counts = {**encoder.counts, **{f"prompts dropped: {why}": number for why, number in dropped.items()}}
    details = "; ".join(f"{number} {what}" for what, number in counts.items())
    say(f"{data.count} prompts -> {count} pairs; {details}")
    if not encoder.knows_ends:
        say("the data has no stop_reasons: every response is taken to have ended by itself, and gets EOS")
