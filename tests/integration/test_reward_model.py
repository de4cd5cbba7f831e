"""Reward-model training: the loss, the split, the trainer on separable data, the saved model, the human labels."""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_policy, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from annotate_data.scorer import RewardScorer
from common.cli import UserError, run
from reward_model import human_labels, train_reward_model
from reward_model.bradley_terry import accuracy, bradley_terry_loss, freeze_all_but_last
from reward_model.preference_data import read_pairs, split_by_prompt, write_pairs


def test_loss_is_the_bradley_terry_likelihood():
    chosen, rejected = [0.3, -2.0, 5.0], [0.1, 1.0, -300.0]
    scalar = [-math.log(math.exp(c) / (math.exp(c) + math.exp(r))) for c, r in zip(chosen, rejected, strict=True)]
    assert bradley_terry_loss(torch.tensor(chosen), torch.tensor(rejected)).item() == pytest.approx(
        sum(scalar) / 3, rel=1e-6
    )
    assert bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == 1000.0
    assert accuracy(torch.tensor([1.0, 0.0, 2.0, 2.0]), torch.tensor([0.0, 1.0, 2.0, 1.0])) == 0.625


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5])
def test_split_is_prompt_disjoint_and_near_its_share(fraction):
    sizes = random.Random(0).choices([1, 2, 5, 40], k=200)
    pairs = [{"prompt": str(i), "chosen": str(j), "rejected": ""} for i, n in enumerate(sizes) for j in range(n)]
    first, second = split_by_prompt(pairs, fraction, seed=1)
    assert not {p["prompt"] for p in first} & {p["prompt"] for p in second}
    key = lambda pair: (pair["prompt"], pair["chosen"])  # noqa: E731
    assert sorted(map(key, first + second)) == sorted(map(key, pairs))
    assert abs(len(first) - fraction * len(pairs)) <= 40
    assert split_by_prompt(pairs, fraction, seed=1) == (first, second)
    assert fraction == 0 or split_by_prompt(pairs, fraction, seed=2) != (first, second)


def separable_pairs(path):
    """Chosen answers hold a 'y', rejected ones do not."""
    letters = random.Random(1)
    word = lambda: "".join(letters.choices("abcdefg ", k=6))  # noqa: E731
    pairs = [
        {"prompt": f"{word()}?", "chosen": word() + "y" + word(), "rejected": word() + word()} for _ in range(160)
    ]
    write_pairs(path, pairs)
    return path


def tiny_encoder(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            initializer_range=0.1,
            max_position_embeddings=64,
        )  # fmt: skip
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(monkeypatch, model, data, output, *more):
    flags = {"--model_name_or_path": model, "--train_file": data, "--output_dir": output}
    flags |= {"--learning_rate": 5e-3, "--num_train_epochs": 4, "--max_length": 60}
    words = [str(word) for pair in flags.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["train_reward_model.py", *words, *map(str, more)])
    run(train_reward_model.main)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_learns_separable_pairs_and_says_so_of_new_prompts(tmp_path, monkeypatch, capsys, kind):
    model = tiny_encoder(tmp_path / "m") if kind == "encoder" else save_tiny_policy(tmp_path / "m", seed=1)
    data = separable_pairs(tmp_path / "pairs.jsonl")
    output = tmp_path / "rm"
    train(monkeypatch, model, data, output)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["eval_accuracy"] > 0.9 and metrics["eval_pairs"] == 32
    assert f"pair accuracy {metrics['eval_accuracy']:.3f}" in capsys.readouterr().out
    assert not Path(f"{output}.tmp").exists()

    # Independent truth of the held-out accuracy: text by text, no padding, stock transformers.
    held_out, _ = split_by_prompt(read_pairs(data), 0.2, seed=0)
    classifier = AutoModelForSequenceClassification.from_pretrained(output).eval()
    tokenizer = tiny_tokenizer()

    def score(prompt, answer):
        text = f"user: {prompt}\nassistant: {answer}\n" if kind == "decoder" else f"{prompt}\n{answer}"
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return classifier(ids).logits.item()

    right = [score(p["prompt"], p["chosen"]) > score(p["prompt"], p["rejected"]) for p in held_out]
    assert metrics["eval_accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-6)

    before = (output / "model.safetensors").read_bytes()
    train(monkeypatch, model, data, output)
    assert "already done" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        train(monkeypatch, model, data, output, "--seed", 5)
    assert refused.value.code == 2 and "seed=0" in capsys.readouterr().err
    assert (output / "model.safetensors").read_bytes() == before


def test_same_seed_same_model_other_seed_other_model(tmp_path, monkeypatch):
    model, data = tiny_encoder(tmp_path / "m"), separable_pairs(tmp_path / "pairs.jsonl")
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(monkeypatch, model, data, tmp_path / name, "--max_steps", 3, "--seed", seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_frozen_layers_do_not_move(tmp_path, monkeypatch):
    model, data = tiny_encoder(tmp_path / "m"), separable_pairs(tmp_path / "pairs.jsonl")
    train(monkeypatch, model, data, tmp_path / "rm", "--max_steps", 3, "--trainable_layers", 1)
    old = BertModel.from_pretrained(model).state_dict()
    new = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").bert.state_dict()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved and all(name.startswith(("encoder.layer.2.", "pooler.")) for name in moved)
    with pytest.raises(UserError, match="3 layers"):
        freeze_all_but_last(AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm"), 4)


def test_saved_model_brings_its_own_text_form(tmp_path, monkeypatch):
    train(
        monkeypatch,
        tiny_encoder(tmp_path / "m"),
        separable_pairs(tmp_path / "p"),
        tmp_path / "rm",
        "--max_steps",
        1,
    )
    scorer = RewardScorer(str(tmp_path / "rm"))
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    assert scorer.tokenizer.apply_chat_template(turns, tokenize=False) == "a?\nb"
    assert scorer.max_length == 60


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", ["line 2", "not JSON"]), ('{"prompt": "a", "chosen": "b"}', ["line 2", "'rejected'"])],
)
def test_bad_pairs_are_named(tmp_path, monkeypatch, capsys, line, words):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line + "\n")
    with pytest.raises(SystemExit) as refused:
        train(monkeypatch, tmp_path, data, tmp_path / "rm")
    said = capsys.readouterr().err
    assert refused.value.code == 2 and said.count("\n") == 1 and all(word in said for word in words)


def test_human_labels_become_two_disjoint_halves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["human_labels.py", "--output_dir", str(tmp_path / "pairs"), "--seed", "3"])
    run(human_labels.main)
    halves = [read_pairs(tmp_path / "pairs" / name) for name in human_labels.NAMES]
    assert not {p["prompt"] for p in halves[0]} & {p["prompt"] for p in halves[1]}
    assert all(len(half) > 500 for half in halves)
    answers = human_labels.rated_answers(human_labels.labels_folder())
    for pair in itertools.chain(*halves):
        harm = answers[pair["prompt"]]
        assert harm[pair["rejected"]] - harm[pair["chosen"]] >= 0.25
