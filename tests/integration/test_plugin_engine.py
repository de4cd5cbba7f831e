"""The mixture engine for one, two and three models against a loop without a cache; models that rest."""

import argparse
import itertools
import random

import pytest
import torch
from mixture_loop import WORDS, greedy, next_logits
from tiny import save_tiny_policy, tiny_tokenizer
from transformers import AutoModelForCausalLM

from bandit.mixtures import MIXTURES
from generation.sampling import Request, Sampling, load_generator

SHAPES = [
    {"hidden": 128, "layers": 2, "heads": 2},
    {"hidden": 96, "layers": 3, "heads": 3, "key_value_heads": 1, "tie_word_embeddings": True},
    {"hidden": 64, "layers": 1, "heads": 2},
]
KINDS = ("logits", "log_probabilities", "probabilities")
STOP = [2, 7, 13]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Three models of one vocabulary and unequal shapes, whose attention matters more than a fresh model's."""
    folder = tmp_path_factory.mktemp("models")
    names = [str(save_tiny_policy(folder / f"m{i}", i, **shape)) for i, shape in enumerate(SHAPES)]
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(name)
        with torch.no_grad():
            for layer in model.model.layers:
                for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    getattr(layer.self_attn, part).weight.mul_(6)
        model.save_pretrained(name)
    return names


def start(models: list[str], **options):
    from generation.backend_vllm import VLLMGenerator

    first, second, *others = [*models, None, None][: max(2, len(models))]
    return VLLMGenerator(first, second, dtype="float32", max_length=96, max_num_seqs=4, others=others, **options)


@pytest.fixture(scope="module")
def three(models):
    """An engine of all three that may leave models out."""
    return load(models, "vllm")


def load(models: list[str], backend: str):
    """By the pipeline's loader."""
    flags = {"backend": backend, "dtype": "float32", "max_num_seqs": 4, "trust_remote_code": False}
    flags |= {"tensor_parallel_size": 1, "gpu_memory_utilization": 0.9, "compile": "eager", "max_new_tokens": 16}
    return load_generator(argparse.Namespace(**flags), models, 80)


