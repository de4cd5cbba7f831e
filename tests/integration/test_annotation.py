"""Annotation: scores against one text at a time, the pad = EOS trap, order, resume, templates, errors."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import save_tiny_policy, save_tiny_reward_model, tiny_tokenizer
from tokenizers import AddedToken
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from annotate_data import get_rewards
from annotate_data.scorer import RewardScorer, in_threads, pad_right, parts_of
from annotate_data.texts import encode
from common.cli import run

SCRIPT = Path(__file__).resolve().parents[2] / "alignment/annotate_data/get_rewards.py"
TEXTS = [
    "a cat",
    "the quick brown fox jumps over the lazy dog",
    "b",
    "hello, who are you? fine!",
    "zz top",
] * 3


def alone(folder, texts, column=0, adds=()):
    """Independent truth: each text alone, no padding, the logits of its very last token (decoder models)."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = tiny_tokenizer()
    scores = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            scores.append(model.score(model.model(ids).last_hidden_state)[0, -1, column].item())
    return scores


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return save_tiny_reward_model(tmp_path_factory.mktemp("models") / "rm", seed=3)


def data_file(path, rows, **extra):
    instances = [{"prompt": p, "responses": r, **extra} for p, r in rows]
    path.write_text(json.dumps({"type": "text_only", "instances": instances}))
    return path


@pytest.fixture
def annotate(monkeypatch, capsys):
    """Runs the script's own `main` on a command line, in this process."""

    def call(*arguments, check=True):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        code = 0
        try:
            run(get_rewards.main)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        assert not check or code == 0, said.err
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return call


def flags(data, model, output, *more):
    return ["--dataset_name_or_path", data, "--reward_name_or_path", model, "--output_file", output, *more]


@pytest.mark.parametrize("budget", [1, 64, 100000])
def test_scores_do_not_depend_on_the_batch(reward_model, budget):
    scores = RewardScorer(str(reward_model), token_budget=budget).score(TEXTS)
    assert scores == pytest.approx(alone(reward_model, TEXTS), abs=1e-5)
    assert max(scores) - min(scores) > 0.01


@pytest.mark.parametrize("pad", ["</s>", None])
def test_pad_is_eos_and_the_text_ends_in_eos(tmp_path, pad):
    folder = save_tiny_reward_model(tmp_path / "rm", seed=4)
    for file, key in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
        content = json.loads((folder / file).read_text())
        content[key] = pad if pad is None or key == "pad_token" else 2
        (folder / file).write_text(json.dumps(content))
    texts = [text + end for text in TEXTS[:5] for end in ("", "</s>", "</s></s>")]
    truth = alone(folder, texts)
    assert abs(truth[0] - truth[1]) > 1e-3  # the two positions really score differently
    assert RewardScorer(str(folder)).score(texts) == pytest.approx(truth, abs=1e-5)


def change_config(folder, **changes):
    """Writes values into a saved model's config.json."""
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("pad", [-1, len(tiny_tokenizer()), 10**6])
def test_a_pad_id_outside_of_the_vocabulary_counts_as_none(tmp_path, annotate, pad):
    folder = save_tiny_reward_model(tmp_path / "rm", seed=4)
    truth = alone(folder, TEXTS)
    change_config(folder, pad_token_id=pad)
    assert RewardScorer(str(folder)).score(TEXTS) == pytest.approx(truth, abs=1e-5)
    data = data_file(tmp_path / "in.json", [(text, [""]) for text in TEXTS])
    annotate(*flags(data, folder, tmp_path / "out.json"))
    rewards = [i["rewards"][0] for i in json.loads((tmp_path / "out.json").read_text())["instances"]]
    assert rewards == pytest.approx(truth, abs=1e-5)


