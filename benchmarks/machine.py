"""The machine that a benchmark ran on: its name, what it is made of, and how fast it reads and multiplies.

Reads   /proc. Holds no host name. Writes nothing; prints the head of a results file.

    python benchmarks/machine.py            a Markdown list
    python benchmarks/machine.py --name     the name of the results file: CPU and cores
"""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness  # noqa: F401 (before the libraries)
from common.provenance import versions
from scripts.machine import cpu_field, multiplies_bfloat16

GIB = 2**30
LIBRARIES = ("numpy", "vllm", "trl", "accelerate")


def half_dtype() -> str:
    """The type that this CPU multiplies fastest: what both sides of a benchmark use."""
    return "bfloat16" if multiplies_bfloat16() else "float32"


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def name() -> str:
    """For example `amd-epyc-model-17-2-cores`: processors of one name differ."""
    model = re.sub(r"[^a-z0-9]+", "-", cpu_field("model name").lower()).strip("-")
    return f"{model}-model-{cpu_field('model')}-{os.cpu_count()}-cores"


def fastest(work: Callable[[], object], turns: int = 10) -> float:
    """Seconds of the fastest turn: what the hardware can do, other work on the machine left out."""
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def memory_bandwidth() -> float:
    """Bytes a second that all threads together read from an array of 1 GiB, far above any cache."""
    import torch

    array = torch.ones(GIB // 4)
    return GIB / fastest(array.sum)


def multiply_rate(dtype: str) -> float:
    """Multiplications and additions a second in a product of two 2048 x 2048 matrices of `dtype`."""
    import torch

    matrix = torch.ones(2048, 2048, dtype=getattr(torch, dtype))
    return 2 * 2048**3 / fastest(lambda: matrix @ matrix)


def describe() -> str:
    """A Markdown list of everything that the figures depend on."""
    half = f", multiplies bfloat16 faster: {'yes' if multiplies_bfloat16() else 'no'}"
    rates = ", ".join(f"{multiply_rate(d) / 1e9:.0f} GFLOP/s in {d}" for d in ("float32", "bfloat16"))
    libraries = ", ".join(f"{k} {v}" for k, v in versions(LIBRARIES).items() if v)
    family = "family {}, model {}".format(cpu_field("cpu family"), cpu_field("model"))
    return "\n".join(
        [
            f"- CPU: {cpu_field('model name')} ({family}), {os.cpu_count()} cores, "
            f"{os.environ['OMP_NUM_THREADS']} used{half}",
            f"- memory: {memory_bytes() / GIB:.0f} GiB, read at {memory_bandwidth() / 1e9:.1f} GB/s",
            f"- matrix product: {rates}",
            f"- versions: {libraries}",
        ]
    )


if __name__ == "__main__":
    print(name() if sys.argv[1:] == ["--name"] else describe())
