"""KL: full enumeration of a tiny model's responses, exact zero, batch size, what is counted, the command line."""

import itertools
import json
import math
import shutil
import sys

import pytest
import torch
from commands import engine_starts, python
from tiny import save_tiny_policy, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from common.cli import UserError, run
from common.journal import Journal
from common.models import load_tokenizer, tokenizer_fingerprint
from evaluation import get_kl
from evaluation.kl import (
    LanguageModel,
    Score,
    Sequence,
    check_same_width,
    score_sequences,
    summarize,
    token_kl,
)

PAD, BOS, EOS = 0, 1, 2
LENGTH = 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A policy and a reference over six ids (pad, BOS, EOS, unknown, a, b)."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = tiny_tokenizer(characters="ab")
    save_tiny_policy(folder / "policy", seed=1, tokenizer=tokenizer)
    save_tiny_policy(folder / "reference", seed=2, tokenizer=tokenizer, hidden=16, layers=1)
    return folder / "policy", folder / "reference"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def next_log_probs(model, ids, temperature):
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0, -1].double() / temperature).log_softmax(-1).tolist()


def all_responses(policy, reference, prompt, temperature, stops=(EOS,)):
    """Return every response of up to LENGTH tokens: (Sequence, log pi, log pi_ref), one forward pass per prefix."""
    found, open_prefixes = [], [((), 0.0, 0.0)]
    for _ in range(LENGTH):
        longer = []
        for prefix, p, q in open_prefixes:
            ids = [*prompt, *prefix]
            ps, qs = (next_log_probs(m, ids, temperature) for m in (policy, reference))
            for token in range(6):
                step = p + ps[token], q + qs[token]
                if token in stops:
                    found.append((Sequence(prompt, [*prefix, token], True), *step))
                else:
                    longer.append(((*prefix, token), *step))
        open_prefixes = longer
    return found + [(Sequence(prompt, list(prefix), False), p, q) for prefix, p, q in open_prefixes]


@pytest.fixture(scope="module", params=[0.7, 1.6])
def enumerated(pair, request):
    policy, reference = map(load, pair)
    prompt = [BOS, 4, 5, 5]
    return request.param, all_responses(policy, reference, prompt, request.param)


def test_expectation_is_the_enumerated_kl(pair, enumerated):
    temperature, responses = enumerated
    assert math.fsum(math.exp(p) for _, p, _ in responses) == pytest.approx(1)
    truth = math.fsum(math.exp(p) * (p - q) for _, p, q in responses)
    assert truth > 0.05
    models = [LanguageModel(load(folder)) for folder in pair]
    scores = score_sequences(*models, [s for s, _, _ in responses], temperature, [EOS])
    weights = [math.exp(p) for _, p, _ in responses]
    exact = math.fsum(w * score.kl for w, score in zip(weights, scores, strict=True))
    assert exact == pytest.approx(truth, rel=1e-5)
    for (_, p, q), score in zip(responses, scores, strict=True):
        assert score.log_ratio == pytest.approx(p - q, abs=1e-4)


STOPS = [EOS, 4]


