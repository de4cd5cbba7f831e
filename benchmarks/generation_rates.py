"""Tokens per second of logit-mixture generation: N transformers models in step, our engine of N, vLLM with one model.

Reads   the quickstart's policy and prompts (alignment/assets). Prints a Markdown table; --figure draws it.

All sides sample the same prompts (two models: the sampler mixp, half of the responses from (1.5, -0.5), half from
(0.5, 0.5)) in the same type, with temperature 1 and end tokens that end a response. Models are loaded, engines
started and warmed up before the clock starts. The last rows are requests of the policy alone in an engine of two.

    python benchmarks/generation_rates.py --figure docs/figures/generation_rates.png
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ASSETS, Row, growth_row, medians, report, seconds, shares  # isort: skip (before torch)

import torch

from benchmarks.machine import half_dtype, memory_bandwidth, multiply_rate
from common.models import load_causal_lm, load_tokenizer, stop_token_ids
from generation.backend_hf import left_pad
from generation.backend_vllm import VLLMGenerator
from generation.prompts import Template, load_prompts
from generation.sampling import Request, Sampling, stream_seed

POLICY = str(ASSETS / "policy")
LONGEST_PROMPT = 96  # tokens
BATCH = 20  # of the published loop
COUNTS = (1, 2, 3)  # models; an engine of one is vLLM without the plugin
# Both sides of a pair, by the number of models; each weighs all of them.
SIDES = {1: [(1.0,)] * 2, 2: [(1.5, -0.5), (0.5, 0.5)], 3: [(1.5, -0.25, -0.25), (0.5, 0.25, 0.25)]}


class ModelsInStep:
    """The published way: each model with a KV cache, a batch of 20 until the last one ends."""

    def __init__(self, count: int, dtype: str) -> None:
        self.models = [load_causal_lm(POLICY, "model", dtype) for _ in range(count)]

    def generate(self, wanted: list[Request], sampling: Sampling) -> int:
        """How many tokens were sampled until each response ended, its end token counted."""
        torch.manual_seed(0)
        batches = [wanted[i : i + BATCH] for i in range(0, len(wanted), BATCH)]
        return sum(self._batch(batch, sampling) for batch in batches)

    @torch.inference_mode()
    def _batch(self, batch: list[Request], sampling: Sampling) -> int:
        ids, mask = left_pad([request.prompt_ids for request in batch], "cpu")
        weights = torch.tensor([request.weights for request in batch])
        stop = torch.tensor(sampling.stop_token_ids)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        caches, going, tokens = [None] * len(self.models), torch.ones(len(batch), dtype=torch.bool), 0
        for _ in range(sampling.max_new_tokens):
            logits = 0
            for side, model in enumerate(self.models):
                output = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=caches[side],
                    use_cache=True,
                    logits_to_keep=1,
                )
                caches[side] = output.past_key_values
                logits = logits + weights[:, side, None] * output.logits[:, -1].float()
            ids = torch.multinomial((logits / sampling.temperature).softmax(dim=-1), 1)
            tokens += int(going.sum())
            going &= ~torch.isin(ids[:, 0], stop)
            if not going.any():
                break
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return tokens


class Engine:
    """Our engine: a mixture, or vLLM with the policy alone."""

    def __init__(self, count: int, args: argparse.Namespace) -> None:
        longest = LONGEST_PROMPT + args.max_new_tokens
        policy, reference, *others = [*[POLICY] * count, None][: max(2, count)]
        options = {"max_num_seqs": args.slots, "others": others}
        self.generator = VLLMGenerator(policy, reference, args.dtype, longest, **options)

    def generate(self, wanted: list[Request], sampling: Sampling) -> int:
        self.generator.llm.reset_prefix_cache()  # prompts of the turn before are not remembered
        return sum(len(response.token_ids) for response in self.generator.generate(wanted, sampling))


def limits(policy: torch.nn.Module, dtype: str, slots: int, prompt: float, length: int) -> tuple[float, float]:
    """Return the tokens per second of one such model that reading memory, and that multiplying, allow.

    Args:
        policy: the model.
        dtype: of weights and caches.
        slots: responses sampled at a time.
        prompt, length: mean prompt and longest response, tokens.
    """
    config, width = policy.config, torch.finfo(getattr(torch, dtype)).bits // 8
    parameters = sum(p.numel() for p in policy.parameters())
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width
    # A decoding step reads all weights, and of each response the cache, which is half full on average.
    read = parameters * width + slots * (prompt + length / 2) * per_token
    # The prompt goes through the layers too, but not through the head.
    multiplied = 2 * (parameters + prompt / length * (parameters - policy.lm_head.weight.numel()))
    return slots * memory_bandwidth() / read, multiply_rate(dtype) / multiplied


def make_prompts(tokenizer, count: int) -> list[list[int]]:
    """Token ids of prompts."""
    found, _ = load_prompts([str(ASSETS / "prompts.jsonl")], tokenizer, Template("chat"), LONGEST_PROMPT, end=count)
    return [list(prompt.token_ids) for prompt in found]


def make_requests(prompts: list[list[int]], sides: list[tuple[float, ...]]) -> list[Request]:
    """Two responses per prompt, one from each side."""
    wanted = [(i, j, ids) for i, ids in enumerate(prompts) for j in range(2)]
    return [Request(f"{i}.{j}", ids, sides[j], stream_seed(0, i, j)) for i, j, ids in wanted]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--prompts", type=int, default=32, help="two responses each (default 32)")
    flags.add_argument("--max_new_tokens", type=int, default=48, help="longest response (default 48)")
    flags.add_argument("--slots", type=int, default=64, help="responses our engine samples at a time (default 64)")
    flags.add_argument("--dtype", default=half_dtype(), help="of both sides (default: what the CPU multiplies)")
    flags.add_argument("--figure", type=Path, help="draw the rates into this file")
    return flags


def measure_all(sides: dict, sampling: Sampling) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds and the number of tokens of each side; `sides`: name → (what generates, its requests)."""
    tokens = {}

    def timed(name: str) -> float:
        side, work = sides[name]
        return seconds(lambda: tokens.update({name: side.generate(work, sampling)}))

    for side, work in sides.values():
        side.generate(work[:BATCH], sampling._replace(max_new_tokens=4))  # the first steps are slow
    return medians({name: functools.partial(timed, name) for name in sides}), tokens


