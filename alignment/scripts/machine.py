"""What this machine has: GPUs, the environments that setup.sh makes. Standard library only."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.cli import UserError

PROJECT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ("vllm", "rlhflow", "rewardflow")
SEES_GPUS = """import sys, torch
sys.exit(not (torch.version.cuda and torch.cuda.is_available() and torch.cuda.device_count() >= {}))"""


def _nvidia_smi(*options: str) -> list[str]:
    """Return the lines that nvidia-smi prints; none where it is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return []
    done = subprocess.run([tool, *options], capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def listed_gpus() -> int:
    """Return how many GPUs a process may use here; parts of one (MIG) are not counted."""
    count = sum(line.startswith("GPU ") for line in _nvidia_smi("--list-gpus"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        count if visible is None or not count else len([v for v in visible.split(",") if v.strip() not in ("", "-1")])
    )


def gpus(needed: bool, dry_run: bool) -> int:
    """Return the GPUs that a run uses. A dry run without any plans for eight where the recipe needs them."""
    return listed_gpus() or (8 if needed and dry_run else 0)


def gpu_names(count: int) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls the GPUs that a run uses."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def gpu_memory() -> int | None:
    """Return the bytes of the smallest GPU's memory; None where nvidia-smi lists none."""
    sizes = _nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits")
    return min((int(size) * 2**20 for size in sizes if size.strip().isdigit()), default=None)


def cpu_field(name: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def multiplies_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 faster than float32.

    With AMX, or AVX-512's instructions for it. Not where the latter stand beside avx512_fp16: those are Intel's since
    Sapphire Rapids, which a virtual machine may rob of AMX, and then bfloat16 has 0.6 to 0.7 times float32's rate.
    """
    flags = set(cpu_field("flags").split())
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "avx512_fp16" not in flags)


def python_of(environment: str, on_cpu: bool = False) -> Path | None:
    """Return an environment's interpreter: that of `setup.sh gpu`, else that of `setup.sh cpu`, else None.

    Args:
        on_cpu: no GPU is to be used: that of `setup.sh cpu` first, since vLLM for CUDA does not run without one.
    """
    folders = [PROJECT / f".venv-{environment}", PROJECT / ".venv"][:: -1 if on_cpu else 1]
    return next((folder / "bin/python" for folder in folders if os.access(folder / "bin/python", os.X_OK)), None)


def check_environments(used_gpus: int, trains_on_cpus: bool) -> None:
    """Raise `UserError` for an environment that is missing, or whose torch sees fewer GPUs than are to be used.

    Args:
        trains_on_cpus: where no GPU is listed, `used_gpus` counts processes (configs/cpu.yaml).
    """
    found = {name: python_of(name, on_cpu=used_gpus == 0) for name in ENVIRONMENTS}
    for name, python in found.items():
        if python is None:
            raise UserError(f"no environment for {name}: run 'bash setup.sh gpu' (or cpu) in {PROJECT} first")
    if used_gpus == 0 or (trains_on_cpus and listed_gpus() == 0):
        return
    pythons = list(dict.fromkeys(found.values()))
    with ThreadPoolExecutor() as pool:
        question = SEES_GPUS.format(used_gpus)
        codes = list(pool.map(lambda python: subprocess.run([python, "-c", question]).returncode, pythons))
    for python, code in zip(pythons, codes, strict=True):
        if code:
            raise UserError(
                f"GPUS={used_gpus}: the torch of {python} can use fewer: there are fewer, it is a CPU build, or the "
                "driver is old; 'bash setup.sh gpu' makes environments for GPUs. GPUS=0 uses the CPU."
            )
