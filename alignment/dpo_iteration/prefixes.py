"""One forward pass over the distinct prefixes of a batch: what sequences have in common is computed once.

In a causal model the state at a token depends on that token and on those before it. Where sequences begin alike (two
responses to one prompt, all prompts of one chat template) their states are the same numbers. So the model runs on
one row of the N tokens that end a distinct prefix: every layer that works on single tokens (embedding, projections,
MLP, norms, head: nearly all of the work) sees each of them once, and no padding. Only in the attention are queries,
keys and values spread to the S sequences of length T, for transformers' own `sdpa`, which sees there exactly what it
would see in a padded batch, sliding windows included.

The model must mix tokens nowhere else than in transformers' attention interface: see `refusal`.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHARED = "sdpa_on_shared_prefixes"  # its name as an `attn_implementation`


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Where the N distinct prefixes of a batch of S sequences, padded on the right to T tokens, are.

    Attributes:
        index: [S, T], the number of the prefix that ends at each token; in the padding that of any.
        place: [N], of each prefix, the first of the S x T tokens at which it ends.
        mask: sdpa's mask for the sequences, [S, 1, T, T], or None: plainly causal. Set inside of the model.
    """

    index: torch.Tensor
    place: torch.Tensor
    mask: torch.Tensor | None = None


def find_prefixes(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Prefixes:
    """The distinct prefixes of sequences [S, T], in the order in which they occur; padding stands on the right."""
    ids = input_ids.where(attention_mask.bool(), -1)  # padding is like no token
    alike = (ids[:, None] == ids).cumprod(-1, dtype=torch.uint8)  # [S, S, T]: up to and with a column
    first = alike.argmax(1)  # [S, T]: the first sequence that begins so (argmax takes the first of equals)
    own = torch.arange(len(input_ids), device=input_ids.device)[:, None]
    distinct = (first == own) & attention_mask.bool()
    number = distinct.flatten().cumsum(0).view_as(distinct) - 1
    return Prefixes(index=number.gather(0, first), place=distinct.flatten().nonzero().squeeze(-1))


_current: ContextVar[Prefixes | None] = ContextVar("prefixes of the batch in the model", default=None)


@contextlib.contextmanager
def sharing(prefixes: Prefixes) -> Iterator[None]:
    """Inside, a model with the attention `SHARED` takes its row of tokens for these prefixes."""
    token = _current.set(prefixes)
    try:
        yield
    finally:
        _current.reset(token)


def _mask(*, batch_size, q_length, kv_length, attention_mask, **options) -> Prefixes:
    """Stands in for `sdpa_mask`: the mask of the spread sequences and, with it, how they are spread.

    It travels through the layers as their `attention_mask`, also when checkpointed layers are computed again.
    Padding needs no mask: it stands behind all real tokens, which do not look there.
    """
    prefixes = _current.get()
    sequences, length = prefixes.index.shape
    mask = sdpa_mask(batch_size=sequences, q_length=length, kv_length=length, attention_mask=None, **options)
    return dataclasses.replace(prefixes, mask=mask)


def _attention(module, query, key, value, attention_mask: Prefixes, **options):
    """Stands in for `sdpa_attention_forward`: [1, heads, N, size] each in, [1, N, heads, size] out."""
    prefixes = attention_mask

    def spread(states):
        # index_select: its backward pass is several times faster than that of states[index]
        rows = states.transpose(1, 2)[0].index_select(0, prefixes.index.flatten())
        return rows.view(*prefixes.index.shape, *rows.shape[1:]).transpose(1, 2)

    output, weights = sdpa_attention_forward(
        module, spread(query), spread(key), spread(value), prefixes.mask, **options
    )
    return output.flatten(0, 1).index_select(0, prefixes.place)[None], weights


AttentionInterface.register(SHARED, _attention)
AttentionMaskInterface.register(SHARED, _mask)


def refusal(model) -> str | None:
    """Why prefixes cannot be shared in this model, as far as its class and configuration say; None: nothing does."""
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    reasons = {
        f"attn_implementation is {config._attn_implementation}, not sdpa": (
            config._attn_implementation not in ("sdpa", SHARED)
        ),
        f"{type(model).__name__} carries a state from token to token": model._is_stateful,
        f"{type(model).__name__} has layers of type {', '.join(sorted(others))}": bool(others),
        f"{type(model).__name__} does not use transformers' attention interface": (not model.is_backend_compatible()),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
