"""Reward-model training: the loss, the split, the trainer on separable data, the saved model, the human labels."""

import csv
import gzip
import json
import math
import os
import random
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import save_tiny_policy, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from annotate_data.scorer import RewardScorer
from common.cli import UserError, run
from reward_model import human_labels, train_reward_model
from reward_model.bradley_terry import (
    bradley_terry_losses,
    freeze_all_but_last,
    hits,
    length_matched_accuracy,
    pair_tokens,
)
from reward_model.preference_data import read_pairs, split_by_prompt, write_pairs


def test_loss_is_the_bradley_terry_likelihood():
    chosen, rejected = [0.3, -2.0, 5.0], [0.1, 1.0, -300.0]
    scalar = [-math.log(math.exp(c) / (math.exp(c) + math.exp(r))) for c, r in zip(chosen, rejected, strict=True)]
    assert bradley_terry_losses(torch.tensor(chosen), torch.tensor(rejected)).tolist() == pytest.approx(
        scalar, rel=1e-6
    )
    assert bradley_terry_losses(torch.tensor([-500.0]), torch.tensor([500.0])).tolist() == [1000.0]
    assert hits(torch.tensor([1.0, 0.0, 2.0, 2.0]), torch.tensor([0.0, 1.0, 2.0, 1.0])).mean() == 0.625


def test_length_matched_accuracy_of_a_rule_of_length_is_one_half():
    rng = random.Random(0)
    for _ in range(50):
        lengths = torch.tensor([[rng.randrange(1, 9), rng.randrange(1, 5)] for _ in range(rng.randrange(2, 40))])
        shorter, right = hits(*-lengths.T), torch.tensor([rng.choice([0.0, 0.5, 1.0]) for _ in lengths])
        if not 0 < shorter.sum() < len(shorter):
            continue
        for rule in (shorter, 1 - shorter):
            ties = (shorter == 0.5).any()
            assert ties or length_matched_accuracy(rule, shorter) == 0.5
        assert length_matched_accuracy(torch.ones_like(shorter), shorter) == pytest.approx(1)
        parts = []  # a naive loop
        for kind in (lambda x, y: x < y, lambda x, y: x > y):
            weights = [kind(x, y) + 0.5 * (x == y) for x, y in lengths.tolist()]
            parts.append(sum(w * r for w, r in zip(weights, right.tolist(), strict=True)) / sum(weights))
        assert length_matched_accuracy(right, shorter) == pytest.approx(sum(parts) / 2)
    assert length_matched_accuracy(torch.ones(3).double(), torch.ones(3).double()) is None


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


def separable(count, answer_length=12):
    """Pairs whose chosen answers hold a 'y', the rejected ones do not."""
    letters = random.Random(1)
    word = lambda k: "".join(letters.choices("abcdefg ", k=k))  # noqa: E731
    half = answer_length // 2
    return [
        {"prompt": f"{word(6)}?", "chosen": word(half) + "y" + word(half), "rejected": word(half) + word(half)}
        for _ in range(count)
    ]


def separable_pairs(path):
    """160 of them in a file."""
    write_pairs(path, separable(160))
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


