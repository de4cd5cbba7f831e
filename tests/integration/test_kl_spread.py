"""KL with models that accelerate spreads over devices: the scores of whole models, and where the layers go."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_policy, tiny_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM

from common.cli import UserError
from common.models import device_map, load_causal_lm
from evaluation.kl import LanguageModel, Sequence, score_sequences

TESTS = Path(__file__).resolve().parents[1]
EOS = 2
SEQUENCES = [Sequence([1, 5, 6, 7], [8, 9, EOS], True), Sequence([1, 9], [5, 6, 7, 8, 9], False)]
PARTS = "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"


def places(*disk):
    return {part: "disk" if part in disk else "cpu" for part in PARTS}


LAYERS_AWAY = places("model.layers.1")
ENDS_AWAY = places("model.embed_tokens", "model.layers.0", "lm_head")  # model.device is then "meta"
TOGETHER = {part: "cpu" for part in PARTS if "layers" not in part} | {"model.layers": "disk"}


@pytest.fixture(scope="module", params=["untied", "tied", "capped"])
def pair(request, tmp_path_factory):
    """Folders of a policy and a reference: their heads are their own, the embeddings, or capped."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("policy", "reference")):
        if request.param == "capped":
            torch.manual_seed(seed)
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = Gemma2Config(
                vocab_size=36, num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.5, **sizes
            )
            Gemma2ForCausalLM(config).save_pretrained(folder / name)
        else:
            tied = request.param == "tied"
            save_tiny_policy(folder / name, seed, tiny_tokenizer(), tie_word_embeddings=tied)
    return folder / "policy", folder / "reference"


def load(folder, **options):
    return LanguageModel(load_causal_lm(str(folder), "policy", "float32", **options))


@pytest.mark.parametrize("away", [(LAYERS_AWAY, ENDS_AWAY), (ENDS_AWAY, LAYERS_AWAY), (TOGETHER, None)])
def test_spread_models_score_as_whole_ones(pair, away):
    """Parts that lie on the disk come by accelerate's hooks, where body and head are called apart too."""
    whole = [load(folder) for folder in pair]
    maps = [{"device_map": places} if places else {} for places in away]
    spread = [load(folder, **options) for folder, options in zip(pair, maps, strict=True)]
    assert any(p.device.type == "meta" for model in spread for p in model.model.parameters())
    assert [model.has_plain_head for model in spread] == [model.has_plain_head for model in whole]
    wanted, found = (score_sequences(*models, SEQUENCES, 0.7, [EOS], True) for models in (whole, spread))
    assert all(score.kl > 0 for score in wanted)
    for one, other in zip(wanted, found, strict=True):
        assert other == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize("head", ["plain", "own"])
def test_what_meets_is_on_the_same_gpu(head):
    """Policy on GPUs 0 and 1, reference on 1 to 3; both with the head apart and by the model's own forward pass."""
    words = [sys.executable, TESTS / "support" / "stand_in_gpus.py", head]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'alignment'}:{TESTS / 'support'}"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "reached the end"), done.stderr[-2000:]


def weights_on(folder, found):
    """Return the bytes of the weights on each device of a map; tied ones count once."""
    sizes, model = {}, load_causal_lm(str(folder), "policy", "float32")
    for name, weight in model.named_parameters():
        part = max((p for p in found if not p or name == p or name.startswith(f"{p}.")), key=len)
        sizes[found[part]] = sizes.get(found[part], 0) + weight.nbytes
    return sizes


def test_both_models_are_spread_over_two_gpus(tmp_path):
    """The first has room for the policy and some layers; what else the reference has goes to the second."""
    folder = save_tiny_policy(tmp_path / "policy", 0, tiny_tokenizer(), layers=8)
    total = sum(weights_on(folder, {"": 0}).values())
    left, used = {0: int(1.3 * total), 1: int(1.1 * total)}, []
    for _ in range(2):
        found = device_map(str(folder), "policy", "float32", left)
        used.append(weights_on(folder, found))
        assert sum(used[-1].values()) == total
        for gpu, size in used[-1].items():
            left[gpu] -= size
    assert used[0] == {0: total} and set(used[1]) == {0, 1}
    assert min(left.values()) >= 0
    with pytest.raises(UserError, match="policy"):
        device_map(str(folder), "policy", "float32", left)


def test_tied_embeddings_stay_together(tmp_path):
    folder = save_tiny_policy(tmp_path / "policy", 0, tiny_tokenizer(), layers=8, tie_word_embeddings=True)
    total = sum(weights_on(folder, {"": 0}).values())
    found = device_map(str(folder), "policy", "float32", {0: int(0.7 * total), 1: total})
    assert set(found.values()) == {0, 1}
    assert found["model.embed_tokens"] == found["lm_head"]
