"""The parts of gpu_day_one.py without an engine: the environment, training, annotation, KL."""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_setting import (
    Check,
    Setting,
    as_text,
    config_of,
    judged,
    measured,
    random_ids,
    random_model,
    write_data,
)

PROJECT = Path(__file__).resolve().parents[1]


def environment(setting: Setting) -> Iterator[Check]:
    """Yield what is installed, and what vLLM would find."""
    import torch

    on_gpu = torch.cuda.is_available()
    smi = shutil.which("nvidia-smi")
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False).stdout if smi else ""
    cuda = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    yield judged("torch sees the GPUs that are listed", not listed.strip() or on_gpu, cuda)
    if on_gpu:
        driver = subprocess.run(
            [smi, "--query-gpu=driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, check=False,
        ).stdout  # fmt: skip
        yield Check("driver, memory", "pass", driver.splitlines()[0])
    for tool, why in (("nvcc", "FlashInfer, DeepSpeed"), ("ninja", "the same"), ("gcc", "Triton")):
        found = shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))
        yield Check(f"{tool} (for {why})", "pass" if found else "skipped", found or "not found")
    try:
        from vllm_logit_mixture.environment import set_defaults

        set_defaults(on_gpu=True)
        from vllm import envs
        from vllm.utils.system_utils import get_mp_context
    except ImportError as error:
        yield Check("engines are spawned, FlashInfer's sampler is off", "skipped", str(error))
        return
    method = get_mp_context().get_start_method()
    right = method == "spawn" and not envs.VLLM_USE_FLASHINFER_SAMPLER
    yield judged("engines are spawned, FlashInfer's sampler is off", right, method)


def train_flags(setting: Setting, shape: str, output: str, *more: str) -> list[str]:
    """Return the flags of run_dpo.py for two optimizer steps of two pairs."""
    model = random_model(setting, shape)
    data = write_data(setting, shape, 4, 64 if not setting.tiny else 12, 128 if not setting.tiny else 16)
    words = f"--model_name_or_path {model} --ref_model {model} --train_dir {data} --output_dir {output} "
    words += "--max_length 512 --num_train_epochs 1 --per_device_train_batch_size 2 --save_strategy no "
    return [*words.split(), "--learning_rate", "1e-6", "--max_grad_norm", "1000", *more]


def train(setting: Setting, name: str, *more: str) -> tuple[list[dict], float]:
    """Return the steps' entries of the log, and the peak of the GPU's memory in GB."""
    import torch

    from dpo_iteration import run_dpo

    output = setting.folder / f"trained-{name}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run_dpo.main(train_flags(setting, setting.shape("1.5B"), str(output), *more))
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return steps_of(output), peak


