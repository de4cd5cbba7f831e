"""The lab's command lines: files, the same numbers again, resuming, and what they refuse."""

import json

import numpy as np
import pytest
from commands import python

SMALL = (
    *("--prompts", 2, "--vocabulary", 3, "--length", 3, "--width", 8, "--updates", 12, "--pairs", 8),
    *("--seeds", 4, "--lrs", 0.003, 0.01),
)


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab") / "cell"
    names = ("online", "online-null", "mixp", "best-worst", "xpo-bonus", "g-hybrid")
    result = python("lab/run_lab.py", "--samplers", *names, *SMALL, "--output_dir", folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_a_cell_holds_values_of_all_runs_and_a_table(cell):
    folder, printed = cell
    with np.load(folder / "values.npz") as data:
        assert data["gap"].shape == (6, 2, 4, 10) and data["updates"][-1] == 12
        assert np.isfinite(data["gap"]).all() and (data["gap"] > -1e-9).all() and (data["kl"] > -1e-9).all()
        names = data["samplers"].tolist()
        # Other random numbers, other runs.
        assert (data["gap"][names.index("online")] != data["gap"][names.index("online-null")]).any()
    table = json.loads((folder / "table.json").read_text())
    assert [row["sampler"] for row in table["rows"]] == names
    assert table["setting"]["updates"] == 12 and table["seeds"] == [0, 1, 2, 3]
    assert (folder / "table.md").read_text().strip() == printed.strip()


def test_the_same_command_gives_the_same_numbers_whatever_else_is_compared(cell, tmp_path):
    result = python("lab/run_lab.py", "--samplers", "mixp", "online", *SMALL, "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    with np.load(cell[0] / "values.npz") as first, np.load(tmp_path / "values.npz") as second:
        np.testing.assert_allclose(second["gap"][0], first["gap"][2], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(second["gap"][1], first["gap"][0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "flags, word",
    [
        (("--samplers", "nope"), "nope"),
        (("--samplers", "gshf"), "online"),
        (("--optimizer", "newton"), "newton"),
        (("--learner", "tree"), "tree"),
        (("--prompts", "9"), "--prompts"),
        (("--heads", "3"), "--heads"),
        (("--iterations", "7"), "--iterations"),
        (("--epochs", "4"), "--epochs"),
        (("--label_noise", "0.7"), "--label_noise"),
        (("--pairs", "0", "--samplers", "online", "best-worst"), "--pairs"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, flags, word):
    result = python("lab/run_lab.py", "--output_dir", tmp_path / "out", *flags)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and word in lines[0] and "Traceback" not in result.stderr


def test_the_study_keeps_what_is_there_and_refuses_another(cell, tmp_path):
    folder = tmp_path / "main"
    folder.mkdir()
    (folder / "table.json").write_bytes((cell[0] / "table.json").read_bytes())
    result = python("lab/study.py", "--output_dir", tmp_path, "--cells", "main", "--seeds", 4)
    assert result.returncode == 2 and "main" in result.stderr
    assert (folder / "table.json").read_bytes() == (cell[0] / "table.json").read_bytes()


def test_figures_of_what_is_there(cell, tmp_path):
    result = python("lab/figures.py", "--study", tmp_path, "--output_dir", tmp_path / "figures")
    assert result.returncode == 2 and "main" in result.stderr and not (tmp_path / "figures").exists()