@pytest.fixture(scope="module")
def two_stops(pair, tmp_path_factory):
    """The pair's models, which generation_config.json gives a second stop token; and all of their responses."""
    folder = tmp_path_factory.mktemp("two_stops")
    for source in pair:
        shutil.copytree(source, folder / source.name)
        config = json.loads((source / "generation_config.json").read_text())
        (folder / source.name / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": STOPS}))
    models = folder / "policy", folder / "reference"
    return models, all_responses(*map(load, models), [BOS, 5, 5], 0.8, STOPS)


def expectation(responses, values):
    return math.fsum(math.exp(p) * value for (_, p, _), value in zip(responses, values, strict=True))


def test_both_estimators_have_the_same_expectation_with_two_stop_tokens(two_stops):
    folders, responses = two_stops
    truth = expectation(responses, [p - q for _, p, q in responses])
    assert {s.response[-1] for s, _, _ in responses if s.ended} == set(STOPS)
    models = [LanguageModel(load(folder)) for folder in folders]
    scores = score_sequences(*models, [s for s, _, _ in responses], 0.8, STOPS)
    assert expectation(responses, [s.kl for s in scores]) == pytest.approx(truth, rel=1e-5)
    assert expectation(responses, [s.log_ratio for s in scores]) == pytest.approx(truth, rel=1e-5)


def test_sampling_with_two_stop_tokens_agrees_with_the_enumeration(tmp_path, monkeypatch, two_stops):
    folders, responses = two_stops
    truth = expectation(responses, [p - q for _, p, q in responses])
    data = prompts_file(tmp_path / "prompts.jsonl", ["bb"] * 600)
    words = flags(folders, tmp_path / "kl.json", dataset_name_or_path=data, temperature=0.8, batch_size=50)
    call(monkeypatch, [*words, "--max_num_seqs", "200", "--published_estimator"])
    result = json.loads((tmp_path / "kl.json").read_text())
    assert abs(result["kl"] - truth) < 4 * result["stderr"]
    assert abs(result["log_ratio_kl"] - truth) < 4 * result["log_ratio_stderr"]
    # The published estimator: log-ratio at T = 1 of what was sampled at another temperature; not this policy's KL.
    at_one = {tuple(s.response): p - q for s, p, q in all_responses(*map(load, folders), [BOS, 5, 5], 1.0, STOPS)}
    published = expectation(responses, [at_one[tuple(s.response)] for s, _, _ in responses])
    assert abs(result["published_kl"] - published) < 4 * result["published_stderr"]


def test_sampled_ids_are_scored_where_this_tokenizer_made_them(tmp_path, monkeypatch, capsys, two_stops):
    """Responses that no text encodes to: an unknown id in the middle, a second stop token at the end."""
    folders, _ = two_stops
    ids = [[5, 3, 5, 4], [3, 5]]
    row = {"prompt": "bb", "responses": ["bb", "b"], "response_ids": ids, "stop_reasons": ["stop", "length"]}
    policy, reference = map(load, folders)
    expected = {}
    for name, responses in (("ids", ids), ("texts", [[5, 5, "any"], [5]])):
        sums = []
        for response in responses:
            for i, token in enumerate(response):
                prefix = [BOS, 5, 5, *response[:i]]
                p, q = (torch.tensor(next_log_probs(model, prefix, 0.8)) for model in (policy, reference))
                # Of a text that ended it is not known by which of the stop tokens.
                wanted = STOPS if token == "any" else [token]
                sums.append((p[wanted].logsumexp(0) - q[wanted].logsumexp(0)).item())
        expected[name] = math.fsum(sums) / 2
    fingerprint = tokenizer_fingerprint(load_tokenizer(str(folders[0]), "policy"))
    for made_by, name in ((fingerprint, "ids"), ("another", "texts"), (None, "texts")):
        data = tmp_path / f"{made_by}.json"
        data.write_text(json.dumps({"instances": [row], "settings": {"generate": {"tokenizer": made_by}}}))
        capsys.readouterr()
        call(monkeypatch, flags(folders, tmp_path / f"{made_by}_kl.json", responses=data, temperature=0.8))
        result = json.loads((tmp_path / f"{made_by}_kl.json").read_text())
        assert result["log_ratio_kl"] == pytest.approx(expected[name], abs=1e-4)
        assert (str(data) in capsys.readouterr().out) == (name == "texts")
        assert result["mean_tokens"] == (3 if name == "ids" else 2)


def test_responses_longer_than_the_models_read_are_left_out_and_counted(tmp_path, monkeypatch, capsys, pair):
    rows = [{"prompt": "b" * n, "responses": ["ab"], "stop_reasons": ["length"]} for n in (3, 252, 253, 254, 400)]
    data = tmp_path / "long.json"
    data.write_text(json.dumps({"instances": rows}))
    call(monkeypatch, flags(pair, tmp_path / "kl.json", responses=data))  # 256 positions: BOS + 253 + 2
    assert json.loads((tmp_path / "kl.json").read_text())["num_prompts"] == 3
    assert "2 prompts left out" in capsys.readouterr().out


@pytest.fixture(scope="module")
def with_newlines(tmp_path_factory):
    """A pair whose tokenizer knows the characters that end a line."""
    folder = tmp_path_factory.mktemp("newlines")
    tokenizer = tiny_tokenizer(characters="ab\r\n")
    return [save_tiny_policy(folder / str(seed), seed=seed, tokenizer=tokenizer, sharpness=9) for seed in (1, 2)]


def test_odd_responses_of_a_text_file_against_a_naive_loop(tmp_path, monkeypatch, with_newlines):
    """Empty, CRLF, the name of the stop token; one forward pass per token; the file itself has CRLF line ends."""
    rows = [
        ("a\r\n", [("", "stop"), ("\r\nb\n", "length")], [["any"], [6, 7, 5, 7]]),
        ("b", [("a\r\n", "stop"), ("</s>", "stop")], [[4, 6, 7, "any"], [3, 3, 3, 3, "any"]]),
    ]
    instances = [
        {"prompt": prompt, "responses": [t for t, _ in said], "stop_reasons": [why for _, why in said]}
        for prompt, said, _ in rows
    ]
    (tmp_path / "r.json").write_bytes(json.dumps({"instances": instances}, indent=1).replace("\n", "\r\n").encode())
    policy, reference = map(load, with_newlines)
    kl, ratio = [], []
    for prompt, _, responses in rows:
        for response in responses:
            kl.append(0.0)
            ratio.append(0.0)
            for i, token in enumerate(response):
                ids = [BOS, *({"a": 4, "b": 5, "\r": 6, "\n": 7}[c] for c in prompt), *response[:i]]
                p, q = (torch.tensor(next_log_probs(model, ids, 0.8)) for model in (policy, reference))
                kl[-1] += (p.exp() * (p - q)).sum().item()
                wanted = EOS if token == "any" else token
                ratio[-1] += (p[wanted] - q[wanted]).item()
    for batch_size in (1, 8):
        output = tmp_path / f"kl{batch_size}.json"
        call(
            monkeypatch,
            flags(with_newlines, output, responses=tmp_path / "r.json", temperature=0.8, batch_size=batch_size),
        )
        result = json.loads(output.read_text())
        assert result["kl"] == pytest.approx(math.fsum(kl) / 4, rel=1e-4)
        assert result["log_ratio_kl"] == pytest.approx(math.fsum(ratio) / 4, abs=1e-4)
        assert result["mean_tokens"] == 14 / 4 and result["truncated_fraction"] == 0.25


def test_a_sampled_stop_token_alone_is_scored_as_the_empty_text_that_ended(tmp_path, monkeypatch, pair):
    fingerprint = tokenizer_fingerprint(load_tokenizer(str(pair[0]), "policy"))
    row = {"prompt": "ab", "responses": [""], "stop_reasons": ["stop"]}
    found = []
    for name, more in (("ids", {"response_ids": [[EOS]]}), ("text", {})):
        content = {"instances": [row | more], "settings": {"generate": {"tokenizer": fingerprint}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        call(monkeypatch, flags(pair, tmp_path / f"{name}_kl.json", responses=tmp_path / f"{name}.json"))
        result = json.loads((tmp_path / f"{name}_kl.json").read_text())
        found.append([result[key] for key in ("kl", "log_ratio_kl", "kl_per_token", "mean_tokens")])
    assert found[0] == pytest.approx(found[1]) and found[0][3] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"responses": ["b", ""]}, "row 1: response 1 has no tokens"),
        ({"response_ids": [[5], []]}, "row 0: no 'response_ids'"),
        ({"stop_reasons": ["stop", "eos"]}, "row 1: 'stop_reasons' holds something else"),
        ({"stop_reasons": None}, "row 1: 'stop_reasons'"),
        ({"prompt": None}, "row 1: 'prompt'"),
    ],
)
def test_responses_without_a_kl_are_refused_in_one_line(tmp_path, monkeypatch, capsys, pair, change, said):
    rows = [{"prompt": "ab", "responses": ["ba", "b"], "stop_reasons": ["stop", "length"]}] * 2
    data = tmp_path / "r.json"
    data.write_text(json.dumps({"instances": [rows[0], rows[1] | change]}))
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        call(monkeypatch, flags(pair, tmp_path / "kl.json", responses=data))
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1 and said in error, error


