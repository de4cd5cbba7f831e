r"""One iteration of DPO on annotated responses.

Reads   a policy, a reference model and a data file with prompts, responses and rewards. A file that also holds the
        sampled token ids (`response_ids`) is trained on these; text is encoded only where there are none.
Writes  OUTPUT_DIR: the trained model (safetensors + tokenizer), trainer_state.json (losses), settings.json.
        <data file>.reference_logps.json: log-probabilities under the reference, computed once.

    python alignment/dpo_iteration/run_dpo.py --model_name_or_path base --ref_model base \
        --train_file data_with_rewards.json --output_dir model_iter1 --loss_type rev_kl --margin_scale 4

On several GPUs: accelerate launch --config_file alignment/configs/zero3.yaml --num_processes 8 <the same>.
A killed run continues from its newest checkpoint by the same command.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import UserError, run

import datasets  # isort: skip (after common.cli, which turns telemetry off)
from accelerate import PartialState
from transformers import Trainer, TrainingArguments

from common.provenance import data_inputs, model_inputs, provenance
from common.records import sha256
from dpo_iteration import checkpoints
from dpo_iteration.data import make_encoder, make_rows, read_data
from dpo_iteration.distributed import on_main, say
from dpo_iteration.dpo import DPOTrainer
from dpo_iteration.logps import as_scorer, disable_dropout, may_share
from dpo_iteration.options import (
    DataOptions,
    DPOOptions,
    DPOTrainingArguments,
    parse,
    prepare_training,
    quit_with,
    settings_of,
    start_wandb,
)
from dpo_iteration.policy import load_policy, precision, with_adapter
from dpo_iteration.reference import add_reference_logps
from dpo_iteration.rows import collate, split_by_prompt


def main(arguments: list[str] | None = None) -> None:
    """Pairs -> token ids -> reference log-probabilities -> training -> the finished folder."""
    options, training = parse(arguments)  # first: a policy loaded later is then sharded as ZeRO-3 wants it
    data = read_data(options)
    output_dir, settings = training.output_dir, settings_of(options, training, sha256(options.train_file))
    if on_main(checkpoints.is_done, output_dir, settings):
        say(f"{output_dir}: already done")
        return
    encoder = make_encoder(options, training, data)
    lock = checkpoints.lock_work(output_dir, settings, data.settings, lambda: made_from(options, training))
    rows = make_rows(options, training, data, encoder)
    prepare_training(options, training, checkpoints.work_dir(output_dir))
    on_main(start_wandb, training)
    rows = add_reference_logps(rows, options, training, precision(options, training))
    trainer = make_trainer(options, training, *split_by_prompt(rows, options.eval_fraction, training.seed))
    train(trainer, options, output_dir)
    del lock


# --- The policy ---------------------------------------------------------------------------------------------------


def make_trainer(
    options: DPOOptions,
    training: DPOTrainingArguments,
    train_rows: datasets.Dataset,
    eval_rows: datasets.Dataset | None,
) -> DPOTrainer:
    """Return the policy, ready to be trained."""
    model = load_policy(options, training)
    disable_dropout(model)
    as_scorer(model)
    return DPOTrainer(
        beta=options.beta,
        loss_type=options.loss_type,
        share=options.share_prefixes and may_share(model),
        model=with_adapter(model, options) if options.use_lora else model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=collate,
        callbacks=[checkpoints.Checkpoints(options.save_minutes)],
    )


def train(trainer: Trainer, options: DataOptions, output_dir: str) -> None:
    """Train from the newest checkpoint on, and give the result its name."""
    checkpoint = on_main(checkpoints.newest_checkpoint, checkpoints.work_dir(output_dir))
    say(f"continuing from {checkpoint}" if checkpoint else f"training on {len(trainer.train_dataset)} pairs")
    dtype = options.save_dtype or ("bfloat16" if trainer.args.bf16 else "float32")
    if dtype == "bfloat16" and not trainer.is_deepspeed_enabled:
        say("trained in float32, saved in bfloat16: small steps are rounded away (--save_dtype float32 keeps them)")
    with checkpoints.saving(output_dir):
        trainer.train(resume_from_checkpoint=checkpoint)
        checkpoints.publish(trainer, options, output_dir, dtype)
    say(f"{output_dir}: done")


def made_from(options: DataOptions, training: TrainingArguments, libraries: tuple[str, ...] = ()) -> dict:
    """Return versions of what trains, and the hashes of both models and of the data."""
    used = {
        "accelerate": True,
        "deepspeed": training.deepspeed_plugin is not None,
        "peft": options.use_lora,
        "bitsandbytes": options.load_in_4bit,
        **dict.fromkeys(libraries, True),
    }
    models = model_inputs({"policy": options.model_name_or_path, "reference": options.ref_model})
    return provenance([name for name in used if used[name]], models + data_inputs([options.train_file]))


def guarded(main: Callable[[], None]) -> None:
    """Run `main`; of several processes only the first prints its error; after a success all leave their group."""
    try:
        main()
    except UserError as error:
        quit_with(str(error))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    run(lambda: guarded(main))
