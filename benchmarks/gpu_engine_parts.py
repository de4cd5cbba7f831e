"""The parts of gpu_day_one.py that start engines: right results, speed, two command lines, two GPUs."""

import contextlib
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.gpu_setting import (
    Check,
    Setting,
    config_of,
    gpu_bandwidth,
    judged,
    measured,
    random_ids,
    random_model,
    shell,
)

PROJECT = Path(__file__).resolve().parents[1]
WEIGHTS = [(1.5, -0.5), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)]
PROMPT, RESPONSE = 24, 16  # tokens, where results are compared


def start(setting: Setting, models: list[str], dtype: str, slots: int, length: int, **options):
    """Return an engine as the project starts it: on a GPU in a process of its own."""
    from generation.backend_vllm import VLLMGenerator

    policy, reference = [*models, None][:2]
    return VLLMGenerator(policy, reference, dtype, length, max_num_seqs=slots, **options)


def params(weights, length: int, mixes: bool, **options):
    """Return a request's sampling parameters, with a response of exactly `length` tokens."""
    from vllm import SamplingParams

    extra = {"mixture": list(weights)} if mixes else None
    return SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False, extra_args=extra, **options)


# --- Right results ----------------------------------------------------------------------------------------------


def mixture(compile: str, asynchronous: bool, dtype: str | None = None) -> Callable[[Setting], Iterator[Check]]:
    """Return the part that compares a mixture engine with plain forward passes.

    Batches have sizes around those for which graphs are captured. The measure is the log-probability of the token
    that the engine took, against a pass in float32; in bfloat16 a plain pass in bfloat16 says how far off is normal.
    """

    def part(setting: Setting) -> Iterator[Check]:
        shape, kind = setting.shape("0.1B"), dtype or setting.dtype
        models = [random_model(setting, shape, seed, attention=4.0) for seed in (0, 1)]
        engine = start(setting, models, kind, 16, 64, compile=compile, async_scheduling=asynchronous)
        done = {size: responses(engine, shape, size) for size in (1, 7, 8, 9, 16)}
        engine.close()
        exact = [scorer(name, "float32", setting.device) for name in models]
        rough = [scorer(name, kind, setting.device) for name in models]
        for size, found in done.items():
            ours, theirs = (worst_errors(found, exact, other) for other in (None, rough))
            allowed = max(5e-3, 4 * theirs[0])
            figure = f"error {ours[0]:.1e} nats (plain pass in {kind}: {theirs[0]:.1e}); gap {ours[1]:.1e}"
            figure += f"; limit {allowed:.1e} (a guess)"
            yield judged(f"{size} at a time = plain passes", max(ours) < allowed, figure)

    return part


def responses(engine, shape: str, count: int) -> list[tuple]:
    """Return (prompt, weights, tokens, their log-probabilities) of greedy responses."""
    prompts = random_ids(shape, count, PROMPT, seed=count)
    weights = [WEIGHTS[i % len(WEIGHTS)] for i in range(count)]
    wanted = [params(w, RESPONSE, True, temperature=0, logprobs=0) for w in weights]
    outputs = engine.llm.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    tokens = [list(answer.token_ids) for answer in answers]
    logps = [
        [row[token].logprob for row, token in zip(answer.logprobs, ids, strict=True)]
        for answer, ids in zip(answers, tokens, strict=True)
    ]
    return list(zip(prompts, weights, tokens, logps, strict=True))


def scorer(name: str, dtype: str, device: str) -> Callable:
    """Return what gives a model's float32 logits for each token of a response: one pass, no cache."""
    import torch

    from common.models import load_causal_lm

    model = load_causal_lm(name, "model", dtype).to(device)

    @torch.inference_mode()
    def logits(prompt: list[int], tokens: list[int]):
        ids = torch.tensor([prompt + tokens], device=device)
        return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()

    return logits


def worst_errors(found: list[tuple], exact: list[Callable], other: list[Callable] | None) -> tuple[float, float]:
    """Return the largest error of log-probabilities, and how far a token was from being the likeliest.

    Args:
        other: models whose log-probabilities are compared with the exact ones; None: those that the engine gave.
    """
    import torch

    errors, gaps = [], []
    for prompt, weights, tokens, given in found:
        index = torch.tensor(tokens)[:, None]

        def log_softmax(models, prompt=prompt, weights=weights, tokens=tokens):
            return sum(w * m(prompt, tokens) for w, m in zip(weights, models, strict=True)).log_softmax(-1).cpu()

        truth = log_softmax(exact)
        mine = torch.tensor(given) if other is None else log_softmax(other).gather(1, index)[:, 0]
        errors.append((truth.gather(1, index)[:, 0] - mine).abs().max().item())
        gaps.append((truth.max(-1).values - truth.gather(1, index)[:, 0]).max().item() if other is None else 0.0)
    return max(errors), max(gaps)