def test_other_prompts_than_those_of_the_result_are_refused(tmp_path, monkeypatch, capsys, pair):
    """A chat template that writes the date: the same command another day, after its end and in its middle."""
    folder = tmp_path / "policy"
    shutil.copytree(pair[0], folder)
    template = folder / "chat_template.jinja"
    data = prompts_file(tmp_path / "prompts.jsonl", ["ab", "ba"])
    words = flags((folder, pair[1]), tmp_path / "kl.json", dataset_name_or_path=data, template="chat")
    template.write_text("{{ day or 'a' }} {{ messages[0]['content'] }}")
    call(monkeypatch, words)
    done = (tmp_path / "kl.json").read_bytes()
    template.write_text("{{ day or 'b' }} {{ messages[0]['content'] }}")
    for left_behind in ("kl.json", "kl.json.journal"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as refused:
            call(monkeypatch, words)
        error = capsys.readouterr().err
        assert refused.value.code == 2 and left_behind in error and f"{data}: line 1" in error
        call(monkeypatch, [*words, "--chat_template_kwargs", '{"day": "a"}'])
        assert json.loads((tmp_path / "kl.json").read_text())["prompts"] == json.loads(done)["prompts"]
        (tmp_path / "kl.json").unlink()
        begun = Journal(tmp_path / "kl.json", json.loads(done)["settings"]["kl"])
        begun.add("0.0", {"ids": [5], "ended": False, "prompt": json.loads(done)["prompts"][0]})
        begun.close(done=False)


def test_scoring_is_in_float32_unless_asked_otherwise(tmp_path, monkeypatch, pair):
    data = prompts_file(tmp_path / "prompts.jsonl", ["ab", "ba"])
    found = {}
    for name, more in (("exact", {}), ("rough", {"scoring_dtype": "bfloat16"})):
        output = tmp_path / f"{name}.json"
        call(monkeypatch, flags(pair, output, dataset_name_or_path=data, temperature=0.8, **more))
        found[name] = json.loads(output.read_text())
    assert found["exact"]["settings"]["kl"]["scoring_dtype"] == "float32"
    assert found["exact"]["kl"] != found["rough"]["kl"]
    assert found["exact"]["kl"] == pytest.approx(found["rough"]["kl"], rel=0.2)


def flags(pair, output, **more):
    named = {"model_name_or_path": pair[0], "ref_model_name_or_path": pair[1], "output_file": output}
    if "responses" not in more:
        named |= {"backend": "hf", "dtype": "float32", "max_new_tokens": LENGTH}
    named |= more
    return [str(word) for name, value in named.items() if value is not None for word in (f"--{name}", value)]


def call(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["get_kl.py", *words])
    run(get_kl.main)


def prompts_file(path, prompts):
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return path


def test_sampled_estimate_agrees_with_the_enumerated_kl(tmp_path, monkeypatch, pair, enumerated):
    temperature, responses = enumerated
    truth = math.fsum(math.exp(p) * (p - q) for _, p, q in responses)
    cut = math.fsum(math.exp(p) for s, p, _ in responses if not s.ended)
    tokens = math.fsum(math.exp(p) * len(s.response) for s, p, _ in responses)
    data = prompts_file(tmp_path / "prompts.jsonl", ["abb"] * 600)
    output = tmp_path / "kl.json"
    words = flags(pair, output, dataset_name_or_path=data, temperature=temperature, max_num_seqs=200, batch_size=50)
    call(monkeypatch, words)
    result = json.loads(output.read_text())
    assert abs(result["kl"] - truth) < 4 * result["stderr"] < truth
    assert abs(result["log_ratio_kl"] - truth) < 4 * result["log_ratio_stderr"]
    assert result["stderr"] < result["log_ratio_stderr"]
    assert abs(result["truncated_fraction"] - cut) < 4 * math.sqrt(0.25 / 600)
    assert abs(result["mean_tokens"] - tokens) < 4 * LENGTH / math.sqrt(600)
    assert result["kl_per_token"] == pytest.approx(result["kl"] / result["mean_tokens"])
    assert result["num_prompts"] == 600 and result["settings"]["kl"]["temperature"] == temperature


def test_vllm_samples_the_same_policy(tmp_path):
    """The real engine and command line, against the enumeration."""
    tokenizer = tiny_tokenizer(characters="ab")
    folders = [
        save_tiny_policy(tmp_path / str(i), seed=i, tokenizer=tokenizer, hidden=64, sharpness=6.0) for i in (1, 2)
    ]
    responses = all_responses(*map(load, folders), [BOS, 4, 5, 5], 0.7)
    truth = math.fsum(math.exp(p) * (p - q) for _, p, q in responses)
    cut = math.fsum(math.exp(p) for s, p, _ in responses if not s.ended)
    data = prompts_file(tmp_path / "prompts.jsonl", ["abb"] * 300)
    words = flags(
        folders,
        tmp_path / "kl.json",
        dataset_name_or_path=data,
        temperature=0.7,
        backend="vllm",
        batch_size=50,
    )
    done = python(get_kl.__file__, *words)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "kl.json").read_text())
    assert abs(result["kl"] - truth) < 4 * result["stderr"] < truth
    assert abs(result["truncated_fraction"] - cut) < 4 * math.sqrt(0.25 / 300)