def main() -> None:
    args = parser().parse_args()
    tokenizer = load_tokenizer(POLICY, "policy")
    prompts = make_prompts(tokenizer, 4 * args.prompts)
    sampling = Sampling(1.0, args.max_new_tokens, stop_token_ids(tokenizer, POLICY))
    engines = {count: Engine(count, args) for count in COUNTS}
    few = prompts[: args.prompts]
    loops = {count: ModelsInStep(count, args.dtype) for count in COUNTS}
    # A full batch says what a loop's rate is.
    sides = {f"loop {n}": (loops[n], make_requests(few[: BATCH // 2], SIDES[n])) for n in COUNTS}
    sides |= {f"engine {n}": (engines[n], make_requests(few, SIDES[n])) for n in COUNTS}
    sides["policy alone in 2"] = engines[2], make_requests(few, [(1.0, 0.0)] * 2)
    times, tokens = measure_all(sides, sampling)
    times["4x"] = seconds(lambda: engines[2].generate(make_requests(prompts, SIDES[2]), sampling))
    length = statistics.mean(map(len, few))
    floors = limits(loops[1].models[0], args.dtype, min(args.slots, 2 * len(few)), length, args.max_new_tokens)
    bound = shares(lambda: engines[2].generate(sides["engine 2"][1], sampling))
    if args.figure:
        draw({name: tokens[name] / times[name] for name in tokens}, args.figure)
    report("Generation", words(args, 2 * len(few)), rows(times, tokens, floors, bound))


def rows(times: dict[str, float], tokens: dict[str, int], floors: tuple[float, float], bound: str) -> list[Row]:
    """The table's lines."""
    rate = {name: tokens[name] / times[name] for name in tokens}

    def row(case: str, baseline: str, ours: str, factor: float, *rest: str) -> Row:
        figures = (f"{rate[name]:.0f} tokens/s" for name in (baseline, ours))
        return Row(case, *figures, f"{factor * rate[ours] / rate[baseline]:.2f}", *rest)

    def limit(count: int) -> str:
        memory, arithmetic = (floor / count for floor in floors)
        return f"{min(memory, arithmetic):.0f} tokens/s (memory {memory:.0f}, arithmetic {arithmetic:.0f})"

    reach = {1: "-", 2: ">= 2.5", 3: "-"}
    found = [
        row(
            f"{n} transformers model(s) in step; engine of {n}",
            f"loop {n}",
            f"engine {n}",
            1,
            reach[n],
            limit(n),
            bound,
        )
        for n in COUNTS
    ]
    found += [
        row(f"vLLM with one model; engine of {n}, ratio times {n}", "engine 1", f"engine {n}", n, ">= 0.95", "1")
        for n in COUNTS[1:]
    ]
    case = "vLLM with one model; its requests in an engine of 2"
    found.append(row(case, "engine 1", "policy alone in 2", 1, ">= 0.9", "1", "as the engine of one"))
    return [*found, growth_row("engine of 2, 4x the prompts", times["engine 2"], times["4x"])]


def draw(rate: dict[str, float], file: Path) -> None:
    """Draw tokens/s against the number of models: loop, engine, and what the engine of one would leave for N."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
    ax.plot(
        COUNTS, [rate["engine 1"] / n for n in COUNTS], "--", color="0.5", label="vLLM with one model, divided by N"
    )
    for name, label, style in (
        ("engine", "engine of N models", "o-"),
        ("loop", "N transformers models in step", "s-"),
    ):
        ax.plot(COUNTS, [rate[f"{name} {n}"] for n in COUNTS], style, label=label)
    ax.plot([2], [rate["policy alone in 2"]], "^", color="C2", label="requests of one model in an engine of 2")
    ax.set(xlabel="N, models that every request weighs", ylabel="tokens/s", xticks=COUNTS, ylim=(0, None))
    fig.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=7)
    fig.savefig(file, dpi=150)
    plt.close(fig)


def words(args: argparse.Namespace, responses: int) -> str:
    """What was run."""
    return (
        f"SmolLM2-135M as every model, {args.dtype} on both sides; {responses} responses of at most "
        f"{args.max_new_tokens} tokens, end tokens on; the loop a batch of {BATCH}, our engine {args.slots} "
        "at a time. Models are loaded and engines started before the clock starts. Limit: the slower of reading "
        "weights and caches at the measured bandwidth and of multiplying at the measured rate."
    )


if __name__ == "__main__":
    main()
