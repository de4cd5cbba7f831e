"""Does all of this work on a GPU, and how fast? Under ten minutes on one H100; no download, no data, random weights.

Reads nothing. Prints one line per check (pass, fail, skipped or measured, with its figure); --output also writes a
file. Limits called guesses were never compared with a GPU: look at the figure before you believe a pass or a fail.
Each part runs in a process of its own, so that one that dies takes no other with it. A part whose packages are
missing is skipped: torch, transformers, accelerate and peft are enough to begin with. Exit code 1 if a check failed.

    python benchmarks/gpu_day_one.py
    python benchmarks/gpu_day_one.py --parts environment mixture-eager speed-eager --output results.md
    python benchmarks/gpu_day_one.py --size tiny          on a machine without a GPU, so that the script cannot rot
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness  # noqa: F401, isort: skip (before the libraries)

from benchmarks import gpu_engine_parts, gpu_model_parts
from benchmarks.gpu_setting import Check, Setting, device_name

MARK = "CHECK "


class Part(NamedTuple):
    """A group of checks.

    Attributes:
        run: takes a `Setting` and yields a `Check` each.
        packages: without which it is skipped.
        gpus: how many it needs; a part for none also has a tiny form on a CPU.
    """

    run: object
    packages: tuple[str, ...] = ("torch", "transformers")
    gpus: int = 0


VLLM = ("torch", "transformers", "vllm", "vllm_logit_mixture")
TRAINING = ("torch", "transformers", "accelerate", "peft")
PARTS = {
    "environment": Part(gpu_model_parts.environment, ("torch",)),
    "mixture-eager": Part(gpu_engine_parts.mixture("eager", True), VLLM),
    "mixture-eager-in-step": Part(gpu_engine_parts.mixture("eager", False), VLLM),
    "mixture-float32": Part(gpu_engine_parts.mixture("eager", True, "float32"), VLLM, 1),
    "mixture-cudagraphs": Part(gpu_engine_parts.mixture("cudagraphs", True), VLLM, 1),
    "mixture-cudagraphs-in-step": Part(gpu_engine_parts.mixture("cudagraphs", False), VLLM, 1),
    "mixture-inductor": Part(gpu_engine_parts.mixture("inductor", True), VLLM, 1),
    "speed-alone": Part(gpu_engine_parts.speed("eager", 1), VLLM),
    "speed-eager": Part(gpu_engine_parts.speed("eager", 2), VLLM),
    "speed-cudagraphs": Part(gpu_engine_parts.speed("cudagraphs", 2), VLLM, 1),
    "speed-inductor-cold": Part(gpu_engine_parts.speed("inductor", 2), VLLM, 1),
    "speed-inductor-warm": Part(gpu_engine_parts.speed("inductor", 2), VLLM, 1),
    "then": Part(gpu_engine_parts.two_command_lines, VLLM),
    "training": Part(gpu_model_parts.training, TRAINING),
    "zero3": Part(gpu_model_parts.zero3, (*TRAINING, "deepspeed"), 1),
    "annotation": Part(gpu_model_parts.annotation),
    "kl": Part(gpu_model_parts.kl),
    "two-gpus": Part(gpu_engine_parts.two_gpus, VLLM, 2),
}


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    flags.add_argument("--size", choices=["real", "tiny"], help="of the models (default: real on a GPU, else tiny)")
    flags.add_argument("--limit", type=float, default=240, help="seconds for one part (default 240)")
    flags.add_argument("--output", type=Path, help="a Markdown file for the table")
    flags.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    flags.add_argument("--folder", help=argparse.SUPPRESS)
    return flags


def missing(part: Part, gpus: int) -> str | None:
    """Return why a part cannot run here, or None."""
    absent = [name for name in part.packages if importlib.util.find_spec(name) is None]
    if absent:
        return f"no {', '.join(absent)}"
    return f"needs {part.gpus} GPU(s), there are {gpus}" if part.gpus > gpus else None


def run_part(name: str, args: argparse.Namespace, folder: str) -> list[Check]:
    """Run a part in a process of its own; what it found until it ended, and how it ended where that was not well."""
    command = [sys.executable, __file__, "--part", name, "--size", args.size, "--folder", folder]
    log, began = Path(folder) / f"{name}.log", time.perf_counter()
    with open(log, "wb") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=args.limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"no end after {args.limit:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    found = [Check(**json.loads(line.removeprefix(MARK))) for line in lines if line.startswith(MARK)]
    if code:
        said = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")
        found.append(Check("ends well", "fail", f"{code}: {said.strip()[:200]}"))
    return [*found, Check("time", "pass" if not code else "fail", f"{time.perf_counter() - began:.0f} s")]


def main() -> None:
    args = parser().parse_args()
    if args.part:
        for check in PARTS[args.part].run(Setting(args.size == "tiny", Path(args.folder))):
            print(MARK + json.dumps(check._asdict()), flush=True)
        return
    name, gpus = device_name()
    args.size = args.size or ("real" if gpus else "tiny")
    table = [
        f"# Day one: {name}",
        "",
        f"Models: {args.size}.",
        "",
        "| part | check | result | figure |",
        "|---|---|---|---|",
    ]
    print("\n".join(table), flush=True)
    failed = False
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        for part in args.parts:
            why = missing(PARTS[part], gpus)
            checks = [Check("runs", "skipped", why)] if why else run_part(part, args, folder)
            failed |= any(check.result == "fail" for check in checks)
            rows = [f"| {part} | {' | '.join(cell.replace('|', '/') for cell in check)} |" for check in checks]
            print("\n".join(rows), flush=True)
            table += rows
    if args.output:
        args.output.write_text("\n".join(table) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