def test_command_lines_in_turn_share_an_engine_and_write_what_each_writes_alone(tmp_path):
    """Two policies of one shape, the first again, one of another shape: vLLM itself says how often it starts."""
    tokenizer = tiny_tokenizer(characters="ab")
    shapes = [{"hidden": 64}, {"hidden": 64}, {"hidden": 96, "heads": 3}, {"hidden": 64}]
    *policies, reference = [
        save_tiny_policy(tmp_path / str(i), seed=i, tokenizer=tokenizer, **shape) for i, shape in enumerate(shapes)
    ]
    data = prompts_file(tmp_path / "prompts.jsonl", ["ab" * 24, "a" * 40, "abb", "b"] * 3)
    more = {"dataset_name_or_path": data, "backend": "vllm", "max_new_tokens": 12, "temperature": 1.0}

    def measure(outputs):
        """Measure the policies' KL, name of the output → number of the policy; return how many engines started."""
        lines = [flags((policies[i], reference), tmp_path / name, **more) for name, i in outputs.items()]
        words = [word for line in lines for word in ("--then", *line)][1:]
        done = python("evaluation/get_kl.py", *words, VLLM_LOGGING_LEVEL="INFO")
        assert done.returncode == 0, done.stderr
        return engine_starts(done)

    in_turn = {"turn0.json": 0, "turn1.json": 1, "turn2.json": 0, "turn3.json": 2}
    assert measure(in_turn) == 2
    for i in range(3):
        assert measure({f"alone{i}.json": i}) == 1
    alone = [(tmp_path / f"alone{i}.json").read_bytes() for i in range(3)]
    assert len(set(alone)) == 3
    assert all((tmp_path / name).read_bytes() == alone[i] for name, i in in_turn.items())