# --- Speed ------------------------------------------------------------------------------------------------------


def speed(compile: str, models: int) -> Callable[[Setting], Iterator[Check]]:
    """Return the part that measures tokens per second: of dummy weights, 128 tokens after 128."""

    def part(setting: Setting) -> Iterator[Check]:
        shape = setting.shape("7B")
        counts, length = ((4, 8), 8) if setting.tiny else ((64, 128, 256), 128)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that its model can be reached
        began = time.perf_counter()
        engine = start(
            setting, [shell(setting, shape)] * models, setting.dtype, max(counts), 2 * length, compile=compile,
            load_format="dummy",
        )  # fmt: skip
        yield measured(f"start, {compile}", f"{time.perf_counter() - began:.0f} s")
        mixed = WEIGHTS[:2] if models == 2 else [(1.0,)]
        rate(engine, shape, counts[:1], mixed, 4)  # the first steps are slow
        for count in counts:
            found = rate(engine, shape, (count,), mixed, length)
            limit = bandwidth_limit(shape, models, count, length, setting)
            figure = f"{found:.0f} tokens/s; memory allows {limit:.0f}, so {found / limit:.0%}"
            yield measured(f"{count} responses, {models} model(s)", figure)
        if models == 2:
            yield from ways(setting, engine, shape, counts[0], length)

    return part


def ways(setting: Setting, engine, shape: str, count: int, length: int) -> Iterator[Check]:
    """Yield the speed of other requests in a mixture engine: one model's, without seeds, with a waiting copy."""
    whole = rate(engine, shape, (count,), WEIGHTS[:2], length)
    alone = rate(engine, shape, (count,), [(1.0, 0.0)], length)
    yield measured("requests of the first model alone", f"{alone / whole:.2f} of the mixed ones' speed")
    seedless = rate(engine, shape, (count,), WEIGHTS[:2], length, seeds=False)
    yield measured("without seeds of their own", f"{seedless / whole:.2f} of the speed with seeds")
    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    weights, figures = worker.model_runner.model.weights, []
    if not weights.pinned:
        yield Check("weights copied without waiting", "skipped", "nothing is copied to a CPU")
        return
    for pinned in (True, False, True, False):
        weights.pinned = pinned  # requests of uneven lengths: in nearly every step one ends
        figures.append(rate(engine, shape, (count,) * 2, WEIGHTS[:2], length, uneven=True))
    ratio = statistics.mean(figures[::2]) / statistics.mean(figures[1::2])
    yield measured("weights copied without waiting", f"{ratio:.3f} of the speed with a waiting copy")


