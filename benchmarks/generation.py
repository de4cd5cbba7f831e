"""Tokens a second of logit-mixture generation: two transformers models in step, our engine, vLLM with one model.

Reads   the quickstart's policy and prompts (alignment/assets). Writes nothing; prints a Markdown table.

Both sides sample the same requests (the sampler mixp: half of the responses from (1.5, -0.5), half from (0.5, 0.5))
in the same type, with temperature 1 and end tokens that end a response. Models are loaded, engines started and
warmed up before the clock starts.

    python benchmarks/generation.py
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ASSETS, Row, growth_row, medians, report, seconds, shares  # isort: skip (before torch)

import torch

from bandit.mixtures import MIXTURES
from benchmarks.machine import half_dtype, memory_bandwidth, multiply_rate
from common.models import load_causal_lm, load_tokenizer, stop_token_ids
from generation.backend_hf import left_pad
from generation.backend_vllm import VLLMGenerator
from generation.interface import Request, Sampling
from generation.plan import Plan, requests
from generation.prompts import load_prompts

POLICY = str(ASSETS / "policy")
LONGEST_PROMPT = 96  # tokens
BATCH = 20  # of the published loop
LOOP, MIXTURE, ALONE = "two transformers models in step", "mixture", "vLLM with the policy alone"


class TwoModelsInStep:
    """The published way: policy and reference each with a KV cache, a batch of 20 until the last one ends."""

    def __init__(self, policy: str, reference: str, dtype: str) -> None:
        self.models = [load_causal_lm(name, "model", dtype) for name in (policy, reference)]

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
        caches, going, tokens = [None, None], torch.ones(len(batch), dtype=torch.bool), 0
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
    """Our engine: the mixture, or vLLM with the policy alone."""

    def __init__(self, reference: str | None, args: argparse.Namespace) -> None:
        longest = LONGEST_PROMPT + args.max_new_tokens
        self.generator = VLLMGenerator(POLICY, reference, args.dtype, longest, max_num_seqs=args.slots)

    def generate(self, wanted: list[Request], sampling: Sampling) -> int:
        self.generator.llm.reset_prefix_cache()  # prompts of the turn before are not remembered
        return sum(len(response.token_ids) for response in self.generator.generate(wanted, sampling))


def limits(policy: torch.nn.Module, dtype: str, slots: int, prompt: float, length: int) -> tuple[float, float]:
    """Tokens a second of two such models that reading memory, and that multiplying, allow.

    Args:
        policy: one of the two models.
        dtype: of weights and caches.
        slots: responses sampled at a time.
        prompt, length: mean prompt and longest response, tokens.
    """
    config, width = policy.config, torch.finfo(getattr(torch, dtype)).bits // 8
    parameters = sum(p.numel() for p in policy.parameters())
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width
    # A decoding step reads all weights, and of each response the cache, which is half full on average.
    read = 2 * (parameters * width + slots * (prompt + length / 2) * per_token)
    # The prompt goes through the layers too, but not through the head.
    multiplied = 2 * 2 * (parameters + prompt / length * (parameters - policy.lm_head.weight.numel()))
    return slots * memory_bandwidth() / read, multiply_rate(dtype) / multiplied


def make_requests(tokenizer, prompts: int) -> list[Request]:
    """Two responses a prompt, one from each side of the sampler mixp."""
    found, _ = load_prompts([str(ASSETS / "prompts.jsonl")], tokenizer, "chat", LONGEST_PROMPT, end=prompts)
    return list(requests(Plan(found, 0, MIXTURES["mixp"].pairs(0.1), 2, seed=0), {}))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--prompts", type=int, default=32, help="two responses each (default 32)")
    flags.add_argument("--max_new_tokens", type=int, default=48, help="longest response (default 48)")
    flags.add_argument("--slots", type=int, default=64, help="responses our engine samples at a time (default 64)")
    flags.add_argument("--dtype", default=half_dtype(), help="of both sides (default: what the CPU multiplies)")
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
    wanted, more = (make_requests(tokenizer, n * args.prompts) for n in (1, 4))
    sampling = Sampling(1.0, args.max_new_tokens, stop_token_ids(tokenizer, POLICY))
    loop = TwoModelsInStep(POLICY, POLICY, args.dtype)
    ours, alone = (Engine(reference, args) for reference in (POLICY, None))
    sides = {
        LOOP: (loop, wanted),
        MIXTURE: (ours, wanted),
        ALONE: (alone, wanted),
        "4x": (ours, more),
    }
    times, tokens = measure_all(sides, sampling)
    prompt = statistics.mean(len(request.prompt_ids) for request in wanted)
    floors = limits(loop.models[0], args.dtype, min(args.slots, len(wanted)), prompt, args.max_new_tokens)
    bound = shares(lambda: ours.generate(wanted, sampling))
    report("Generation", words(args, wanted), rows(times, tokens, floors, bound))


def rows(times: dict[str, float], tokens: dict[str, int], floors: tuple[float, float], bound: str) -> list[Row]:
    """The table's lines."""
    rate = {name: tokens[name] / times[name] for name in times}
    figures = {name: f"{value:.0f} tokens/s" for name, value in rate.items()}
    limit = f"{min(floors):.0f} tokens/s (memory {floors[0]:.0f}, arithmetic {floors[1]:.0f})"
    return [
        Row(
            f"(a) {LOOP}",
            figures[LOOP],
            figures[MIXTURE],
            f"{rate[MIXTURE] / rate[LOOP]:.2f}",
            ">= 2.5",
            limit,
            bound,
        ),
        Row(
            f"(b) {ALONE}",
            figures[ALONE],
            figures[MIXTURE],
            f"{rate[MIXTURE] / rate[ALONE]:.2f}",
            ">= 0.48",
            "0.5 where the models' work is all",
            "the second model",
        ),
        growth_row("mixture, 4x the prompts", times[MIXTURE], times["4x"]),
    ]


def words(args: argparse.Namespace, wanted: list[Request]) -> str:
    """What was run."""
    return (
        f"SmolLM2-135M as policy and as reference, {args.dtype} on both sides; {args.prompts} prompts x 2 responses "
        f"of at most {args.max_new_tokens} tokens, end tokens on; the loop in batches of {BATCH}, our engine "
        f"{args.slots} at a time. Models are loaded and engines started before the clock starts. Limit: the slower "
        "of reading weights and caches at the measured bandwidth and of multiplying at the measured rate."
    )


if __name__ == "__main__":
    main()
