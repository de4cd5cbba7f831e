"""The type that a model computes in: what its weights are stored in, and what a GPU's default does to it."""

import argparse

import pytest
import torch
from tiny import save_tiny_policy, save_tiny_reward_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from annotate_data import get_rewards
from common.cli import UserError
from common.models import choose_dtype, stored_dtype


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr("common.models.default_device", lambda: "cuda")


def stored_twice(folder, save, kind) -> tuple[str, str]:
    """Return folders of one model in float32 and in bfloat16."""
    save(folder / "full", 0)
    kind.from_pretrained(folder / "full").to(torch.bfloat16).save_pretrained(folder / "half")
    return str(folder / "full"), str(folder / "half")


def test_the_type_that_weights_are_stored_in(tmp_path):
    full, half = stored_twice(tmp_path, save_tiny_policy, LlamaForCausalLM)
    assert (stored_dtype(full), stored_dtype(half)) == ("float32", "bfloat16")


def test_weights_of_32_bits_are_not_rounded_unless_asked_for(tmp_path, capsys, on_a_gpu):
    """A policy trained in float32 differs from its start by less than bfloat16 holds."""
    full, half = stored_twice(tmp_path, save_tiny_policy, LlamaForCausalLM)
    flags = argparse.Namespace(dtype=None, trust_remote_code=False)
    assert choose_dtype(flags, (half, None)) == "bfloat16"
    assert capsys.readouterr().out == ""
    for models in ((full, None), (half, full)):
        assert choose_dtype(flags, models) == "float32"
        assert full in capsys.readouterr().out
    flags.dtype = "bfloat16"
    assert choose_dtype(flags, (full, None)) == "bfloat16"


def test_nor_are_those_of_a_reward_model(tmp_path, capsys, on_a_gpu):
    """The type is among the settings of the scores, so that a result in another one is not taken for the same."""
    full, half = stored_twice(tmp_path, save_tiny_reward_model, LlamaForSequenceClassification)

    def dtype(name: str, *more: str) -> str:
        words = ("--dataset_name_or_path", "x", "--output_file", "y", "--reward_name_or_path", name, *more)
        return get_rewards.reward_source(get_rewards.parser().parse_args(words)).settings["dtype"]

    assert (dtype(half), capsys.readouterr().out) == ("bfloat16", "")
    assert dtype(full) == "float32" and full in capsys.readouterr().out
    assert (dtype(full, "--dtype", "bfloat16"), capsys.readouterr().out) == ("bfloat16", "")


def test_without_safetensors_no_type_is_chosen(tmp_path, on_a_gpu):
    save_tiny_reward_model(tmp_path, 0)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"reward model {tmp_path}"):
        choose_dtype(argparse.Namespace(dtype=None, trust_remote_code=False), [str(tmp_path)], "", "reward model")
