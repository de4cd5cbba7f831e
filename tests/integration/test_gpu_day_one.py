"""benchmarks/gpu_day_one.py on a machine without a GPU: its tiny form, so that it cannot rot."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_day_one

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_day_one.py"
RUN_HERE = ["environment", "mixture-eager", "speed-eager", "training", "annotation", "kl"]


def run(*words: object) -> tuple[int, list[list[str]]]:
    """Exit code and the table's rows: [part, check, result, figure]."""
    command = [sys.executable, str(SCRIPT), "--size", "tiny", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    return done.returncode, [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_tiny_form_passes(tmp_path):
    code, rows = run("--parts", *RUN_HERE, "--output", tmp_path / "day.md")
    failed = [row for row in rows if row[2] == "fail"]
    assert not failed and code == 0
    for part in RUN_HERE:
        assert sum(row[0] == part and row[2] == "pass" for row in rows) > 1
    assert len((tmp_path / "day.md").read_text().splitlines()) == len(rows) + 6


def test_a_part_that_breaks_is_a_line_and_the_others_run(tmp_path):
    code, rows = run("--parts", "kl", "environment", "--limit", 0.5)
    assert code == 1
    assert {row[0] for row in rows if row[2] == "fail"} == {"kl", "environment"}


def test_parts_without_their_packages_are_skipped(monkeypatch):
    """As on a machine with torch, transformers and accelerate alone."""
    here = {"torch", "transformers", "accelerate"}
    monkeypatch.setattr(gpu_day_one.importlib.util, "find_spec", lambda name: name if name in here else None)
    runs = {name for name, part in gpu_day_one.PARTS.items() if gpu_day_one.missing(part, gpus=1) is None}
    assert runs == {"environment", "training", "annotation", "kl"}
    assert "GPU" in gpu_day_one.missing(gpu_day_one.PARTS["two-gpus"], gpus=1) or "vllm" in gpu_day_one.missing(
        gpu_day_one.PARTS["two-gpus"], gpus=1
    )
