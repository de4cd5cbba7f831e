"""What the benchmarks share: taking turns, medians, the peak memory of a process, one form of table.

Imported before the libraries: it makes the pipeline's modules importable and sets the number of threads, which
libraries read when they are imported.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[1]
ASSETS = PROJECT / "alignment/assets"
# Without the scripts' own folder: its files are no packages.
sys.path[:] = [
    str(PROJECT / "alignment"),
    *(p for p in sys.path if Path(p).resolve() != PROJECT / "benchmarks"),
]
os.environ.setdefault("OMP_NUM_THREADS", "2")  # two cores, as the quickstart
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPETITIONS = 3
GROWTH = 4.4  # four times the work may take this many times as long
# What torch's profiler calls the two kinds of work that a transformer needs; all else could be spared in principle.
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention", "cpu_attention"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn_linear", "onednn"),
}
HEAD = ("case", "baseline", "ours", "ratio", "to reach", "limit", "bound by")


class Row(NamedTuple):
    """A line of a table; `-` where nothing belongs.

    Attributes:
        case: what was run.
        baseline, ours: figures with their unit, of the same run.
        ratio: of the two.
        to_reach: what the ratio should be.
        limit: what no program could exceed on this machine, or for this comparison.
        bound_by: what the time of ours goes into, from a profile.
    """

    case: str
    baseline: str
    ours: str
    ratio: str
    to_reach: str = "-"
    limit: str = "-"
    bound_by: str = "-"


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def report(title: str, words: str, rows: list[Row]) -> None:
    """Prints a benchmark's section of the results."""
    print(f"## {title}\n\n{words.strip()}\n\n{table(rows)}\n", flush=True)


def medians(sides: Mapping[str, Callable[[], float]], repetitions: int = REPETITIONS) -> dict[str, float]:
    """The median figure of each side. The sides take turns, so that a busy machine hits all alike.

    Args:
        sides: name → what runs it once and returns its figure (seconds, tokens per second).
    """
    figures = {name: [] for name in sides}
    for turn in range(repetitions):
        for name, side in sides.items():
            figures[name].append(side())
            print(f"turn {turn + 1}: {name} {figures[name][-1]:.4g}", file=sys.stderr, flush=True)
    return {name: statistics.median(found) for name, found in figures.items()}


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def shares(work: Callable[[], object]) -> str:
    """What the processor does in it: for example "matrix products 78%, attention 7%"."""
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    everywhere = _ExperimentalConfig(profile_all_threads=True)  # annotation works in threads of its own
    with profile(activities=[ProfilerActivity.CPU], acc_events=True, experimental_config=everywhere) as profiler:
        work()
    parts = dict.fromkeys(("matrix products", "attention", "rest"), 0.0)
    for event in profiler.key_averages():
        kinds = (kind for kind, names in KINDS.items() if any(name in event.key for name in names))
        parts[next(kinds, "rest")] += event.self_cpu_time_total
    total = sum(parts.values())
    return ", ".join(f"{name} {part / total:.0%}" for name, part in parts.items() if name != "rest")


def growth_row(case: str, once: float, four_times: float, bound_by: str = "-") -> Row:
    """How our time grew from the work to four times the work."""
    figures = f"{once:.3g} s (1x)", f"{four_times:.3g} s (4x)"
    return Row(case, *figures, f"{four_times / once:.2f}", f"<= {GROWTH}", "4", bound_by)


def peak_memory(command: list[str], **environment: str) -> int:
    """Bytes of memory that a process held at its highest. Exits with its last line of error if it fails.

    The system counts what the caller held when it started the process, so the caller must be small: it must not
    have imported torch.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # waited for here, not by `process`
        if process.returncode:
            errors.seek(0)
            words = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            sys.exit(f"{command[1]}: exit code {process.returncode}: {''.join(words)}")
    return usage.ru_maxrss * 1024
