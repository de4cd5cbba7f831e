"""The command line of `run_dpo.py`: the experiment's options and those of `transformers.TrainingArguments`."""

import argparse
import importlib.util
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, IntervalStrategy, TrainingArguments

from common.cli import UserError, fail, first_line
from common.models import default_dtype
from dpo_iteration.dpo import LOSSES
from dpo_iteration.pairs import CHOOSE_TYPES


def option(default, text: str, **more):
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text, **more})


@dataclass
class DPOOptions:
    """What is learned from which pairs. The defaults are those that the published experiments share."""

    model_name_or_path: str = field(metadata={"help": "The policy to train: a folder or a hub name."})
    ref_model: str = field(metadata={"help": "The reference model: a folder or a hub name."})
    train_dir: str = field(metadata={"help": "Data file (JSON) with prompts, responses and rewards."})
    loss_type: str = option("rev_kl", "The loss, see dpo.py.", choices=list(LOSSES))
    beta: float = option(0.1, "Strength of the pull towards the reference model, above 0.")
    margin_scale: float = option(1.0, "margin = this x (reward of chosen - reward of rejected).")
    choose_type: str = option(
        "sampler",
        "Which two of a prompt's responses make its pair, see pairs.py; `sampler`: the rule of the row that the data "
        "was sampled with, max_min where the data file names none.",
        choices=["sampler", *CHOOSE_TYPES],
    )
    length_penalty: float = option(0.0, "Reward taken off per response token, for choose_type max_min_p only.")
    max_length: int = option(512, "Tokens of prompt + response; longer responses are cut.")
    max_prompt_length: int | None = option(
        None,
        "Tokens of the prompt; longer ones are cut from the left, BOS stays. Default: half of max_length.",
    )
    eval_fraction: float = option(0.0, "Share of the prompts held out from training for evaluation, 0 to below 1.")
    use_lora: bool = option(False, "Train a LoRA adapter; the saved model is merged, the adapter is kept too.")
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: float = option(32.0, "Scale of the adapter (x 1/rank).")
    lora_target_modules: str = option("all-linear", "Modules to adapt, separated by commas, or all-linear.")
    save_dtype: str = option(
        "",
        "Type of the saved weights, float32 or bfloat16. Default: bfloat16 with --bf16, else float32. A few steps "
        "from bfloat16 weights are smaller than its spacing and would be rounded away.",
        choices=["", "float32", "bfloat16"],
    )
    attn_implementation: str = option("sdpa", "Attention kernels: sdpa, eager, flash_attention_2.")
    trust_remote_code: bool = option(False, "Run code that comes with a model. Off: such models are refused.")

    def __post_init__(self) -> None:
        if self.max_prompt_length is None:
            self.max_prompt_length = self.max_length // 2


@dataclass
class DPOTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults of this project."""

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
    save_total_limit: int = option(1, "Checkpoints kept while training; the newest one is what a restart needs.")
    seed: int = option(42, "Seed of the pairs, the evaluation split, the order of the data and LoRA's start.")
    share_prefixes: bool = option(
        True,
        "Compute what a batch's sequences have in common (prompts, templates) once, where the model is one of those "
        "that allow it and attn_implementation is sdpa; equal to rounding.",
    )
    report_to: str = option(
        "none", "Where logs go besides trainer_state.json.", choices=["none", "wandb", "tensorboard"]
    )

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and default_dtype() == "bfloat16"
        # The flag wins over what the launcher was told.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if self.bf16 else "no"
        self.remove_unused_columns = False  # our columns are no arguments of the model's forward
        super().__post_init__()


class Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line."""

    def error(self, message: str) -> None:
        quit_with(message, self.prog)


def quit_with(message: str, program: str | None = None) -> None:
    """Ends a process with exit code 2 and, in the first process only, one line."""
    if os.environ.get("RANK", "0") == "0":
        fail(message, program)
    raise SystemExit(2)


def parse(arguments: list[str] | None = None) -> tuple[DPOOptions, DPOTrainingArguments]:
    """Reads and checks the command line."""
    parser = Parser(
        (DPOOptions, DPOTrainingArguments),
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    try:
        options, training, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError, KeyError) as error:
        raise UserError(str(error).strip().split("\n")[0]) from None
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}")
    check(options, training)
    return options, training


def check(options: DPOOptions, training: DPOTrainingArguments) -> None:
    """Raises `UserError` for values that cannot be meant."""
    wrong = {
        "--output_dir: is required": not training.output_dir,
        "--beta: must be a number above 0": not 0 < options.beta < math.inf,
        "--margin_scale: must be a number, 0 or more": not 0 <= options.margin_scale < math.inf,
        "--eval_fraction: must be from 0 to below 1": not 0 <= options.eval_fraction < 1,
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
        "--save_only_model: a restart would need the optimizer too": training.save_only_model,
        "--lora_r: must be above 0": options.lora_r <= 0,
        "--save_dtype float32: with --bf16 DeepSpeed's weights are bfloat16 already": (
            options.save_dtype == "float32" and training.bf16 and training.deepspeed_plugin is not None
        ),
        "--fp16: is not supported, use --bf16": training.fp16,
        "--resume_from_checkpoint: a run continues by itself": training.resume_from_checkpoint is not None,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(message)
    for package in training.report_to:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--report_to {package}: the package {package} is not installed")


# The training arguments that shape the result; the others say how a run is watched, saved or loaded.
SHAPING = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "seed",
    "data_seed",
    "bf16",
)


def settings_of(options: DPOOptions, training: DPOTrainingArguments, data_sha256: str) -> dict:
    """Everything that shapes the result, as plain JSON values."""
    shaping = {name: getattr(training, name) for name in SHAPING}
    shaping = {name: getattr(value, "value", value) for name, value in shaping.items()}
    return {**vars(options), "train_sha256": data_sha256, **shaping, "num_processes": training.world_size}


def prepare_training(training: DPOTrainingArguments, work_dir: Path, evaluates: bool) -> None:
    """Points the Trainer at its working folder and sets what follows from the other options."""
    training.run_name = training.run_name or Path(training.output_dir).name
    training.output_dir = str(work_dir)
    training.dataloader_pin_memory &= training.device.type == "cuda"
    # A plain process uses one GPU: DataParallel cannot run the scorer. `accelerate launch` uses all.
    training._n_gpu = min(training.n_gpu, 1)
    if evaluates and training.eval_strategy == "no":
        training.eval_strategy = IntervalStrategy.EPOCH


def start_wandb(training: DPOTrainingArguments) -> None:
    """With `--report_to wandb`: starts its run now, so that a server out of reach ends the training before it begins.

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
