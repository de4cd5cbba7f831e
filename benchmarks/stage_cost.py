"""Memory and time of each stage of the pipeline on GPUs, by arithmetic.

What memory bandwidth, arithmetic and links alone would take are a stage's terms; the largest one is its bound.
Loading a model, starting an engine and Python's own time are left out, and every response has its full length.
"""

import math

from benchmarks.cost import Hardware, Shape, Stage, Workload, add, in_turn, overlapped, pass_terms, scale
from scripts import memory
from scripts.memory import (
    FP32,
    GRADIENT,
    OPTIMIZER,
    REDUCE_BUCKET,
    WEIGHT,
    activation_bytes,
    kv_bytes,
    kv_share,
    live_bytes,
    model_file_bytes,
    training_bytes,
)

FLOAT32_RATE = 67 / 989  # of the bf16 rate, on an H100: PyTorch computes float32 without tensor cores

# --- Generation ---------------------------------------------------------------------------------------------------


def batch_that_fits(models: list[Shape], work: Workload, hardware: Hardware, parallel: int) -> int:
    """Responses of full length whose KV caches fit beside the weights of all `models` (may be 0 or less)."""
    return memory.batch_that_fits(models, work.length, hardware.usable, parallel)


def parallel_needed(models: list[Shape], work: Workload, hardware: Hardware, gpus: int) -> int | None:
    """The smallest tensor parallel size (a power of two) with room for a full batch; None: not within `gpus`."""
    for parallel in (2**i for i in range(gpus.bit_length())):
        splits = all(model.heads % parallel == 0 for model in models)
        if parallel <= gpus and splits and batch_that_fits(models, work, hardware, parallel) >= work.max_num_seqs:
            return parallel
    return None


def decode_step(
    models: list[Shape], work: Workload, hardware: Hardware, parallel: int, batch: int
) -> dict[str, float]:
    """One token for each of `batch` responses that are half finished, from all `models`."""
    context = work.prompt_tokens + work.new_tokens / 2
    return add(*(pass_terms(m, hardware, parallel, batch, context, batch * context) for m in models))


def sampling(
    name: str,
    models: list[Shape],
    work: Workload,
    hardware: Hardware,
    gpus: int,
    responses: int,
    engines: int | None,
) -> Stage:
    """`responses` responses of full length. `engines` None: as many as there is room for on `gpus`.

    Where no engine fits, what it would need on all GPUs of the cluster.
    """
    parallel = parallel_needed(models, work, hardware, gpus) or gpus
    engines = engines or gpus // parallel
    batch = max(1, min(work.max_num_seqs, math.ceil(responses / engines)))
    steps = responses * work.new_tokens / (batch * engines)
    prefill = add(*(pass_terms(m, hardware, parallel, work.token_budget, work.prompt_tokens / 2) for m in models))
    prefills = responses * work.prompt_tokens / work.token_budget / engines
    parts = scale(decode_step(models, work, hardware, parallel, batch), steps), scale(prefill, prefills)
    caches = sum(kv_bytes(m, batch * work.length) / kv_share(m, parallel) for m in models)
    memory = sum(model_file_bytes(m) for m in models) / parallel + caches + hardware.overhead
    layout = f"{engines} x TP {parallel}, {batch} at a time"
    return Stage(name, layout, memory, hardware.holds(memory), sum(map(in_turn, parts)), add(*parts))


# --- Scoring ------------------------------------------------------------------------------------------------------


def annotation(shape: Shape, work: Workload, hardware: Hardware, workers: int) -> Stage:
    """Rewards of all responses, by `workers` processes that hold one reward model each."""
    passes = work.prompts * work.responses * work.length / work.token_budget / workers
    terms = scale(pass_terms(shape, hardware, 1, work.token_budget, work.length / 2), passes)
    memory = model_file_bytes(shape) + activation_bytes(shape, work.token_budget) + hardware.overhead
    layout = f"{workers} reward model(s), one per GPU"
    return Stage("annotation", layout, memory, hardware.holds(memory), in_turn(terms), terms)


def reference_pass(shape: Shape, work: Workload, hardware: Hardware, gpus: int) -> Stage:
    """Log-probabilities of all pairs under the reference, sharded by ZeRO-3."""
    per_pass = work.eval_pairs * 2 * work.length
    passes = math.ceil(work.prompts / work.eval_pairs / gpus)
    one = pass_terms(shape, hardware, 1, per_pass, work.length / 2)
    one["interconnect"] = hardware.collective(model_file_bytes(shape), gpus, shape.layers)
    weights = model_file_bytes(shape) / gpus + live_bytes(shape, gpus)
    memory = hardware.overhead + activation_bytes(shape, per_pass) + weights
    terms = scale(one, passes)
    return Stage("reference", "ZeRO-3", memory, hardware.holds(memory), passes * overlapped(one), terms)


