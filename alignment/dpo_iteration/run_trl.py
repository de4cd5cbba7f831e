r"""One iteration of preference training by TRL's own DPOTrainer: its losses and options, our pairs.

Reads and writes the same files as run_dpo.py and continues a killed run in the same way. Its pairs are the same too,
token id by token id. The margin of the rewards is not used: TRL's losses see which response was chosen, so
`--labels sampled` is the choice that lets the rewards' size count. `--loss_type` and the other flags of
trl.DPOConfig are TRL's; so is its way with a last, smaller batch and with the reference model, which stays in memory
unless `--precompute_ref_log_probs True`.

    python alignment/dpo_iteration/run_trl.py --model_name_or_path base --ref_model base \
        --train_file data_with_rewards.json --output_dir model_iter1 --loss_type sigmoid --beta 0.1

On several GPUs: accelerate launch --config_file alignment/configs/zero3.yaml --num_processes 8 <the same>.
"""

import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import UserError, first_line, run

import datasets  # isort: skip (after common.cli, which turns telemetry off)
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import DPOConfig, DPOTrainer

from common.models import load_causal_lm
from common.records import sha256
from dpo_iteration import checkpoints
from dpo_iteration.data import make_encoder, make_rows, read_data
from dpo_iteration.distributed import on_main, say
from dpo_iteration.options import (
    DataOptions,
    Defaults,
    check,
    parse_into,
    prepare_training,
    settings_of,
    start_wandb,
)
from dpo_iteration.policy import load_policy, lora_config, precision
from dpo_iteration.rows import split_by_prompt
from dpo_iteration.run_dpo import guarded, made_from, train

# What DPOConfig has that says how a run is spread or stored; all the rest of its own shapes the result.
TRL_RUNNING = {"dataset_num_proc", "precompute_ref_batch_size", "activation_offloading"}
TRL_REFUSED = {
    "model_init_kwargs": "has no effect here; --attn_implementation and --bf16 say how models are loaded",
    "pad_token": "has no effect here: padding is neither attended to nor predicted",
    "dataset_num_proc": "has no effect here: the rows are token ids already",
}


@dataclass
class TRLArguments(Defaults, DPOConfig):
    """`trl.DPOConfig` with the defaults of this project."""


class OnIds(DPOTrainer):
    """TRL's trainer on rows that are token ids already."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: object) -> datasets.Dataset:
        """Return the rows as they are: TRL would encode texts here, and put EOS behind each."""
        return dataset


def main(arguments: list[str] | None = None) -> None:
    """Pairs -> token ids -> TRL -> the finished folder."""
    options, training = parse(arguments)
    data = read_data(options)
    output_dir = training.output_dir
    settings = settings_of(options, training, sha256(options.train_file), more=trl_shaping())
    exactly = True  # some of TRL's losses depend on how a step is divided
    if on_main(checkpoints.is_done, output_dir, settings, exactly):
        say(f"{output_dir}: already done")
        return
    encoder = make_encoder(options, training, data)
    work = output_dir, settings, data.settings, lambda: made_from(options, training, ("trl",)), exactly
    lock = checkpoints.lock_work(*work)
    rows = make_rows(options, training, data, encoder)
    prepare_training(options, training, checkpoints.work_dir(output_dir))
    on_main(start_wandb, training)
    both = split_by_prompt(rows, options.eval_fraction, training.seed)
    try:
        trainer = make_trainer(options, training, encoder.tokenizer, *both)
    except UserError:
        on_main(checkpoints.give_up, output_dir)
        raise
    train(trainer, options, output_dir)
    del lock


def parse(arguments: list[str] | None) -> tuple[DataOptions, TRLArguments]:
    """Read and check the command line; the options get what `run_dpo.py` has among its own."""
    options, training = parse_into((DataOptions, TRLArguments), arguments)
    for name, why in TRL_REFUSED.items():
        if getattr(training, name) is not None:
            raise UserError(f"--{name}: {why}")
    known = re.findall(r"`'(\w+)'`", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
    for loss in training.loss_type:
        if known and loss not in known:  # TRL would say so at its first step
            raise UserError(f"--loss_type {loss}: TRL has {', '.join(known)}")
    if options.labels == "margin" and options.label_noise:
        raise UserError("--label_noise: TRL's losses do not look at the margin; --labels sampled draws labels")
    training.max_length = training.max_length or 512
    options.max_length, options.beta = training.max_length, training.beta
    options.trust_remote_code = training.trust_remote_code
    check(options, training)
    return options, training


def trl_shaping() -> tuple[str, ...]:
    """Return the names of DPOConfig's own fields that shape the result."""
    inherited = {one.name for one in fields(TrainingArguments)}
    own = {one.name for one in fields(DPOConfig)} - inherited - TRL_RUNNING - TRL_REFUSED.keys()
    return tuple(sorted(own - {"trust_remote_code"}))


def make_trainer(
    options: DataOptions,
    training: TRLArguments,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: datasets.Dataset,
    eval_rows: datasets.Dataset | None,
) -> OnIds:
    """Return TRL's trainer with policy and reference, ready to train."""
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    policy = load_policy(options, training)
    reference = load_causal_lm(
        options.ref_model,
        "--ref_model",
        precision(options, training)[0],
        options.trust_remote_code,
        attn_implementation=options.attn_implementation,
    )
    try:
        return OnIds(
            model=policy,
            ref_model=reference,
            args=training,
            train_dataset=train_rows.select_columns(columns),
            eval_dataset=eval_rows and eval_rows.select_columns(columns),
            processing_class=tokenizer,
            peft_config=lora_config(options) if options.use_lora else None,
            callbacks=[checkpoints.Checkpoints(options.save_minutes)],
        )
    except (ValueError, NotImplementedError, ImportError) as error:  # TRL's own checks of its options
        raise UserError(first_line(error)) from None


if __name__ == "__main__":
    run(lambda: guarded(main))
