"""The command lines of `run_dpo.py` and `run_trl.py`: the experiment's options and those of the trainers.

Every argument that `transformers.TrainingArguments` brings is in one of three tables, and a test looks for new ones:
it shapes the result and is compared when a run continues (`SHAPING`), it says how a run is watched, stored, loaded or
spread (`RUNNING`), or it is refused (`REFUSED`).
"""

import argparse
import importlib.util
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, IntervalStrategy, TrainingArguments

from common.cli import UserError, fail, first_line
from common.models import default_dtype, weights_of
from dpo_iteration.losses import LOSSES, looks_at_margin, takes_hard_labels
from dpo_iteration.pairs import CHOOSE_TYPES, LABELS


def option(default: Any, text: str, **more: object) -> Any:
    """Return a dataclass field with its help text."""
    return field(default=default, metadata={"help": text, **more})


@dataclass
class DataOptions:
    """What is learned from which pairs. The defaults are those that the published experiments share."""

    model_name_or_path: str = field(metadata={"help": "The policy to train: a folder or a hub name."})
    ref_model: str = field(metadata={"help": "The reference model: a folder or a hub name."})
    train_file: str = field(
        metadata={
            "help": "Data file (JSON) with prompts, responses and rewards; --train_dir is RLHFlow's name for it.",
            "aliases": ["--train_dir"],
        }
    )
    margin_scale: float = option(1.0, "margin = this x (reward of chosen - reward of rejected).")
    choose_type: str = option(
        "sampler",
        "Which two of a prompt's responses make its pair, see pairs.py; `sampler`: the rule of the row that the data "
        "was sampled with, max_min where the data file names none.",
        choices=["sampler", *CHOOSE_TYPES],
    )
    length_penalty: float = option(0.0, "Reward taken off per response token, for choose_type max_min_p only.")
    labels: str = option(
        "margin",
        "`margin`: the higher reward is chosen, the loss sees the margin. `sampled`: the winner is drawn with "
        "probability sigmoid(margin), the loss sees a hard label.",
        choices=list(LABELS),
    )
    label_noise: float = option(0.0, "Share of the labels that are flipped, 0 to 0.5, mixed in or drawn.")
    label_seed: int = option(0, "Seed of the labels that are drawn.")
    max_prompt_length: int | None = option(
        None,
        "Tokens of the prompt; longer ones are cut from the left, BOS stays. Default: half of max_length.",
    )
    eval_fraction: float = option(0.0, "Share of the prompts held out from training for evaluation, 0 to below 1.")
    use_lora: bool = option(False, "Train a LoRA adapter; the saved model is merged, the adapter is kept too.")
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: float = option(32.0, "Scale of the adapter (x 1/rank).")
    lora_target_modules: str = option("all-linear", "Modules to adapt, separated by commas, or all-linear.")
    load_in_4bit: bool = option(
        False,
        "QLoRA: the policy's own weights in 4 bit (NF4, by bitsandbytes) while its adapter is trained. What is saved "
        "is the model that was trained: the 4-bit weights, widened, and the adapter.",
    )
    save_dtype: str = option(
        "",
        "Type of the saved weights, float32 or bfloat16. Default: bfloat16 with --bf16, else float32. A few steps "
        "from bfloat16 weights are smaller than its spacing and would be rounded away.",
        choices=["", "float32", "bfloat16"],
    )
    save_minutes: float = option(0.0, "Minutes between checkpoints, instead of --save_steps; 0: by steps.")
    attn_implementation: str = option("sdpa", "Attention kernels: sdpa, eager, flash_attention_2.")
    share_prefixes: bool = option(
        True,
        "Compute what a batch's sequences have in common (prompts, templates) once, where the model is one of those "
        "that allow it and attn_implementation is sdpa; equal to rounding. In bfloat16 on a GPU the last bits of the "
        "gradients differ from run to run; with False they do not.",
    )


@dataclass
class DPOOptions(DataOptions):
    """What `run_dpo.py` has besides."""

    loss_type: str = option("rev_kl", "The loss, see losses.py.", choices=list(LOSSES))
    beta: float = option(0.1, "Strength of the pull towards the reference model, above 0.")
    max_length: int = option(512, "Tokens of prompt + response; longer responses are cut.")
    trust_remote_code: bool = option(False, "Run code that comes with a model. Off: such models are refused.")


