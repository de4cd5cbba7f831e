"""docs/tutorial.md: its row leaves every test green, and every command of it runs, in a copy of the project.

The commands are the reader's own; lines at the end of two recipes only make the runs small.
"""

import json
import re
import shutil
import subprocess

import numpy as np
import psutil
import pytest
from commands import PROJECT, run

from common.record_stream import read_records

pytestmark = pytest.mark.slow

SMALL = {
    "TRAIN_END": 8,
    "TEST_START": 400,
    "TEST_END": 404,
    "KL_PROMPTS": 4,
    "MAX_NEW_TOKENS": 12,
    "EPOCHS": 1,
    "SEEDS": [1],
}


TABLE = r"import.*\b(MIXTURES|SAMPLERS)\b"  # what a unit test says that goes through the rows


def blocks(language: str) -> list[str]:
    text = (PROJECT / "docs/tutorial.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def copy_of_the_project(folder):
    """The files that git knows, with the environment that is here already."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (PROJECT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / name)
    (folder / ".venv").symlink_to(PROJECT / ".venv")


def add_row(folder) -> None:
    """Do what the reader does: put the tutorial's row into the table."""
    [row] = blocks("python")
    table = folder / "bandit/mixtures.py"
    before, found, after = table.read_text().partition("MIXTURES = {\n")
    assert found
    table.write_text(before + found + row + after)


def test_the_row_leaves_the_tests_of_tables_and_pages_green(tmp_path):
    """Those that go through a table of samplers, or through the documentation; the others know no row."""
    copy_of_the_project(tmp_path)
    add_row(tmp_path)
    unit = sorted((PROJECT / "tests/unit").glob("test_*.py"))
    words = [f"tests/unit/{file.name}" for file in unit if re.search(TABLE, file.read_text())]
    assert {f"tests/unit/test_{name}.py" for name in ("bandit_maths", "lab", "samplers")} <= set(words)
    words += ["tests/unit/test_docs.py"]
    result = run(["bash", "-c", f'cd {tmp_path} && .venv/bin/python -m pytest -q "$@"', "-", *words])
    assert result.returncode == 0, result.stdout[-3000:]


def test_every_command_of_the_tutorial(tmp_path, assets):
    copy_of_the_project(tmp_path)
    for recipe in ("quickstart", "ablation"):  # the last of a name counts
        with (tmp_path / f"alignment/recipes/{recipe}.yaml").open("a") as file:
            file.write("".join(f"{k}: {json.dumps(v)}\n" for k, v in {**SMALL, "ASSETS": str(assets)}.items()))
    outputs = []
    for number, commands in enumerate(blocks("bash")):
        if number == 1:
            add_row(tmp_path)
        result = run(["bash", "-ec", f"cd {tmp_path}\n{commands}"])
        assert result.returncode == 0, f"{commands}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        outputs.append(result.stdout)
    check_lab(tmp_path / "alignment/lab/results/bold")
    check_bandit(tmp_path / "bandit/results/bold")
    check_quickstart(tmp_path / "alignment/runs/bold", outputs)
    seeds = (tmp_path / "alignment/runs/bold_seeds/results/seeds.md").read_text()
    assert "bold" in seeds and "missing" not in seeds
    running = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in running if str(tmp_path) in words]  # such as the Python of quickstart and ablation


def check_bandit(folder):
    with np.load(folder / "trajectories.npz") as data:
        for series in ("param_diff", "value", "max_delta"):
            np.testing.assert_array_equal(data[f"bold/exact/{series}"], data[f"mix_1_0_1/exact/{series}"])
        assert (data["bold/exact/param_diff"][:, -1] < data["bold/exact/param_diff"][:, 0]).all()


def check_lab(folder):
    rows = {row["sampler"]: row for row in json.loads((folder / "table.json").read_text())["rows"]}
    assert set(rows) == {"online", "online-null", "mixp", "bold"}
    assert all(0 < row["gap"] < 1.4 for row in rows.values())  # the reference's own is about 1.35


def check_quickstart(folder, outputs):
    instances, settings = read_records(folder / "data/data_with_rewards_iter2_bold.json", ("responses", "rewards"))
    assert len(instances) == 8
    # A real language model answers in words, and the two distributions differ.
    assert all(any(c.isalpha() for c in text) for i in instances for text in i["responses"])
    assert sum(len(set(i["responses"])) == 2 for i in instances) >= 6
    assert settings["generate"]["sampler"] == [[1.0, [2.0, -1.0], [1.0, 0.0]]]
    assert json.loads((folder / "results/kl_bold_iter2.json").read_text())["kl"] > 0
    table = (folder / "results/summary.md").read_text()
    assert "base" in table and "bold" in table
    assert any("runs/bold/results/report.html" in output for output in outputs)