def steps_of(output: Path) -> list[dict]:
    """Return the log's entries that have a loss."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


FORMS = {
    "padded": ("--share_prefixes", "false", "--gradient_checkpointing", "false"),
    "shared": ("--share_prefixes", "true", "--gradient_checkpointing", "false"),
    "shared, checkpointed": ("--share_prefixes", "true", "--gradient_checkpointing", "true"),
}


def training(setting: Setting) -> Iterator[Check]:
    """Yield, for each form of the same two steps: loss, gradient norm, |h| at the first step, peak memory."""
    found = {}
    for name, flags in FORMS.items():
        steps, peak = found[name] = train(setting, name.replace(", ", "-"), *flags)
        first = steps[0]
        h = abs(first["rewards/margins"]) / 0.1
        limit = 0.5 if setting.dtype == "bfloat16" else 1e-2
        figure = f"loss {first['loss']:.4f}, gradient {first['grad_norm']:.3f}, peak {peak:.1f} GB, "
        figure += f"|h| {h:.2e}; limit {limit} (a guess)"
        # Policy and reference are one model, so h is rounding: far below what a step changes.
        yield judged(f"a step, {name}", h < limit, figure)
    base = found["padded"][0]
    for name in list(FORMS)[1:]:
        off = max(abs(a["loss"] - b["loss"]) for a, b in zip(base, found[name][0], strict=True))
        norm = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(base, found[name][0], strict=True))
        figure = f"loss {off:.1e}, gradient norm {norm:.1%} off; limits 0.02, 5% (guesses)"
        yield judged(f"{name} = padded", off < 0.02 and norm < 0.05, figure)


def zero3(setting: Setting) -> Iterator[Check]:
    """Yield a comparison of ZeRO-3 on all GPUs with one process."""
    import torch

    processes, output = torch.cuda.device_count(), str(setting.folder / "trained-zero3")
    pairs = max(1, 2 // processes)
    flags = train_flags(setting, setting.shape("1.5B"), output, "--per_device_train_batch_size", str(pairs))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    config = ["--config_file", str(PROJECT / "alignment/configs/zero3.yaml"), "--num_processes", str(processes)]
    command = [*accelerate, *config, str(PROJECT / "alignment/dpo_iteration/run_dpo.py"), *flags]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        yield Check("ZeRO-3 runs", "fail", (done.stderr.strip().splitlines() or ["no word"])[-1][:200])
        return
    alone, _ = train(setting, "alone")
    off = abs(steps_of(Path(output))[0]["loss"] - alone[0]["loss"])
    yield judged(
        f"ZeRO-3 on {processes} GPU(s) = one process", off < 0.02, f"loss {off:.1e} off; limit 0.02 (a guess)"
    )


def annotation(setting: Setting) -> Iterator[Check]:
    """Yield whether batches score as single texts do, and tokens per second against the arithmetic."""
    import torch

    from annotate_data.scorer import RewardScorer

    shape = setting.shape("1.5B")
    count, longest = (64, 256) if not setting.tiny else (12, 24)
    texts = [as_text(ids[: longest * (i + 1) // count]) for i, ids in enumerate(random_ids(shape, count, longest))]
    scorer = RewardScorer(random_model(setting, shape, reward=True), dtype=setting.dtype)
    single = [scorer.score([text])[0] for text in texts]
    scorer.score(texts)
    began = time.perf_counter()
    batch = scorer.score(texts)
    seconds = time.perf_counter() - began
    off, spread = max(abs(a - b) for a, b in zip(single, batch, strict=True)), max(single) - min(single)
    figure = f"{off:.1e} off, scores spread {spread:.2f}; limit 2% of it (a guess)"
    yield judged("a batch scores as single texts", off < 0.02 * spread + 1e-4, figure)
    config, tokens = config_of(shape), sum(text.count(" ") + 1 for text in texts)
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    flops = 2 * config.num_hidden_layers * layer * tokens / seconds
    size = 8192 if torch.cuda.is_available() else 512
    matrix = torch.ones(size, size, dtype=getattr(torch, setting.dtype), device=setting.device)
    float((matrix @ matrix)[0, 0])
    began = time.perf_counter()
    for _ in range(5):
        product = matrix @ matrix
    float(product[0, 0])
    limit = 5 * 2 * size**3 / (time.perf_counter() - began)
    figure = f"{tokens / seconds:.0f}, {flops / limit:.0%} of a matrix product's rate"
    yield measured("tokens per second", figure)


def kl(setting: Setting) -> Iterator[Check]:
    """Yield the KL of a model with itself, and how far bfloat16 is from float32."""
    from common.models import load_causal_lm
    from evaluation.kl import LanguageModel, Sequence, score_sequences

    shape = setting.shape("0.1B")
    names = [random_model(setting, shape, seed) for seed in (0, 1)]
    sequences = [Sequence(ids[:8], ids[8:], False) for ids in random_ids(shape, 4, 40)]
    sums = {}
    for dtype in ("float32", "bfloat16"):
        models = [LanguageModel(load_causal_lm(name, "model", dtype).to(setting.device)) for name in names]
        same = score_sequences(models[0], models[0], sequences, 0.7, [2])
        worst = max(abs(score.kl) for score in same)
        yield judged(f"KL of a model with itself, {dtype}", worst < 1e-3, f"{worst:.1e} nats; limit 0.001 (a guess)")
        sums[dtype] = [score.kl for score in score_sequences(*models, sequences, 0.7, [2])]
    off = max(abs(a - b) / b for a, b in zip(sums["bfloat16"], sums["float32"], strict=True))
    yield judged(
        "bfloat16 against float32",
        off < 0.1,
        f"{off:.2%} off at {max(sums['float32']):.2f} nats; limit 10% (a guess)",
    )
