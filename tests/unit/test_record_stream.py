"""The streaming reader of data files against Python's own, which reads the whole text at once."""

import json
import random

import pytest

from common import record_stream
from common.cli import UserError
from common.record_stream import RecordStream
from common.records import read_records

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


def test_whatever_is_cut_off_or_put_in_is_refused_as_by_the_whole_reader(tmp_path, monkeypatch):
    """Both refuse the same files, with the same words."""
    monkeypatch.setattr(record_stream, "CHUNK", 16)
    rng = random.Random(0)
    content = {"instances": [{"prompt": "p", "responses": ["a", "b"]}] * 3, "settings": {"generate": {"K": 2.5}}}
    text = json.dumps(content)
    file = tmp_path / "d.json"
    refused = 0
    for _ in range(400):
        at = rng.randrange(len(text))
        changed = text[:at] + rng.choice(["", rng.choice('{}[]",:1 x'), text[at] * 2]) + text[at + 1 :]
        file.write_text(rng.choice([changed, text[:at]]))
        messages = []
        for read in (read_records, RecordStream):
            try:
                read(file)
                messages.append(None)
            except UserError as error:
                messages.append(str(error))
        assert messages[0] == messages[1], file.read_text()
        refused += messages[0] is not None
    assert refused > 200
