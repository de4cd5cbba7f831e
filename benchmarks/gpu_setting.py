"""What the parts of gpu_day_one.py share: a check's form, shapes of models, random models on disk, the device."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

SHAPES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    "0.1B": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376},
    "1.5B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5504},
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
}


class Check(NamedTuple):
    """One line of the table: `result` is pass, fail, skipped or, of a figure that nothing judges, measured."""

    what: str
    result: str
    figure: str = ""


def judged(what: str, holds: bool, figure: str) -> Check:
    """Return a check that passes if it `holds`."""
    return Check(what, "pass" if holds else "fail", figure)


def measured(what: str, figure: str) -> Check:
    """Return a check that no limit judges."""
    return Check(what, "measured", figure)


class Setting(NamedTuple):
    """Where models are made, and whether they are the tiny ones of a machine without a GPU."""

    tiny: bool
    folder: Path

    def shape(self, real: str) -> str:
        """Return the name of the shape: this one, or the tiny one."""
        return "tiny" if self.tiny else real

    @property
    def device(self) -> str:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"


def device_name() -> tuple[str, int]:
    """Return what computes here, and how many GPUs torch can use."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return (f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "no GPU"), gpus


def vocabulary_size(shape: str) -> int:
    """Return how many tokens a model of the shape has."""
    return 64 if shape == "tiny" else 32000


def config_of(shape: str, **options):
    """Return a Llama configuration of one of SHAPES."""
    from transformers import LlamaConfig

    size = vocabulary_size(shape)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**SHAPES[shape], **ends, vocab_size=size, max_position_embeddings=1024, **options)


def save_tokenizer(folder: Path, size: int) -> None:
    """Save a tokenizer of `size` tokens, one per word w3, w4, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    tokenizer.save_pretrained(folder)


def shell(setting: Setting, shape: str) -> str:
    """Return a folder with configuration and tokenizer and no weights: what an engine of dummy weights needs."""
    folder = setting.folder / f"shell-{shape}"
    if not folder.exists():
        config = config_of(shape)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        save_tokenizer(folder, vocabulary_size(shape))
    return str(folder)


def random_model(setting: Setting, shape: str, seed: int = 0, reward: bool = False, attention: float = 1.0) -> str:
    """Return a folder with a random model; its head is sharpened, so that the likeliest token is clear.

    Args:
        attention: scales the attention's matrices; a fresh model hardly looks at earlier tokens.
    """
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    folder = setting.folder / f"{'reward' if reward else 'model'}-{shape}-{seed}-{attention:g}"
    if (folder / "tokenizer.json").exists():
        return str(folder)
    torch.manual_seed(seed)
    with torch.device(setting.device):
        kind = LlamaForSequenceClassification if reward else LlamaForCausalLM
        model = kind(config_of(shape, **({"num_labels": 1} if reward else {})))
    for name, weight in model.named_parameters():
        if "self_attn" in name:
            weight.data.mul_(attention)
    if not reward:
        model.lm_head.weight.data.mul_(5)
    model.to(getattr(torch, setting.dtype)).save_pretrained(folder)
    save_tokenizer(folder, vocabulary_size(shape))
    return str(folder)


def random_ids(shape: str, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Return `count` token lists of `length`, without special tokens."""
    import random

    rng, size = random.Random(seed), vocabulary_size(shape)
    return [[rng.randrange(3, size) for _ in range(length)] for _ in range(count)]


def as_text(ids: list[int]) -> str:
    """Return the text of which `save_tokenizer`'s tokenizer makes these ids."""
    return " ".join(f"w{i}" for i in ids)


def write_data(setting: Setting, shape: str, rows: int, prompt: int, response: int) -> str:
    """Return a data file with `rows` prompts, two responses and rewards each, lengths in tokens."""
    path = setting.folder / f"data-{shape}-{rows}-{prompt}-{response}.json"
    prompts, one, two = (
        random_ids(shape, rows, size, seed) for seed, size in enumerate((prompt, response, response))
    )
    reasons = ["length", "length"]
    instances = [
        {"prompt": as_text(p), "responses": [as_text(a), as_text(b)], "rewards": [1.0, 0.0], "stop_reasons": reasons}
        for p, a, b in zip(prompts, one, two, strict=True)
    ]
    path.write_text(json.dumps({"type": "text_only", "instances": instances}))
    return str(path)


@functools.cache
def gpu_bandwidth() -> float:
    """Return the bytes per second that the device reads, from sums over an array above any cache."""
    import time

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    array = torch.ones(2**28 if device == "cuda" else 2**24, device=device)

    def one() -> float:
        began = time.perf_counter()
        float(array.sum())  # waits for the device
        return time.perf_counter() - began

    return array.numel() * 4 / min(one() for _ in range(10))
