"""Seconds and memory of training: trl beside ours, and the reference in every step beside one pass before.

Reads a policy and preference pairs (the quickstart's: `bash quickstart.sh` makes them once); prints a Markdown table.

Steps: forward, backward, clipping, AdamW on the same token ids, neither side with a reference model in the step; the
sides take turns. Two epochs: each side in a process of its own, whose peak memory is its own. The smaller work comes
`--repetitions` times (median), two epochs of the larger work once. The two sides' losses are compared.

    OMP_NUM_THREADS=2 python benchmarks/training.py
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ASSETS, Row, growth_row, medians, report, seconds, shares  # isort: skip (first)

from benchmarks.machine import memory_bandwidth, multiply_rate
from common.cli import UserError, run
from common.models import encode_prompt, encode_response, load_causal_lm, load_tokenizer, render_chat

STEP_PAIRS, EPOCH_PAIRS, EPOCH_BATCH, MORE = 4, 4, 4, 4  # MORE: times the pairs
RESPONSE_TOKENS, MAX_LENGTH = 32, 128  # the quickstart's
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


def arrow(rows: list[dict]):
    """Rows as training takes them."""
    from datasets import Dataset

    lengths = ({"length": len(row["prompt_ids"]) + RESPONSE_TOKENS} for row in rows)
    return Dataset.from_list([row | length for row, length in zip(rows, lengths, strict=True)])


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
    from trl import DPOConfig

    from dpo_iteration.run_trl import OnIds

    options = {**COMMON, "precompute_ref_log_probs": not reference, "per_device_train_batch_size": batch}
    return OnIds(
        model=load_causal_lm(model, "--model", "float32"),
        ref_model=load_causal_lm(model, "--model", "float32") if reference else None,
        args=DPOConfig(output_dir=output_dir, **options),
        # Without our log-probabilities: trl adds its own.
        train_dataset=arrow(rows).select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]),
        processing_class=load_tokenizer(model, "--model"),
    )


def our_options(model: str, batch: int, output_dir: str):
    """What `run_dpo.py` makes of the same settings: (options, training arguments)."""
    from dpo_iteration.options import parse

    flags = {**COMMON, "model_name_or_path": model, "ref_model": model, "train_file": "none"}
    flags |= {"output_dir": output_dir, "per_device_train_batch_size": batch}
    options, training = parse([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    training.dataloader_pin_memory = False
    return options, training


def with_reference_inside(trainer, model: str):
    """Our trainer, made to ask a reference model in every step."""
    import torch

    from dpo_iteration.logps import SEQUENCES, as_scorer

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
        rows, logps = arrow(rows), np.zeros((len(rows), 2))
        if side == "before":
            start = time.perf_counter()
            logps = reference.compute(rows, model, options, training, ("float32", False))
            before = time.perf_counter() - start
        rows = rows.add_column("ref_chosen_logps", logps[:, 0]).add_column("ref_rejected_logps", logps[:, 1])
        trainer = make_trainer(options, training, rows, None)
        if side == "inside":
            trainer = with_reference_inside(trainer, model)
    ends = step_ends(trainer)
    start = time.perf_counter()
    trainer.train()
    return {
        "pass": before,
        "training": time.perf_counter() - start,
        "step": statistics.median(after - earlier for earlier, after in itertools.pairwise(ends)),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak": peak_bytes(),
    }


def step_ends(trainer) -> list[float]:
    """A list that the trainer fills: when each optimizer step was done."""
    from transformers import TrainerCallback

    ends = []

    class Ends(TrainerCallback):
        def on_step_end(self, *args, **options) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Ends())
    return ends


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

    from dpo_iteration.logps import find_prefixes
    from dpo_iteration.rows import collate

    batch, head, config = collate(rows), model.get_output_embeddings(), model.config
    layers = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    tokens = len(find_prefixes(batch["input_ids"], batch["attention_mask"]).first)
    lengths = batch["attention_mask"].sum(1).double()
    scores = config.num_hidden_layers * config.hidden_size * lengths.square().sum().item()
    return 6 * (layers * tokens + head.weight.numel() * batch["response_mask"].sum().item() + scores)


def epoch_limits(args) -> tuple[float, float]:
    """Ratios that this machine cannot exceed at EPOCH_BATCH pairs per step: of a step; of two epochs with the pass.

    A forward pass f multiplies at the measured rate, backward is 2 f, a reference in every step one f more. Clipping
    and AdamW o move 40 bytes per float32 weight at the measured bandwidth: gradients read, read and written by
    clipping, then read; weights and two moments read and written. A reference model does not change o.
    """
    model = load_causal_lm(args.model, "--model", "float32")
    forward = least_flops(model, read_rows(args.model, args.pairs, EPOCH_BATCH)) / 3 / multiply_rate("float32")
    fixed = 40 * sum(p.numel() for p in model.parameters()) / memory_bandwidth()
    return (4 * forward + fixed) / (3 * forward + fixed), (8 * forward + 2 * fixed) / (7 * forward + 2 * fixed)


def row(case: str, baseline: float, ours: float, unit: str, *rest: str) -> Row:
    """A line of the table; the ratio is baseline / ours."""
    return Row(case, f"{baseline:.2f} {unit}", f"{ours:.2f} {unit}", f"{baseline / ours:.2f}", *rest)


def step_rows(args, output_dir: str) -> list[Row]:
    """One optimizer step at STEP_PAIRS and at MORE times as many."""
    from dpo_iteration.run_dpo import make_trainer

    rows = read_rows(args.model, args.pairs, MORE * STEP_PAIRS)
    rows = [{**pair, "ref_chosen_logps": -70.0, "ref_rejected_logps": -80.0} for pair in rows]
    few = rows[:STEP_PAIRS]
    theirs = trl_trainer(args.model, rows, STEP_PAIRS, output_dir, reference=False)
    ours = make_trainer(*our_options(args.model, STEP_PAIRS, output_dir), arrow(rows), None)
    for trainer in (theirs, ours):
        trainer.create_optimizer()
    for _ in range(2):  # the second loss shows whether the first step did the same
        agree([one_step(theirs, few)], [one_step(ours, few)])
    bound, rate = shares(lambda: one_step(ours, few)), multiply_rate("float32")

    def padded() -> None:
        ours.share = False
        one_step(ours, few)
        ours.share = True

    def limit(part: list[dict]) -> str:
        return f"{least_flops(ours.model, part) / rate:.2f} s"

    sides = {
        "trl": lambda: one_step(theirs, few),
        "padded": padded,
        "ours": lambda: one_step(ours, few),
        "trl, 4x": lambda: one_step(theirs, rows),
        "ours, 4x": lambda: one_step(ours, rows),
    }
    times = medians({name: lambda side=side: seconds(side) for name, side in sides.items()}, args.repetitions)
    case = f"step of {len(few)} pairs, trl's trainer"
    return [
        row(f"{case}; ours padded", times["trl"], times["padded"], "s", ">= 1.0"),
        row(f"{case}; ours", times["trl"], times["ours"], "s", ">= 1.2", limit(few), bound),
        row(
            f"step of {len(rows)} pairs, trl's trainer; ours",
            times["trl, 4x"],
            times["ours, 4x"],
            "s",
            ">= 1.2",
            limit(rows),
            bound,
        ),
        growth_row("step of ours, 4x the pairs", times["ours"], times["ours, 4x"]),
    ]


def epoch_rows(args) -> list[Row]:
    """Two epochs with the reference model in every step (trl's and ours) and with one pass before."""
    found, wholes = [], []
    of_step, of_epochs = (f"{limit:.2f}" for limit in epoch_limits(args))
    for pairs, turns in ((EPOCH_PAIRS, args.repetitions), (MORE * EPOCH_PAIRS, 1)):
        turns = [{side: in_a_process(side, pairs, args) for side in SIDES} for _ in range(turns)]
        for side in SIDES[1:]:
            agree(turns[0]["trl"]["losses"], turns[0][side]["losses"])

        def median(side: str, name: str) -> float:
            return statistics.median(turn[side][name] for turn in turns)  # noqa: B023

        inside, training = median("inside", "training"), median("before", "training")
        wholes.append(training + median("before", "pass"))
        steps = len(turns[0]["before"]["losses"])
        start = training - steps * median("before", "step")
        case = f"2 epochs of {pairs} pairs, reference in every step"
        peaks = [median(side, "peak") / 2**30 for side in ("inside", "before")]
        less = f"{peaks[0] - peaks[1]:.2f} GiB less; the model: {size_gib(args.model):.2f}"
        step = (median(side, "step") for side in ("inside", "before"))
        found += [
            row(f"{case}; a step after a pass, the first left out", *step, "s", ">= 1.3", of_step, "as the steps"),
            row(
                f"{case}; training after a pass, with its start",
                *(inside, training),
                *("s", "-", of_step, f"steps; the start takes {start:.1f} s on top of {steps}"),
            ),
            row(f"{case}; pass and training", inside, wholes[-1], "s", "-", of_epochs, "as the steps"),
            row(f"{case} by trl; pass and training", median("trl", "training"), wholes[-1], "s"),
            row(f"{case}; after a pass: peak memory", *peaks, "GiB", "-", "-", less),
        ]
    return [*found, growth_row("pass and training, 4x the pairs", *wholes)]


def size_gib(model: str) -> float:
    return load_causal_lm(model, "--model", "float32").get_memory_footprint() / 2**30


WORDS = """
Case: the baseline; ours. Step limit: FLOPs of each distinct token once at the rate of a matrix product.
Limits of the epochs, at 4 pairs per step: a forward pass at that rate, a backward pass of two, and clipping and AdamW
at the measured bandwidth of memory, which a reference does not change. The start of a training is what the first step
takes more than the others: both forms of the log-probabilities compared, moments and gradients allocated. Peak memory
is the process's; the larger epochs ran once.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "policy"), help="policy and reference (a folder)")
    parser.add_argument("--pairs", type=Path, default=ASSETS / "reward_pairs.jsonl", help="prompt, chosen, rejected")
    parser.add_argument("--repetitions", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.side:
            rows = read_rows(args.model, args.pairs, args.number)
            print(json.dumps(two_epochs(args.side, args.model, rows, folder)))
            return
        steps = step_rows(args, folder)
    report("Training", WORDS, steps + epoch_rows(args))


if __name__ == "__main__":
    run(main)