def test_several_end_ids_and_a_tokenizer_without_any(tmp_path):
    folder = save_tiny_reward_model(tmp_path / "rm", seed=4)
    truth = alone(folder, TEXTS)
    change_config(folder, eos_token_id=[2, 5], pad_token_id=5)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content |= {"eos_token": None, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    scorer = RewardScorer(str(folder))
    assert scorer.tokenizer.eos_token_id is None
    assert scorer.score(TEXTS) == pytest.approx(truth, abs=1e-5)


def test_a_token_that_the_model_does_not_have_is_named(tmp_path, annotate):
    folder = save_tiny_reward_model(tmp_path / "rm", seed=4)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[NEW]"])
    tokenizer.save_pretrained(folder)
    data = data_file(tmp_path / "in.json", [("a", ["b[NEW]"])])
    failed = annotate(*flags(data, folder, tmp_path / "out.json"), check=False)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "[NEW]" in failed.stderr


@pytest.mark.parametrize(("asked", "kept"), [(None, 33), (20, 20), (500, 33)])
def test_positions_that_begin_behind_the_pad_id(tmp_path, annotate, asked, kept):
    """RoBERTa: 34 positions, of which those behind pad id 0 are used; its tokenizer says 1000."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=34, pad_token_id=0, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    folder = tmp_path / "rm"
    model.save_pretrained(folder)
    tokenizer.model_max_length = 1000
    tokenizer.save_pretrained(folder)
    texts = ["short", "abcdefghij" * 5, "exactly " * 4, "a" * 32]  # 6, 51, 33, 33 tokens with BOS
    with torch.no_grad():
        truth = [model(torch.tensor([tokenizer(t)["input_ids"][:kept]])).logits.item() for t in texts]
    data = data_file(tmp_path / "in.json", [("", [text]) for text in texts])
    more = [] if asked is None else ["--max_length", asked]
    printed = annotate(*flags(data, folder, tmp_path / "out.json", *more)).stdout
    rewards = [i["rewards"][0] for i in json.loads((tmp_path / "out.json").read_text())["instances"]]
    assert rewards == pytest.approx(truth, abs=1e-5)
    assert f"{1 if kept == 33 else 3} texts were cut to {kept} tokens" in printed


def test_a_batch_that_uses_every_id_is_scored_text_by_text(tmp_path):
    folder = save_tiny_reward_model(tmp_path / "rm", seed=5)
    everything = "<pad><s></s><unk> abcdefghijklmnopqrstuvwxyz.,:?!"
    texts = [everything, everything + " and more", "short"]
    assert pad_right(encode(tiny_tokenizer(), texts, None)[0], RewardScorer(str(folder)).model.config) is None
    assert RewardScorer(str(folder)).score(texts) == pytest.approx(alone(folder, texts), abs=1e-5)


def test_encoder_scores_equal_unpadded_ones(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        truth = [model(torch.tensor([tokenizer(t)["input_ids"]])).logits.item() for t in TEXTS]
    assert RewardScorer(str(tmp_path)).score(TEXTS) == pytest.approx(truth, abs=1e-5)


def test_column_of_several_labels(tmp_path, annotate):
    folder = save_tiny_reward_model(tmp_path / "rm", seed=6, labels=3)
    assert RewardScorer(str(folder), column=2).score(TEXTS[:5]) == pytest.approx(
        alone(folder, TEXTS[:5], column=2), abs=1e-5
    )
    data = data_file(tmp_path / "in.json", [("a", ["b"])])
    failed = annotate(*flags(data, folder, tmp_path / "out.json"), check=False)
    assert failed.returncode == 2 and "3 labels" in failed.stderr


@pytest.fixture
def two_cores():
    """Two threads, whatever this test run was given."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_part_of_a_batch_is_as_wide_as_its_longest_text():
    rows = [list(range(1, length + 1)) for length in (9, 7, 7, 4, 2)]
    mask = torch.tensor([[1] * len(row) + [0] * (9 - len(row)) for row in rows])
    ids = torch.tensor([row + [0] * (9 - len(row)) for row in rows])
    parts = parts_of({"input_ids": ids, "attention_mask": mask}, 2)
    assert [part["input_ids"].shape for part in parts] == [(3, 9), (2, 4)]
    found = [x[m.bool()].tolist() for part in parts for x, m in zip(*part.values(), strict=True)]
    assert found == rows


def test_cores_divide_a_batch_and_get_their_threads_back(reward_model, two_cores):
    assert RewardScorer(str(reward_model)).score(TEXTS) == pytest.approx(alone(reward_model, TEXTS), abs=1e-5)
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda part: 1 // part, [1, 0])
    assert torch.get_num_threads() == 2


def test_a_model_that_sees_padding_is_given_none(reward_model, two_cores, capsys):
    """The parts of a batch hide padding from the check unless it is made on one whole batch."""
    scorer = RewardScorer(str(reward_model))
    assert scorer.padding_is_safe
    truth, whole = scorer.score(TEXTS), scorer.model.forward

    def forward(input_ids, **inputs):
        output = whole(input_ids=input_ids, **inputs)
        output.logits = output.logits + input_ids.shape[1]
        return output

    scorer.model.forward = forward
    scorer.padding_is_safe = scorer._padding_is_safe("float32")
    lengths = [len(ids) for ids in encode(scorer.tokenizer, TEXTS, None)[0]]
    assert "batching equal lengths only" in capsys.readouterr().out and len(set(lengths)) > 2
    expected = [score + length for score, length in zip(truth, lengths, strict=True)]
    assert scorer.score(TEXTS) == pytest.approx(expected, abs=1e-4)


def test_out_of_memory_halves_the_budget_and_goes_on(reward_model, monkeypatch, capsys):
    scorer = RewardScorer(str(reward_model), token_budget=10000)
    truth = scorer.score(TEXTS)
    whole = scorer.forward

    def small_gpu(batch):
        if sum(map(len, batch)) > 120:
            raise torch.OutOfMemoryError
        return whole(batch)

    monkeypatch.setattr(scorer, "forward", small_gpu)
    assert scorer.score(TEXTS) == pytest.approx(truth, abs=1e-5)
    assert "out of GPU memory" in capsys.readouterr().out
    assert scorer.token_budget < 10000


def test_file_in_file_out(tmp_path, reward_model, annotate):
    rows = [("ask me. ", ["yes", "no, never!"]), ("b: ", ["c", "a much longer answer that goes on"])]
    data = data_file(tmp_path / "in.json", rows, pairs=[0, 0], stop_reasons=["stop", "length"],
                     response_ids=[[5, 6, 2], [9, 9]], extra={"kept": [None, "\u2028"]})  # fmt: skip
    output = tmp_path / "out.json"
    said = annotate(*flags(data, reward_model, output)).stdout
    result = json.loads(output.read_text())
    truth = [alone(reward_model, [p + r for r in responses]) for p, responses in rows]
    for instance, (prompt, responses), rewards in zip(result["instances"], rows, truth, strict=True):
        assert (instance["prompt"], instance["responses"]) == (prompt, responses)
        assert (instance["response_ids"], instance["extra"]) == ([[5, 6, 2], [9, 9]], {"kept": [None, "\u2028"]})
        assert instance["rewards"] == pytest.approx(rewards, abs=1e-4)
    assert f"mean reward {sum(map(sum, truth)) / 4:.4f}" in said
    assert f"best-of-K reward {sum(map(max, truth)) / 2:.4f}" in said
    assert result["settings"]["annotate"]["reward_template"] == "none"
    before = output.read_bytes()
    assert "already done" in annotate(*flags(data, reward_model, output)).stdout
    refused = annotate(*flags(data, reward_model, output, "--max_length", "5"), check=False)
    assert refused.returncode == 2 and "max_length" in refused.stderr and refused.stderr.count("\n") == 1
    assert output.read_bytes() == before


def test_a_killed_run_continues_and_ends_with_the_same_file(tmp_path, reward_model, annotate):
    rows = [(f"question {'abcdefghij'[i % 10] * (i % 17)} ", ["yes" * (i % 5 + 1), "no"]) for i in range(400)]
    data = data_file(tmp_path / "in.json", rows)
    budget = ("--token_budget", "100")
    annotate(*flags(data, reward_model, tmp_path / "whole.json", *budget))
    output = tmp_path / "out.json"
    journal = Path(f"{output}.journal")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, flags(data, reward_model, output, *budget))],
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
        pass
    process.kill()
    process.wait()
    assert not output.exists() and journal.read_bytes().count(b"\n") > 1
    annotate(*flags(data, reward_model, output, *budget))
    assert not journal.exists()
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_only_the_missing_texts_are_scored_again(reward_model):
    scorer = RewardScorer(str(reward_model), token_budget=64)
    whole = dict(scorer.stream(TEXTS))
    rest = dict(scorer.stream(TEXTS, skip={0, 3, 7}))
    assert set(rest) == set(range(len(TEXTS))) - {0, 3, 7}
    assert all(rest[i] == whole[i] for i in rest)  # bit for bit: the batches stay the same
    scorer.forward = None  # nothing is left to compute
    assert list(scorer.stream(TEXTS, skip=set(whole))) == []