def prompts(count: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    rng, tokenizer = random.Random(seed), tiny_tokenizer()
    return [tokenizer(" ".join(rng.choices(WORDS, k=rng.randint(1, longest))))["input_ids"] for _ in range(count)]


def random_weights(rng: random.Random, models: int, kind: str) -> list[float]:
    """Some of them 0; no negative ones for probabilities."""
    values = [0.0, 0.5, 1.0] if kind == "probabilities" else [0.0, -0.5, 0.5, 1.5]
    while not any(weights := [rng.choice(values) for _ in range(models)]):
        pass
    return weights


def run(generator, wanted: list[dict], length: int = 16) -> list[list[int]]:
    """Greedy responses of raw requests, all in one batch: {"prompt", "mixture", "mixture_of"}."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=length,
            stop_token_ids=STOP,
            detokenize=False,
            extra_args={key: value for key, value in one.items() if key != "prompt"},
        )
        for one in wanted
    ]
    inputs = [{"prompt_token_ids": one["prompt"]} for one in wanted]
    return [list(output.outputs[0].token_ids) for output in generator.llm.generate(inputs, params, use_tqdm=False)]


def expected(models: list[str], wanted: list[dict], length: int = 16) -> list[list[int]]:
    first = [1.0] + [0.0] * (len(models) - 1)
    return [
        greedy(models, w["prompt"], w.get("mixture", first), length, STOP, w.get("mixture_of", "logits"))
        for w in wanted
    ]


def requests(models: int, count: int, seed: int = 0) -> list[dict]:
    """Every kind, with weights of some models 0, and requests without weights."""
    rng, found = random.Random(seed), []
    for i, prompt in enumerate(prompts(count, seed)):
        kind = KINDS[i % 3]
        found.append({"prompt": prompt, "mixture": random_weights(rng, models, kind), "mixture_of": kind})
        if i % 5 == 4:
            found.append({"prompt": prompt})
    return found


def test_three_models_of_all_kinds_in_one_batch(models, three):
    wanted = requests(3, 20)
    assert run(three, wanted) == expected(models, wanted)


@pytest.fixture(scope="module")
def three_by_hf(models):
    """The same three models with transformers."""
    return load(models, "hf")


@pytest.mark.parametrize("backend", ["three", "three_by_hf"])
def test_a_row_of_the_table_with_three_models(models, backend, request):
    [(_, *sides)] = MIXTURES["history-mixp"].pairs(0.1)
    tokenized = prompts(6, seed=3)
    wanted = [
        Request(f"{i}.{j}", ids, weights, 0) for i, ids in enumerate(tokenized) for j, weights in enumerate(sides)
    ]
    generator = request.getfixturevalue(backend)
    found = {r.key: r.token_ids for r in generator.generate(wanted, Sampling(0.0, 16, STOP))}
    assert found == {r.key: greedy(models, r.prompt_ids, r.weights, 16, STOP) for r in wanted}


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_of_each_kind(models, three, kind):
    from vllm import SamplingParams

    [prompt], weights = prompts(1, seed=9), [0.5, 0.3, 0.2]
    extra = {"mixture": weights, "mixture_of": kind}
    params = SamplingParams(temperature=1, seed=1, max_tokens=8, logprobs=4, extra_args=extra)
    [output] = three.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    ids = list(prompt)
    for token, found in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
        exact = next_logits(models, ids, weights, kind).log_softmax(-1)
        for other, value in found.items():
            assert value.logprob == pytest.approx(float(exact[other]), abs=2e-4)
        ids.append(token)


@pytest.fixture
def computed(three):
    """Which models each forward pass computed."""
    model = three.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    steps, forward = [], model.forward

    def watched(*args, **options):
        result = forward(*args, **options)
        steps.append(tuple(model.computed))
        return result

    model.forward = watched
    yield steps
    del model.forward


def test_models_that_nobody_weighs_rest(models, three, computed):
    for weights, needed in (([1, 0, 0], (0,)), ([0, 0, 1], (2,)), ([1.5, 0, -0.5], (0, 2)), ([1, 1, 1], (0, 1, 2))):
        computed.clear()
        wanted = [{"prompt": p, "mixture": weights} for p in prompts(3, seed=5)]
        assert run(three, wanted) == expected(models, wanted)
        assert set(computed) == {needed}


def test_requests_of_like_weights_run_together(models, three, computed):
    """Sides of other models, given in turn, never keep both busy; the second window begins as the first ended."""
    wanted = [
        Request(f"{i}.{j}", ids, weights, 0)
        for i, ids in enumerate(prompts(three.window * 3 // 4, seed=6))
        for j, weights in enumerate([(0.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
    ]
    found = {r.key: r.token_ids for r in three.generate(wanted, Sampling(0.0, 16, [2]))}
    assert found == {r.key: greedy(models, r.prompt_ids, r.weights, 16) for r in wanted}
    assert all(len(step) == 1 for step in computed)
    assert sum(a != b for a, b in itertools.pairwise(computed)) == 2  # not once more between the windows


def test_the_prefix_cache_holds_nothing_that_a_model_has_not_seen(models, three, computed):
    """Long equal prompts, first with one model, then with others: no block without their keys is served."""
    [prompt] = [p for p in prompts(40, seed=7, longest=20) if len(p) > 66][:1]
    three.llm.reset_prefix_cache()
    order = ([1, 0, 0], [0, 1, 0], [1.5, -0.5, 0], [0.5, 0, 0.5], [1, 0, 0], [0.2, 0.3, 0.5], [1.5, -0.5, 0])
    for weights in order:
        wanted = [{"prompt": prompt, "mixture": weights}]
        assert run(three, wanted, 8) == expected(models, wanted, 8)
    # Equal needs share blocks; the engine really caches.
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=2, extra_args={"mixture": [0.5, 0.5, 0]})
    [output] = three.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert output.num_cached_tokens >= 32


def test_without_salt_the_prefix_cache_would_be_wrong(models, three, monkeypatch):
    """The test above shows something: blocks of the first model alone, served to a mixture, change its logits."""
    from vllm import SamplingParams
    from vllm_logit_mixture import prefix_cache

    [prompt] = [p for p in prompts(40, seed=8, longest=20) if len(p) > 66][:1]
    monkeypatch.setattr(prefix_cache, "salted", lambda salt, extra: salt)
    weights, values = [0, 0.2, 0], []  # small, so that the distribution is soft
    for first in (None, [1, 0, 0]):
        three.llm.reset_prefix_cache()
        for extra in filter(None, (first, weights)):
            params = SamplingParams(max_tokens=1, logprobs=1, temperature=0, extra_args={"mixture": extra})
            [output] = three.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        values.append(next(iter(output.outputs[0].logprobs[0].values())).logprob)
    three.llm.reset_prefix_cache()
    exact = float(next_logits(models, prompt, weights).log_softmax(-1).max())
    right, wrong = (abs(value - exact) for value in values)
    assert wrong > 1e-2 and right < 1e-4


def test_a_row_that_weighs_nothing_of_a_model_gets_nothing_of_it(models, three, monkeypatch):
    """Even where that model's hidden states are no numbers, as a cache of unseen tokens may make them."""
    model = three.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    second = model.models.each[1]
    original = second.forward

    def spoiled(*args, **options):
        hidden = original(*args, **options)
        return torch.full_like(hidden, torch.nan) if spoil else hidden

    monkeypatch.setattr(second, "forward", spoiled)
    for kind in KINDS:
        spoil = True
        wanted = [
            {"prompt": p, "mixture": w, "mixture_of": kind}
            for p, w in zip(prompts(2, seed=4), ([0.5, 0, 0.5], [0.2, 0.3, 0.5]), strict=True)
        ]
        assert run(three, wanted)[0] == expected(models, wanted[:1])[0]
    spoil = False


def test_an_engine_refuses_what_it_cannot_mix(models, tmp_path):
    """One line each, from the generator: other tokens, a missing model."""
    from common.cli import UserError

    letters = " abcdefghijklmnopqrstuvwxyz.,:!?"
    other = str(save_tiny_policy(tmp_path / "other", 0, tokenizer=tiny_tokenizer(characters=letters)))
    for wrong in (other, str(tmp_path / "nowhere")):
        with pytest.raises(UserError) as error:
            start([models[0], wrong])
        assert wrong in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def wide(models, tmp_path_factory) -> str:
    """The first model with eight ids more than its tokenizer has, and likely ones."""
    model = AutoModelForCausalLM.from_pretrained(models[0])
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 8)
    with torch.no_grad():
        model.lm_head.weight[size:] = 2 * model.lm_head.weight[size - 8 : size]
    folder = tmp_path_factory.mktemp("wide")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("names", [["1"], ["1", "1"], ["wide", "1"], ["1", "wide"]], ids="-".join)
def test_one_model_one_folder_twice_and_unequal_widths(models, wide, names):
    """The last test: an engine that ends takes `three` along."""
    from vllm_logit_mixture import engine_options
    from vllm_logit_mixture.environment import set_defaults

    set_defaults(on_gpu=False)
    from vllm import LLM

    held = [wide if name == "wide" else models[int(name)] for name in names]
    llm = LLM(
        **engine_options(held),
        dtype="float32",
        max_model_len=96,
        max_num_seqs=4,
        enforce_eager=True,
        enable_chunked_prefill=False,
        load_format="safetensors",
    )
    wanted = requests(len(held), 8, seed=len(held))
    assert run(type("Holder", (), {"llm": llm}), wanted) == expected(held, wanted)
    llm.llm_engine.engine_core.shutdown()
