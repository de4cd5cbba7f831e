"""One iteration of DPO on annotated responses.

Reads   a policy, a reference model and a data file with prompts, responses and rewards.
Writes  OUTPUT_DIR: the trained model (safetensors + tokenizer), trainer_state.json (losses), settings.json.
        <data file>.reference_logps.json: log-probabilities under the reference, computed once.

    python alignment/dpo_iteration/run_dpo.py --model_name_or_path base --ref_model base \
        --train_dir data_with_rewards.json --output_dir model_iter1 --loss_type rev_kl --margin_scale 4

On several GPUs: accelerate launch --config_file alignment/configs/zero3.yaml --num_processes 8 <the same>.
A killed run continues from its newest checkpoint by the same command.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import UserError, run
from common.models import (
    check_same_vocabulary,
    context_length,
    load_causal_lm,
    load_config,
    load_tokenizer,
)
from common.provenance import data_inputs, model_inputs, provenance
from common.records import read_records, sha256
from dpo_iteration import checkpoints
from dpo_iteration.distributed import on_main, say
from dpo_iteration.dpo import DPOTrainer
from dpo_iteration.implicit import add_implicit_rewards
from dpo_iteration.options import parse, prepare_training, quit_with, settings_of, start_wandb
from dpo_iteration.pairs import CHOOSE_TYPES, choose_all
from dpo_iteration.reference import add_reference_logps
from dpo_iteration.response_logps import as_scorer, disable_dropout, may_share
from dpo_iteration.rows import build_rows, collate, split_by_prompt


def main(arguments: list[str] | None = None) -> None:
    """Pairs -> token ids -> reference log-probabilities -> training -> the finished folder."""
    options, training = parse(arguments)  # first: a policy loaded later is then sharded as ZeRO-3 wants it
    instances, data_settings = read_data(options)
    output_dir = training.output_dir
    settings = settings_of(options, training, sha256(options.train_dir))
    if on_main(checkpoints.is_done, output_dir, settings):
        say(f"{output_dir}: already done")
        return
    if options.choose_type == "implicit_max_min":
        tokenizer, _ = checked_models(options)
        instances = add_implicit_rewards(instances, tokenizer, options, training, *precision(options, training))
    rows = make_rows(options, instances, training.seed)
    lock = lock_work(output_dir, settings, data_settings, lambda: made_from(options, training))
    prepare_training(training, checkpoints.work_dir(output_dir), options.eval_fraction > 0)
    on_main(start_wandb, training)
    rows = add_reference_logps(rows, options, training, *precision(options, training))
    trainer = make_trainer(options, training, *split_by_prompt(rows, options.eval_fraction, training.seed))
    checkpoint = on_main(checkpoints.newest_checkpoint, checkpoints.work_dir(output_dir))
    say(f"continuing from {checkpoint}" if checkpoint else f"training on {len(trainer.train_dataset)} pairs")
    with checkpoints.saving(output_dir):
        trainer.train(resume_from_checkpoint=checkpoint)
        checkpoints.publish(
            trainer, options, output_dir, options.save_dtype or ("bfloat16" if training.bf16 else "float32")
        )
    del lock
    say(f"{output_dir}: done")


def read_data(options) -> tuple[list[dict], dict]:
    """Instances and settings of the data file, checked; a choice that is left to the sampler is looked up there."""
    if options.choose_type == "sampler":
        _, data_settings = read_records(options.train_dir)
        options.choose_type = (data_settings.get("generate") or {}).get("choose_type") or "max_min"
        if options.choose_type not in CHOOSE_TYPES:
            raise UserError(f"{options.train_dir}: its sampler's choose_type {options.choose_type!r} is unknown")
    needed = ("responses", "rewards") + (("pairs",) if options.choose_type == "mixed_max_min" else ())
    return read_records(options.train_dir, needed)


def checked_models(options) -> tuple:
    """The tokenizer, and how many tokens the models read (None: they do not say); refuses two that do not fit."""
    names = {"--model_name_or_path": options.model_name_or_path, "--ref_model": options.ref_model}
    contexts = [context_length(load_config(name, what, options.trust_remote_code)) for what, name in names.items()]
    tokenizer, reference = (load_tokenizer(name, what, options.trust_remote_code) for what, name in names.items())
    check_same_vocabulary(tokenizer, reference)
    return tokenizer, min((c for c in contexts if c), default=None)


def make_rows(options, instances: list[dict], seed: int) -> list[dict]:
    """Chooses the pairs and tokenizes them; refuses, before a model is loaded, what cannot be trained on."""
    tokenizer, limit = checked_models(options)
    pairs, dropped = choose_all(instances, options.train_dir, options.choose_type, seed, options.length_penalty)
    rows, counts = build_rows(tokenizer, pairs, options.margin_scale, options.max_prompt_length, options.max_length)
    report(instances, rows, dropped, counts)
    if not rows:
        raise UserError(f"{options.train_dir}: no prompt has two different responses with unequal rewards")
    if not all(row["prompt_ids"] for row in rows):
        raise UserError(f"{options.train_dir}: a prompt has no tokens, so nothing predicts its responses")
    if options.eval_fraction and len({row["prompt"] for row in rows}) < 2:
        raise UserError(f"--eval_fraction {options.eval_fraction}: there is only one prompt")
    longest = max(len(row["prompt_ids"] + max(row["chosen_ids"], row["rejected_ids"], key=len)) for row in rows)
    if limit is not None and longest > limit:
        raise UserError(f"--max_length {options.max_length}: a row has {longest} tokens, the models read {limit}")
    return rows


def report(instances: list[dict], rows: list[dict], dropped: Counter, counts: Counter) -> None:
    """Prints what became of the prompts."""
    for why, number in dropped.items():
        counts[f"prompts dropped: {why}"] = number
    details = "; ".join(f"{number} {what}" for what, number in counts.items())
    say(f"{len(instances)} prompts -> {len(rows)} pairs; {details}")
    if not any("stop_reasons" in instance for instance in instances):
        say("the data has no stop_reasons: every response is taken to have ended by itself, and gets EOS")


def precision(options, training) -> tuple[str, bool]:
    """(dtype of the weights while training, whether autocast runs above them).

    Updates of 1e-6 vanish in bfloat16 weights: without DeepSpeed, which keeps its own float32 copy, the trained
    weights stay in float32 and autocast does the arithmetic in bfloat16. LoRA's frozen weights need no such care.
    """
    if not training.bf16:
        return "float32", False
    if training.deepspeed_plugin is not None:
        return "bfloat16", False
    return ("bfloat16" if options.use_lora else "float32"), True


def make_trainer(options, training, train_rows: list[dict], eval_rows: list[dict]) -> DPOTrainer:
    """The policy, ready to be trained."""
    from transformers import set_seed

    set_seed(training.seed)  # LoRA's first weights
    model = load_causal_lm(
        options.model_name_or_path,
        "--model_name_or_path",
        precision(options, training)[0],
        trust_remote_code=options.trust_remote_code,
        attn_implementation=options.attn_implementation,
    )
    checkpoints.make_savable(model)
    disable_dropout(model)
    as_scorer(model)
    return DPOTrainer(
        beta=options.beta,
        loss_type=options.loss_type,
        share=training.share_prefixes and may_share(model),
        model=with_adapter(model, options) if options.use_lora else model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows or None,
        data_collator=collate,
        callbacks=[checkpoints.NoCheckpointAtTheEnd()],
    )


def with_adapter(model, options):
    """The model with a fresh LoRA adapter, the only part that is trained."""
    from peft import LoraConfig, get_peft_model

    targets = options.lora_target_modules
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules {targets}: {str(error).splitlines()[0]}") from None


def lock_work(*work):
    """Opens the working folder in the first process; the lock is held as long as the result is."""
    locks = []
    on_main(lambda: locks.append(checkpoints.open_work(*work)))
    return locks


def made_from(options, training) -> dict:
    """Versions of what trains, and the hashes of both models and of the data."""
    used = {"accelerate": True, "deepspeed": training.deepspeed_plugin is not None, "peft": options.use_lora}
    models = model_inputs({"policy": options.model_name_or_path, "reference": options.ref_model})
    return provenance([name for name in used if used[name]], models + data_inputs([options.train_dir]))


def guarded() -> None:
    """`main`, where of several processes only the first prints its error."""
    try:
        main()
    except UserError as error:
        quit_with(str(error))


if __name__ == "__main__":
    run(guarded)