def kl(shape: Shape, work: Workload, hardware: Hardware, gpus: int) -> list[Stage]:
    """Sampling with one engine of the policy; then both models score in float32.

    Layers are spread over as many GPUs of a node as they need; one computes while the others wait.
    """
    sampled = sampling("KL: sampling", [shape], work, hardware, gpus, work.kl_prompts, engines=1)
    per_pass = 8 * work.length  # get_kl.py --batch_size
    passes = 2 * math.ceil(work.kl_prompts * work.length / per_pass)
    terms = scale(pass_terms(shape, hardware, 1, per_pass, work.length / 2), passes)
    terms |= {"memory bandwidth": 2 * terms["memory bandwidth"], "compute": terms["compute"] / FLOAT32_RATE}
    beside = 4 * activation_bytes(shape, per_pass) + hardware.overhead
    needs = [2 * model_file_bytes(shape, FP32) / count + beside for count in range(1, min(gpus, hardware.node) + 1)]
    spread, memory = next(
        ((i, need) for i, need in enumerate(needs, 1) if hardware.holds(need)), (len(needs), needs[-1])
    )
    layout = f"both models on {spread} GPU{'s' if spread > 1 else ''}"
    return [sampled, Stage("KL: scoring", layout, memory, hardware.holds(memory), in_turn(terms), terms)]


# --- Training -----------------------------------------------------------------------------------------------------


def global_batch(work: Workload, gpus: int) -> int:
    """Pairs an optimizer step: at least `work.batch`, and a whole number of passes of all GPUs."""
    together = work.pairs_per_gpu * gpus
    return together * math.ceil(work.batch / together)


def micro_step(shape: Shape, work: Workload, hardware: Hardware, gpus: int, lora: bool = False) -> dict[str, float]:
    """Forward, recomputation and backward of `pairs_per_gpu` pairs on each GPU, under ZeRO-3.

    The backward pass costs two forward passes, one of them for the gradients of the weights. The weights are gathered
    for the forward and for the backward pass (with its recomputation), and gradients are reduced.
    """
    tokens = work.pairs_per_gpu * 2 * work.length
    passes, transfers = (3, 2) if lora else (4, 3)
    one = pass_terms(shape, hardware, 1, tokens, work.length / 2)
    moved = transfers * model_file_bytes(shape)
    return scale(one, passes) | {"interconnect": hardware.collective(moved, gpus, transfers * shape.layers)}


def training(shape: Shape, work: Workload, hardware: Hardware, gpus: int, lora: bool = False) -> Stage:
    """All epochs of training with ZeRO-3 and gradient checkpointing; with `lora` only small adapters are trained."""
    batch = global_batch(work, gpus)
    accumulation = batch // (work.pairs_per_gpu * gpus)
    steps = work.epochs * math.ceil(work.prompts / batch)
    micro = micro_step(shape, work, hardware, gpus, lora)
    # The optimizer reads weights, moments and gradient and writes all but the gradient.
    updated = 0 if lora else shape.parameters / gpus * (2 * OPTIMIZER + GRADIENT + WEIGHT)
    update = updated / (hardware.bandwidth * hardware.bandwidth_share)
    seconds = steps * (accumulation * overlapped(micro) + update)
    states = WEIGHT * shape.parameters / gpus if lora else training_bytes(shape.parameters, gpus)
    tokens = work.pairs_per_gpu * 2 * work.length
    buffers = live_bytes(shape, gpus) + (0 if lora else GRADIENT * min(REDUCE_BUCKET, shape.parameters))
    memory = states + buffers + activation_bytes(shape, tokens, shape.layers) + hardware.overhead
    name, layout = "training, LoRA" if lora else "training", f"ZeRO-3, batch {batch}, {steps} steps"
    terms = scale(micro, steps * accumulation)
    return Stage(name, layout, memory, hardware.holds(memory), seconds, terms)


def gpus_to_train(shape: Shape, work: Workload, hardware: Hardware, most: int = 1024) -> int | None:
    """The smallest number of whole nodes, in GPUs, on which training fits; None: more than `most`."""
    choices = range(hardware.node, most + 1, hardware.node)
    return next((gpus for gpus in choices if training(shape, work, hardware, gpus).fits), None)
