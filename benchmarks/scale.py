"""Memory and time of every stage for models and clusters of any size, from arithmetic; see docs/scale.md.

Prints Markdown tables. Reads nothing but the config.json of --model; with --document it also puts the tables into
that file, between its two markers.

    python benchmarks/scale.py
    python benchmarks/scale.py --model /path/to/model --gpus 4 --gpu_memory 141 --gpu_bandwidth 4.8
    python benchmarks/scale.py --document docs/scale.md
"""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "alignment")]

from benchmarks.cost import REWARD_MODEL, SHAPES, Hardware, Shape, Stage, Workload, in_turn, overlapped
from benchmarks.stage_cost import (
    annotation,
    batch_that_fits,
    decode_step,
    global_batch,
    gpus_to_train,
    kl,
    micro_step,
    parallel_needed,
    reference_pass,
    sampling,
    training,
)
from common.cli import Parser, UserError, positive, positive_int, run
from scripts.memory import OPTIMIZER, checkpoint_bytes, kv_bytes, model_file_bytes, shape_of

BEGIN = "<!-- begin: python benchmarks/scale.py -->"
END = "<!-- end -->"

# flag: (field of `Hardware`, unit, what it is)
HARDWARE_FLAGS = {
    "--gpu_memory": ("memory", 1e9, "memory of a GPU, GB"),
    "--gpu_bandwidth": ("bandwidth", 1e12, "its bandwidth, TB/s"),
    "--gpu_flops": ("flops", 1e12, "bf16 dense arithmetic of a GPU, TFLOP/s"),
    "--link": ("link", 1e9, "link of a GPU inside its node, GB/s each direction"),
    "--network": ("network", 1e9, "network of a GPU between nodes, GB/s each direction"),
    "--memory_share": ("memory_share", 1, "share of the memory that is used"),
    "--bandwidth_share": ("bandwidth_share", 1, "share of the memory bandwidth that is reached"),
    "--flops_share": ("flops_share", 1, "share of the arithmetic that is reached"),
    "--link_share": ("link_share", 1, "share of links and network that is reached"),
    "--latency": ("latency", 1e-6, "of a collective operation, microseconds a node that it spans"),
    "--overhead": ("overhead", 1e9, "context, communication buffers, graphs, fragments, GB per GPU"),
}


def parser() -> Parser:
    """The command line: every assumption is a flag."""
    p = Parser(__doc__)
    p.add("--model", "a folder with the config.json of a Llama-like model, instead of 7B and 70B")
    p.add("--gpus", "sizes of the cluster, in GPUs", type=positive_int, nargs="+", default=[8, 64])
    for flag, (name, unit, text) in HARDWARE_FLAGS.items():
        p.add(flag, text, type=positive, default=round(getattr(Hardware, name) / unit, 6))
    p.add("--gpus_per_node", "GPUs of a node", type=positive_int, default=Hardware.node)
    for field in fields(Workload):
        p.add(f"--{field.name}", WORKLOAD_TEXT[field.name], type=positive_int, default=field.default)
    p.add("--document", f"a file whose lines between '{BEGIN}' and '{END}' the tables replace")
    return p


WORKLOAD_TEXT = {
    "prompts": "training prompts of an iteration",
    "responses": "responses per prompt",
    "prompt_tokens": "tokens of a prompt",
    "new_tokens": "tokens of a response",
    "batch": "pairs an optimizer step, at least",
    "pairs_per_gpu": "pairs per GPU and forward pass",
    "epochs": "passes over the pairs",
    "max_num_seqs": "responses that an engine samples at a time",
    "eval_pairs": "pairs per GPU and forward pass of the reference",
    "token_budget": "tokens in a batch of the reward model",
    "kl_prompts": "prompts of the KL",
}


def main() -> None:
    args = parser().parse_args()
    values = {name: getattr(args, flag[2:]) * unit for flag, (name, unit, _) in HARDWARE_FLAGS.items()}
    hardware = replace(Hardware(), **values, node=args.gpus_per_node)
    work = Workload(**{field.name: getattr(args, field.name) for field in fields(Workload)})
    shapes = {Path(args.model).resolve().name: read_shape(args.model)} if args.model else SHAPES
    tables = report(shapes, args.gpus, work, hardware)
    print(tables)
    if args.document:
        put_into(Path(args.document), tables)


