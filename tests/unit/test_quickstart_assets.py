"""The quickstart's tokenizer splits texts as the model's own did: by the rule that its GGUF file names."""

import importlib.metadata
import json
import sys

import pytest
import regex
from commands import ALIGNMENT
from gguf import GGUFWriter
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from common.cli import UserError

sys.path.insert(0, str(ALIGNMENT / "scripts"))
import quickstart_assets

GPT2 = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
TEXTS = ["\n\n1.", "in 2024, 10% of 3½", "  two  spaces\n", "it's 1st,\t2nd", "你好 42😀", "a1b22 333"]


def smollm_rule(text: str) -> list[str]:
    """Digits one by one, then GPT-2's pattern on each piece, in its letters for bytes; as published."""
    letters = bytes_to_unicode()
    pieces = regex.split(r"(\p{N})", text)
    found = [word for piece in pieces if piece for word in GPT2.findall(piece)]
    return ["".join(letters[byte] for byte in word.encode()) for word in found]


@pytest.fixture(scope="module")
def gguf():
    package, inner = quickstart_assets.POLICY
    return importlib.metadata.distribution(package).locate_file(inner)


def test_the_packaged_model_names_the_rule(gguf):
    splits = quickstart_assets.pre_tokenizer_of(gguf)
    for text in TEXTS:
        assert [piece for piece, _ in splits.pre_tokenize_str(text)] == smollm_rule(text)


def test_with_it_the_models_own_merges_are_found(gguf):
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    assert tokenizer.tokenize("\n\n1.") != ["ĊĊ", "1", "."]  # as transformers converts it
    tokenizer.backend_tokenizer.pre_tokenizer = quickstart_assets.pre_tokenizers()["smollm"]
    assert tokenizer.tokenize("\n\n1.") == ["ĊĊ", "1", "."]


@pytest.mark.parametrize("pre", ["llama-bpe", None])
def test_an_unknown_rule_is_refused(tmp_path, pre):
    writer = GGUFWriter(tmp_path / "other.gguf", "llama")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError) as error:
        quickstart_assets.pre_tokenizer_of(tmp_path / "other.gguf")
    assert "other.gguf" in str(error.value) and str(pre) in str(error.value)


def test_a_policy_with_another_tokenizer_is_made_again(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert not quickstart_assets.is_right_policy(tmp_path)
    tokenizer = Tokenizer(models.BPE())
    for pre, right in ((None, False), (quickstart_assets.pre_tokenizers()["smollm"], True)):
        if pre is not None:
            tokenizer.pre_tokenizer = pre
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert quickstart_assets.is_right_policy(tmp_path) == right
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1]  # the byte level alone: the converter's
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert not quickstart_assets.is_right_policy(tmp_path)