@pytest.mark.parametrize("kind", ["encoder", "decoder", "mean of the decoder's tokens"])
def test_learns_separable_pairs_and_says_so_of_new_prompts(tmp_path, monkeypatch, capsys, kind):
    model = tiny_encoder(tmp_path / "m") if kind == "encoder" else save_tiny_policy(tmp_path / "m", seed=1)
    data = separable_pairs(tmp_path / "pairs.jsonl")
    output, mean = tmp_path / "rm", kind.startswith("mean")
    more = ["--mean_pooling", "--plain_template"] if mean else []
    train(monkeypatch, model, data, output, *more)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["eval_accuracy"] > 0.9 and metrics["eval_pairs"] == 32
    assert f"pair accuracy {metrics['eval_accuracy']:.3f}" in capsys.readouterr().out
    assert not Path(f"{output}.tmp").exists()

    # Independent truth of the held-out accuracy: text by text, no padding, stock transformers.
    held_out, _ = split_by_prompt(read_pairs(data), 0.2, seed=0)
    classifier = AutoModelForSequenceClassification.from_pretrained(output).eval()
    tokenizer = tiny_tokenizer()

    def score(prompt, answer):
        ids = torch.tensor([tokenizer(text(prompt, answer))["input_ids"]])
        with torch.no_grad():
            if mean:
                return classifier.score(classifier.model(ids).last_hidden_state.mean(1)).item()
            return classifier(ids).logits.item()

    def text(prompt, answer):
        return f"user: {prompt}\nassistant: {answer}\n" if kind == "decoder" else f"{prompt}\n{answer}"

    right = [score(p["prompt"], p["chosen"]) > score(p["prompt"], p["rejected"]) for p in held_out]
    assert metrics["eval_accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-6)

    # The scores themselves, of texts that need padding beside one another.
    scorer = RewardScorer(str(output))
    several = [("a", "b"), ("user says", "b" * 20), ("c", "d" * 30)]
    expected = [score(*words) for words in several]
    assert scorer.padding_is_safe and scorer.score([text(*words) for words in several]) == pytest.approx(
        expected, abs=1e-5
    )

    before = (output / "model.safetensors").read_bytes()
    train(monkeypatch, model, data, output, *more)
    assert "already done" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        train(monkeypatch, model, data, output, *more, "--seed", 5)
    assert refused.value.code == 2 and "seed=0" in capsys.readouterr().err
    assert (output / "model.safetensors").read_bytes() == before


def test_an_encoder_has_no_mean_over_tokens(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as refused:
        data = separable_pairs(tmp_path / "pairs.jsonl")
        train(monkeypatch, tiny_encoder(tmp_path / "m"), data, tmp_path / "rm", "--mean_pooling")
    assert refused.value.code == 2 and "scores are not one per token" in capsys.readouterr().err


def test_same_seed_same_model_other_seed_other_model(tmp_path, monkeypatch):
    model, data = tiny_encoder(tmp_path / "m"), separable_pairs(tmp_path / "pairs.jsonl")
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(monkeypatch, model, data, tmp_path / name, "--max_steps", 3, "--seed", seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_bfloat16_rounds_what_is_multiplied_and_not_the_weights(tmp_path, monkeypatch, capsys):
    model, data = tiny_encoder(tmp_path / "m"), separable_pairs(tmp_path / "pairs.jsonl")
    weights, losses = {}, {}
    for dtype in ("float32", "bfloat16"):
        train(monkeypatch, model, data, tmp_path / dtype, "--max_steps", 20, "--dtype", dtype)
        metrics = json.loads((tmp_path / dtype / "metrics.json").read_text())
        assert metrics["dtype"] == dtype
        losses[dtype] = metrics["eval_loss"]
        weights[dtype] = load_file(tmp_path / dtype / "model.safetensors")
    assert {tensor.dtype for tensor in weights["bfloat16"].values() if tensor.is_floating_point()} == {torch.float32}
    apart = [(weights["float32"][name] - other).abs().max() for name, other in weights["bfloat16"].items()]
    assert 0 < max(apart) < 0.05 and losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)
    train(monkeypatch, model, data, tmp_path / "float32", "--max_steps", 20, "--dtype", "bfloat16")
    assert "already done" in capsys.readouterr().out  # on a machine with another default too


def test_frozen_layers_do_not_move(tmp_path, monkeypatch):
    model, data = tiny_encoder(tmp_path / "m"), separable_pairs(tmp_path / "pairs.jsonl")
    train(monkeypatch, model, data, tmp_path / "rm", "--max_steps", 3, "--trainable_layers", 1)
    old = BertModel.from_pretrained(model).state_dict()
    new = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").bert.state_dict()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved and all(name.startswith(("encoder.layer.2.", "pooler.")) for name in moved)
    with pytest.raises(UserError, match="3 layers"):
        freeze_all_but_last(AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm"), 4)


def test_the_first_layers_alone_are_kept(tmp_path, monkeypatch, capsys):
    """Layers 0 and 1 of 3: the first as it was, the second trained, the third gone."""
    model, data = save_tiny_policy(tmp_path / "m", seed=1, layers=3), separable_pairs(tmp_path / "pairs.jsonl")
    more = ("--max_steps", 3, "--trainable_layers", 1, "--first_layers")
    train(monkeypatch, model, data, tmp_path / "rm", *more, 2)
    old, new = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "rm"))
    moved = {name for name in new if name not in old or not torch.equal(old[name], new[name])}
    layers = {name for name in old if name.startswith("model.layers.")}
    assert {name for name in new if name.startswith("model.layers.")} == {n for n in layers if ".2." not in n}
    assert moved == {n for n in layers if ".1." in n} | {"model.norm.weight", "score.weight"}
    assert RewardScorer(str(tmp_path / "rm")).model.config.num_hidden_layers == 2
    with pytest.raises(SystemExit) as refused:
        train(monkeypatch, model, data, tmp_path / "none", *more, 4)
    assert refused.value.code == 2 and "--first_layers 4: the model has 3 layers" in capsys.readouterr().err


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


@pytest.mark.parametrize("form", ["bom.jsonl", "list.json", "rows.parquet", "rows.csv", "lines.jsonl.gz", "folder"])
def test_pairs_are_read_in_the_forms_that_people_have(tmp_path, form):
    """With a byte-order mark, other columns, and nulls in them."""
    expected = [{"prompt": f"q{i} é", "chosen": 'a\u2028b, "c"', "rejected": f"no {i}"} for i in range(4)]
    rows = [{**pair, "note": None if i % 2 else "x"} for i, pair in enumerate(expected)]
    path = tmp_path / form
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if form == "bom.jsonl":
        path.write_text(lines, encoding="utf-8-sig")
    elif form == "list.json":
        path.write_text(json.dumps(rows))
    elif form == "lines.jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        data = Dataset.from_list(rows)
        write = {"rows.parquet": data.to_parquet, "rows.csv": data.to_csv, "folder": data.save_to_disk}[form]
        write(str(path))
    assert read_pairs(path) == expected


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


def test_pairs_that_are_alike_after_cutting_are_dropped(tmp_path, monkeypatch, capsys):
    """Long prompts leave no room for the answers; some pairs have the same answer twice."""
    model, data = tiny_encoder(tmp_path / "m"), separable_pairs(tmp_path / "pairs.jsonl")
    good = read_pairs(data)[:20]
    long = [{**pair, "prompt": f"{i} " + "please read " * 9} for i, pair in enumerate(good[:7])]
    write_pairs(data, [*good, *long, {**good[0], "rejected": good[0]["chosen"]}])
    train(monkeypatch, model, data, tmp_path / "rm", "--max_steps", 1)
    metrics = json.loads((tmp_path / "rm/metrics.json").read_text())
    assert metrics["dropped_pairs"] == 8
    assert metrics["train_pairs"] + metrics["eval_pairs"] == 20
    assert "8 of 28 pairs" in capsys.readouterr().out
    write_pairs(data, long)
    with pytest.raises(SystemExit) as refused:
        train(monkeypatch, model, data, tmp_path / "none")
    errors = capsys.readouterr().err
    assert refused.value.code == 2 and errors.count("\n") == 1 and "pairs.jsonl: 7 of 7" in errors
    assert {path.name for path in tmp_path.iterdir()} == {"m", "pairs.jsonl", "rm"}


@pytest.mark.parametrize("processes", [1, 2])
def test_every_pair_of_a_step_weighs_the_same(tmp_path, processes):
    """5 pairs in batches of 2: one step of plain gradient descent is that of the mean loss of the five."""
    folder = save_tiny_policy(tmp_path / "m", seed=1)
    data = write_pairs(tmp_path / "pairs.jsonl", separable(5)) or tmp_path / "pairs.jsonl"
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        processes,
        "--master_port",
        free_port(),
    ]
    script = Path(__file__).parents[1] / "support/one_reward_step.py"
    done = subprocess.run(
        [*map(str, start), str(script), str(folder), str(data), str(tmp_path / "weights.safetensors")],
        env={**os.environ, "CI": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    after = load_file(tmp_path / "weights.safetensors")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).train()
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tokenizer = tiny_tokenizer()
    losses = []
    for pair in read_pairs(data):  # one text at a time, without padding
        scores = []
        for answer in (pair["chosen"], pair["rejected"]):
            ids = torch.tensor([tokenizer(f"user: {pair['prompt']}\nassistant: {answer}\n")["input_ids"]])
            scores.append(model.score(model.model(ids).last_hidden_state)[0, -1, 0])
        losses.append(-torch.log(torch.sigmoid(scores[0] - scores[1])))
    torch.stack(losses).mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(after[name], before[name] - 0.5 * parameter.grad, atol=2e-6), name


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_tokenizer_without_end_and_a_pad_id_that_the_model_does_not_have(tmp_path, monkeypatch):
    """Trained and saved so that the result can be used; decoder models look for the last id that is no pad id."""
    model = save_tiny_policy(tmp_path / "m", seed=1)
    for file, changes in (
        ("config.json", {"pad_token_id": -1}),
        ("tokenizer_config.json", {"eos_token": None, "pad_token": None}),
    ):
        (model / file).write_text(json.dumps({**json.loads((model / file).read_text()), **changes}))
    train(monkeypatch, model, separable_pairs(tmp_path / "p"), tmp_path / "rm", "--max_steps", 2)
    texts = ["a", "a longer text", "b"]
    together = RewardScorer(str(tmp_path / "rm")).score(texts)
    assert together == pytest.approx([RewardScorer(str(tmp_path / "rm")).score([t])[0] for t in texts], abs=1e-5)
    assert json.loads((tmp_path / "rm/config.json").read_text())["pad_token_id"] is None


def test_texts_are_cut_to_what_the_model_reads(tmp_path, monkeypatch, capsys):
    """64 positions; --max_length 90 would end in the forward pass."""
    model = tiny_encoder(tmp_path / "m")
    pairs = separable(12, answer_length=80)
    write_pairs(tmp_path / "p", [{**p, "chosen": "y" + p["chosen"]} for p in pairs])
    train(monkeypatch, model, tmp_path / "p", tmp_path / "rm", "--max_steps", 2, "--max_length", 90)
    assert "64" in capsys.readouterr().out
    assert RewardScorer(str(tmp_path / "rm")).max_length == 64
    tokens = pair_tokens(RewardScorer(str(tmp_path / "rm")).tokenizer, pairs)
    assert {len(ids) for pair in tokens for ids in pair} == {64}


def test_human_labels_become_two_files_of_other_raters_and_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["human_labels.py", "--output_dir", str(tmp_path / "pairs"), "--seed", "3"])
    run(human_labels.main)
    files = [read_pairs(tmp_path / "pairs" / name) for name in human_labels.NAMES]
    assert not {p["prompt"] for p in files[0]} & {p["prompt"] for p in files[1]}
    assert all(len(pairs) > 500 for pairs in files)
    # The tables themselves: which columns rated an answer how.
    ratings = [defaultdict(list), defaultdict(list)]
    for path in human_labels.labels_folder().glob("*/*.csv"):
        if path.parent.name in human_labels.FOLDERS and not path.name.startswith("mini_"):
            for row in csv.DictReader(path.read_text().splitlines(keepends=True)[1:]):
                key = " ".join(row["objective"].split()), row["assistant_response"].strip()
                for column, value in row.items():
                    if column.startswith("human_score") and value:
                        ratings[column[-1] in "23"][key].append((str(path), float(value)))

    def mean(found: list) -> float:
        """Of the tables' means."""
        tables = [[v for path, v in found if path == table] for table in sorted({path for path, _ in found})]
        return sum(sum(values) / len(values) for values in tables) / len(tables)

    for pairs, harm in zip(files, ratings, strict=True):
        for pair in pairs:
            chosen, rejected = (mean(harm[pair["prompt"], pair[name]]) for name in ("chosen", "rejected"))
            assert rejected - chosen >= 0.25 - 1e-9
