"""How many bytes a model's weights, caches, states and activations take: arithmetic, nothing here was measured.

Used before a run, to refuse what a GPU cannot hold (`check`), and by benchmarks/. Units: bytes; GB is 10^9 bytes.
Standard library only.
"""

import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import UserError
from scripts.settings import Settings

BF16, FP32 = 2, 4
# Bytes per trained parameter in DeepSpeed's bfloat16 mode: weight and gradient in bf16; master weight and Adam's two
# moments in float32. While a sub-group of parameters is updated its gradient exists in float32 too.
WEIGHT, GRADIENT, OPTIMIZER = BF16, BF16, 3 * FP32
# DeepSpeed's defaults, in parameters: gathered at a time, waiting to be reduced, updated at a time.
LIVE_PARAMETERS, REDUCE_BUCKET, SUB_GROUP = 10**9, 5 * 10**8, 10**9
FOUR_BIT = 0.6  # bytes per weight, with its scales
USED, OVERHEAD = 0.9, 4e9  # share of a GPU that can be filled; bytes of context, buffers, graphs, fragments
LEAST_BATCH, MOST_BATCH = 8, 256  # responses at a time: fewer are not worth an engine; more gain nothing


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder without biases. `outputs`: rows of the head; None: one per token of the vocabulary."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    head_size: int
    tied: bool = False
    outputs: int | None = None

    @property
    def layer_parameters(self) -> int:
        """Of one layer: query and output, key and value, three of the MLP, two norms."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def head_parameters(self) -> int:
        """Of the output head, whether or not it is tied to the embeddings."""
        return self.hidden * (self.vocabulary if self.outputs is None else self.outputs)

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with: all but the embeddings, of which it looks up one row."""
        return self.layers * self.layer_parameters + self.head_parameters

    @property
    def parameters(self) -> int:
        """All parameters."""
        own_head = 0 if self.tied else self.head_parameters
        return self.layers * self.layer_parameters + self.hidden * (self.vocabulary + 1) + own_head


# What models are like whose configuration is not here yet, by the size in their name: Llama 2 and 3.
SIZES = {
    1.2: Shape(16, 2048, 32, 8, 8192, 128256, 64, tied=True),
    3.2: Shape(28, 3072, 24, 8, 8192, 128256, 128, tied=True),
    6.7: Shape(32, 4096, 32, 32, 11008, 32000, 128),
    8.0: Shape(32, 4096, 32, 8, 14336, 128256, 128),
    13.0: Shape(40, 5120, 40, 40, 13824, 32000, 128),
    69.0: Shape(80, 8192, 64, 8, 28672, 32000, 128),
}


