"""Seconds and memory of training: trl beside ours, and the reference in every step beside one pass before.

Reads a policy and preference pairs (the quickstart's: `bash quickstart.sh` makes them once); prints a Markdown table.

Steps: forward, backward, clipping, AdamW on the same token ids, neither side with a reference model in the step; the
sides take turns. Two epochs: each side in a process of its own, whose peak memory is its own. The smaller work comes
`--repetitions` times (median), two epochs of the larger work once. The two sides' losses are compared.

    OMP_NUM_THREADS=2 python benchmarks/training.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "alignment"))
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # trl asks the hub, too

from common.cli import UserError, run
from common.models import encode_prompt, encode_response, load_causal_lm, load_tokenizer, render_chat

ASSETS = PROJECT / "alignment" / "assets"
STEP_PAIRS, EPOCH_PAIRS, EPOCH_BATCH, MORE = 8, 4, 4, 4  # MORE: times the pairs
RESPONSE_TOKENS, MAX_LENGTH = 32, 128  # the quickstart's
GROWTH = 4.4  # the most that the time may grow with MORE times the work
# Two epochs: trl with a reference model in every step, ours with one, ours with one pass before.
SIDES = ("trl", "inside", "before")


def read_rows(model: str, pairs: Path, number: int) -> list[dict]:
    """Rows of different prompts, both responses cut at RESPONSE_TOKENS; the margin makes rev_kl plain DPO."""
    if not pairs.is_file():
        raise UserError(f"--pairs {pairs}: no such file; quickstart.sh makes the default one")
    tokenizer, rows = load_tokenizer(model, "--model"), {}
    for line in pairs.read_text().splitlines():
        pair = json.loads(line)
        chat = [{"role": "user", "content": pair["prompt"]}]
        prompt = encode_prompt(tokenizer, render_chat(tokenizer, chat, "prompt", add_generation_prompt=True))
        sides = [encode_response(tokenizer, pair[side], False) for side in ("chosen", "rejected")]
        if len(prompt) + RESPONSE_TOKENS > MAX_LENGTH or min(map(len, sides)) < RESPONSE_TOKENS:
            continue
        chosen, rejected = (ids[:RESPONSE_TOKENS] for ids in sides)
        row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "margin": 1000.0}
        rows.setdefault(tuple(prompt), row)
        if len(rows) == number:
            return list(rows.values())
    raise UserError(f"--pairs {pairs}: {len(rows)} prompts with two long responses, {number} are needed")


# --- The sides --------------------------------------------------------------------------------------------------

COMMON = {
    "learning_rate": 1e-6,
    "max_length": MAX_LENGTH,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "num_train_epochs": 2,
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "cosine",
}


def trl_trainer(model: str, rows: list[dict], batch: int, output_dir: str, reference: bool):
    """trl's DPOTrainer on the rows' token ids; `reference`: a reference model in every step, as is its default."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    options = {**COMMON, "precompute_ref_log_probs": not reference, "per_device_train_batch_size": batch}
    trainer = DPOTrainer(
        model=load_causal_lm(model, "--model", "float32"),
        ref_model=load_causal_lm(model, "--model", "float32") if reference else None,
        args=DPOConfig(output_dir=output_dir, **options),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=load_tokenizer(model, "--model"),
    )
    trainer.train_dataset = Dataset.from_list(rows)  # its collator takes ids: both sides get the same
    return trainer


