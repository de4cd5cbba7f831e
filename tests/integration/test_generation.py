"""Generation: the vLLM mixture engine and the transformers back end against a loop without any cache."""

import json
import random

import mixture_loop
import pytest
import torch
from mixture_loop import WORDS
from tiny import save_tiny_policy, tiny_tokenizer
from vllm_logit_mixture import processor

from common.models import load_tokenizer
from generation.backend_hf import HFGenerator, sample
from generation.sampling import Request, Sampling

WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (1.5, -0.5), (0.5, 0.5)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Policy and reference of different depth, width, head count and head size; the reference ties its embeddings."""
    folder = tmp_path_factory.mktemp("models")
    policy = save_tiny_policy(folder / "policy", 0, hidden=128, layers=2, heads=2)
    reference = save_tiny_policy(
        folder / "reference", 1, hidden=96, layers=3, heads=3, key_value_heads=1, tie_word_embeddings=True
    )
    return str(policy), str(reference)


@pytest.fixture(scope="module")
def engine(models):
    """One vLLM mixture engine for all tests of this file, with fewer slots than requests.

    The prompts of four requests have more tokens than it takes in one step.
    """
    from generation.backend_vllm import VLLMGenerator

    return VLLMGenerator(
        *models,
        dtype="float32",
        max_length=96,
        max_num_seqs=4,
        max_num_batched_tokens=96,
        logprobs_mode="processed_logprobs",
    )


@pytest.fixture(scope="module")
def hf(models):
    return HFGenerator(*models, dtype="float32", max_num_seqs=5)


def make_requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts of uneven length, weights in random order."""
    tokenizer, rng = tiny_tokenizer(), random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(count)]
    weights = [WEIGHTS[i % 4] for i in range(count)]
    rng.shuffle(weights)
    return [
        Request(str(i), tokenizer(text)["input_ids"], w, rng.getrandbits(62))
        for i, (text, w) in enumerate(zip(texts, weights, strict=True))
    ]


def greedy(models, request: Request, sampling: Sampling):
    """(tokens, why they end) by the definition."""
    stop = sampling.stop_token_ids
    ids = mixture_loop.greedy(models, request.prompt_ids, request.weights, sampling.max_new_tokens, stop)
    return ids, "stop" if ids[-1] in stop else "length"


def by_key(responses) -> dict:
    return {r.key: (r.token_ids, r.stop_reason) for r in responses}


def test_greedy_equals_the_definition_for_mixed_weights_in_one_batch(models, engine, hf):
    requests = make_requests(16)
    # Several stop tokens, so that responses end at uneven lengths and batch slots are moved.
    sampling = Sampling(0.0, 24, [2, 7, 13])
    expected = {r.key: greedy(models, r, sampling) for r in requests}
    assert {reason for _, reason in expected.values()} == {"stop", "length"}
    assert by_key(engine.generate(requests, sampling)) == expected
    assert by_key(hf.generate(requests, sampling)) == expected


def test_nothing_but_the_given_ids_ends_a_response(models, engine, hf):
    """Not the tokenizer's EOS either, where it is not among them: models of one vocabulary may differ in it."""
    requests = make_requests(16, seed=3)
    sampling = Sampling(0.0, 24, [7])
    expected = {r.key: greedy(models, r, sampling) for r in requests}
    assert any(2 in ids[:-1] for ids, _ in expected.values()), "EOS was never sampled: the test shows nothing"
    assert by_key(engine.generate(requests, sampling)) == expected
    assert by_key(hf.generate(requests, sampling)) == expected


def test_slots_really_move_while_results_stay_right(models, engine, monkeypatch):
    moves = []
    follow = processor.follow
    monkeypatch.setattr(processor, "follow", lambda weights, u: (moves.extend(u.moved), follow(weights, u)))
    requests = make_requests(8, seed=5)
    sampling = Sampling(0.0, 20, [2, 7, 13, 20])
    expected = {r.key: greedy(models, r, sampling) for r in requests}
    assert by_key(engine.generate(requests, sampling)) == expected
    assert moves, "no request changed its slot: the test shows nothing"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_log_probabilities(models, engine, weights):
    from vllm import SamplingParams

    temperature, prompt = 0.7, make_requests(3)[2].prompt_ids
    params = SamplingParams(
        temperature=temperature, max_tokens=12, seed=3, logprobs=5, extra_args={"mixture": list(weights)}
    )
    [output] = engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    ids = list(prompt)
    for token, logprobs in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
        exact = (mixture_loop.next_logits(models, ids, weights) / temperature).log_softmax(-1)
        for other, value in logprobs.items():
            assert value.logprob == pytest.approx(float(exact[other]), abs=2e-4)
        ids.append(token)


@pytest.mark.parametrize("backend", ["engine", "hf"])
def test_samples_do_not_depend_on_the_batch(backend, request):
    generator = request.getfixturevalue(backend)
    requests = make_requests(10, seed=2)
    sampling = Sampling(1.0, 16, [2, 7])
    together = by_key(generator.generate(requests, sampling))
    again = by_key(generator.generate(requests, sampling))
    part = by_key(generator.generate(requests[7:2:-1], sampling))
    assert together == again
    assert part == {key: together[key] for key in part}
    assert len({tuple(ids) for ids, _ in together.values()}) == 10


def test_other_seeds_give_other_samples(engine):
    requests = make_requests(6, seed=2)
    sampling = Sampling(1.0, 16, [2])
    moved = [r._replace(seed=r.seed + 1) for r in requests]
    assert by_key(engine.generate(requests, sampling)) != by_key(engine.generate(moved, sampling))


def test_sampled_frequencies(models, engine, hf):
    """First tokens of many seeds against the mixture's probabilities: total variation as expected of that many."""
    n, temperature, weights = 1500, 0.8, (1.5, -0.5)
    prompt = make_requests(1)[0].prompt_ids
    exact = (mixture_loop.next_logits(models, prompt, weights) / temperature).softmax(-1)
    requests = [Request(str(i), prompt, weights, 1000 + i) for i in range(n)]
    for generator in (engine, hf):
        counts = torch.zeros(len(exact), dtype=torch.float64)
        for response in generator.generate(requests, Sampling(temperature, 1, [])):
            counts[response.token_ids[0]] += 1
        expected_tv = 0.5 * (2 * exact * (1 - exact) / (torch.pi * n)).sqrt().sum()
        assert 0.5 * (counts / n - exact).abs().sum() < 2 * expected_tv


def test_gumbel_sampling_at_zero_temperature_is_argmax():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    assert sample(logits, 0, []).tolist() == [1, 0]


def test_the_stop_token_is_the_last_id(engine, hf):
    requests = make_requests(6, seed=3)
    every = list(range(len(tiny_tokenizer())))
    for generator in (engine, hf):
        for response in generator.generate(requests, Sampling(1.0, 8, every)):
            assert (len(response.token_ids), response.stop_reason) == (1, "stop")


def test_models_of_the_embedded_kind_load_with_pad_equal_to_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    folder = save_tiny_policy(tmp_path / "m", 0, tokenizer=tokenizer)
    loaded = load_tokenizer(str(folder), "policy")
    assert loaded.pad_token_id == loaded.eos_token_id == 2
    generator = HFGenerator(str(folder), None, "float32")
    requests = [r._replace(weights=(1.0, 0.0)) for r in make_requests(4)]
    alone = [by_key(generator.generate([r], Sampling(0.0, 10, [2])))[r.key] for r in requests]
    assert list(by_key(generator.generate(requests, Sampling(0.0, 10, [2]))).values()) == alone
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 2
