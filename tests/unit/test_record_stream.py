"""The streaming reader of data files against Python's own, which reads the whole text at once."""

import json
import random
from collections import Counter

import pytest

from common import record_stream
from common.cli import UserError
from common.record_stream import RecordStream, members, read_records

TEXTS = ["", "a", 'quote " and \\ and \n', "é\u2028", "🙂" * 7, "}],{[", "0" * 50]


def random_value(rng, depth=0):
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 5:
        number = rng.uniform(-1, 1) * 10.0 ** rng.randrange(-300, 300)
        return [rng.choice(TEXTS), rng.randrange(-(10**20), 10**20), number, None, True][kind]
    if kind == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS) + str(i): random_value(rng, depth + 1) for i in range(rng.randrange(4))}


def random_file(rng):
    instances = [
        {"prompt": rng.choice(TEXTS), "responses": [rng.choice(TEXTS) for _ in range(2)], "more": random_value(rng)}
        for _ in range(rng.randrange(1, 6))
    ]
    content = {"type": "text_only", "settings": {"generate": {"a": random_value(rng)}}, "instances": instances}
    content |= {"provenance": {"x": random_value(rng)}, "other": random_value(rng)}
    keys = rng.sample(sorted(content), len(content))
    return {key: content[key] for key in keys}


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 2**20])
def test_reads_what_json_reads_in_any_order_and_form(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(record_stream, "CHUNK", chunk)
    rng = random.Random(chunk)
    for number in range(30):
        content = random_file(rng)
        file = tmp_path / f"{number}.json"
        text = json.dumps(content, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 0, 3]))
        file.write_text(text + rng.choice(["", "\n \t"]), encoding=rng.choice(["utf-8", "utf-8-sig"]))
        stream = RecordStream(file)
        assert list(stream) == list(stream) == content["instances"]
        assert (stream.count, stream.responses_each) == (len(content["instances"]), 2)
        assert (stream.settings, stream.provenance) == (content["settings"], content["provenance"])


def oracle(text: str) -> list | None:
    """The instances, read by Python's own parser as one text; None for what is no data file."""
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("settings", {}), dict):
        return None
    rows = content.get("instances")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return None
    lists = [row.get("responses") for row in rows]
    fine = all(isinstance(found, list) and found and all(isinstance(x, str) for x in found) for found in lists)
    fine &= all(isinstance(row.get("prompt"), str) for row in rows)
    fine &= all(isinstance(stage, dict) for stage in content.get("settings", {}).values())
    return rows if fine and len({len(found) for found in lists}) == 1 else None


def test_whatever_is_cut_off_or_put_in_is_read_or_refused_as_python_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(record_stream, "CHUNK", 16)
    rng = random.Random(0)
    content = {"instances": [{"prompt": "p", "responses": ["a", "b"]}] * 3, "settings": {"generate": {"K": 2.5}}}
    text = json.dumps(content)
    file = tmp_path / "d.json"
    seen = Counter()
    for _ in range(600):
        at = rng.randrange(len(text))
        changed = text[:at] + rng.choice(["", rng.choice('{}[]",:1 x'), text[at] * 2]) + text[at + 1 :]
        file.write_text(rng.choice([changed, text[:at]]))
        try:
            wanted = oracle(file.read_text())
        except ValueError:
            wanted = "not JSON"
        try:
            found, outcome = read_records(file)[0], "read"
        except UserError as error:
            found, outcome = None, "not JSON" if "not JSON" in str(error) else "refused"
        assert found == (None if wanted == "not JSON" else wanted), file.read_text()
        assert (outcome == "not JSON") == (wanted == "not JSON"), file.read_text()
        seen[outcome] += 1
    assert min(seen[outcome] for outcome in ("read", "refused", "not JSON")) > 20, seen


@pytest.mark.parametrize("list_alone", [True, False])
def test_rows_of_a_list_and_of_an_object(tmp_path, list_alone):
    rows = [1, "a", {"instances": [2]}, None, [[]]]
    for content, wanted in ((rows, rows if list_alone else None), ({"x": 1, "instances": rows}, rows), ("a", None)):
        (tmp_path / "d.json").write_text(json.dumps(content))
        try:
            found = [value for key, value in members(tmp_path / "d.json", list_alone) if isinstance(key, int)]
        except UserError:
            found = None
        assert found == wanted
