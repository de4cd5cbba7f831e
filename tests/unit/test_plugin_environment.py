"""What an engine finds in the environment and in its options; the GPU's branch is forced."""

import os

import pytest
from tiny import save_tiny_policy

from common.cli import UserError
from generation import backend_vllm


class Engine:
    """Stands for `vllm.LLM`: keeps what it was made with, and the environment at that moment."""

    def __init__(self, **options) -> None:
        self.options, self.environment = options, dict(os.environ)
        self.llm_engine = type("Nothing", (), {"engine_core": None})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_policy(tmp_path_factory.mktemp("model"), 0))


@pytest.fixture
def start(monkeypatch, model):
    """Makes a generator on a machine of this kind and returns what its engine was made with."""
    for name in list(os.environ):
        if name.startswith("VLLM_"):
            monkeypatch.delenv(name)
    kept = dict(os.environ)

    def start(device: str, **options) -> Engine:
        monkeypatch.setattr(backend_vllm, "default_device", lambda: device)
        monkeypatch.setattr("vllm.LLM", Engine)
        monkeypatch.setattr("gc.freeze", lambda: None)  # in this process it would stay so
        monkeypatch.setattr(backend_vllm, "_watch_engine", lambda core: None)
        return backend_vllm.VLLMGenerator(model, None, "float32", 64, **options).llm

    yield start
    os.environ.clear()
    os.environ.update(kept)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_gpu_engine_is_spawned_and_compiles_no_sampler(start, processes):
    """As vLLM's own function reads it: without the setting it would fork."""
    from vllm import envs
    from vllm.utils.system_utils import get_mp_context

    assert get_mp_context().get_start_method() == "fork"
    environment = start("cuda", tensor_parallel_size=processes).environment
    assert get_mp_context().get_start_method() == "spawn"
    assert envs.VLLM_USE_FLASHINFER_SAMPLER is False
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert not any(name.startswith("VLLM_CPU_") for name in environment)


def test_the_users_own_settings_win(start, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    environment = start("cuda").environment
    assert environment["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "1"


def test_nothing_is_compiled_unless_asked(start):
    assert start("cuda").options["enforce_eager"] is True
    assert start("cpu").options["enforce_eager"] is True
    graphs = start("cuda", compile="cudagraphs").options
    assert graphs["compilation_config"] == {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    assert not graphs.get("enforce_eager")
    assert not start("cuda", compile="inductor").options["enforce_eager"]
    with pytest.raises(UserError):
        start("cpu", compile="cudagraphs")


def test_the_options_are_vllms_own(start):
    """vLLM's configuration takes each form of `compile` as it is meant."""
    from vllm.config import CompilationConfig

    options = start("cuda", compile="cudagraphs").options["compilation_config"]
    config = CompilationConfig(**options)
    assert config.mode == 0 and config.cudagraph_mode.name == "FULL_DECODE_ONLY"


def test_only_a_gpu_engine_may_split_prompts(start):
    assert start("cpu").options["enable_chunked_prefill"] is False
    assert "enable_chunked_prefill" not in start("cuda").options