def read_shape(folder: str) -> Shape:
    """The shape in a config.json. Raises `UserError` where it is not a model that `Shape` describes."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        kind = config["model_type"]
        if kind not in ("llama", "mistral") or config.get("attention_bias") or config.get("mlp_bias"):
            raise UserError(f"{path}: a {kind} model; the arithmetic is for Llama and Mistral without biases")
        return shape_of(config)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not the configuration of a language model ({error})") from None


def put_into(path: Path, tables: str) -> None:
    """Replaces what stands between the markers."""
    try:
        before, _, rest = path.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise UserError(f"{path}: has no lines '{BEGIN}' and '{END}'")
        path.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


# --- Tables -------------------------------------------------------------------------------------------------------


def report(shapes: dict[str, Shape], sizes: list[int], work: Workload, hardware: Hardware) -> str:
    """All tables, as Markdown."""
    parts = ["**Models**", model_table(shapes, work, hardware)]
    for name, shape in shapes.items():
        for gpus in sizes:
            parts += [f"**{name} on {gpus} GPUs**", stage_table(stages(shape, gpus, work, hardware))]
    parts += [
        "**One token of every response in an engine's batch**",
        decode_table(shapes, sizes, work, hardware),
    ]
    parts += ["**One forward and backward pass of training**", training_table(shapes, sizes, work, hardware)]
    return "\n\n".join(parts)


def stages(shape: Shape, gpus: int, work: Workload, hardware: Hardware) -> list[Stage]:
    """Every stage of an iteration; a mixture engine holds two models of the same shape."""
    responses = work.prompts * work.responses
    generation = [
        sampling(f"generation, {name}", models, work, hardware, gpus, responses, engines=None)
        for name, models in (("one model", [shape]), ("mixture", [shape, shape]))
    ]
    scored = [annotation(REWARD_MODEL, work, hardware, workers) for workers in dict.fromkeys((1, gpus))]
    reference = reference_pass(shape, work, hardware, gpus)
    trained = [training(shape, work, hardware, gpus, lora) for lora in (False, True)]
    return [*generation, *scored, reference, *trained, *kl(shape, work, hardware, gpus)]


def stage_table(rows: list[Stage]) -> str:
    """Memory, time and bound of stages; no time where there is no room."""
    return table(
        ["stage", "layout", "GB per GPU", "fits", "time", "bound by"],
        [
            [row.name, row.layout, f"{row.memory / 1e9:.1f}"]
            + (["yes", duration(row.seconds), row.bound] if row.fits else ["**no**", "–", "–"])
            for row in rows
        ],
    )


def model_table(shapes: dict[str, Shape], work: Workload, hardware: Hardware) -> str:
    """What depends on the shape alone."""
    rows = {
        "parameters": lambda s: f"{s.parameters:,}",
        "weights in bf16, also a saved model": lambda s: gigabytes(model_file_bytes(s)),
        "optimizer states (12 bytes per parameter)": lambda s: gigabytes(OPTIMIZER * s.parameters),
        "checkpoint from which training continues": lambda s: gigabytes(checkpoint_bytes(s)),
        "KV cache, per token": lambda s: f"{kv_bytes(s):,} bytes",
        f"KV cache, a response of {work.length} tokens": lambda s: gigabytes(kv_bytes(s, work.length)),
        "the same in a mixture engine: two caches": lambda s: gigabytes(2 * kv_bytes(s, work.length)),
        "fewest GPUs that train it (whole nodes)": lambda s: gpus_to_train(s, work, hardware) or "–",
    }
    return table(["", *shapes], [[what, *map(value, shapes.values())] for what, value in rows.items()])


def decode_table(shapes: dict[str, Shape], sizes: list[int], work: Workload, hardware: Hardware) -> str:
    """Milliseconds of a decode step by cause, with the drivers' batch and with all that fit."""
    rows = []
    for name, shape in shapes.items():
        for kind, models in (("one model", [shape]), ("mixture", [shape, shape])):
            parallel = parallel_needed(models, work, hardware, max(sizes))
            if parallel is None:
                continue
            for batch in (work.max_num_seqs, batch_that_fits(models, work, hardware, parallel)):
                terms = decode_step(models, work, hardware, parallel, batch)
                speed = batch / in_turn(terms) / parallel
                rows.append([f"{name}, {kind}", parallel, batch, *milliseconds(terms), f"{speed:,.0f}"])
    return table(["engine", "TP", "batch", *KINDS_MS, "tokens/s per GPU"], rows)


def training_table(shapes: dict[str, Shape], sizes: list[int], work: Workload, hardware: Hardware) -> str:
    """Milliseconds of a forward and backward pass by cause, with more and more pairs on each GPU."""
    rows = []
    for name, shape in shapes.items():
        for gpus in sizes:
            for pairs in (work.pairs_per_gpu * factor for factor in (1, 4, 16)):
                more = replace(work, pairs_per_gpu=pairs)
                planned = training(shape, more, hardware, gpus)
                if planned.fits:
                    terms = micro_step(shape, more, hardware, gpus)
                    speed = pairs * gpus / overlapped(terms)
                    batch = global_batch(more, gpus)
                    rows.append([name, gpus, pairs, batch, *milliseconds(terms), planned.bound, f"{speed:,.0f}"])
    head = ["model", "GPUs", "pairs per GPU", "global batch", *KINDS_MS, "bound by", "pairs/s"]
    return table(head, rows)


KINDS_MS = ("memory bandwidth, ms", "compute, ms", "interconnect, ms")


def milliseconds(terms: dict[str, float]) -> list[str]:
    """Cells for `KINDS_MS`."""
    return [f"{1e3 * terms[kind.removesuffix(', ms')]:.1f}" for kind in KINDS_MS]


def gigabytes(count: float) -> str:
    """Bytes in GB."""
    return f"{count / 1e9:.3g} GB" if count < 100e9 else f"{count / 1e9:,.0f} GB"


def duration(seconds: float) -> str:
    """Seconds below two minutes, else minutes."""
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    run(main)
