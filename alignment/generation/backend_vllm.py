"""Generation with vLLM: one engine, one continuous batch, for any mix of policy, second model and their mixtures."""

import collections
import gc
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import connection

from vllm_logit_mixture import MixtureError, engine_options
from vllm_logit_mixture.environment import set_defaults

from common.adapters import whole_model
from common.cli import UserError
from common.models import (
    default_device,
    give_memory_back,
    load_config,
    load_tokenizer,
    stored_weights,
    tokenizer_fingerprint,
)
from generation.sampling import EngineDied, Request, Response, Sampling

CPU_OPTIONS = {
    # A prompt split over steps draws a token too early, and vLLM winds the request's random stream back, which
    # torch cannot do on a CPU: it would crash.
    "enable_chunked_prefill": False,
    # Responses to one prompt share whole blocks of its cache. vLLM's 128 tokens are longer than most prompts.
    "block_size": 32,
}
# What is compiled when an engine starts. Graphs without Inductor cover the steps in which all requests decode.
COMPILE = {
    "eager": {"enforce_eager": True},
    "cudagraphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "inductor": {"enforce_eager": False},
}


class VLLMGenerator:
    """Samples responses with one vLLM engine.

    Args:
        policy, second: model folders or names; give None for the one that no request needs, and the engine
            holds a single model. With both, it is the logit mixture of the plugin.
        others: further models; a request has one weight per model: policy, second, others.
        dtype: float32 or bfloat16.
        max_length: longest prompt + response, in tokens.
        max_num_seqs: how many responses are sampled at a time.
        tensor_parallel_size: over how many GPUs each layer is split.
        gpu_memory_utilization: share of a GPU's memory that the engine may take.
        trust_remote_code: run code that comes with the model.
        compile: `eager`, `cudagraphs` (captured at each start, GPU only) or `inductor` (vLLM's default: compiles for
            minutes for every model folder, since its cache's key holds the folder's name).
        options: anything else for `vllm.LLM`.
    """

    def __init__(
        self,
        policy: str | None,
        second: str | None,
        dtype: str,
        max_length: int,
        max_num_seqs: int = 64,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        trust_remote_code: bool = False,
        compile: str = "eager",
        others: Sequence[str | None] = (),
        **options,
    ) -> None:
        models = [policy, second, *others]
        self.held = [i for i, name in enumerate(models) if name is not None]
        self.first, self.trust_remote_code = models[self.held[0]], trust_remote_code
        self.traits = None  # the first model's, from the first exchange on
        on_gpu = default_device() == "cuda"
        if compile == "cudagraphs" and not on_gpu:
            raise UserError("--compile cudagraphs: needs a GPU")
        set_defaults(on_gpu, tensor_parallel_size)
        from vllm import LLM

        gc.freeze()  # vLLM collects garbage several times as an engine starts, and what it imports is none
        self.llm = LLM(
            **_options([models[i] for i in self.held], trust_remote_code),
            dtype=dtype,
            max_model_len=max_length,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            trust_remote_code=trust_remote_code,
            use_tqdm_on_load=False,
            # The pipeline puts end tokens itself (`Sampling`), the same for both back ends.
            generation_config="vllm",
            **{"load_format": "safetensors"} | ({} if on_gpu else CPU_OPTIONS) | COMPILE[compile] | options,
        )
        self.window = 4 * max_num_seqs
        _watch_engine(self.llm.llm_engine.engine_core)

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Response]:
        """Yields responses as they finish, in no particular order.

        Reads `requests` only as fast as it samples, and asks it again while responses are in flight: an iterator
        that had no more may have more then.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield from self._generate(requests, sampling)
        except EngineDeadError:
            raise EngineDied("vLLM's engine process died; the same command continues from here") from None

    def reload_weights(self, policy: str) -> None:
        """Put another model's weights in the place of the first one's; an engine starts once for many models.

        What the engine samples afterwards is what a fresh one would.

        Raises:
            UserError: the model has another shape, other weights' names, or another tokenizer.
        """
        policy = whole_model(policy, "policy", self.trust_remote_code)
        held = self.traits or _traits(self.first, self.trust_remote_code)
        traits = _traits(policy, self.trust_remote_code)
        if other := [what for what in traits if traits[what] != held[what]]:
            raise UserError(f"{policy}: has another {other[0]} than {self.first}, so it needs an engine of its own")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": policy})
        if not self.llm.reset_prefix_cache():
            raise UserError(f"{self.first}: its cache is in use, so {policy} needs an engine of its own")
        self.first, self.traits = policy, traits

    def close(self) -> None:
        """Ends the engine and gives its memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        give_memory_back()

    def _generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Response]:
        engine = self.llm.llm_engine
        in_flight, models = 0, None
        waiting, ready = iter(requests), collections.deque()
        while True:
            if not ready and in_flight < self.window:
                # Requests that need the same models run together: a model that none in the batch needs rests. First
                # come those that may join the ones in flight.
                window = itertools.islice(waiting, self.window)
                ready.extend(sorted(window, key=lambda request: (_weighed(request) != models, _weighed(request))))
            # With requests of two kinds in a batch all models would run on all of it. The last ones of a kind in a
            # batch of their own cost less.
            while ready and in_flight < self.window and (not in_flight or _weighed(ready[0]) == models):
                models = _weighed(ready[0])
                self._add(ready.popleft(), sampling)
                in_flight += 1
            if not in_flight:
                return
            for output in engine.step():
                if output.finished:
                    in_flight -= 1
                    yield _as_response(output, sampling)

    def _add(self, request: Request, sampling: Sampling) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=True,  # vLLM's is its first model's tokenizer's; those that end a response are all in the list
            seed=request.seed,
            detokenize=False,
            extra_args={"mixture": [request.weights[i] for i in self.held]} if len(self.held) > 1 else None,
        )
        engine = self.llm.llm_engine
        [prompt] = engine.renderer.render_cmpl([{"prompt_token_ids": request.prompt_ids}])
        engine.add_request(request.key, prompt, params)


