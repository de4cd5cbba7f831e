"""Seconds of exact per-token KL: one forward pass per token over the growing prefix beside one pass per model.

Reads   the quickstart's policy (alignment/assets) and the human-rated answers of the package pyrit. The reference is
        the policy with its weights disturbed, since two equal models have KL 0.
Writes nothing; prints a Markdown table. Ends with exit code 1 if the values of both sides differ.

    python benchmarks/kl.py
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ASSETS, Row, growth_row, medians, report, seconds, shares  # isort: skip (before torch)

import torch

from benchmarks.machine import multiply_rate
from common.models import encode_prompt, encode_response, load_causal_lm, load_tokenizer, render_chat
from evaluation.kl import LanguageModel, Sequence, score_sequences
from reward_model.human_labels import labels_folder, rated_answers

POLICY = str(ASSETS / "policy")
TEMPERATURE = 0.7
TOLERANCE = 1e-3  # relative; both sides are float32
NOISE = 0.05  # of the weights' own spread


def disturbed(name: str) -> torch.nn.Module:
    """The model with normal noise on every matrix."""
    model, random = load_causal_lm(name, "reference", "float32"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights += NOISE * weights.std() * torch.randn(weights.shape, generator=random)
    return model


def sequences(tokenizer, count: int, length: int) -> list[Sequence]:
    """Rated answers of at least `length` tokens, cut there, with their prompts."""
    found = []
    for prompt, answers in rated_answers(labels_folder()).items():
        text = render_chat(tokenizer, [{"role": "user", "content": prompt}], prompt, add_generation_prompt=True)
        for answer in answers:
            ids = encode_response(tokenizer, answer, ended=False)
            if len(ids) >= length:
                found.append(Sequence(encode_prompt(tokenizer, text), ids[:length], ended=False))
    return found[:count]


@torch.inference_mode()
def prefix_loop(policy, reference, sequence: Sequence) -> float:
    """KL summed over the response, as published: both models read the whole prefix again for every token."""
    total = 0.0
    for end in range(len(sequence.response)):
        ids = torch.tensor([sequence.prompt + sequence.response[:end]])
        p, q = (
            (model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1] / TEMPERATURE).log_softmax(-1)
            for model in (policy, reference)
        )
        total += float((p.exp() * (p - q)).sum())
    return total


def limit(model, sequence: Sequence) -> float:
    """Seconds of the matrix products of one pass of both models, at the measured rate."""
    parameters, head = sum(p.numel() for p in model.parameters()), model.lm_head.weight.numel()
    tokens, scored = len(sequence.prompt) + len(sequence.response), len(sequence.response)
    return 2 * 2 * (tokens * (parameters - head) + scored * head) / multiply_rate("float32")


def check(expected: float, found: float) -> None:
    """Ends the benchmark unless both sides give the same KL."""
    if abs(expected - found) > TOLERANCE * expected:
        sys.exit(f"kl.py: {found:.6g} nats, but the loop over prefixes gives {expected:.6g}")
    print(f"KL {found:.6g} nats, loop over prefixes {expected:.6g}", file=sys.stderr)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--tokens", type=int, default=128, help="of the response; then four times as many")
    tokens = flags.parse_args().tokens
    tokenizer = load_tokenizer(POLICY, "policy")
    models = load_causal_lm(POLICY, "policy", "float32"), disturbed(POLICY)
    wrapped = [LanguageModel(model) for model in models]
    (long,) = sequences(tokenizer, 1, 4 * tokens)
    short = long._replace(response=long.response[:tokens])

    def ours(work: list[Sequence]) -> float:
        return score_sequences(*wrapped, work, TEMPERATURE, [tokenizer.eos_token_id])[0].kl

    ours([short])
    values = {}
    # Once: it is many passes already, and takes a minute.
    times = {"loop": seconds(lambda: values.update(loop=prefix_loop(*models, short)))}
    times |= medians(
        {
            "ours": lambda: seconds(lambda: values.update(ours=ours([short]))),
            "4x tokens": lambda: seconds(lambda: ours([long])),
            "4x responses": lambda: seconds(lambda: ours([short] * 4)),
        }
    )
    check(values["loop"], values["ours"])
    report(
        "KL",
        WORDS.format(tokens=tokens, prompt=len(short.prompt)),
        rows(times, tokens, limit(models[0], short), shares(lambda: ours([short]))),
    )


def rows(times: dict[str, float], tokens: int, fastest: float, bound: str) -> list[Row]:
    """The table's lines."""
    ratio = f"{times['loop'] / times['ours']:.0f}"
    figures = f"{times['loop']:.3g} s", f"{times['ours']:.3g} s", ratio, ">= 50", f"{fastest:.3g} s", bound
    return [
        Row(f"one response of {tokens} tokens", *figures),
        growth_row("ours, 4x the tokens", times["ours"], times["4x tokens"]),
        growth_row("ours, 4x the responses", times["ours"], times["4x responses"]),
    ]


WORDS = """
SmolLM2-135M and the same model with disturbed weights, float32; a human-rated answer of {tokens} tokens after a
prompt of {prompt}. Baseline: for every token one pass of each model over the whole prefix (as published), of which
only the last position goes through the head. Both sides give the same KL to 1e-3. Limit: the matrix products of one
pass of each model at the measured rate. Models are loaded before the clock starts.
"""

if __name__ == "__main__":
    main()
