"""The policy as it is loaded for training: its precision, its adapter, 4-bit weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TrainingArguments, set_seed

from common.cli import UserError, first_line
from common.models import load_causal_lm, load_config, make_savable
from dpo_iteration.options import DataOptions

if TYPE_CHECKING:  # seconds, and only an adapter needs it
    from peft import LoraConfig, PeftModel


def precision(options: DataOptions, training: TrainingArguments) -> tuple[str, bool]:
    """Return (dtype of the weights while training, whether autocast runs above them).

    Updates of 1e-6 vanish in bfloat16 weights: without DeepSpeed, which keeps its own float32 copy, the trained
    weights stay in float32 and autocast does the arithmetic in bfloat16. LoRA's frozen weights need no such care.
    """
    if not training.bf16:
        return "float32", False
    if training.deepspeed_plugin is not None:
        return "bfloat16", False
    return ("bfloat16" if options.use_lora else "float32"), True


def load_policy(options: DataOptions, training: TrainingArguments) -> PreTrainedModel:
    """Return the policy as it stands before training."""
    set_seed(training.seed)  # LoRA's first weights
    dtype, _ = precision(options, training)
    more = {"attn_implementation": options.attn_implementation}
    if options.load_in_4bit:
        more |= {"quantization_config": four_bit_config(dtype), "device_map": {"": training.device}}
    model = load_causal_lm(
        options.model_name_or_path, "--model_name_or_path", dtype, options.trust_remote_code, **more
    )
    make_savable(model)
    return model


def with_adapter(model: PreTrainedModel, options: DataOptions) -> PeftModel:
    """Return the model with a fresh LoRA adapter, the only part that is trained."""
    from peft import get_peft_model

    try:
        return get_peft_model(model, lora_config(options))
    except ValueError as error:
        raise UserError(f"--lora_target_modules {options.lora_target_modules}: {first_line(error)}") from None


def check_adapter(options: DataOptions) -> None:
    """Raise `UserError` for an adapter that the policy has no modules for: tried on a model without weights."""
    config = load_config(options.model_name_or_path, "--model_name_or_path", options.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=options.trust_remote_code)
        with_adapter(model, options)


def lora_config(options: DataOptions) -> LoraConfig:
    """Return the adapter that the flags ask for."""
    from peft import LoraConfig

    targets = options.lora_target_modules
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type="CAUSAL_LM",
    )


def four_bit_config(dtype: str) -> BitsAndBytesConfig:
    """Return how bitsandbytes holds a policy in 4 bit: NF4, its scales quantized too (QLoRA, arXiv 2305.14314)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def load_base(options: DataOptions) -> PreTrainedModel:
    """Return the model that an adapter was trained on, in float32: of 4-bit weights, what they stand for.

    It stays off the GPU, where the trained policy still is.
    """
    four_bit = {}
    if options.load_in_4bit:
        four_bit = {"quantization_config": four_bit_config("float32"), "device_map": {"": "cpu"}}
    base = load_causal_lm(
        options.model_name_or_path, "--model_name_or_path", "float32", options.trust_remote_code, **four_bit
    )
    return base.dequantize() if four_bit else base
