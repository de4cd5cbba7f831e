"""A transformer of the lab as a transformers checkpoint, and back: so that the real scripts can run it.

The prompt and the responses are words of one vocabulary, a b c ...; the stop token is one more, and is never drawn:
responses have L tokens each.
"""

from pathlib import Path

import torch
from lab.environment import Setting
from lab.learners import Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

STOP = "</s>"
# The last norm's output sums to about `width` (its bias starts at 1, its weight at 1): a logit of about -100 width.
NEVER = -100.0


def words(setting: Setting) -> list[str]:
    """Return the vocabulary."""
    return [chr(ord("a") + i) for i in range(setting.vocabulary)]


def save_checkpoint(setting: Setting, parameters: torch.Tensor, folder: Path) -> None:
    """Write parameters [D] of a transformer as GPT2LMHeadModel with a word tokenizer."""
    model = GPT2LMHeadModel(config(setting))
    tensors = {name: t[0] for name, t in Transformer(setting).tensors(parameters.unsqueeze(0)).items()}
    state = {f"transformer.{name}": t for name, t in tensors.items() if "." in name}
    v, w = setting.vocabulary, setting.width
    state |= {f"transformer.{name}.weight": torch.zeros(v + 1, w) for name in ("wte", "wpe")}
    state["transformer.wte.weight"][:v] = tensors["wte"]
    state["transformer.wpe.weight"] = torch.cat([tensors["wpe"], torch.zeros(1, w)])
    state["lm_head.weight"] = torch.cat([tensors["lm_head"], torch.full((1, w), NEVER)])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if not name.endswith(("attn.bias", "masked_bias"))]
    model.save_pretrained(folder)
    tokenizer(setting).save_pretrained(folder)


def load_checkpoint(setting: Setting, folder: Path) -> torch.Tensor:
    """Return parameters [D] of a checkpoint that `save_checkpoint` or a training of one has written."""
    state = GPT2LMHeadModel.from_pretrained(folder).state_dict()
    parts = []
    for name, shape in Transformer(setting).shapes.items():
        full = {"lm_head": "lm_head.weight"}.get(name, f"transformer.{name}" + ".weight" * ("." not in name))
        parts.append(state[full][: shape[0]].flatten())
    return torch.cat(parts)


def config(setting: Setting) -> GPT2Config:
    """Return the configuration: one position more than the lab uses, for the last token's own input."""
    return GPT2Config(
        vocab_size=setting.vocabulary + 1, n_positions=setting.length + 1, n_embd=setting.width,
        n_layer=setting.depth, n_head=setting.heads, activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, tie_word_embeddings=False, bos_token_id=None, eos_token_id=setting.vocabulary,
        pad_token_id=setting.vocabulary,
    )  # fmt: skip


def tokenizer(setting: Setting) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are words, separated by blanks."""
    vocabulary = {word: i for i, word in enumerate([*words(setting), STOP])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=STOP))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=STOP, pad_token=STOP, unk_token=STOP)


def numbers(setting: Setting, ids: list[int]) -> int:
    """Return the number of a response, whose tokens are its digits; a stop token is none."""
    assert len(ids) == setting.length and setting.vocabulary not in ids
    total = 0
    for token in ids:
        total = total * setting.vocabulary + token
    return total