@pytest.mark.parametrize(
    ("extra", "user"),
    [
        ({"raw_prompt": "raw?"}, "raw?"),
        ({"messages": [{"role": "user", "content": "said"}]}, "said"),
        ({}, "p: "),
    ],
)
def test_chat_template_is_applied_with_one_bos(tmp_path, reward_model, extra, user, annotate):
    data = data_file(tmp_path / "in.json", [("p: ", ["yes", "no"])], **extra)
    annotate(*flags(data, reward_model, tmp_path / "out.json", "--reward_template", "chat"))
    # tiny_tokenizer writes its own <s>; the template's text is spelled out here by hand.
    truth = alone(reward_model, [f"user: {user}\nassistant: {answer}\n" for answer in ("yes", "no")])
    rewards = json.loads((tmp_path / "out.json").read_text())["instances"][0]["rewards"]
    assert rewards == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("template", ["none", "chat"])
@pytest.mark.parametrize("max_length", [None, 12])
def test_a_control_token_that_a_response_spells_out_is_text(tmp_path, reward_model, template, max_length, annotate):
    """As if its characters (< / s >, which this tokenizer does not know) had been written one by one."""
    answers = ["</s>", "a</s>b <s>", "no", "<unk> </s>"]
    data = data_file(tmp_path / "in.json", [("q</s>: ", answers)])
    more = ["--reward_template", template] + (["--max_length", max_length] if max_length else [])
    annotate(*flags(data, reward_model, tmp_path / "out.json", *more))
    tokenizer = tiny_tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    before, after = ("user: q</s>: \nassistant: ", "\n") if template == "chat" else ("q</s>: ", "")
    vocabulary = tokenizer.get_vocab()
    truth = []
    for answer in answers:
        ids = tokenizer(before)["input_ids"] + [vocabulary.get(c, 3) for c in answer]
        ids = (ids + tokenizer(after, add_special_tokens=False)["input_ids"])[:max_length]
        with torch.no_grad():
            truth.append(model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0].item())
    [instance] = json.loads((tmp_path / "out.json").read_text())["instances"]
    assert instance["rewards"] == pytest.approx(truth, abs=1e-5)


