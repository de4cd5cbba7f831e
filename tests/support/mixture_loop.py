"""The definition of a mixture, for any number of models: no cache, no batch, no padding, double precision."""

import functools
import math

import torch
from transformers import AutoModelForCausalLM

WORDS = ["the", "cat", "sat", "on", "a", "mat,", "did", "it", "not?", "yes:", "it", "did.", "who", "knows", "why"]


@functools.cache
def load(name: str):
    """A model in float32."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()


@torch.no_grad()
def next_logits(models: list[str], ids: list[int], weights, kind: str = "logits") -> torch.Tensor:
    """Logits of the mixture for the token after `ids`: [ids that all models know], float64."""
    own = [load(name)(torch.tensor([ids])).logits[0, -1].double() for name in models]
    narrowest = min(map(len, own))
    own = [logits[:narrowest] for logits in own]
    if kind == "logits":
        return sum(w * logits for w, logits in zip(weights, own, strict=True))
    if kind == "log_probabilities":
        return sum(w * logits.log_softmax(-1) for w, logits in zip(weights, own, strict=True))
    mixed = sum(w * logits.softmax(-1) for w, logits in zip(weights, own, strict=True))
    return (mixed / math.fsum(weights)).log()


def greedy(models: list[str], prompt: list[int], weights, length: int, stop=(2,), kind: str = "logits") -> list[int]:
    """The likeliest token again and again, with the stop token that ends it."""
    ids = list(prompt)
    while len(ids) - len(prompt) < length and not (len(ids) > len(prompt) and ids[-1] in stop):
        ids.append(int(next_logits(models, ids, weights, kind).argmax()))
    return ids[len(prompt) :]