@dataclass
class Defaults:
    """The defaults of this project for what the trainers' arguments hold."""

    output_dir: str = option("", "Where the trained model goes; unfinished work is in <output_dir>.partial.")
    bf16: bool = option(None, "Train in bfloat16. Default: yes on a GPU, no on a CPU.")
    learning_rate: float = option(5e-7, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = option("cosine", "Shape of the learning rate's decay.")
    num_train_epochs: float = option(2.0, "Passes over the training pairs.")
    per_device_train_batch_size: int = option(1, "Pairs per process and forward pass.")
    logging_steps: float = option(1, "Optimizer steps between log lines.")
    logging_first_step: bool = option(True, "Log the first step, whatever logging_steps is.")
    logging_nan_inf_filter: bool = option(False, "Leave it off: it hides losses that are not numbers.")
    ddp_find_unused_parameters: bool = option(False, "Every parameter has a gradient here: nothing to look for.")
    remove_unused_columns: bool = option(False, "Stays off: the rows' columns are no arguments of the model.")
    save_total_limit: int = option(1, "Checkpoints kept while training; the newest one is what a restart needs.")
    seed: int = option(42, "Seed of the pairs, the evaluation split, the order of the data and LoRA's start.")
    report_to: str = option(
        "none", "Where logs go besides trainer_state.json.", choices=["none", "wandb", "tensorboard"]
    )

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and default_dtype() == "bfloat16"
        # The flag wins over what the launcher was told.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if self.bf16 else "no"
        super().__post_init__()


@dataclass
class DPOTrainingArguments(Defaults, TrainingArguments):
    """`transformers.TrainingArguments` with the defaults of this project."""


# --- The tables of inherited arguments ----------------------------------------------------------------------------


def _names(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


SHAPING = _names(
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps optim optim_args",
    "optim_target_modules adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm per_device_train_batch_size",
    "gradient_accumulation_steps dataloader_drop_last train_sampling_strategy seed data_seed bf16 tf32",
    "full_determinism",
)
RUNNING = _names(
    # memory and speed, equal to rounding
    "gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps use_cpu dataloader_num_workers",
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor",
    "dataloader_multiprocessing_context dataloader_in_order per_device_eval_batch_size",
    # where it runs
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout",
    "fsdp fsdp_config deepspeed local_rank",
    # what is printed, logged and stored
    "output_dir logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter",
    "include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project debug",
    "skip_memory_metrics eval_strategy eval_steps eval_delay eval_on_start save_strategy save_steps",
    "save_on_each_node save_total_limit",
)
_NOTHING, _HUB, _UNTRIED = "has no effect here", "nothing is pushed to a hub", "is not supported"
REFUSED = {
    "label_smoothing_factor": f"{_NOTHING}; --label_noise mixes noise into the labels",
    "average_tokens_across_devices": f"{_NOTHING}: every pair of an optimizer step weighs the same",
    "fp16": "is not supported, use --bf16",
    "bf16_full_eval": _NOTHING,
    "fp16_full_eval": _NOTHING,
    "torch_compile": _UNTRIED,
    "torch_compile_backend": _UNTRIED,
    "torch_compile_mode": _UNTRIED,
    "use_liger_kernel": f"{_UNTRIED}: its kernels replace the forward pass",
    "liger_kernel_config": _UNTRIED,
    "use_cache": _NOTHING,
    "neftune_noise_alpha": "policy and reference must be the same function of their weights",
    "auto_find_batch_size": "would change the number of pairs of an optimizer step",
    "trackio_space_id": _NOTHING,
    "trackio_bucket_id": _NOTHING,
    "trackio_static_space_id": _NOTHING,
    "prediction_loss_only": _NOTHING,
    "eval_do_concat_batches": _NOTHING,
    "eval_use_gather_object": _NOTHING,
    "eval_accumulation_steps": _NOTHING,
    "include_for_metrics": _NOTHING,
    "batch_eval_metrics": _NOTHING,
    "save_only_model": "a restart would need the optimizer too",
    "enable_jit_checkpoint": _UNTRIED,
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "load_best_model_at_end": "the model after the last step is saved",
    "metric_for_best_model": "the model after the last step is saved",
    "greater_is_better": "the model after the last step is saved",
    "ignore_data_skip": "a run that continues must not see pairs twice",
    "restore_callback_states_from_checkpoint": _NOTHING,
    "accelerator_config": _UNTRIED,
    "parallelism_config": _UNTRIED,
    "remove_unused_columns": "the rows' columns are no arguments of the model",
    "label_names": _NOTHING,
    "length_column_name": _NOTHING,
    "do_train": _NOTHING,
    "do_eval": _NOTHING,
    "do_predict": _NOTHING,
    "resume_from_checkpoint": "a run continues by itself",
}


class Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line, and which refuses what is in `REFUSED`."""

    def error(self, message: str) -> None:
        quit_with(message, self.prog)

    def parse_known_args(self, *arguments, **options) -> tuple[argparse.Namespace, list[str]]:
        """Parse, then refuse every argument of `REFUSED` that is not at its default."""
        found, unknown = super().parse_known_args(*arguments, **options)
        for name, why in REFUSED.items():
            if getattr(found, name, None) != self.get_default(name):
                raise UserError(f"--{name}: {why}")
        return found, unknown


def quit_with(message: str, program: str | None = None) -> None:
    """End a process with exit code 2 and, in the first process only, one line."""
    if os.environ.get("RANK", "0") == "0":
        fail(message, program)
    raise SystemExit(2)


def parse(arguments: list[str] | None = None) -> tuple[DPOOptions, DPOTrainingArguments]:
    """Read and check the command line of `run_dpo.py`."""
    options, training = parse_into((DPOOptions, DPOTrainingArguments), arguments)
    check(options, training)
    loss = options.loss_type
    if options.labels == "sampled" and not takes_hard_labels(loss):
        raise UserError(f"--labels sampled: --loss_type {loss} is not finite for a hard label")
    if options.labels == "margin" and options.label_noise and not looks_at_margin(loss):
        raise UserError(
            f"--label_noise: --loss_type {loss} does not look at the margin; --labels sampled draws labels"
        )
    return options, training


def parse_into(kinds: tuple, arguments: list[str] | None) -> tuple:
    """Read a command line into instances of these dataclasses."""
    parser = Parser(
        kinds,
        description=sys.modules["__main__"].__doc__,
        formatter_class=type("", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}),
        allow_abbrev=False,
    )
    try:
        *found, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError, KeyError, TypeError) as error:
        raise UserError(first_line(error)) from None
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(found)


def check(options: DataOptions, training: TrainingArguments) -> None:
    """Raise `UserError` for values that cannot be meant; `options` also has `max_length` and `beta`."""
    if options.max_prompt_length is None:
        options.max_prompt_length = options.max_length // 2
    four_bit = options.load_in_4bit
    wrong = {
        "--output_dir: is required": not training.output_dir,
        "--beta: must be a number above 0": not 0 < options.beta < math.inf,
        "--margin_scale: must be a number, 0 or more": not 0 <= options.margin_scale < math.inf,
        "--label_noise: must be from 0 to 0.5": not 0 <= options.label_noise <= 0.5,
        "--eval_fraction: must be from 0 to below 1": not 0 <= options.eval_fraction < 1,
        f"--eval_strategy {training.eval_strategy.value}: needs held-out prompts, --eval_fraction above 0": (
            training.eval_strategy != IntervalStrategy.NO and options.eval_fraction == 0
        ),
        "--eval_on_start: needs held-out prompts, --eval_fraction above 0": (
            training.eval_on_start and options.eval_fraction == 0
        ),
        "--save_strategy best: the model after the last step is saved": training.save_strategy == "best",
        "--train_sampling_strategy batch_rebalance: is not supported": (
            training.train_sampling_strategy == "batch_rebalance"
        ),
        "--max_prompt_length: must be above 0": options.max_prompt_length <= 0,
        "--max_prompt_length: must be below --max_length": options.max_prompt_length >= options.max_length,
        "--length_penalty: is for --choose_type max_min_p, which needs one that is not 0": (
            (options.choose_type == "max_min_p") != (options.length_penalty != 0)
        ),
        "--length_penalty: must be a number": not math.isfinite(options.length_penalty),
        "--seed: must be from 0 to 4294967295": not 0 <= training.seed < 2**32,
        "--learning_rate: must be a number, 0 or more": not 0 <= training.learning_rate < math.inf,
        "--num_train_epochs: must be above 0": not 0 < training.num_train_epochs < math.inf,
        "--per_device_train_batch_size: must be above 0": training.per_device_train_batch_size <= 0,
        "--per_device_eval_batch_size: must be above 0": training.per_device_eval_batch_size <= 0,
        "--gradient_accumulation_steps: must be above 0": training.gradient_accumulation_steps <= 0,
        "--logging_steps: must be above 0": training.logging_steps <= 0,
        "--save_steps: must be above 0": training.save_steps <= 0,
        "--save_minutes: must be a number, 0 or more": not 0 <= options.save_minutes < math.inf,
        "--lora_r: must be above 0": options.lora_r <= 0,
        "--load_in_4bit: needs --use_lora True, 4-bit weights cannot be trained": four_bit and not options.use_lora,
        "--load_in_4bit: the package bitsandbytes is not installed": (
            four_bit and importlib.util.find_spec("bitsandbytes") is None
        ),
        "--load_in_4bit: DeepSpeed and FSDP cannot shard 4-bit weights": four_bit
        and (training.deepspeed_plugin is not None or bool(training.fsdp)),
        "--save_dtype float32: with --bf16 DeepSpeed's weights are bfloat16 already": (
            options.save_dtype == "float32" and training.bf16 and training.deepspeed_plugin is not None
        ),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(message)
    for package in training.report_to:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--report_to {package}: the package {package} is not installed")


def settings_of(options: DataOptions, training: TrainingArguments, data_sha256: str, more: tuple = ()) -> dict:
    """Return everything that shapes the result, as plain JSON values; `more` names further training arguments."""
    watched = ("save_minutes", "share_prefixes")
    chosen = {name: value for name, value in vars(options).items() if name not in watched}
    shaping = {name: getattr(training, name) for name in (*sorted(SHAPING), *more)}
    shaping = {name: getattr(value, "value", value) for name, value in shaping.items()}
    models = {"policy": options.model_name_or_path, "reference": options.ref_model}
    made_from = {"train_sha256": data_sha256, "weights": weights_of(models)}
    return {**chosen, **made_from, **shaping, "num_processes": training.world_size}


def prepare_training(options: DataOptions, training: TrainingArguments, work_dir: Path) -> None:
    """Point the Trainer at its working folder and set what follows from the other options."""
    training.run_name = training.run_name or Path(training.output_dir).name
    training.output_dir = str(work_dir)
    training.dataloader_pin_memory &= training.device.type == "cuda"
    # A plain process uses one GPU: DataParallel cannot run the scorer. `accelerate launch` uses all.
    training._n_gpu = min(training.n_gpu, 1)
    if options.eval_fraction > 0 and training.eval_strategy == IntervalStrategy.NO:
        training.eval_strategy = IntervalStrategy.EPOCH
    if options.save_minutes:
        training.save_strategy = IntervalStrategy.NO  # checkpoints.Checkpoints saves


def start_wandb(training: TrainingArguments) -> None:
    """With `--report_to wandb`: start its run now, so that a server out of reach ends the training before it begins.

    Later the client sends in the background and waits for no answer. The files are beside the model's folder.
    """
    if "wandb" not in training.report_to:
        return
    os.environ.setdefault("WANDB_SILENT", "true")  # an error is one line, and it is ours
    import wandb

    folder = Path(training.output_dir).parent
    settings = wandb.Settings(init_timeout=30, root_dir=os.environ.get("WANDB_DIR", str(folder)))
    project = os.environ.get("WANDB_PROJECT", "huggingface")
    try:
        started = wandb.init(project=project, name=training.run_name, settings=settings)
    except wandb.errors.Error as error:
        raise UserError(
            f"--report_to wandb: {first_line(error)}; WANDB_MODE=offline keeps the log in {folder / 'wandb'}"
        ) from None
    print(f"wandb: {started.url or started.dir}", flush=True)
