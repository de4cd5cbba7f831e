"""A causal model whose forward pass returns log-probabilities of responses, one number per sequence.

Two forms give the same numbers. Padded: every sequence on its own. Shared: one forward pass over the distinct
prefixes of a batch, so that what sequences have in common is computed once.

In a causal model the state at a token depends on that token and on those before it. Where sequences begin alike (two
responses to one prompt, all prompts of one chat template) their states are the same numbers. So the model runs on
one row of the N tokens that end a distinct prefix. Every layer that works on single tokens sees each of them once,
and no padding: embedding, projections, MLP, norms, head, which is nearly all of the work. Only in the attention are
queries, keys and values spread to the S sequences of length T, for transformers' own `sdpa`. It sees there exactly
what it would see in a padded batch, sliding windows included.

The model must mix tokens nowhere else than in transformers' attention interface: see `refusal`.

In bfloat16 the gradients of shared states are sums whose order the GPU chooses: with more than two sequences that
share a prefix, two runs differ in the last bits. `--share_prefixes False` is reproducible to the bit.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common.cli import UserError, first_line
from dpo_iteration.distributed import say

CHUNK_BYTES = 2**25  # of float32 copies of the logits that are alive at a time
SEQUENCES = ("input_ids", "attention_mask", "response_mask")  # what the model reads of a batch
SHARED = "sdpa_on_shared_prefixes"  # the shared form's name as an `attn_implementation`

# --- Shared prefixes --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Where the N distinct prefixes of a batch of S sequences, padded on the right to T tokens, are.

    Attributes:
        index: [S, T], the number of the prefix that ends at each token; in the padding that of any.
        first: [N], of each prefix, the first of the S x T tokens at which it ends.
        mask: sdpa's mask for the sequences, [S, 1, T, T], or None: plainly causal. Set inside of the model.
    """

    index: Tensor
    first: Tensor
    mask: Tensor | None = None


def find_prefixes(input_ids: Tensor, attention_mask: Tensor) -> Prefixes:
    """Return the distinct prefixes of sequences [S, T] in the order of their occurrence; padding is on the right."""
    ids = input_ids.where(attention_mask.bool(), -1)  # padding is like no token
    alike = (ids[:, None] == ids).cumprod(-1, dtype=torch.uint8)  # [S, S, T]: up to and with a column
    owner = alike.argmax(1)  # [S, T]: the first sequence that begins so (argmax takes the first of equals)
    own = torch.arange(len(input_ids), device=input_ids.device)[:, None]
    distinct = (owner == own) & attention_mask.bool()
    number = distinct.flatten().cumsum(0).view_as(distinct) - 1
    return Prefixes(index=number.gather(0, owner), first=distinct.flatten().nonzero().squeeze(-1))


_current: ContextVar[Prefixes | None] = ContextVar("prefixes of the batch in the model", default=None)


@contextlib.contextmanager
def sharing(prefixes: Prefixes) -> Iterator[None]:
    """Make a model with the attention `SHARED` take its row of tokens for these prefixes."""
    token = _current.set(prefixes)
    try:
        yield
    finally:
        _current.reset(token)


def _mask(*, batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None, **options) -> Prefixes:
    """Stand in for `sdpa_mask`: return the mask of the spread sequences and, with it, how they are spread.

    It travels through the layers as their `attention_mask`, also when checkpointed layers are computed again.
    Padding needs no mask: it stands behind all real tokens, which do not look there.
    """
    prefixes = _current.get()
    sequences, length = prefixes.index.shape
    mask = sdpa_mask(batch_size=sequences, q_length=length, kv_length=length, attention_mask=None, **options)
    return dataclasses.replace(prefixes, mask=mask)


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Prefixes, **options
) -> tuple[Tensor, None]:
    """Stand in for `sdpa_attention_forward`: [1, heads, N, size] each in, [1, N, heads, size] out."""
    prefixes = attention_mask

    def spread(states: Tensor) -> Tensor:
        # [1, heads, N, size] -> [S, heads, T, size]
        # index_select: its backward pass is several times faster than that of states[index]
        rows = states.transpose(1, 2)[0].index_select(0, prefixes.index.flatten())
        return rows.view(*prefixes.index.shape, *rows.shape[1:]).transpose(1, 2)

    states, precision = (query, key, value), contextlib.nullcontext()
    if query.device.type == "cpu":
        # torch's backward pass of attention in bfloat16 takes twice as long on a CPU as that in float32.
        states, precision = (x.float() for x in states), torch.autocast("cpu", enabled=False)
    with precision:
        output, weights = sdpa_attention_forward(module, *map(spread, states), prefixes.mask, **options)
    return output.flatten(0, 1).index_select(0, prefixes.first)[None].to(query.dtype), weights


AttentionInterface.register(SHARED, _attention)
AttentionMaskInterface.register(SHARED, _mask)


def refusal(model: torch.nn.Module) -> str | None:
    """Return why class or configuration forbid to share prefixes in this model; None if they do not."""
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


# --- Log-probabilities ---------------------------------------------------------------------------------------


