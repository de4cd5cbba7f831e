"""Rewards from a Python function: called as documented, checked, continued, and untouched by all else in the file."""

import json
import subprocess
import sys

import pytest
from commands import ALIGNMENT

from annotate_data import get_rewards
from common.cli import run
from common.journal import journal_path

RULES = """
import helper

def length(prompt, responses, fields):
    return [len(response) for response in responses]

def exact_answer(prompt, responses, fields):
    return [response.strip() == fields["answer"] for response in responses]

def everything(prompt, responses, fields):
    assert set(fields) == {"answer", "response_ids", "odd"}, fields
    fields.clear()
    responses.reverse()
    return [helper.VALUE + len(prompt), len(responses)]

def half(prompt, responses, fields):
    return [1.0]

def number(prompt, responses, fields):
    return 3

def text(prompt, responses, fields):
    return "12"

def words(prompt, responses, fields):
    return ["1", "2"]

def not_finite(prompt, responses, fields):
    return [0.0, float("nan") if fields["answer"] == "5" else 1.0]

def fails(prompt, responses, fields):
    return [1 / (fields["answer"] != "5"), 0]

def leaves(prompt, responses, fields):
    raise SystemExit(0)

def stops_at_5(prompt, responses, fields):
    if fields["answer"] == "5" and not open(__file__ + ".go").read():
        raise KeyError("5")
    print("called", prompt)
    return [float(len(response)) for response in responses]

not_a_function = 3
"""
ROWS = [
    {"prompt": "2 + 2 = ", "responses": ["4", "5 "], "answer": "4", "response_ids": [[7, 2], [8, 9, 2]]},
    {"prompt": "2 + 3 = ", "responses": ["five", " 5\n"], "answer": "5", "response_ids": [[3], [4, 4]]},
    {"prompt": "x\u2028é", "responses": ["", "🙂"], "answer": "", "response_ids": [[2], [5]]},
]
FAILS_IN_LINE = 1 + RULES[: RULES.index("1 / (")].count("\n")
ODD = [None, {"a": [1, {}]}, 12345678901234567890]
ROWS = [{**row, "odd": odd} for row, odd in zip(ROWS, ODD, strict=True)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rules.py").write_text(RULES)
    (tmp_path / "rules.py.go").write_text("yes")
    (tmp_path / "helper.py").write_text("VALUE = 0.5")
    (tmp_path / "in.json").write_text(json.dumps({"instances": ROWS, "settings": {"generate": {"K": 2}}}, indent=1))
    return tmp_path


@pytest.fixture
def score(folder, monkeypatch, capsys):
    """Runs the script's own `main`; returns (exit code, standard output, standard error)."""

    def call(name, *more, file=None, output="out.json"):
        flags = {"--dataset_name_or_path": folder / "in.json", "--output_file": folder / output}
        flags["--reward_function"] = f"{file or folder / 'rules.py'}:{name}"
        words = [str(word) for pair in flags.items() for word in pair]
        monkeypatch.setattr(sys, "argv", ["get_rewards.py", *words, *map(str, more)])
        monkeypatch.setattr(sys, "path", sys.path.copy())
        code = 0
        try:
            run(get_rewards.main)
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def rewards(folder, output="out.json"):
    return [instance["rewards"] for instance in json.loads((folder / output).read_text())["instances"]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("length", [[1, 2], [4, 3], [0, 1]]),
        ("exact_answer", [[1, 0], [0, 1], [1, 0]]),
        ("everything", [[8.5, 2], [8.5, 2], [3.5, 2]]),
    ],
)
def test_one_number_per_response_and_all_else_untouched(folder, score, name, expected):
    code, printed, errors = score(name)
    assert (code, errors) == (0, "")
    assert rewards(folder) == expected
    result = json.loads((folder / "out.json").read_text())
    assert [{k: v for k, v in row.items() if k != "rewards"} for row in result["instances"]] == ROWS
    assert result["settings"]["generate"] == {"K": 2}
    assert all(isinstance(v, float) for row in result["instances"] for v in row["rewards"])
    assert f"mean reward {sum(map(sum, expected)) / 6:.4f}" in printed


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("half", ["in.json: row 0", "half"]),
        ("number", ["in.json: row 0", "number"]),
        ("text", ["in.json: row 0", "text"]),
        ("words", ["in.json: row 0", "words"]),
        ("not_finite", ["in.json: row 1", "nan", "5"]),
        ("fails", ["in.json: row 1", "ZeroDivisionError", f"line {FAILS_IN_LINE}"]),
        ("leaves", ["in.json: row 0", "SystemExit"]),
        ("absent", ["rules.py", "absent"]),
        ("not_a_function", ["rules.py", "not_a_function"]),
        ("a b", ["--reward_function"]),
    ],
)
def test_a_wrong_answer_is_one_line_with_file_and_row(folder, score, name, parts):
    code, _, errors = score(name)
    assert code == 2 and errors.count("\n") == 1
    assert all(part in errors for part in parts), errors
    assert not (folder / "out.json").exists()


