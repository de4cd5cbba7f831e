"""Data files and journals: what is written can be read, and no kill or second writer damages it."""

import contextlib
import json
import random

import pytest

from common.cli import UserError
from common.journal import Journal, is_done, journal, journal_path
from common.record_stream import read_records
from common.records import write_records

INSTANCE = {"prompt": "p", "responses": ["a", "b"], "rewards": [0.5, -1.0], "pairs": [0, 0]}


def test_round_trip(tmp_path):
    write_records(tmp_path / "d.json", [INSTANCE, INSTANCE], {"generate": {"K": 2}})
    assert read_records(tmp_path / "d.json", ("responses", "rewards")) == (
        [INSTANCE] * 2,
        {"generate": {"K": 2}},
    )
    assert json.loads((tmp_path / "d.json").read_text())["type"] == "text_only"
    assert [path.name for path in tmp_path.iterdir()] == ["d.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "row 1: 'prompt'"),
        ({"responses": "a"}, "row 1: 'responses'"),
        ({"responses": []}, "row 1: 'responses'"),
        ({"rewards": [1.0]}, "row 1: 'rewards'"),
        ({"rewards": [1.0, "x"]}, "row 1: 'rewards'"),
        ({"rewards": [1.0, float("inf")]}, "row 1: 'rewards' holds a value that is not finite"),
        ({"rewards": [1.0, float("nan")]}, "row 1: 'rewards' holds a value that is not finite"),
        ({"pairs": [0, True]}, "row 1: 'pairs'"),
    ],
)
def test_bad_instances_are_named(tmp_path, change, message):
    file = tmp_path / "d.json"
    file.write_text(json.dumps({"instances": [INSTANCE, {**INSTANCE, **change}]}))
    with pytest.raises(UserError, match=message):
        read_records(file, ("responses", "rewards"))


def test_done_means_the_same_settings(tmp_path):
    file = tmp_path / "d.json"
    assert not is_done(file, "generate", {"K": 2})
    write_records(file, [INSTANCE], {"generate": {"K": 2, "seed": 1}})
    assert is_done(file, "generate", {"K": 2, "seed": 1})
    with pytest.raises(UserError, match="made with seed=1, now seed=3"):
        is_done(file, "generate", {"K": 2, "seed": 3})
    with pytest.raises(UserError, match="did not write it"):
        is_done(file, "annotate", {})


def test_journal_survives_and_continues(tmp_path):
    file = tmp_path / "out.json"
    first = Journal(file, {"K": 2})
    first.add("0.0", {"text": "a\nb\u2028"})
    first.add("0.1", {"text": "c"})
    first.close(done=False)
    with journal(file, {"K": 2}) as second:
        assert second.rows == {"0.0": {"text": "a\nb\u2028"}, "0.1": {"text": "c"}}
    assert not journal_path(file).exists()


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_torn_last_line_is_dropped(tmp_path, cut):
    file = tmp_path / "out.json"
    first = Journal(file, {})
    for i in range(3):
        first.add(str(i), {"text": "x" * 30})
    first.close(done=False)
    path = journal_path(file)
    path.write_bytes(path.read_bytes()[:-cut])
    second = Journal(file, {})
    assert list(second.rows) == ["0", "1"]
    second.add("2", {"text": "again"})
    second.close(done=False)
    assert list(Journal(file, {}).rows) == ["0", "1", "2"]


def test_journal_of_other_settings_is_refused(tmp_path):
    first = Journal(tmp_path / "out.json", {"seed": 1})
    first.add("0", {})
    first.close(done=False)
    with pytest.raises(UserError, match="seed"):
        Journal(tmp_path / "out.json", {"seed": 2})


def test_journal_without_rows_takes_other_settings(tmp_path):
    """A stage that was killed before its first row may change its settings; one that failed leaves nothing."""
    path = journal_path(tmp_path / "out.json")
    Journal(tmp_path / "out.json", {"seed": 1})
    assert json.loads(path.read_text())["settings"] == {"seed": 1}
    second = Journal(tmp_path / "out.json", {"seed": 2})
    [line] = path.read_text().splitlines()
    assert json.loads(line)["settings"] == {"seed": 2}
    second.close(done=False)
    assert not list(tmp_path.iterdir())


def test_second_writer_is_refused(tmp_path):
    first = Journal(tmp_path / "out.json", {})
    with pytest.raises(UserError, match="another process"):
        Journal(tmp_path / "out.json", {})
    first.close(done=False)
    Journal(tmp_path / "out.json", {}).close(done=False)


def test_journal_left_by_a_kill_after_the_rename_is_removed(tmp_path):
    file = tmp_path / "out.json"
    with contextlib.suppress(InterruptedError), journal(file, {"K": 2}) as opened:
        opened.add("0", {})
        raise InterruptedError
    assert journal_path(file).exists()
    write_records(file, [INSTANCE], {"generate": {"K": 2}})
    assert is_done(file, "generate", {"K": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_failure_keeps_the_journal(tmp_path):
    with pytest.raises(RuntimeError), journal(tmp_path / "out.json", {}) as opened:
        opened.add("a", {})
        raise RuntimeError
    assert journal_path(tmp_path / "out.json").exists()


def test_a_journals_rows_are_a_dict_of_any_keys(tmp_path):
    """Keys of all stages, of others' making and in any order, against a plain dict; long rows too."""
    rng = random.Random(0)
    pairs = [f"{rng.randrange(2000)}{mark}{rng.randrange(3)}" for mark in "./" for _ in range(400)]
    keys = [*pairs, "score 7", "", "00.1", "1.", "1.0.0", "-1.0", "½.1", "1.99999999999", "x" * 5000]
    wanted = {}
    done = Journal(tmp_path / "out.json", {})
    for number, key in enumerate(keys):
        wanted[key] = {"n": number, "text": "\n\u2028ü" * rng.choice([0, 1, 3000])}
        done.add(key, wanted[key])
    for _ in range(2):  # as written, and as read again
        assert dict(done.rows) == wanted and len(done.rows) == len(wanted)
        assert all(key not in done.rows for key in ("2000.0", "0.3", "score 8", "٣.1", 7))
        with pytest.raises(KeyError):
            done.rows["5000.0"]
        done.close(done=False)
        done = Journal(tmp_path / "out.json", {})
