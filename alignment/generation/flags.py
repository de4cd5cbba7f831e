"""What the scripts that sample share of their command lines: which prompts, and what samples from them."""

import argparse
from pathlib import Path

from common.cli import Parser, UserError, fraction, positive_int
from common.models import context_length
from common.records import sha256
from generation.prompts import TEMPLATES, Prompt, load_prompts

# With these, and with a slice, a data set gives the same prompts again.
PROMPT_SETTINGS = ("dataset_key", "template", "max_prompt_characters", "max_input_length")


def add_prompt_flags(p: Parser) -> None:
    """How rows of a data set become prompts."""
    p.add("--dataset_split", "split of a data set", default="train")
    p.add("--dataset_key", "field that holds the prompt (default: prompt, messages or context_messages)")
    p.add("--template", "what is put around the prompt", choices=sorted(TEMPLATES), default="none")
    p.add("--max_prompt_characters", "leave out templated prompts with more characters", type=positive_int)
    p.add("--max_input_length", "leave out prompts with more tokens", type=positive_int, default=128)


def add_engine_flags(p: Parser) -> None:
    """What samples, and how much."""
    p.add("--max_new_tokens", "longest response, tokens", type=positive_int, default=128)
    p.add("--backend", "what samples", choices=["vllm", "hf"], default="vllm")
    p.add("--dtype", "default: bfloat16 on a GPU, else float32", choices=["float32", "bfloat16"])
    p.add("--max_num_seqs", "responses sampled at a time", type=positive_int, default=64)
    p.add("--tensor_parallel_size", "GPUs that share a model (vllm)", type=positive_int, default=1)
    p.add("--gpu_memory_utilization", "share of GPU memory for the engine (vllm)", type=fraction, default=0.9)
    p.add(
        "--compile",
        "what vLLM compiles at each start: nothing, CUDA graphs (seconds), or all of the model (minutes)",
        choices=["eager", "cudagraphs", "inductor"],
        default="eager",
    )
    p.add("--trust_remote_code", "run code that comes with a model", action="store_true")


def read_prompts(args: argparse.Namespace, tokenizer, start: int, end: int | None) -> list[Prompt]:
    """The prompts of a slice; says how many were too long."""
    prompts, left_out = load_prompts(
        args.dataset_name_or_path,
        tokenizer,
        args.template,
        args.max_input_length,
        args.max_prompt_characters,
        start,
        end,
        args.dataset_split,
        args.dataset_key,
    )
    if left_out:
        print(f"{left_out} prompts left out as too long")
    return prompts


def prompt_settings(args: argparse.Namespace) -> dict:
    """What decides the prompts, but for the slice: files by their content."""
    names = args.dataset_name_or_path
    dataset = {name: sha256(name) if Path(name).is_file() else args.dataset_split for name in names}
    return {"dataset": dataset, **{name: getattr(args, name) for name in PROMPT_SETTINGS}}


def check_room(args: argparse.Namespace, config, what: str) -> None:
    """Raises `UserError` if the longest prompt with the longest response is more than a model can read.

    Args:
        config: the model's.
        what: the model's role and name, for the error.
    """
    longest, room = args.max_input_length + args.max_new_tokens, context_length(config)
    if room is not None and longest > room:
        raise UserError(
            f"--max_input_length {args.max_input_length} + --max_new_tokens {args.max_new_tokens} is more than "
            f"the {room} tokens that the {what} can read"
        )