def rate(engine, shape: str, counts, weights, length: int, seeds: bool = True, uneven: bool = False) -> float:
    """Return tokens per second of requests with these weights in turn."""
    rng, count = random.Random(0), sum(counts)
    wanted = [
        params(
            weights[i % len(weights)],
            rng.randint(length // 4, length) if uneven else length,
            len(weights[0]) > 1,
            temperature=1.0,
            seed=i if seeds else None,
        )
        for i in range(count)
    ]
    prompts = [{"prompt_token_ids": ids} for ids in random_ids(shape, count, length - 1, seed=rng.randrange(10**9))]
    engine.llm.reset_prefix_cache()
    began = time.perf_counter()
    outputs = engine.llm.generate(prompts, wanted, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - began)


def bandwidth_limit(shape: str, models: int, count: int, length: int, setting: Setting) -> float:
    """Return the tokens per second at which weights and caches are read as fast as memory allows."""
    config, width = config_of(shape), 2 if setting.dtype == "bfloat16" else 4
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    parameters = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    cache = 2 * config.num_hidden_layers * config.hidden_size * 1.5 * length  # half of the response on average
    return count * gpu_bandwidth() / (models * width * (parameters + count * cache))


# --- Processes and GPUs -----------------------------------------------------------------------------------------


def generate(setting: Setting, shape: str, output: str, *more: str) -> list[str]:
    """Return the flags of generate.py for a few responses of a mixture."""
    import json

    from benchmarks.gpu_setting import as_text

    prompts = setting.folder / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": as_text(ids)} for ids in random_ids(shape, 8, PROMPT)]))
    policy, reference = (random_model(setting, shape, seed) for seed in (0, 1))
    words = f"--model_name_or_path {policy} --ref_model_name_or_path {reference} --dataset_name_or_path {prompts}"
    words += (
        f" --sampler mixp --max_new_tokens {RESPONSE} --max_input_length 64 --temperature 0 --dtype {setting.dtype}"
    )
    return [*words.split(), *more, "--output_file", output]


def run_generate(*flags: str) -> tuple[bool, str, str]:
    """Return whether generate.py ended well, its last line of error if not, and what it printed."""
    command = [sys.executable, str(PROJECT / "alignment/generation/generate.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (done.stderr.strip().splitlines() or [""])[-1][:200] if done.returncode else ""
    return done.returncode == 0, said, done.stdout


def column(path: str, name: str = "responses") -> list:
    """Return one field of a data file's instances."""
    import json

    return [instance[name] for instance in json.loads(Path(path).read_text())["instances"]]


def then_lines(setting: Setting) -> dict[str, list[str]]:
    """Return the command lines of the part `then`, by what is new in them; in float32, so that ids can be equal."""
    shape = setting.shape("1.5B")
    other = ("--model_name_or_path", random_model(setting, shape, 2))
    more = {
        "first model": (),
        "second model, greedy": other,
        "first model again, seeded": ("--temperature", "1", "--seed", "7"),
        "another length": (*other, "--max_new_tokens", str(RESPONSE // 2)),
    }
    return {
        name: generate(setting, shape, str(setting.folder / f"then{i}.json"), "--dtype", "float32", *flags)
        for i, (name, flags) in enumerate(more.items())
    }


def two_command_lines(setting: Setting) -> Iterator[Check]:
    """Two models in turn in one process write what they write alone: in one engine, then in a second one."""
    lines = then_lines(setting)
    first, *others = lines.values()
    with watched_memory(setting) as used:
        well, said, printed = run_generate(*first, *(word for line in others for word in ("--then", *line)))
    yield judged("four command lines in one process", well, said)
    if not well:
        return
    count = printed.count("the engine that runs takes the weights of")
    yield judged("its first engine took other weights twice", count == 2, f"{count} times, then a second engine")
    yield from memory_given_back(used)
    for name in ("second model, greedy", "first model again, seeded"):
        alone = f"{lines[name][-1]}.alone.json"
        well, said, _ = run_generate(*lines[name][:-1], alone)
        ours = column(lines[name][-1], "response_ids")
        theirs = column(alone, "response_ids") if well else []
        same = sum(a == b for a, b in zip(ours, theirs, strict=False))
        figure = f"ids of {same} of {len(ours)} prompts are equal" if well else said
        yield judged(f"{name} = the same command line alone", well and ours == theirs, figure)


@contextlib.contextmanager
def watched_memory(setting: Setting) -> Iterator[list[float]]:
    """Give a list of the GPU's used bytes by all processes: before, at most meanwhile, after. Empty on a CPU."""
    import torch

    used, ended = [], threading.Event()
    if setting.device == "cpu":
        yield used
        return

    def now() -> float:
        free, total = torch.cuda.mem_get_info()
        return total - free

    used += [now()] * 3

    def watch() -> None:
        while not ended.wait(0.2):
            used[1] = max(used[1], now())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield used
    finally:
        ended.set()
        thread.join()
        used[2] = now()


def memory_given_back(used: list[float]) -> Iterator[Check]:
    """Yield whether the GPU's memory is free again; that a second engine started says the same of the first."""
    if not used:
        yield Check("memory given back", "skipped", "not on a GPU")
        return
    before, most, after = (value / 1e9 for value in used)
    figure = f"{before:.1f} GB before, {most:.1f} during, {after:.1f} after; limit 0.5 more (a guess)"
    yield judged("memory given back", after - before < 0.5, figure)


def two_gpus(setting: Setting) -> Iterator[Check]:
    """Tensor parallel, and two engines, against one GPU."""
    shape, one = setting.shape("0.1B"), str(setting.folder / "one.json")
    well, said, _ = run_generate(*generate(setting, shape, one))
    yield judged("one GPU", well, said)
    for what, flag in (("tensor parallel 2", "--tensor_parallel_size"), ("two engines", "--num_engines")):
        name = str(setting.folder / f"{flag[2:]}.json")
        well, said, _ = run_generate(*generate(setting, shape, name, flag, "2"))
        yield judged(what, well, said)
        if well:
            same = [a == b for x, y in zip(column(one), column(name), strict=True) for a, b in zip(x, y, strict=True)]
            yield judged(
                f"{what} = one GPU",
                statistics.mean(same) > 0.7,
                f"{sum(same)} of {len(same)} are equal; limit 70% (a guess)",
            )