def shape_of(config: dict) -> Shape:
    """Return the shape that a config.json describes. Raises `KeyError` or `TypeError` where it is not a decoder's."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        head_size=config.get("head_dim") or hidden // heads,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def find_shape(name: str) -> Shape | None:
    """Return a model's shape: of its folder, of the hub's cache, or about that of its name's size; None: unknown."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{name.replace('/', '--')}"
    for file in [Path(name) / "config.json", *cache.glob("snapshots/*/config.json")]:
        try:
            return shape_of(json.loads(file.read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    size = re.search(r"(?:^|[^A-Za-z0-9])(\d+(?:\.\d+)?)[bB](?![A-Za-z0-9])", name.rpartition("/")[2])
    if not size:
        return None
    wanted = float(size[1])
    return SIZES[min(SIZES, key=lambda known: abs(math.log(known / wanted)))] if wanted > 0 else None


# --- Shapes to bytes ------------------------------------------------------------------------------------------------


def kv_bytes(shape: Shape, tokens: int = 1) -> int:
    """Return the KV cache of `tokens` tokens: keys and values of every layer."""
    return tokens * 2 * shape.layers * shape.kv_heads * shape.head_size * BF16


def kv_share(shape: Shape, parallel: int) -> int:
    """Return over how many GPUs a KV cache is divided: beyond `kv_heads`, heads are copied."""
    return min(parallel, shape.kv_heads)


def activation_bytes(shape: Shape, tokens: int, kept_layers: int = 1) -> int:
    """Return the activations: the input of each kept layer, and about all tensors of the one at work."""
    at_work = 8 * shape.hidden + 4 * shape.intermediate
    return BF16 * tokens * (kept_layers * shape.hidden + at_work)


def model_file_bytes(shape: Shape, bytes_each: float = BF16) -> float:
    """Return the tensors of a saved model."""
    return bytes_each * shape.parameters


def checkpoint_bytes(shape: Shape) -> int:
    """Return a checkpoint from which ZeRO-3 training continues: float32 states, and the weights gathered."""
    return (OPTIMIZER + BF16) * shape.parameters


def training_bytes(parameters: int, gpus: int, whole: bool = False) -> float:
    """Return a GPU's weights, gradients and optimizer states under ZeRO-3, at the peak of the optimizer's step.

    Args:
        whole: each GPU holds all weights, as under ZeRO-2.
    """
    shard = parameters / gpus
    weights = WEIGHT * (parameters if whole else shard)
    return weights + shard * (GRADIENT + OPTIMIZER) + FP32 * min(shard, SUB_GROUP)


def live_bytes(shape: Shape, gpus: int) -> float:
    """Return the parameters that ZeRO-3 has gathered at a time, on more than one GPU."""
    return 0 if gpus == 1 else BF16 * min(LIVE_PARAMETERS, shape.parameters)


def batch_that_fits(models: list[Shape], length: int, room: float, parallel: int) -> int:
    """Return how many responses of `length` tokens fit in `room` beside the models' weights; may be 0 or less."""
    left = room - sum(model_file_bytes(m) for m in models) / parallel
    return math.floor(left / sum(kv_bytes(m, length) / kv_share(m, parallel) for m in models))


def lora_parameters(shape: Shape, rank: int) -> int:
    """Return the parameters of adapters of this rank on all linear layers: rank * (inputs + outputs) each."""
    heads, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    attention = 2 * (shape.hidden + heads) + 2 * (shape.hidden + kv)
    return shape.layers * rank * (attention + 3 * (shape.hidden + shape.intermediate))


# --- A run ----------------------------------------------------------------------------------------------------------


def training_need(s: Settings, shape: Shape, **changed) -> float:
    """Return the bytes per GPU of training with these settings, some of them `changed`."""
    s = replace(s, **changed)
    shards = s.processes if s.ACCELERATE_CONFIG.startswith(("zero3", "fsdp")) else 1  # of the weights
    # Without checkpointing a layer keeps about six tensors of its input's size.
    kept = shape.layers if s.GRADIENT_CHECKPOINTING else 6 * shape.layers
    need = OVERHEAD + activation_bytes(shape, s.PER_DEVICE_BATCH * 2 * s.MAX_LENGTH, kept)
    if s.ACCELERATE_CONFIG == "zero3_offload":  # weights, gradients and states are in host memory
        return need + BF16 * min(2 * LIVE_PARAMETERS, shape.parameters)
    if shards > 1:
        need += live_bytes(shape, shards)
    if s.USE_LORA:
        adapters = lora_parameters(shape, s.LORA_R or 16)
        return need + model_file_bytes(shape, FOUR_BIT if s.QLORA else BF16) / shards + training_bytes(adapters, 1)
    whole = s.ACCELERATE_CONFIG == "zero2"
    states = training_bytes(shape.parameters, s.processes if whole else shards, whole)
    return need + states + GRADIENT * min(REDUCE_BUCKET, shape.parameters)


def say_what_fits(s: Settings, shape: Shape, room: float) -> str:
    """Return the settings with which training would fit, and what they need."""
    lora = {"USE_LORA": True, "QLORA": False, "ACCELERATE_CONFIG": "single"}
    ways = {}
    if s.NUM_MACHINES == 1:
        ways["USE_LORA=1 ACCELERATE_CONFIG=single"] = lora
        ways["USE_LORA=1 QLORA=1 ACCELERATE_CONFIG=single"] = lora | {"QLORA": True}
    host = f"ACCELERATE_CONFIG=zero3_offload with {gb(16 * shape.parameters)} of host memory"
    ways[host] = {"USE_LORA": False, "ACCELERATE_CONFIG": "zero3_offload"}
    needs = {way: training_need(s, shape, **values) for way, values in ways.items()}
    found = [f"{way} ({gb(need)})" for way, need in needs.items() if need <= room]
    many = {"NUM_MACHINES": 1, "ACCELERATE_CONFIG": "zero3", "QLORA": False}
    equal_shares = (n for n in range(1, s.GLOBAL_BATCH + 1) if s.GLOBAL_BATCH % n == 0)
    counts = (n for n in equal_shares if training_need(s, shape, GPUS=n, **many) <= room)
    count = next(counts, f"more than {s.GLOBAL_BATCH}, the pairs of a step,")
    return "; ".join([*found, f"{'QLORA=0 ' * s.QLORA}ACCELERATE_CONFIG=zero3 on {count} GPUs"])


def gb(size: float) -> str:
    """Return a size in words."""
    return f"{size / 1e9:.0f} GB"


def check(s: Settings, driver: str, gpu_memory: int) -> int | None:
    """Return how many responses an engine can sample at a time; None where the policy's size is not known.

    Raises:
        UserError: a stage that a GPU cannot hold, with what to set instead.
    """
    policy, scorer = find_shape(s.BASE_MODEL), find_shape(s.REWARD_MODEL or "")
    room = USED * gpu_memory
    have = f"{s.GPUS} GPU(s) of {gb(gpu_memory)}"
    if policy and driver.startswith("sample_train") and (need := training_need(s, policy)) > room:
        fits = say_what_fits(s, policy, room)
        raise UserError(f"training {s.BASE_MODEL} needs about {gb(need)} on each of {have}. What fits: {fits}")
    if policy and driver.startswith("sample_train") and s.ACCELERATE_CONFIG == "zero3_offload" and not s.DRY_RUN:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if (need := 16 * policy.parameters / s.NUM_MACHINES) > host:
            raise UserError(f"ACCELERATE_CONFIG=zero3_offload needs {gb(need)} of host memory, which has {gb(host)}")
    if policy and driver == "sample_kl.sh":
        check_kl(s, policy, room, have)
    if scorer and (need := model_file_bytes(scorer) + OVERHEAD) > room:
        raise UserError(f"REWARD_MODEL {s.REWARD_MODEL} needs {gb(need)} on one of {have}: name a smaller one")
    return responses_at_a_time(s, policy, s.GPU_MEMORY_UTILIZATION * gpu_memory - OVERHEAD) if policy else None


def check_kl(s: Settings, policy: Shape, room: float, have: str) -> None:
    """Raise `UserError` unless the GPUs of one engine, over which layers are spread, hold both models that score."""
    weights = 2 * model_file_bytes(policy, BF16 if s.KL_DTYPE == "bfloat16" else FP32)
    if weights / s.TENSOR_PARALLEL_SIZE + OVERHEAD <= room:
        return
    sizes = [n for n in (2, 4, 8) if n <= s.GPUS and weights / n + OVERHEAD <= room]
    ways = [f"TENSOR_PARALLEL_SIZE={n}" for n in sizes[:1]]
    ways += ["KL_DTYPE=bfloat16, which needs half"] if s.KL_DTYPE != "bfloat16" else []
    raise UserError(
        f"the two models of the KL need {gb(weights)} on {s.TENSOR_PARALLEL_SIZE} of {have}: "
        + (" or ".join(ways) or "they need more GPUs")
    )


def responses_at_a_time(s: Settings, policy: Shape, room: float) -> int:
    """Return how many responses fit in an engine beside policy and reference. Raises `UserError` for too few."""
    length = s.MAX_PROMPT_LENGTH + s.MAX_NEW_TOKENS
    room /= 2 if s.GENERATION_DTYPE == "float32" else 1
    fit = {p: batch_that_fits([policy, policy], length, room, p) for p in (s.TENSOR_PARALLEL_SIZE, 2, 4, 8)}
    if (count := fit[s.TENSOR_PARALLEL_SIZE]) >= LEAST_BATCH:
        return min(MOST_BATCH, count // 8 * 8)
    size = next((p for p, number in fit.items() if number >= LEAST_BATCH and p <= s.GPUS), None)
    raise UserError(
        f"policy and reference of {s.BASE_MODEL} ({gb(2 * model_file_bytes(policy))}) and their caches do not fit "
        f"on {s.TENSOR_PARALLEL_SIZE} GPU(s): {f'TENSOR_PARALLEL_SIZE={size}' if size else 'they need more GPUs'}"
    )
