"""An engine whose weights were exchanged samples what a fresh one samples: one model, and a mixture."""

import random

import pytest
from mixture_loop import WORDS, greedy
from tiny import save_tiny_policy, tiny_tokenizer

from common.cli import UserError
from generation.backend_vllm import VLLMGenerator
from generation.sampling import Request, Sampling


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Two of one shape, a third with tied weights of another."""
    folder = tmp_path_factory.mktemp("models")
    shapes = [{"hidden": 64}, {"hidden": 64}, {"hidden": 96, "heads": 3, "tie_word_embeddings": True}]
    return [str(save_tiny_policy(folder / f"m{i}", i, **shape)) for i, shape in enumerate(shapes)]


def requests(weights) -> list[Request]:
    """With prompts long enough to fill blocks of the prefix cache."""
    rng, tokenizer = random.Random(0), tiny_tokenizer()
    prompts = [tokenizer(" ".join(rng.choices(WORDS, k=12)))["input_ids"][:50] for _ in range(6)]
    return [Request(str(i), ids, weights, rng.getrandbits(60)) for i, ids in enumerate(prompts)]


def run(generator: VLLMGenerator, weights, temperature: float) -> dict:
    found = generator.generate(requests(weights), Sampling(temperature, 12, [2]))
    return {response.key: response.token_ids for response in found}


def start(policy: str, reference: str | None) -> VLLMGenerator:
    return VLLMGenerator(policy, reference, dtype="float32", max_length=96, max_num_seqs=4)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.5, -0.5)])
def test_a_reloaded_engine_equals_a_fresh_one(models, weights):
    first, second, reference = models
    reference = reference if weights[1] else None
    fresh = {}
    for name in (first, second):
        engine = start(name, reference)
        fresh[name] = run(engine, weights, 1.0)
        engine.close()
    assert fresh[first] != fresh[second]
    engine = start(first, reference)
    for name in (first, second, second, first):
        engine.reload_weights(name)
        assert run(engine, weights, 1.0) == fresh[name]
        by_hand = {r.key: greedy([name, models[2]], r.prompt_ids, r.weights, 12) for r in requests(weights)}
        assert run(engine, weights, 0.0) == by_hand
    with pytest.raises(UserError, match="shape"):
        engine.reload_weights(models[2])
    assert run(engine, weights, 1.0) == fresh[first]
    engine.close()
