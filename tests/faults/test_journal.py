"""Journals that a power cut or a bad disk has damaged: every row that is whole is used, the result is the same."""

import json
import os
import random
import sys
from pathlib import Path

import pytest
from tiny import save_tiny_reward_model

from annotate_data import get_rewards
from common.cli import UserError, run
from common.journal import Journal, journal_path
from common.records import rename_flushed, write_atomic

SETTINGS = {"seed": 3, "weights": [1.5, -0.5], "name": "é"}


def write_journal(output: Path, rows: dict, settings: dict = SETTINGS) -> Path:
    """A journal as a killed process leaves it."""
    journal = Journal(output, settings)
    for key, row in rows.items():
        journal.add(key, row)
    journal._file.close()
    return journal.path


def random_rows(rng: random.Random) -> dict:
    texts = ["", "a\nb", "é\u2028", "🙂" * 9, '{"crc32": "00000000", ', "\x00\x00", "}\\", "x" * 300]
    return {
        f"{i}.{k}": rng.choice([{"text": rng.choice(texts), "ids": [i] * rng.randrange(5)}, {"crc32": "0" * 8}, 1.5])
        for i in range(rng.randrange(1, 12))
        for k in range(2)
    }


def damage(content: bytes, rng: random.Random) -> tuple[bytes, list[int | None]]:
    """Damaged bytes, and for each which byte of `content` it still is (None: it was changed)."""
    now = [(byte, i) for i, byte in enumerate(content)]
    for _ in range(rng.randrange(1, 4)):
        at, size = rng.randrange(len(now)), rng.choice([1, 2, 30, 500])
        part = now[at : at + size]
        kind = rng.choice(["zero", "cut", "flip", "newline", "end"])
        if kind == "zero":
            now[at : at + size] = [(0, None)] * len(part)
        elif kind == "cut":
            del now[at : at + size]
        elif kind == "flip":
            now[at] = (now[at][0] ^ (1 << rng.randrange(8)), None)
        elif kind == "newline":
            now[at] = (ord("\n"), None)
        else:
            del now[at:]
        now = now or [(0, None)]
    return bytes(byte for byte, _ in now), [i for _, i in now]


def untouched(content: bytes, left: list[int | None]) -> set[int]:
    """Numbers of the lines whose bytes all stand there as before, one after the other."""
    places = {i: at for at, i in enumerate(left) if i is not None}
    found, start = set(), 0
    for number, line in enumerate(content.splitlines(keepends=True) if b"\r" not in content else []):
        spots = [places.get(i) for i in range(start, start + len(line))]
        if spots[0] is not None and spots == list(range(spots[0], spots[0] + len(line))):
            found.add(number)
        start += len(line)
    return found


@pytest.mark.parametrize("seed", range(300))
def test_every_undamaged_row_survives(tmp_path, seed, capsys):
    rng = random.Random(seed)
    rows = random_rows(rng)
    path = write_journal(tmp_path / "out.json", rows)
    content = path.read_bytes()
    assert content.count(b"\n") == 1 + len(rows)
    changed, left = damage(content, rng)
    path.write_bytes(changed)
    whole = untouched(content, left)
    survivors = {key: row for number, (key, row) in enumerate(rows.items(), 1) if number in whole}
    try:
        journal = Journal(tmp_path / "out.json", SETTINGS)
    except UserError as error:
        assert not whole, error  # neither the settings nor a row are left
        assert path.read_bytes() == changed
        return
    found = dict(journal.rows)
    assert found == {key: rows[key] for key in found}, "a row that nobody wrote"
    assert {key: found.get(key) for key in survivors} == survivors
    if changed.count(b"\n") > len(whole):  # more than a torn end
        assert "damaged in" in capsys.readouterr().out
    for key in rows.keys() - found.keys():
        journal.add(key, rows[key])
    assert dict(journal.rows) == rows
    journal._file.close()
    again = Journal(tmp_path / "out.json", SETTINGS)
    assert dict(again.rows) == rows


def test_a_lost_line_break_costs_one_row(tmp_path):
    rows = {str(i): {"text": "x" * i} for i in range(9)}
    path = write_journal(tmp_path / "out.json", rows)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:4]) + b"\0" + b"\n".join(lines[4:]))
    assert set(Journal(tmp_path / "out.json", SETTINGS).rows) == set(rows) - {"2"}