@pytest.mark.parametrize("content", ["def length(:\n", "import no_such_module\n", "raise SystemExit(0)\n", None])
def test_a_file_that_does_not_run_is_one_line(folder, score, content):
    if content is not None:
        (folder / "other.py").write_text(content)
    code, _, errors = score("length", file=folder / "other.py")
    assert code == 2 and errors.count("\n") == 1 and "other.py" in errors
    assert not list(folder.glob("out.json*"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--reward_name_or_path", "model"],
        ["--reward_template", "chat"],
        ["--max_length", "5"],
        ["--dtype", "bfloat16"],
        ["--reward_column", "0"],
    ],
)
def test_flags_of_a_model_are_refused(folder, score, flags):
    code, _, errors = score("length", *flags)
    assert code == 2 and errors.count("\n") == 1 and flags[0] in errors
    assert not (folder / "out.json").exists()


def test_a_run_that_failed_continues_where_it_was(folder, score):
    assert score("stops_at_5", output="whole.json")[0] == 0
    (folder / "rules.py.go").write_text("")
    code, printed, errors = score("stops_at_5")
    assert code == 2 and "row 1" in errors and "KeyError" in errors
    assert printed.count("called") == 1
    assert len(journal_path(folder / "out.json").read_text().splitlines()) == 3  # settings and row 0
    (folder / "rules.py.go").write_text("yes")
    code, printed, _ = score("stops_at_5")
    assert code == 0 and printed.count("called") == 2
    assert (folder / "out.json").read_bytes() == (folder / "whole.json").read_bytes()
    assert not journal_path(folder / "out.json").exists()


def test_a_changed_file_is_another_function_and_a_moved_one_is_not(folder, score):
    assert score("length")[0] == 0
    before = (folder / "out.json").read_bytes()
    (folder / "moved").mkdir()
    (folder / "moved/rules.py").write_text(RULES)
    code, printed, _ = score("length", file=folder / "moved/rules.py")
    assert code == 0 and "already done" in printed
    (folder / "rules.py").write_text(RULES + "\n# changed\n")
    code, _, errors = score("length")
    assert code == 2 and "reward_function_sha256" in errors
    assert (folder / "out.json").read_bytes() == before


def test_torch_is_not_imported(folder):
    """As a process of its own; what is imported is printed at its end."""
    script = ALIGNMENT / "annotate_data/get_rewards.py"
    code = f"import runpy, sys\nrunpy.run_path({str(script)!r}, run_name='__main__')\nprint(sorted(sys.modules))"
    flags = [f"--dataset_name_or_path={folder / 'in.json'}", f"--reward_function={folder / 'rules.py'}:length"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, f"--output_file={folder / 'out.json'}"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "'argparse'" in done.stdout
    assert not any(f"'{name}'" in done.stdout for name in ("torch", "transformers", "numpy"))