class _TokenLogps(torch.autograd.Function):
    """The gradient is written down: autograd's would pass over the logits' memory twice as often."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, rows: int) -> Tensor:
        normalizers = torch.cat([part.float().logsumexp(-1) for part in logits.split(rows)])
        ctx.save_for_backward(logits, labels, normalizers)
        ctx.rows = rows
        return logits.gather(-1, labels[:, None]).squeeze(-1).float() - normalizers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return d log p(label) / d logits = [label] - p."""
        logits, labels, normalizers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        parts = zip(*(x.split(ctx.rows) for x in (gradient, logits, labels, normalizers, grad)), strict=True)
        for out, part, label, normalizer, g in parts:
            chunk = (part.float() - normalizer[:, None]).exp_().mul_(-g[:, None])
            out.copy_(chunk.scatter_add_(-1, label[:, None], g[:, None]))
        return gradient, None, None


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log softmax(logits)[labels] in float32: logits [N, V] of any float type, labels [N] -> [N].

    Only `CHUNK_BYTES` of float32 copies of the logits exist at a time, in the backward pass too.
    """
    return _TokenLogps.apply(logits, labels, max(1, CHUNK_BYTES // (4 * logits.shape[-1])))


def _padded(forward: Callable, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    """Run every sequence on its own. Logits only in columns from which some row's response token is predicted."""
    columns = response_mask[:, 1:].any(dim=0).nonzero().squeeze(-1)
    logits = forward(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=columns, use_cache=False
    ).logits
    labels, mask = input_ids[:, 1:][:, columns], response_mask[:, 1:][:, columns]
    logps = token_logps(logits.flatten(0, 1), labels.flatten()).view_as(labels)
    return torch.where(mask, logps, 0.0).sum(-1)


def _shared(forward: Callable, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    """Run every distinct prefix once. Logits only where a token is predicted."""
    prefixes = find_prefixes(input_ids, attention_mask)
    tokens = input_ids.flatten()[prefixes.first][None]
    predicted = response_mask[:, 1:]
    with sharing(prefixes):
        logits = forward(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            position_ids=(prefixes.first % input_ids.shape[1])[None],
            logits_to_keep=prefixes.index[:, :-1][predicted],
            use_cache=False,
        ).logits[0]
    logps = token_logps(logits, input_ids[:, 1:][predicted])
    return logps.new_zeros(predicted.shape).masked_scatter(predicted, logps).sum(-1)


def _response_logps(
    self: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    share: bool = False,
    exact: bool = False,
    **options,
) -> Tensor:
    """Stand in for a causal model's forward: [S, T] ids and masks -> [S] summed response log-probabilities.

    Args:
        share: which of the two forms runs.
        exact: whether it runs in float32, whatever the weights and autocast are.
    """
    # Not set back afterwards: with gradient checkpointing the backward pass runs layers again.
    if (self.config._attn_implementation == SHARED) != share:
        self.set_attn_implementation(SHARED if share else "sdpa")
    form = _shared if share else _padded
    with _in_float32(self, input_ids.device.type) if exact else contextlib.nullcontext():
        return form(self.logits_forward, input_ids, attention_mask, response_mask)


def _can_be_float32(parameter: Tensor) -> bool:
    # ZeRO-3 and FSDP keep accounts of their shards' memory; what is quantized has no other form.
    return parameter.is_floating_point() and not hasattr(parameter, "ds_id") and type(parameter.data) is Tensor


@contextlib.contextmanager
def _in_float32(model: torch.nn.Module, device: str) -> Iterator[None]:
    """Make a model compute in float32: the weights of one layer at a time, so that no copy of the model is needed."""
    handles, kept = [], {}

    def widen(module: torch.nn.Module, *_) -> None:
        for parameter in module.parameters(recurse=False):
            if _can_be_float32(parameter) and parameter.dtype != torch.float32:
                kept[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def narrow(module: torch.nn.Module, *_) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in kept:
                parameter.data = kept.pop(parameter)

    for module in model.modules():
        if module is not model and next(module.parameters(recurse=False), None) is not None:
            handles += [
                module.register_forward_pre_hook(widen),
                module.register_forward_hook(narrow, always_call=True),
            ]
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for handle in handles:
            handle.remove()


def as_scorer(model: torch.nn.Module) -> torch.nn.Module:
    """Make a causal model's forward return response log-probabilities (see `_response_logps`).

    The work is done inside `forward` because wrappers (DDP, ZeRO, autocast) act there: autocast would turn returned
    logits into float32, and a head that is called outside of the wrapper would find its ZeRO-3 shards not gathered.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UserError(f"{type(model).__name__}: this architecture cannot restrict its logits (logits_to_keep)")
    model.logits_forward = model.forward
    model.forward = MethodType(_response_logps, model)
    return model


def may_share(model: torch.nn.Module) -> bool:
    """Return whether class and configuration of a bare scorer allow shared prefixes; if not, one line says why."""
    reason = refusal(model)
    return reason is None or _pads(reason)


def forms_agree(model: torch.nn.Module, batch: dict[str, Tensor]) -> bool:
    """Return whether both forms give the same numbers on a small batch; if not, one line says so.

    An architecture may mix tokens where neither class nor configuration tell. They are compared in float32, since
    bfloat16's rounding would hide errors of whole nats.

    Args:
        model: a scorer, or what wraps it.
    """
    sequences = {name: batch[name] for name in SEQUENCES}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            padded, shared = (model(**sequences, share=share, exact=True).double() for share in (False, True))
    except Exception as error:  # whatever a model makes of a row that it was not written for
        return _pads(first_line(error))
    finally:
        model.train(training)
    off = (shared - padded).abs()
    limit = 1e-3 * (1 + padded.abs())
    if any(p.dtype != torch.float32 and not _can_be_float32(p) for p in model.parameters()):
        # Weights that stay rounded: errors of 0.1 nats per token, which add up as a random walk does.
        limit = 0.1 * sequences["response_mask"].sum(1).double().sqrt()
    return bool((off <= limit).all()) or _pads(f"log-probabilities would be {off.max().item():.2g} nats off")


def _pads(reason: str) -> bool:
    say(f"sequences are padded, their common beginnings computed for each: {reason}")
    return False


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: pi and pi_ref must be the same function of their weights."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