def test_control_tokens_without_a_name_are_text_too():
    """Llama-3's <|eot_id|> is one: special, and neither EOS nor any other named token."""
    tokenizer = tiny_tokenizer()
    # Added the way that a tokenizer.json lists them: no attribute of the tokenizer names it.
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("(turn)", special=True, normalized=False)])
    assert tokenizer("(turn)")["input_ids"] == [1, 36] and 36 not in tokenizer.all_special_ids
    vocabulary = tokenizer.get_vocab()
    [ids], _ = encode(tokenizer, ["q(turn)a(turn)b"], None, ["a(turn)b"])
    assert ids == [1, vocabulary["q"], 36, *(vocabulary.get(c, 3) for c in "a(turn)b")]


def test_a_response_continues_the_assistants_turn(tmp_path, reward_model, annotate):
    """And null is absent."""
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "as"}]
    data = data_file(tmp_path / "in.json", [("p", [" it is"])], messages=turns)
    annotate(*flags(data, reward_model, tmp_path / "out.json", "--reward_template", "chat"))
    [instance] = json.loads((tmp_path / "out.json").read_text())["instances"]
    truth = alone(reward_model, ["user: why?\nassistant: as it is\n"])
    assert instance["rewards"] == pytest.approx(truth, abs=1e-5)
    data = data_file(tmp_path / "null.json", [("p", ["yes"])], messages=None, raw_prompt="why?")
    annotate(*flags(data, reward_model, tmp_path / "out2.json", "--reward_template", "chat"))
    [instance] = json.loads((tmp_path / "out2.json").read_text())["instances"]
    assert instance["rewards"] == pytest.approx(alone(reward_model, ["user: why?\nassistant: yes\n"]), abs=1e-5)
    data = data_file(tmp_path / "system.json", [("p", ["yes"])], messages=[{"role": "system", "content": "x"}])
    failed = annotate(*flags(data, reward_model, tmp_path / "out3.json", "--reward_template", "chat"), check=False)
    assert failed.returncode == 2 and "system.json: row 0" in failed.stderr and failed.stderr.count("\n") == 1