@pytest.mark.parametrize("batch_size", [1, 7, 600])
def test_batch_size_changes_nothing(pair, enumerated, batch_size):
    temperature, responses = enumerated
    sequences = [s for s, _, _ in responses]
    models = [LanguageModel(load(folder)) for folder in pair]
    sequences = sequences[:: max(1, 30 // batch_size)]  # few sequences for the small batches, which are slow
    alone = [score_sequences(*models, [s], temperature, [EOS])[0] for s in sequences[::23]]
    chunks = [sequences[i : i + batch_size] for i in range(0, len(sequences), batch_size)]
    together = [s for c in chunks for s in score_sequences(*models, c, temperature, [EOS])][::23]
    for one, other in zip(alone, together, strict=True):
        assert one[:2] == pytest.approx(other[:2], abs=1e-5)


def test_chunks_of_positions_change_nothing(pair, enumerated, monkeypatch):
    temperature, responses = enumerated
    sequences = [s for s, _, _ in responses][::31]
    models = [LanguageModel(load(folder)) for folder in pair]
    whole = score_sequences(*models, sequences, temperature, [EOS])
    monkeypatch.setattr("evaluation.kl.CHUNK_ELEMENTS", 13)
    for one, other in zip(whole, score_sequences(*models, sequences, temperature, [EOS]), strict=True):
        assert one[:2] == pytest.approx(other[:2], abs=1e-5)


def test_identical_models_have_exactly_zero(tmp_path, monkeypatch, pair):
    data = prompts_file(tmp_path / "prompts.jsonl", ["a", "ab", "bbbab"])
    call(monkeypatch, flags((pair[0], pair[0]), tmp_path / "kl.json", dataset_name_or_path=data))
    result = json.loads((tmp_path / "kl.json").read_text())
    assert result["kl"] == result["log_ratio_kl"] == result["stderr"] == 0


def test_prompt_has_one_bos_and_the_stop_token_counts(tmp_path, monkeypatch, pair):
    """Two responses from a file against a hand-made computation, position by position."""
    rows = [{"prompt": "ab", "responses": ["ba", "b"], "stop_reasons": ["stop", "length"]}]
    data = tmp_path / "responses.json"
    data.write_text(json.dumps({"instances": rows}))
    output = tmp_path / "kl.json"
    call(monkeypatch, flags(pair, output, responses=data, temperature=0.9))
    policy, reference = map(load, pair)
    steps = {}
    for prefix in ([], [5], [5, 4]):
        p, q = (torch.tensor(next_log_probs(m, [BOS, 4, 5, *prefix], 0.9)) for m in (policy, reference))
        steps[len(prefix)] = (p.exp() * (p - q)).sum().item()
    first, second = steps[0] + steps[1] + steps[2], steps[0]
    result = json.loads(output.read_text())
    assert result["kl"] == pytest.approx((first + second) / 2, rel=1e-4)
    assert result["kl_per_token"] == pytest.approx((first + second) / 4, rel=1e-4)
    assert (result["num_prompts"], result["num_responses"]) == (1, 2)
    assert (result["truncated_fraction"], result["stderr"]) == (0.5, None)


def test_model_that_caps_its_logits_is_scored_as_its_own_forward_pass():
    torch.manual_seed(0)
    shape = tiny_config(tiny_tokenizer()).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = Gemma2Config(
        **{k: shape[k] for k in names}, num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.5
    )
    models = [Gemma2ForCausalLM(config).eval() for _ in range(2)]
    wrapped = [LanguageModel(model) for model in models]
    assert not wrapped[0].has_plain_head
    sequence = Sequence([1, 5, 6], [7, 8, EOS], True)
    p, q = (m(torch.tensor([[1, 5, 6, 7, 8]])).logits[0, 2:].log_softmax(-1) for m in models)
    truth = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
    assert score_sequences(*wrapped, [sequence], 1.0, [EOS])[0].kl == pytest.approx(truth, rel=1e-5)


def test_token_kl_of_impossible_tokens_is_not_nan():
    p = torch.tensor([[0.0, -math.inf]])
    q = torch.tensor([[math.log(0.25), math.log(0.75)]])
    assert token_kl(p, q).item() == pytest.approx(math.log(4))
    assert token_kl(p, p).item() == 0


def test_standard_error_is_over_prompts():
    sequence = Sequence([1], [4], False)
    groups = [[(sequence, Score(1, 1)), (sequence, Score(3, 1))], [(sequence, Score(6, 1))]]
    result = summarize(groups)
    assert result["kl"] == 4 and result["stderr"] == pytest.approx(2)
    assert result["kl_per_token"] == pytest.approx(10 / 3)


def test_killed_while_scoring_continues_to_the_same_result(tmp_path, monkeypatch, pair):
    data = prompts_file(tmp_path / "prompts.jsonl", ["a", "ab", "bbb", "bab", "aab"])
    words = flags(pair, tmp_path / "whole.json", dataset_name_or_path=data, batch_size=2)
    call(monkeypatch, words)
    real = score_sequences
    calls = itertools.count()

    def killed(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr("evaluation.kl.score_sequences", killed)
    words[words.index("--output_file") + 1] = str(tmp_path / "kl.json")
    with pytest.raises(SystemExit):
        call(monkeypatch, words)
    monkeypatch.setattr("evaluation.kl.score_sequences", real)
    monkeypatch.setattr(get_kl.Engines, "load", None)  # nothing is sampled twice
    call(monkeypatch, words)
    assert (tmp_path / "kl.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, pair):
    data = prompts_file(tmp_path / "prompts.jsonl", ["a"])
    other = save_tiny_policy(tmp_path / "other", seed=1, tokenizer=tiny_tokenizer(characters="xy"))
    row = {"prompt": "ab", "responses": ["ba"], "stop_reasons": ["stop"]}

    def made_with(**settings):
        responses = tmp_path / f"{next(iter(settings))}.json"
        responses.write_text(json.dumps({"instances": [row], "settings": {"generate": settings}}))
        return {"responses": responses, "temperature": 0.7}

    output = tmp_path / "kl.json"
    capsys.readouterr()
    for words, said in [
        (flags((pair[0], other), output, dataset_name_or_path=data), "different vocabularies"),
        (flags(pair, output, dataset_name_or_path=data, temperature=0), "temperature above 0"),
        (flags(pair, output, dataset_name_or_path=tmp_path / "no.jsonl"), "no.jsonl"),
        (flags(pair, output, dataset_name_or_path=data, max_new_tokens=1000), "256 tokens"),
        (flags(pair, output), "required"),
        (flags(pair, output, **made_with(temperature=0.1)), "sampled at temperature 0.1"),
        (flags(pair, output, **made_with(policy="/another")), "sampled from /another"),
        (flags(pair, output, **made_with(sampler=[[1, [0, 1], [0, 1]]])), "not the policy alone"),
    ]:
        with pytest.raises(SystemExit) as refused:
            call(monkeypatch, words)
        error = capsys.readouterr().err
        assert refused.value.code == 2 and error.count("\n") == 1 and said in error, error
        assert not output.exists()


def test_heads_of_unequal_width_are_refused(pair):
    wide = load(pair[0])
    wide.resize_token_embeddings(8)
    with pytest.raises(UserError, match="8 and 6"):
        check_same_width(LanguageModel(wide), LanguageModel(load(pair[1])))
