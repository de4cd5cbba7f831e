"""GPUs and work as numbers, and what one forward pass costs: pure functions to FLOP and seconds.

Bytes are in alignment/scripts/memory.py, the stages in stage_cost.py, the tables in scale.py. Nothing here was
measured: rates are peaks times the shares that `Hardware` assumes. Units: bytes, seconds, FLOP; GB is 10^9 bytes.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "alignment"))

from scripts.memory import BF16, Shape, kv_bytes, kv_share

SHAPES = {
    "7B": Shape(32, 4096, 32, 32, 11008, 32000, 128),
    "70B": Shape(80, 8192, 64, 8, 28672, 32000, 128),
}
REWARD_MODEL = Shape(32, 4096, 32, 8, 14336, 128256, 128, outputs=1)  # Llama-3-8B with one score


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal GPUs, and which share of each peak is assumed to be reached. Defaults: H100 SXM, 80 GB."""

    memory: float = 80e9
    bandwidth: float = 3.35e12  # bytes/s of memory
    flops: float = 989e12  # FLOP/s, bf16, dense
    link: float = 450e9  # bytes/s of one GPU inside a node, each direction
    network: float = 50e9  # bytes/s of one GPU's adapter to other nodes, each direction
    node: int = 8  # GPUs
    memory_share: float = 0.9
    bandwidth_share: float = 0.7
    flops_share: float = 0.4
    link_share: float = 0.7
    latency: float = 10e-6  # seconds a collective operation, times the nodes that it spans
    overhead: float = 4e9  # bytes per GPU: CUDA context, communication buffers, graphs, fragments

    @property
    def usable(self) -> float:
        """Bytes of one GPU for weights, caches, states and activations."""
        return self.memory * self.memory_share - self.overhead

    def holds(self, memory: float) -> bool:
        """Whether `memory` bytes, the overhead among them, fit on a GPU."""
        return memory <= self.memory * self.memory_share

    def collective(self, volume: float, gpus: int, operations: float = 1) -> float:
        """Seconds of `operations` all-gathers or reduce-scatters over `gpus`, `volume` bytes in all.

        Each GPU receives (gpus - 1) / gpus of the volume. Between nodes all adapters of a node work side by side (one
        ring each), so a node's traffic is limited by their sum, and a GPU's by its own link.
        """
        if gpus == 1:
            return 0.0
        nodes = math.ceil(gpus / self.node)
        rate = self.link if nodes == 1 else min(self.link, self.network * self.node)
        return volume * (gpus - 1) / gpus / (rate * self.link_share) + operations * self.latency * nodes


@dataclass(frozen=True)
class Workload:
    """One iteration; the defaults are the paper's Safe-RLHF experiment and the drivers' settings."""

    prompts: int = 10_000
    responses: int = 2  # a prompt
    prompt_tokens: int = 128
    new_tokens: int = 128
    batch: int = 16  # pairs an optimizer step
    pairs_per_gpu: int = 1  # a forward pass
    epochs: int = 2
    max_num_seqs: int = 64  # responses that an engine samples at a time
    eval_pairs: int = 8  # per GPU and forward pass of the reference (transformers' default)
    token_budget: int = 16384  # in a batch of the reward model
    kl_prompts: int = 200

    @property
    def length(self) -> int:
        """Tokens of a response with its prompt, at most."""
        return self.prompt_tokens + self.new_tokens


class Stage(NamedTuple):
    """What one stage needs.

    Attributes:
        name, layout: what it is and how it is spread.
        memory: bytes on the fullest GPU, `Hardware.overhead` included.
        fits: whether they are within the usable share of a GPU.
        seconds: the whole stage.
        terms: {"memory bandwidth" | "compute" | "interconnect": seconds that this alone would take}.
    """

    name: str
    layout: str
    memory: float
    fits: bool
    seconds: float
    terms: dict[str, float]

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.terms, key=self.terms.get)


def in_turn(terms: dict[str, float]) -> float:
    """Seconds where a tensor-parallel layer waits for its all-reduce; reading and computing overlap."""
    return max(terms["memory bandwidth"], terms["compute"]) + terms["interconnect"]


def overlapped(terms: dict[str, float]) -> float:
    """Seconds where weights are gathered while the layers before compute, as ZeRO-3 does."""
    return max(terms.values())


def add(*many: dict[str, float]) -> dict[str, float]:
    """Terms of things that are done one after the other, kind by kind."""
    return {kind: sum(terms[kind] for terms in many) for kind in many[0]}


def scale(terms: dict[str, float], factor: float) -> dict[str, float]:
    """Terms of `factor` repetitions."""
    return {kind: factor * seconds for kind, seconds in terms.items()}


# --- Shapes to bytes and FLOP -------------------------------------------------------------------------------------


def forward_flops(shape: Shape, tokens: float, context: float) -> float:
    """FLOP of a forward pass over `tokens` tokens that attend to `context` tokens on average."""
    attention = 4 * shape.layers * shape.heads * shape.head_size * context
    return tokens * (2 * shape.multiplied + attention)


def pass_terms(
    shape: Shape, hardware: Hardware, parallel: int, tokens: float, context: float, cached: float = 0
) -> dict[str, float]:
    """One forward pass of one model over `tokens` tokens, split over `parallel` GPUs.

    Args:
        context: tokens that each of them attends to, on average.
        cached: tokens whose keys and values are read from the KV cache.
    """
    read = BF16 * shape.multiplied / parallel + kv_bytes(shape) * cached / kv_share(shape, parallel)
    # Two all-reduces a layer, each a reduce-scatter and an all-gather of the hidden states.
    reduced = 2 * shape.layers * 2 * BF16 * tokens * shape.hidden
    return {
        "memory bandwidth": read / (hardware.bandwidth * hardware.bandwidth_share),
        "compute": forward_flops(shape, tokens, context) / parallel / (hardware.flops * hardware.flops_share),
        "interconnect": hardware.collective(reduced, parallel, operations=2 * shape.layers),
    }