def _options(models: list[str], trust_remote_code: bool) -> dict:
    """What makes vLLM an engine of one model, or of the plugin's mixture. Raises `UserError` for unlike models."""
    if len(models) == 1:
        return {"model": models[0]}
    try:
        return engine_options(models, trust_remote_code)
    except MixtureError as error:
        raise UserError(str(error)) from None


def _traits(name: str, trust_remote_code: bool) -> dict[str, object]:
    """What a model must have in common with one that takes its place in an engine.

    Shape: all that its configuration says of its weights and of what is done with them. Set of weights: name and
    shape of each, since vLLM would keep the old value of one that the new model does not have.
    """
    config = load_config(name, "model", trust_remote_code).to_diff_dict()
    return {
        "shape": {k: v for k, v in config.items() if k not in ("transformers_version", "dtype", "use_cache")},
        "set of weights": {key: entry["shape"] for key, entry in stored_weights(name).items()},
        "tokenizer": tokenizer_fingerprint(load_tokenizer(name, "model", trust_remote_code)),
    }


def _weighed(request: Request) -> tuple[bool, ...]:
    return tuple(weight != 0 for weight in request.weights)


def _watch_engine(core) -> None:
    """Ends the wait for an engine process (if there is one) that was killed: vLLM itself would wait for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    if not hasattr(core, "outputs_queue"):  # the engine runs in this process
        return
    processes = core.resources.engine_manager.sentinels()

    def wait() -> None:
        connection.wait(processes)
        core.outputs_queue.put_nowait(EngineDeadError())

    threading.Thread(target=wait, daemon=True).start()


def _as_response(output, sampling: Sampling) -> Response:
    [answer] = output.outputs
    if answer.finish_reason not in ("stop", "length"):
        raise UserError(f"vLLM ended response {output.request_id} with {answer.finish_reason!r}")
    ids = list(answer.token_ids)
    ended = bool(ids) and ids[-1] in sampling.stop_token_ids
    return Response(output.request_id, ids, "stop" if ended else "length")
