"""The plugin without an engine: requests' weights, the sum, batch slots of both runners, salts, and refusals."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import save_tiny_policy, save_tiny_reward_model, tiny_tokenizer
from transformers import BertConfig, T5Config
from vllm_logit_mixture import MixtureError, engine_options
from vllm_logit_mixture.check import REFUSED, check_options
from vllm_logit_mixture.prefix_cache import salted
from vllm_logit_mixture.weights import KINDS, BatchWeights, Mixture, mix, mixture_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("models", [1, 2, 3])
def test_a_request_without_weights_gets_the_first_model(models):
    for extra in (None, {}, {"something": 1}):
        found = mixture_of(extra, models)
        assert found == ((1.0,) + (0.0,) * (models - 1), "logits")
        assert found.weighed == (0,)


@pytest.mark.parametrize(
    "weights",
    [
        [1],
        [1, 2, 3],
        [],
        [1, math.nan],
        [1, math.inf],
        [1, 1e9],
        ["1", "2"],
        [1, None],
        [True, False],
        "ab",
        "12",
        1.5,
        None,
        {"0": 1, "1": 2},
        [[1], [2]],
    ],
)
def test_wrong_weights_are_refused(weights):
    with pytest.raises(ValueError, match="^mixture: must be a list of 2 ") as error:
        mixture_of({"mixture": weights}, 2)
    assert "\n" not in str(error.value)


def test_kinds():
    for kind in KINDS:
        assert mixture_of({"mixture": [1, 2], "mixture_of": kind}, 2) == ((1.0, 2.0), kind)
    for kind in ("logit", None, 3, ["logits"]):
        with pytest.raises(ValueError, match="^mixture_of: "):
            mixture_of({"mixture": [1, 2], "mixture_of": kind}, 2)
    for weights in ([1.5, -0.5], [0, 0]):
        with pytest.raises(ValueError):
            mixture_of({"mixture": weights, "mixture_of": "probabilities"}, 2)


def test_the_sum_against_a_loop():
    """Each row and kind by itself, one id after the other, in double precision."""
    rng = random.Random(0)
    torch.manual_seed(0)
    models, rows, width = 3, 12, 7
    logits = [torch.randn(rows, width) * 4 for _ in range(models)]
    kinds = [KINDS[i % 3] for i in range(rows)]
    weights = [
        [
            rng.choice([0.0, 0.2, 1.0]) + (i == 0) if kind == "probabilities" else rng.uniform(-2, 2)
            for i in range(models)
        ]
        for kind in kinds
    ]
    found = mix(logits, torch.tensor(weights), torch.tensor([KINDS.index(kind) for kind in kinds]))
    for row in range(rows):
        values = []
        for token in range(width):
            total = 0.0
            for model in range(models):
                own = [float(v) for v in logits[model][row]]
                log_probability = own[token] - math.log(sum(map(math.exp, own)))
                term = {
                    "logits": own[token],
                    "log_probabilities": log_probability,
                    "probabilities": math.exp(log_probability),
                }
                total += weights[row][model] * term[kinds[row]]
            values.append(math.log(total) if kinds[row] == "probabilities" else total)
        torch.testing.assert_close(found[row].double(), torch.tensor(values).double(), atol=1e-4, rtol=1e-5)
    plain = mix(logits, torch.tensor(weights))
    is_plain = torch.tensor([kind == "logits" for kind in kinds])
    torch.testing.assert_close(plain[is_plain], found[is_plain])
    # A product of experts is the same distribution as the sum of logits.
    for row, kind in enumerate(kinds):
        if kind == "log_probabilities":
            torch.testing.assert_close(plain[row].softmax(-1), found[row].softmax(-1), atol=1e-5, rtol=1e-4)


def random_mixture(rng: random.Random) -> Mixture:
    return Mixture(tuple(rng.choice([0.0, 1.0, -0.5]) for _ in range(3)), rng.choice(KINDS[:2]))


def as_row(mixture: Mixture) -> list[float]:
    return [*mixture.weights, KINDS.index(mixture.kind)]


def as_params(mixture: Mixture):
    from vllm import SamplingParams

    return SamplingParams(extra_args={"mixture": list(mixture.weights), "mixture_of": mixture.kind})


def test_first_runner_slots_follow_any_sequence_of_changes():
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
    from vllm_logit_mixture.processor import follow

    rng = random.Random(0)
    slots, weights = 6, BatchWeights(6, 3, CPU)
    assert weights.weighed == [0, 1, 2]  # the engine's profile runs all models
    truth = [Mixture((1.0, 0.0, 0.0))] * slots
    for _ in range(300):
        added = [(s, random_mixture(rng)) for s in rng.sample(range(slots), rng.randint(0, 2))]
        moved = [
            (*rng.sample(range(slots), 2), rng.choice(list(MoveDirectionality))) for _ in range(rng.randint(0, 2))
        ]
        size = rng.randint(1, slots)
        given = [(s, as_params(m), None, []) for s, m in added]
        follow(weights, BatchUpdate(batch_size=size, removed=[], added=given, moved=moved))
        for s, m in added:
            truth[s] = m
        for a, b, direction in moved:
            truth[a], truth[b] = (truth[b] if direction == MoveDirectionality.SWAP else truth[a]), truth[a]
        assert weights.of_rows(size).tolist() == [as_row(m) for m in truth[:size]]
        needed = sorted({i for m in truth[:size] for i, w in enumerate(m.weights) if w}) or [0]
        assert weights.weighed == needed
        assert weights.plain == all(m.kind == "logits" for m in truth[:size])


def test_second_runner_rows_name_their_slots():
    """A stand-in for its batches, in any order, with slots used again: what a model would read of its rows."""
    from vllm_logit_mixture.runner_v2 import MixtureState

    rng = random.Random(1)
    weights = BatchWeights(8, 3, CPU)
    state = object.__new__(MixtureState)
    state.model = SimpleNamespace(weights=weights)
    state.rope_state = state.prompt_embeds_state = None
    truth = {}
    for _ in range(200):
        for slot in rng.sample(range(8), 2):
            truth[slot] = random_mixture(rng)
            state.add_request(slot, SimpleNamespace(sampling_params=as_params(truth[slot])))
        batch = rng.sample(sorted(truth), rng.randint(1, len(truth)))
        index = np.array(batch, dtype=np.int32)
        # Written from InputBatch: without drafts a batch position is a row.
        state.preprocess_state(
            SimpleNamespace(idx_mapping_np=index, expanded_idx_mapping=torch.from_numpy(index)), (), None, None
        )
        assert weights.of_rows(len(batch)).tolist() == [as_row(truth[slot]) for slot in batch]
        assert weights.weighed == (sorted({i for s in batch for i, w in enumerate(truth[s].weights) if w}) or [0])


def test_second_runner_takes_the_model_and_the_processor():
    """By vLLM's own loaders: its model state, and a processor that both runners accept."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.sample.logits_processor import validate_logits_processors_parameters
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
    from vllm.v1.worker.gpu.model_states.interface import ModelState
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator
    from vllm_logit_mixture.model import LogitMixtureForCausalLM

    model = object.__new__(LogitMixtureForCausalLM)
    assert issubclass(resolve_model_state_cls(None, model), ModelState)
    assert {"idx_mapping_np", "expanded_idx_mapping"} <= set(InputBatch.__annotations__)
    names = ("vllm_logit_mixture.processor:MixtureOf3",)
    good = SamplingParams(extra_args={"mixture": [1, 2, 3]})
    bad = SamplingParams(extra_args={"mixture": [1, 2]})
    second = build_custom_logits_processors_params_validator(names)
    first = lambda params: validate_logits_processors_parameters(names, params)  # noqa: E731
    for validate in (first, second):
        validate(good)
        for wrong in (bad, SamplingParams(extra_args={"mixture": [1, 2, 3]}, prompt_logprobs=1)):
            with pytest.raises(VLLMValidationError):
                validate(wrong)


