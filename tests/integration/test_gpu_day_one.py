"""benchmarks/gpu_day_one.py on a machine without a GPU: its tiny form, so that it cannot rot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_day_one.py"
WITH_ENGINE = ["environment", "mixture-eager", "speed-eager"]
WITHOUT = ["environment", "training", "annotation", "kl"]
BLOCKER = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
absent = {"vllm", "deepspeed", "trl"}
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in absent else find(name, *rest))
"""


def run(*words: object, **environment: str) -> tuple[int, list[list[str]]]:
    """Exit code and the table's rows: [part, check, result, figure]."""
    command = [sys.executable, str(SCRIPT), "--size", "tiny", *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False, env=os.environ | environment
    )
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    return done.returncode, [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def runs_well(rows, parts) -> bool:
    """Each of the parts has figures, and not only the time it took."""
    return all(sum(row[0] == part and row[2] in ("pass", "measured") for row in rows) > 1 for part in parts)


def test_the_tiny_form_passes(tmp_path):
    code, rows = run("--parts", *WITH_ENGINE, "--output", tmp_path / "day.md")
    failed = [row for row in rows if row[2] == "fail"]
    assert not failed and code == 0
    assert runs_well(rows, WITH_ENGINE)
    assert len((tmp_path / "day.md").read_text().splitlines()) == len(rows) + 6


def test_a_part_that_breaks_is_a_line_and_the_others_run(tmp_path):
    code, rows = run("--parts", "kl", "environment", "--limit", 0.5)
    assert code == 1
    assert {row[0] for row in rows if row[2] == "fail"} == {"kl", "environment"}


def test_parts_run_without_the_packages_that_only_others_need(tmp_path):
    """As on a machine with torch, transformers, accelerate and peft alone: the others cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    for name in ("vllm", "deepspeed", "trl"):
        command = [sys.executable, "-c", f"import {name}"]
        assert subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=False
        ).returncode
    code, rows = run("--parts", *WITHOUT, "mixture-eager", "then", "zero3", PYTHONPATH=path)
    assert code == 0 and runs_well(rows, WITHOUT)
    skipped = {row[0] for row in rows if row[1:3] == ["runs", "skipped"]}
    assert skipped == {"mixture-eager", "then", "zero3"}
