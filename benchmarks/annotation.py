"""Texts a second of reward scoring: the transformers pipeline, batch 1 (as published) and 16, beside RewardScorer.

Reads   the quickstart's reward model (alignment/assets) and the human-rated answers of the package pyrit.
Writes nothing; prints a Markdown table. Ends with exit code 1 if the scores of both sides differ.

    python benchmarks/annotation.py
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ASSETS, Row, growth_row, medians, report, seconds  # isort: skip (before torch)

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging

from annotate_data.scorer import RewardScorer
from annotate_data.texts import chat_text, encode
from benchmarks.machine import multiply_rate
from reward_model.human_labels import labels_folder, rated_answers

MODEL = str(ASSETS / "reward_model")
TOLERANCE = 1e-4


def rated_texts(tokenizer) -> list[str]:
    """Every rated answer with its prompt, as the reward model reads it."""
    return [
        chat_text(tokenizer, [{"role": "user", "content": prompt}], answer, prompt)
        for prompt, answers in rated_answers(labels_folder()).items()
        for answer in answers
    ]


class Pipeline:
    """What one would write with transformers alone."""

    def __init__(self) -> None:
        logging.set_verbosity_error()
        model = AutoModelForSequenceClassification.from_pretrained(MODEL, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")

    def score(self, texts: list[str], batch_size: int) -> list[float]:
        # Without function_to_apply a model of one label would be given a sigmoid.
        found = self.pipe(texts, batch_size=batch_size, function_to_apply="none", truncation=True)
        return [entry["score"] for entry in found]


def limit(scorer: RewardScorer, texts: list[str]) -> float:
    """Texts a second if the machine did nothing but the matrix products of the layers, without padding."""
    tokens, _ = encode(scorer.tokenizer, texts, scorer.max_length)
    parameters = sum(p.numel() for p in scorer.model.base_model.encoder.parameters())
    return multiply_rate("float32") / (2 * parameters * statistics.mean(map(len, tokens)))


def check(expected: list[float], scores: list[float]) -> None:
    """Ends the benchmark unless both sides give the same scores."""
    worst = max(abs(a - b) for a, b in zip(expected, scores, strict=True))
    if worst > TOLERANCE:
        sys.exit(f"annotation.py: scores differ by {worst:.2g} from those of the pipeline")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--texts", type=int, default=256, help="how many; four times as many at the end (default 256)"
    )
    count = flags.parse_args().texts
    pipe, scorer = Pipeline(), RewardScorer(MODEL)
    every = rated_texts(scorer.tokenizer)
    more = [every[i % len(every)] for i in range(4 * count)]
    texts = more[::4]  # of the same lengths
    check(pipe.score(texts, 1), scorer.score(texts))
    times = medians(
        {
            "pipeline, batch 1": lambda: seconds(lambda: pipe.score(texts, 1)),
            "pipeline, batch 16": lambda: seconds(lambda: pipe.score(texts, 16)),
            "ours": lambda: seconds(lambda: scorer.score(texts)),
            "4x": lambda: seconds(lambda: scorer.score(more)),
        }
    )
    report("Annotation", WORDS.format(count), rows(times, count, limit(scorer, texts)))


def rows(times: dict[str, float], count: int, fastest: float) -> list[Row]:
    """The table's lines."""
    ours = times["ours"]
    share = f"matrix products: {count / ours / fastest:.0%} of what the machine's product rate allows"
    found = []
    for name, goal in (("pipeline, batch 1", 3), ("pipeline, batch 16", 1.5)):
        figures = (
            f"{count / times[name]:.0f} texts/s",
            f"{count / ours:.0f} texts/s",
            f"{times[name] / ours:.2f}",
        )
        found.append(Row(name, *figures, f">= {goal}", f"{fastest:.0f} texts/s", share))
    return [*found, growth_row("ours, 4x the texts", ours, times["4x"])]


WORDS = """
The quickstart's reward model (MiniLM, 22M parameters, float32) on {} human-rated answers with their prompts, cut to
96 tokens on both sides. Scores of both sides were compared: they differ by less than 1e-4. Limit: the matrix products
of the layers at the measured rate, without padding. Models are loaded before the clock starts.
"""

if __name__ == "__main__":
    main()