def test_requests_that_need_other_models_share_no_prefix():
    assert salted(None, None) is None
    assert salted("own", {"mixture": [1.5, 0.0]}) == "own"
    seen = {salted(None, {"mixture": list(w)}) for w in ([1, 0], [0, 1], [1, -1], [0.5, 0.5])}
    assert len(seen) == 3  # nobody, the second alone, both
    assert salted("a", {"mixture": [1, 1]}) != salted("b", {"mixture": [1, 1]})


def test_the_salt_reaches_vllms_requests():
    """Through `Request.from_engine_core_request`, as every front end's requests come; block hashes differ."""
    import vllm_logit_mixture
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

    vllm_logit_mixture.register()
    vllm_logit_mixture.register()  # each process may do it more than once
    init_none_hash(sha256)
    hasher = get_request_block_hasher(4, sha256)

    def hashes(extra: dict | None) -> list:
        request = EngineCoreRequest(
            request_id="r",
            prompt_token_ids=list(range(12)),
            mm_features=None,
            sampling_params=SamplingParams(extra_args=extra, max_tokens=4),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        return Request.from_engine_core_request(request, hasher).block_hashes

    first, both = hashes({"mixture": [1, 0]}), hashes({"mixture": [1.5, -0.5]})
    assert len(first) == 3 and not set(first) & set(both)
    assert hashes(None) == first and hashes({"mixture": [0.5, 0.5]}) == both


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models that can and that cannot be mixed."""
    place = tmp_path_factory.mktemp("models")
    save_tiny_policy(place / "one", 0)
    save_tiny_policy(place / "two", 1, hidden=64)
    save_tiny_policy(place / "letters", 2, tokenizer=tiny_tokenizer(characters=" abcdefghijklmnopqrstuvwxyz.,:!?"))
    save_tiny_reward_model(place / "reward", 3)
    save_tiny_policy(place / "quantized", 4)
    config = json.loads((place / "quantized/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (place / "quantized/config.json").write_text(json.dumps(config))
    (place / "empty").mkdir()
    for name, config in (("encoder", BertConfig()), ("translator", T5Config())):
        config.architectures = [f"{config.model_type.capitalize()}ForMaskedLM"]
        config.save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    return place


WRONG = ["letters", "reward", "encoder", "translator", "quantized", "empty", "nowhere"]


def test_models_that_can_be_mixed(folder):
    options = engine_options([f"{folder}/one", f"{folder}/two", f"{folder}/one"])
    assert options["model"] == f"{folder}/one"
    assert options["hf_overrides"]["mixture_models"] == [f"{folder}/two", f"{folder}/one"]
    assert options["logits_processors"] == ["vllm_logit_mixture.processor:MixtureOf3"]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("first", [True, False])
def test_models_that_cannot_be_mixed(folder, wrong, first):
    names = [f"{folder}/{wrong}", f"{folder}/one"]
    with pytest.raises(MixtureError) as error:
        engine_options(names if first else names[::-1])
    assert f"{folder}/{wrong}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_be_had(name):
    off, _ = REFUSED[name]
    check_options({name: off})
    check_options({name: None})
    with pytest.raises(MixtureError, match=f"^{name}="):
        check_options({name: 2})


@pytest.mark.parametrize(
    ("words", "part"),
    [
        *((f"{{0}}/one --with {{0}}/{wrong}", wrong) for wrong in WRONG),
        ("{0}/nowhere", "nowhere"),
        ("{0}/one {0}/two", "two"),
        ("{0}/one --model {0}/two", "two"),
        ("", "POLICY"),
        ("{0}/one --with", "--with"),
        ("{0}/one --wiht {0}/two", "--wiht"),
        ("{0}/one --port x", "--port"),
        ("{0}/one --with {0}/two --max-model-len 9999", "--max-model-len 9999"),
        ("{0}/one --with {0}/two --pipeline-parallel-size 2", "pipeline_parallel_size"),
        ("{0}/one --with {0}/two --enable-lora", "enable_lora"),
        ("{0}/one --with {0}/two --quantization fp8", "quantization"),
        (
            '{0}/one --with {0}/two --speculative-config {{"method":"ngram","num_speculative_tokens":2}}',
            "speculative_config",
        ),
    ],
)
def test_wrong_command_lines_of_the_server_are_one_line(folder, words, part, monkeypatch, capsys):
    from vllm_logit_mixture import serve

    monkeypatch.setattr(serve, "set_defaults", lambda *args, **options: None)  # this process's environment stays
    with pytest.raises(SystemExit) as end:
        serve.main(words.format(folder).split())
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and part in line
