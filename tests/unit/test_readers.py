"""Property tests of all that reads a file: whatever it holds, the reader gives valid data or one clear line."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from common.cli import UserError
from common.journal import Journal, is_done
from common.record_stream import read_records
from common.records import write_records
from generation.prompts import Template, load_prompts
from reward_model.preference_data import read_pairs, write_pairs

TOKENIZER = tiny_tokenizer()
MANY = settings(max_examples=300, deadline=None, derandomize=True)

anything = st.text(st.characters(codec=None))  # surrogates, control characters and U+2028 too
text = st.text() | st.text('\0\n\r\t\x0b\x1c\x85\u2028\u2029"\\', min_size=1)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400) | anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(anything, inner, max_size=3),
    max_leaves=8,
)


def nearly(right: st.SearchStrategy) -> st.SearchStrategy:
    """Mostly what is right, sometimes anything."""
    return st.integers(0, 7).flatmap(lambda i: right if i else values)


def objects(**fields: st.SearchStrategy) -> st.SearchStrategy:
    """Objects that have, or lack, these fields with nearly right values, and others."""
    known = st.fixed_dictionaries({}, optional={name: nearly(field) for name, field in fields.items()})
    return nearly(st.builds(lambda a, b: {**b, **a}, known, st.dictionaries(anything, values, max_size=1)))


pairs_of = lambda kind: st.lists(nearly(kind), min_size=2, max_size=2)  # noqa: E731
message = objects(role=st.sampled_from(["user", "assistant"]), content=text)
instance = objects(
    prompt=text,
    responses=pairs_of(text),
    rewards=pairs_of(st.floats() | st.integers()),
    pairs=pairs_of(st.integers()),
    stop_reasons=pairs_of(st.sampled_from(["stop", "length"])),
    num_tokens=pairs_of(st.integers()),
    messages=st.lists(message, max_size=3),
)
data_file = objects(instances=st.lists(instance, max_size=3), settings=st.dictionaries(text, values, max_size=2))
as_json = st.builds(json.dumps, data_file | values, ensure_ascii=st.booleans())
file_bytes = st.binary() | as_json.map(lambda s: s.encode(errors="surrogatepass"))
torn = st.builds(lambda whole, cut: whole[:cut], file_bytes, st.integers(0, 200))
content = file_bytes | torn


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readers")


def read(reader, path: Path):
    """What the reader gives, or None after a `UserError` of one line that names the file."""
    try:
        return reader(path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error)
        return None


@MANY
@given(content=content)
@example(content=b"[" * 100_000)
@example(content=b"[" + b"9" * 5000 + b"]")
@example(content=b'{"instances": [{"prompt": "a", "responses": ["b"], "rewards": [1], "score": NaN}]}')
def test_data_files(folder, content):
    path = folder / "data.json"
    path.write_bytes(content)
    found = read(lambda p: read_records(p, ("responses", "rewards")), path)
    if found is not None:
        instances, made_with = found
        assert all(len(i["responses"]) == len(i["rewards"]) > 0 for i in instances)
        write_records(folder / "again.json", *found)  # what was read can be written, and is the same
        assert read_records(folder / "again.json")[0] == instances
        assert all(isinstance(stage, dict) for stage in made_with.values())


@MANY
@given(content=content)
def test_an_earlier_output(folder, content):
    path = folder / "data.json"
    path.write_bytes(content)
    assert read(lambda p: is_done(p, "generate", {"K": 2}), path) in (None, False)


@MANY
@given(
    rows=st.lists(instance, max_size=3),
    form=st.sampled_from(["json", "jsonl"]),
    template=st.sampled_from(["none", "chat", "safe_rlhf"]),
)
def test_prompts(folder, rows, form, template):
    path = folder / f"prompts.{form}"
    path.write_text(json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows)))
    found = read(lambda p: load_prompts([str(p)], TOKENIZER, Template(template)), path)
    if found is not None:
        assert len(found[0]) == len(rows)
        assert all(isinstance(i, int) for prompt in found[0] for i in prompt.token_ids)


@MANY
@given(content=content, form=st.sampled_from(["json", "jsonl"]))
def test_prompts_of_any_bytes(folder, content, form):
    path = folder / f"prompts.{form}"
    path.write_bytes(content)
    read(lambda p: load_prompts([str(p)], TOKENIZER), path)


preference = objects(prompt=text, chosen=text, rejected=text)


@MANY
@given(content=file_bytes | st.lists(preference.map(json.dumps)).map(lambda rows: "\n".join(rows).encode()))
def test_preference_pairs(folder, content):
    path = folder / "pairs.jsonl"
    path.write_bytes(content)
    for pair in read(read_pairs, path) or []:
        assert all(isinstance(pair[field], str) for field in ("prompt", "chosen", "rejected"))


@MANY
@given(prompt=text, responses=st.lists(text, min_size=2, max_size=2))
def test_every_text_comes_back(folder, prompt, responses):
    rows = [{"prompt": prompt, "responses": responses}]
    write_records(folder / "texts.json", rows, {"generate": {"template": prompt}})
    assert read_records(folder / "texts.json") == (rows, {"generate": {"template": prompt}})
    pair = {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}
    write_pairs(folder / "texts.jsonl", [pair, pair])
    assert read_pairs(folder / "texts.jsonl") == [pair, pair]
    if prompt.strip():
        found, _ = load_prompts([str(folder / "texts.jsonl")], TOKENIZER)
        assert [p.text for p in found] == [prompt, prompt]


@MANY
@given(found=st.lists(text, max_size=4))
def test_every_text_comes_back_from_the_journal(folder, found):
    first = Journal(folder / "out.json", {"settings": found})
    for i, value in enumerate(found):
        first.add(str(i), {"text": value})
    first.close(done=False)
    second = Journal(folder / "out.json", {"settings": found})
    assert second.rows == {str(i): {"text": value} for i, value in enumerate(found)}
    second.close(done=True)


def test_a_folder_whose_name_is_not_utf_8(tmp_path):
    """Python has surrogates in such names, and they are part of the settings."""
    name = b"caf\xe9".decode(errors="surrogateescape")
    write_records(tmp_path / "d.json", [{"prompt": "p", "responses": ["a"]}], {"generate": {"policy": name}})
    assert is_done(tmp_path / "d.json", "generate", {"policy": name})


def test_a_prompt_that_stands_twice_is_sampled_twice_each_with_its_own_seeds(tmp_path):
    from bandit.mixtures import family
    from generation.sampling import Plan

    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}]))
    prompts, _ = load_prompts([str(tmp_path / "p.json")], TOKENIZER)
    asked = list(Plan(prompts, 0, family(0, 0), 2, seed=3).requests({}))
    assert [r.prompt_ids == asked[0].prompt_ids for r in asked] == [True, True, False, False, True, True]
    assert len({r.key for r in asked}) == len({r.seed for r in asked}) == 6