def our_options(model: str, batch: int, output_dir: str):
    """What `run_dpo.py` makes of the same settings: (options, training arguments)."""
    from dpo_iteration.options import parse

    flags = {**COMMON, "model_name_or_path": model, "ref_model": model, "train_dir": "none"}
    flags |= {"output_dir": output_dir, "per_device_train_batch_size": batch}
    options, training = parse([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    training.dataloader_pin_memory = False
    return options, training


def with_reference_inside(trainer, model: str):
    """Our trainer, made to ask a reference model in every step."""
    import torch

    from dpo_iteration.response_logps import SEQUENCES, as_scorer

    reference, loss = as_scorer(load_causal_lm(model, "--model", "float32")), trainer.compute_loss

    def compute_loss(policy, inputs, **options):
        with torch.no_grad():
            logps = reference(**{name: inputs[name] for name in SEQUENCES}, share=trainer.share is not False)
        chosen, rejected = logps.chunk(2)
        return loss(policy, {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}, **options)

    trainer.compute_loss = compute_loss
    return trainer


def two_epochs(side: str, model: str, rows: list[dict], output_dir: str) -> dict:
    """Seconds of the pass before and of the training, the losses, peak bytes of this process."""
    from dpo_iteration import reference
    from dpo_iteration.run_dpo import make_trainer

    before = 0.0
    if side == "trl":
        trainer = trl_trainer(model, rows, EPOCH_BATCH, output_dir, reference=True)
    else:
        options, training = our_options(model, EPOCH_BATCH, output_dir)
        logps = [[0.0, 0.0]] * len(rows)
        if side == "before":
            start = time.perf_counter()
            logps = reference.compute(rows, options, training, "float32", autocast=False)
            before = time.perf_counter() - start
        rows = [
            {**row, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            for row, (chosen, rejected) in zip(rows, logps, strict=True)
        ]
        trainer = make_trainer(options, training, rows, [])
        if side == "inside":
            trainer = with_reference_inside(trainer, model)
    start = time.perf_counter()
    trainer.train()
    return {
        "pass": before,
        "training": time.perf_counter() - start,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak": peak_bytes(),
    }


def peak_bytes() -> int:
    """The most memory that this process has held. (getrusage's figure is inherited from the parent.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def in_a_process(side: str, pairs: int, args) -> dict:
    """`two_epochs` in a process of its own."""
    command = [sys.executable, __file__, "--model", args.model, "--pairs", str(args.pairs)]
    done = subprocess.run(
        [*command, "--side", side, "--number", str(pairs)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"side {side}: {(done.stderr.strip().splitlines() or ['it was killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- Measuring --------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def medians(sides: list[Callable[[], object]], repetitions: int) -> list[float]:
    """Median seconds of each side, the sides taking turns."""
    times = [[seconds(side) for side in sides] for _ in range(repetitions)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def agree(one: list[float], other: list[float]) -> None:
    """Raises where the sides have not computed the same."""
    if len(one) != len(other) or any(abs(a - b) > 2e-3 for a, b in zip(one, other, strict=True)):
        raise SystemExit(f"the sides' losses differ: {one} and {other}")


def one_step(trainer, rows: list[dict]) -> float:
    """One optimizer step by the trainer's own code; returns the loss."""
    import torch

    trainer.current_gradient_accumulation_steps = 1  # which its loop would set
    loss = trainer.training_step(trainer.model, trainer.data_collator(rows))
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return loss.item()


def least_flops(model, rows: list[dict]) -> float:
    """Of forward and backward pass on each distinct prefix once: 6 a weight and token, and causal attention."""
    from torch import nn

    from dpo_iteration.prefixes import find_prefixes
    from dpo_iteration.rows import collate

    batch, head, config = collate(rows), model.get_output_embeddings(), model.config
    layers = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    tokens = len(find_prefixes(batch["input_ids"], batch["attention_mask"]).place)
    lengths = batch["attention_mask"].sum(1).double()
    scores = config.num_hidden_layers * config.hidden_size * lengths.square().sum().item()
    return 6 * (layers * tokens + head.weight.numel() * batch["response_mask"].sum().item() + scores)


def matmul_rate(size: int = 1024) -> float:
    """Float32 FLOP/s of a matrix product: the best of some."""
    import torch

    a, b = torch.randn(2, size, size).unbind()
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(20))


def shares(work: Callable[[], object]) -> str:
    """What the processor does in it: 'matrix products 78%, attention 7%'."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    parts = {"matrix products": 0.0, "attention": 0.0, "rest": 0.0}
    for event in profiler.key_averages():
        kind = "matrix products" if event.key in ("aten::mm", "aten::addmm", "aten::bmm") else "rest"
        kind = "attention" if "scaled_dot_product" in event.key else kind
        parts[kind] += event.self_cpu_time_total
    total = sum(parts.values())
    return ", ".join(f"{name} {part / total:.0%}" for name, part in list(parts.items())[:2])


def line(case: str, baseline: float, ours: float, unit: str, to_reach: str, limit: str, bound: str) -> None:
    """Prints a row of the table; the ratio is baseline / ours."""
    ratio = f"{baseline / ours:.2f}"
    print(
        f"| {case} | {baseline:.2f} {unit} | {ours:.2f} {unit} | {ratio} | {to_reach} | {limit} | {bound} |",
        flush=True,
    )


def growth(less: float, more: float) -> str:
    return f"{more / less:.2f}x the time of a {MORE}th of the pairs (at most {GROWTH})"


def step_lines(args, output_dir: str) -> None:
    """One optimizer step at STEP_PAIRS and at MORE times as many."""
    from dpo_iteration.run_dpo import make_trainer

    rows = read_rows(args.model, args.pairs, MORE * STEP_PAIRS)
    rows = [{**row, "ref_chosen_logps": -70.0, "ref_rejected_logps": -80.0} for row in rows]
    few = rows[:STEP_PAIRS]
    theirs = trl_trainer(args.model, rows, STEP_PAIRS, output_dir, reference=False)
    ours = make_trainer(*our_options(args.model, STEP_PAIRS, output_dir), rows, [])
    for trainer in (theirs, ours):
        trainer.create_optimizer()
    for _ in range(2):  # the second loss shows whether the first step did the same
        agree([one_step(theirs, few)], [one_step(ours, few)])
    rate, bound = matmul_rate(), shares(lambda: one_step(ours, few))

    def padded() -> None:
        ours.share = False
        one_step(ours, few)
        ours.share = True

    def limit(part: list[dict]) -> str:
        return f"{least_flops(ours.model, part) / rate:.2f} s at {rate / 1e9:.0f} GFLOP/s"

    print("## Training\n")
    print("| case | baseline | ours | ratio | to reach | limit | bound by |\n" + "|---" * 7 + "|")
    sides = [lambda: one_step(theirs, few), padded, lambda: one_step(ours, few)]
    trl, alone, shared = medians(sides, args.repetitions)
    sides = [lambda: one_step(theirs, rows), lambda: one_step(ours, rows)]
    trl_more, shared_more = medians(sides, args.repetitions)
    case = f"step of {len(few)} pairs, trl's trainer"
    line(f"{case}; ours padded", trl, alone, "s", ">= 1.0", "-", "-")
    line(f"{case}; ours", trl, shared, "s", ">= 1.2", limit(few), bound)
    case = f"step of {len(rows)} pairs, trl's trainer; ours"
    line(case, trl_more, shared_more, "s", ">= 1.2", limit(rows), growth(shared, shared_more))


def epoch_lines(args) -> None:
    """Two epochs with the reference model in every step (trl's and ours) and with one pass before."""
    wholes = []
    for pairs, turns in ((EPOCH_PAIRS, args.repetitions), (MORE * EPOCH_PAIRS, 1)):
        turns = [{side: in_a_process(side, pairs, args) for side in SIDES} for _ in range(turns)]
        for side in SIDES[1:]:
            agree(turns[0]["trl"]["losses"], turns[0][side]["losses"])

        def median(side: str, name: str) -> float:
            return statistics.median(turn[side][name] for turn in turns)  # noqa: B023

        inside, training = median("inside", "training"), median("before", "training")
        wholes.append(training + median("before", "pass"))
        bound = growth(*wholes) if wholes[1:] else "as the steps above"
        case = f"2 epochs of {pairs} pairs, reference in every step"
        line(f"{case}; training after a pass", inside, training, "s", ">= 1.3", "1.33", "-")
        line(f"{case}; pass and training", inside, wholes[-1], "s", "-", "1.14", bound)
        line(f"{case} by trl; pass and training", median("trl", "training"), wholes[-1], "s", "-", "-", bound)
        peaks = [median(side, "peak") / 2**30 for side in ("inside", "before")]
        less = f"{peaks[0] - peaks[1]:.2f} GiB less; the model: {size_gib(args.model):.2f}"
        line(f"{case}; after a pass: peak memory", *peaks, "GiB", "-", "-", less)


def size_gib(model: str) -> float:
    return load_causal_lm(model, "--model", "float32").get_memory_footprint() / 2**30


NOTES = """
Case: the baseline; ours. Step limit: FLOPs of each distinct token once at the rate of a matrix product.
Limits of the epochs: with a forward pass as a third of a step, a reference in every step makes 4 thirds of 3, and a
pass before 2 epochs is 1 of 6 thirds more. Peak memory is the process's; the larger epochs ran once.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ASSETS / "policy"), help="policy and reference (a folder)")
    parser.add_argument(
        "--pairs", type=Path, default=ASSETS / "reward_pairs.jsonl", help="prompt, chosen, rejected"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.side:
            rows = read_rows(args.model, args.pairs, args.number)
            print(json.dumps(two_epochs(args.side, args.model, rows, folder)))
            return
        step_lines(args, folder)
    epoch_lines(args)
    print(NOTES)


if __name__ == "__main__":
    run(main)
