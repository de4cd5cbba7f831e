"""Tiny real models for the tests: Llamas, reward models and tokenizers of a few thousand parameters, on disk."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

CHARACTERS = " abcdefghijklmnopqrstuvwxyz.,:?!"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_tokenizer(adds_bos: bool = True, characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """A character tokenizer: pad 0, BOS 1, EOS 2, unknown 3, then one id a character."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate(special + list(characters))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(tokenizer, hidden: int = 32, layers: int = 2, heads: int = 2, **options) -> LlamaConfig:
    """A Llama configuration for `tokenizer`; head size is hidden / heads."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=options.pop("key_value_heads", heads),
        max_position_embeddings=options.pop("context", 256),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def save_tiny_policy(folder: str | Path, seed: int, tokenizer=None, sharpness: float = 20.0, **shape) -> Path:
    """Saves a random causal Llama with its tokenizer in `folder` (float32 safetensors).

    `sharpness` scales the output head, so that greedy choices are clear and sampled text is not uniform.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(tokenizer, **shape))
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return _save(model, tokenizer, folder)


def save_tiny_reward_model(folder: str | Path, seed: int, tokenizer=None, labels: int = 1, **shape) -> Path:
    """Saves a random Llama sequence classifier (a reward model) with its tokenizer in `folder`."""
    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=labels, **shape))
    return _save(model, tokenizer, folder)


def _save(model, tokenizer, folder: str | Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