@pytest.mark.parametrize("first_line_damaged", [False, True])
def test_rows_of_other_settings_are_never_used(tmp_path, first_line_damaged):
    path = write_journal(tmp_path / "out.json", {"0": {"text": "a"}}, {**SETTINGS, "seed": 4})
    if first_line_damaged:
        path.write_bytes(b"\0" * 20 + path.read_bytes()[20:])
    before = path.read_bytes()
    with pytest.raises(UserError, match="other settings" if first_line_damaged else "seed=4, now seed=3"):
        Journal(tmp_path / "out.json", SETTINGS)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b'{"K": 5}\n{"key": "0.0", "row": {}}\n', b"notes of mine\n", b'{"crc32": "00000000", "settings": {}}\n'],
    ids=["of an earlier version", "of a person", "of nothing but damage"],
)
def test_what_is_no_journal_is_left_as_it_is(tmp_path, content):
    path = journal_path(tmp_path / "out.json")
    path.write_bytes(content)
    with pytest.raises(UserError, match="remove it"):
        Journal(tmp_path / "out.json", SETTINGS)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b'{"crc'])
def test_a_journal_of_nothing_begins_again(tmp_path, content):
    journal_path(tmp_path / "out.json").write_bytes(content)
    assert len(Journal(tmp_path / "out.json", SETTINGS).rows) == 0


RULES = """
def length(prompt, responses, fields):
    open(__file__ + ".calls", "a").write("x")
    return [len(response) + 0.1 for response in responses]
"""


def annotate(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["get_rewards.py", *map(str, flags)])
    run(get_rewards.main)


@pytest.mark.parametrize("kind", ["function", "model"])
def test_results_are_byte_identical(tmp_path, monkeypatch, capsys, kind):
    """The real script on its own journal, damaged in twelve ways."""
    rng = random.Random(1)
    instances = [{"prompt": f"p{i}", "responses": ["a" * rng.randrange(1, 60), "b" * i]} for i in range(60)]
    (tmp_path / "in.json").write_text(json.dumps({"instances": instances}))
    (tmp_path / "rules.py").write_text(RULES)
    if kind == "function":
        flags = ["--reward_function", tmp_path / "rules.py:length"]
    else:
        flags = ["--reward_name_or_path", save_tiny_reward_model(tmp_path / "rm", 1), "--token_budget", 200]
    flags += ["--dataset_name_or_path", tmp_path / "in.json", "--output_file"]
    whole = tmp_path / "whole.json"
    with monkeypatch.context() as patch:  # keep the journal of a whole run
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        annotate(monkeypatch, *flags, whole)
    content, output = journal_path(whole).read_bytes(), tmp_path / "out.json"
    assert content.count(b"\n") == 121
    used = 0
    for seed in range(12):
        (tmp_path / "rules.py.calls").unlink(missing_ok=True)
        changed, left = damage(content, random.Random(seed))
        if not untouched(content, left):
            continue  # the test above says what happens then
        used += 1
        journal_path(output).write_bytes(changed)
        annotate(monkeypatch, *flags, output)
        assert output.read_bytes() == whole.read_bytes()
        assert not journal_path(output).exists()
        if kind == "function":  # only for instances that lost a row
            lines = untouched(content, left)
            lost = sum(not {1 + 2 * row, 2 + 2 * row} <= lines for row in range(60))
            calls = tmp_path / "rules.py.calls"
            assert (len(calls.read_text()) if calls.exists() else 0) <= lost
        output.unlink()
    assert used >= 8


def test_what_gets_a_name_is_on_the_disk_and_so_is_the_name(tmp_path, monkeypatch):
    """Which files and folders are flushed, by inode, in which order around the rename."""
    events = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_atomic(tmp_path / "d.json", "text")
    inode = (tmp_path / "d.json").stat().st_ino
    parent = tmp_path.stat().st_ino
    assert events.index(inode) < events.index("rename") < events.index(parent)
    events.clear()
    model = tmp_path / "model.tmp"
    (model / "inner").mkdir(parents=True)
    for name in ("weights", "inner/more"):
        (model / name).write_text("x")
    inodes = {path.stat().st_ino for path in [model, *model.rglob("*")]}
    rename_flushed(model, tmp_path / "model")
    before = events[: events.index("rename")]
    assert inodes <= set(before) and parent in events[len(before) :]
    assert (tmp_path / "model/inner/more").read_text() == "x"
