"""Texts a second of reward scoring: the transformers pipeline, batch 1 (as published) and 16, beside RewardScorer.

Reads   the quickstart's reward model (alignment/assets) and the human-rated answers of the package pyrit.
Writes nothing; prints a Markdown table. Ends with exit code 1 if the scores of both sides differ.

    python benchmarks/annotation.py
"""

import argparse
import functools
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ASSETS, Row, growth_row, medians, report, seconds, shares  # isort: skip (before torch)

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging

from annotate_data.scorer import RewardScorer
from annotate_data.texts import chat_text, encode
from benchmarks.machine import half_dtype, multiply_rate
from reward_model.human_labels import labels_folder, rated_answers

MODEL = str(ASSETS / "reward_model")
TOLERANCE = 1e-4


class Work(NamedTuple):
    """Texts to score.

    Attributes:
        name: for the table.
        response_tokens: what is kept of an answer.
        max_length: tokens kept of a text, on both sides.
        share: of `--texts`.
    """

    name: str
    response_tokens: int
    max_length: int
    share: float


# The model was trained on 96 tokens and can read 512. Long texts take long: a half of them is enough.
WORK = (Work("answers of 32 tokens", 32, 96, 1.0), Work("whole answers", 10**6, 512, 0.5))


def rated_texts(tokenizer, response_tokens: int) -> list[str]:
    """Every rated answer, cut, with its prompt as the reward model reads it; long and short mixed."""

    def cut(answer: str) -> str:
        return tokenizer.decode(
            tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"][:response_tokens]
        )

    texts = [
        chat_text(tokenizer, [{"role": "user", "content": prompt}], cut(answer), prompt)
        for prompt, answers in rated_answers(labels_folder()).items()
        for answer in answers
    ]
    random.Random(0).shuffle(texts)
    return texts


def reading(max_length: int, folder: Path) -> str:
    """The reward model as it would be if it had been trained on texts of `max_length` tokens, in `folder`."""
    AutoTokenizer.from_pretrained(MODEL, model_max_length=max_length).save_pretrained(folder)
    for file in Path(MODEL).resolve().iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    return str(folder)


class Pipeline:
    """What one would write with transformers alone."""

    def __init__(self, name: str) -> None:
        logging.set_verbosity_error()
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
        self.pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")

    def score(self, texts: list[str], batch_size: int) -> list[float]:
        # Without function_to_apply a model of one label would be given a sigmoid.
        found = self.pipe(texts, batch_size=batch_size, function_to_apply="none", truncation=True)
        return [entry["score"] for entry in found]


def limit(scorer: RewardScorer, texts: list[str]) -> float:
    """Texts a second if the machine did nothing but what the layers cannot do without, and no padding.

    Their matrix products at the measured rate, and attention, which grows with the square of a text's length, on
    each text alone.
    """
    tokens, _ = encode(scorer.tokenizer, texts, scorer.max_length)
    parameters = sum(p.numel() for p in scorer.model.base_model.encoder.parameters())
    products = 2 * parameters * sum(map(len, tokens)) / multiply_rate("float32")
    return len(texts) / (products + attention_time(scorer.model.config, [len(ids) for ids in tokens]))


def attention_time(config, lengths: list[int]) -> float:
    """Seconds that attention alone takes for texts of these lengths in all layers."""
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    states = torch.randn(1, heads, max(lengths), size)

    def attend() -> None:
        with torch.inference_mode():
            for length in lengths:
                part = states[:, :, :length]
                for _ in range(config.num_hidden_layers):
                    torch.nn.functional.scaled_dot_product_attention(part, part, part)

    return statistics.median(seconds(attend) for _ in range(3))


def worst(expected: list[float], scores: list[float]) -> float:
    """The largest difference."""
    return max(abs(a - b) for a, b in zip(expected, scores, strict=True))


def measure(work: Work, count: int, folder: Path) -> list[Row]:
    """The table's lines of one kind of texts. Ends the benchmark if the pipeline's scores are others."""
    name = reading(work.max_length, folder)
    pipe, scorer = Pipeline(name), RewardScorer(name)
    every = rated_texts(scorer.tokenizer, work.response_tokens)
    more = [every[i % len(every)] for i in range(4 * count)]
    texts = more[:count]
    expected, scores = pipe.score(texts, 1), scorer.score(texts)
    if worst(expected, scores) > TOLERANCE:
        sys.exit(f"annotation.py: scores differ by {worst(expected, scores):.2g} from those of the pipeline")
    sides = {
        "pipeline, batch 1": lambda: pipe.score(texts, 1),
        "pipeline, batch 16": lambda: pipe.score(texts, 16),
        "ours": lambda: scorer.score(texts),
        "4x": lambda: scorer.score(more),
    }
    if half_dtype() == "bfloat16":
        half = RewardScorer(name, dtype="bfloat16")
        error = worst(expected, half.score(texts)) / statistics.pstdev(expected)
        sides["bfloat16"] = lambda: half.score(texts)
    times = medians({name: functools.partial(seconds, side) for name, side in sides.items()})
    bound = shares(sides["ours"])
    fastest = limit(scorer, texts)

    def rate(side: str) -> str:
        return f"{count / times[side]:.0f} texts/s"

    found = []
    for side, goal in (("pipeline, batch 1", 3), ("pipeline, batch 16", 1.5)):
        ratio, most = times[side] / times["ours"], times[side] * fastest / count
        case = f"{work.name}: {side}"
        reach = f"{fastest:.0f} texts/s, ratio {most:.2f}"
        found.append(Row(case, rate(side), rate("ours"), f"{ratio:.2f}", f">= {goal}", reach, bound))
        if "bfloat16" in sides:
            ratio = f"{times[side] / times['bfloat16']:.2f}"
            note = f"scores off by up to {error:.1%} of their deviation"
            found.append(Row(f"{case}; ours in bfloat16", rate(side), rate("bfloat16"), ratio, "-", "-", note))
    return [*found, growth_row(f"{work.name}: ours, 4x the texts", times["ours"], times["4x"])]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--texts", type=int, default=256, help="how many; four times as many at the end (default 256)")
    count = flags.parse_args().texts
    rows = []
    for work in WORK:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(work, round(count * work.share), Path(folder))
    report("Annotation", WORDS, rows)


WORDS = """
The quickstart's reward model (MiniLM, 22M parameters, float32) on human-rated answers with their prompts: cut to 32
tokens, as long as the quickstart's responses, and whole (up to 512 tokens with the prompt). Scores of both sides were
compared: they differ by less than 1e-4. Limit: the matrix products of the layers at the measured rate and attention
on each text alone, without padding, and the ratio at that speed. Models are loaded before the clock starts.
"""

if __name__ == "__main__":
    main()