def test_errors_are_one_line_and_leave_files_alone(tmp_path, reward_model, annotate):
    data = data_file(tmp_path / "in.json", [("a", ["b", "c"]), ("long", ["d", "e"])])
    templated = tmp_path / "templated.json"
    settings = {"generate": {"template": "alpaca"}}
    templated.write_text(json.dumps({"instances": [{"prompt": "a", "responses": ["b"]}], "settings": settings}))
    broken = tmp_path / "broken"
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny_tokenizer()("l")["input_ids"][-1]] = math.nan
    model.save_pretrained(broken)
    tiny_tokenizer().save_pretrained(broken)
    policy = save_tiny_policy(tmp_path / "policy", seed=1)
    output = tmp_path / "out.json"
    for arguments, words in [
        (flags(data, broken, output), ["row 1", "nan", "long"]),
        (
            flags(templated, reward_model, output, "--reward_template", "chat"),
            ["row 0", "raw_prompt", "alpaca"],
        ),
        (flags(data, policy, output), ["score.weight"]),
        (flags(data, tmp_path / "nowhere", output), ["nowhere", "no such folder"]),
        (flags(tmp_path / "none.json", reward_model, output), ["none.json", "no such file"]),
        (flags(data, reward_model, output, "--reward_column", "1"), ["--reward_column 1"]),
    ]:
        failed = annotate(*arguments, check=False)
        assert failed.returncode == 2, failed.stderr
        assert failed.stderr.count("\n") == 1 and all(word in failed.stderr for word in words), failed.stderr
        assert not output.exists()


def test_long_texts_are_cut_and_counted(reward_model):
    scorer = RewardScorer(str(reward_model), max_length=10)
    scores = scorer.score(["abcdefghi", "abcdefghijkl"])
    assert scorer.cut == 1
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)


def test_several_files_with_one_model(tmp_path, reward_model, annotate):
    one = data_file(tmp_path / "one.json", [("a", ["b", "c"])])
    two = data_file(tmp_path / "two.json", [("d", ["e"])])
    annotate(*flags(one, reward_model, tmp_path / "out1.json"))
    before = (tmp_path / "out1.json").stat().st_mtime_ns
    said = annotate(
        "--reward_name_or_path", reward_model, "--dataset_name_or_path", one, two,
        "--output_file", tmp_path / "out1.json", tmp_path / "out2.json",
    ).stdout  # fmt: skip
    assert "out1.json: already done" in said and (tmp_path / "out1.json").stat().st_mtime_ns == before
    [instance] = json.loads((tmp_path / "out2.json").read_text())["instances"]
    assert instance["rewards"] == pytest.approx(alone(reward_model, ["de"]), abs=1e-4)
    failed = annotate(*flags(one, reward_model, tmp_path / "x.json", tmp_path / "y.json"), check=False)
    assert failed.returncode == 2 and "same number" in failed.stderr
