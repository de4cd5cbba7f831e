"""Log-probabilities of responses: a causal model whose forward pass returns them, one number a sequence."""

import inspect
from types import MethodType

import torch

from common.cli import UserError, first_line
from dpo_iteration.distributed import say
from dpo_iteration.prefixes import SHARED, find_prefixes, refusal, sharing

CHUNK_BYTES = 2**25  # of float32 copies of the logits that are alive at a time
SEQUENCES = ("input_ids", "attention_mask", "response_mask")  # what the model reads of a batch


class _TokenLogps(torch.autograd.Function):
    """The gradient is written down: autograd's would pass over the logits' memory twice as often."""

    @staticmethod
    def forward(ctx, logits, labels, rows):
        normalizers = torch.cat([part.float().logsumexp(-1) for part in logits.split(rows)])
        ctx.save_for_backward(logits, labels, normalizers)
        ctx.rows = rows
        return logits.gather(-1, labels[:, None]).squeeze(-1).float() - normalizers

    @staticmethod
    def backward(ctx, grad):
        """d log p(label) / d logits = [label] - p."""
        logits, labels, normalizers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        parts = zip(*(x.split(ctx.rows) for x in (gradient, logits, labels, normalizers, grad)), strict=True)
        for out, part, label, normalizer, g in parts:
            chunk = (part.float() - normalizer[:, None]).exp_().mul_(-g[:, None])
            out.copy_(chunk.scatter_add_(-1, label[:, None], g[:, None]))
        return gradient, None, None


def token_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[labels] in float32: logits [N, V] of any float type, labels [N] -> [N].

    Only `CHUNK_BYTES` of float32 copies of the logits exist at a time, in the backward pass too.
    """
    return _TokenLogps.apply(logits, labels, max(1, CHUNK_BYTES // (4 * logits.shape[-1])))


def _padded(forward, input_ids, attention_mask, response_mask) -> torch.Tensor:
    """Every sequence on its own. Logits only in columns from which some row's response token is predicted."""
    columns = response_mask[:, 1:].any(dim=0).nonzero().squeeze(-1)
    logits = forward(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=columns, use_cache=False
    ).logits
    labels, mask = input_ids[:, 1:][:, columns], response_mask[:, 1:][:, columns]
    logps = token_logps(logits.flatten(0, 1), labels.flatten()).view_as(labels)
    return torch.where(mask, logps, 0.0).sum(-1)


def _shared(forward, input_ids, attention_mask, response_mask) -> torch.Tensor:
    """What sequences have in common is computed once, see prefixes.py. Logits only where a token is predicted."""
    prefixes = find_prefixes(input_ids, attention_mask)
    tokens = input_ids.flatten()[prefixes.place][None]
    predicted = response_mask[:, 1:]
    with sharing(prefixes):
        logits = forward(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            position_ids=(prefixes.place % input_ids.shape[1])[None],
            logits_to_keep=prefixes.index[:, :-1][predicted],
            use_cache=False,
        ).logits[0]
    logps = token_logps(logits, input_ids[:, 1:][predicted])
    return logps.new_zeros(predicted.shape).masked_scatter(predicted, logps).sum(-1)


def _response_logps(self, input_ids, attention_mask, response_mask, share=False, **options) -> torch.Tensor:
    """Stands in for a causal model's forward: [S, T] ids and masks -> [S] summed response log-probabilities."""
    # Not set back afterwards: with gradient checkpointing the backward pass runs layers again.
    if (self.config._attn_implementation == SHARED) != share:
        self.set_attn_implementation(SHARED if share else "sdpa")
    form = _shared if share else _padded
    return form(self.logits_forward, input_ids, attention_mask, response_mask)


def as_scorer(model: torch.nn.Module) -> torch.nn.Module:
    """Makes a causal model's forward return response log-probabilities (see `_response_logps`).

    The work is done inside `forward` because wrappers (DDP, ZeRO, autocast) act there: autocast would turn returned
    logits into float32, and a head that is called outside of the wrapper would find its ZeRO-3 shards not gathered.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UserError(f"{type(model).__name__}: this architecture cannot restrict its logits (logits_to_keep)")
    model.logits_forward = model.forward
    model.forward = MethodType(_response_logps, model)
    return model


def may_share(model: torch.nn.Module) -> bool:
    """Whether class and configuration of a bare scorer allow shared prefixes; if not, one line says why."""
    reason = refusal(model)
    return reason is None or _pads(reason)


def forms_agree(model: torch.nn.Module, batch: dict[str, torch.Tensor], bf16: bool) -> bool:
    """Whether both forms give the same numbers on a small batch; if not, one line says so.

    An architecture may mix tokens where neither class nor configuration tell.

    Args:
        model: a scorer, or what wraps it.
        bf16: whether numbers are only as exact as bfloat16.
    """
    sequences = {name: batch[name] for name in SEQUENCES}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            padded, shared = (model(**sequences, share=share) for share in (False, True))
    except Exception as error:  # whatever a model makes of a row that it was not written for
        return _pads(first_line(error))
    finally:
        model.train(training)
    off = ((shared - padded).abs() / (1 + padded.abs())).max().item()
    return off <= (0.05 if bf16 else 1e-3) or _pads(f"log-probabilities would be {off:.1%} off")


def _pads(reason: str) -> bool:
    say(f"sequences are padded, their common beginnings computed for each: {reason}")
    return False


def disable_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout to 0: pi and pi_ref must be the same function of their weights."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
