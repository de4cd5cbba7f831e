"""The losses, the log-probabilities they are made of, and the trainer.

Notation: pi is the policy, pi_ref the reference, x a prompt, y+ / y- the chosen / rejected response,

    h = [log pi(y+|x) - log pi_ref(y+|x)] - [log pi(y-|x) - log pi_ref(y-|x)]
    q = sigmoid(beta h)    what the policy says:     P(y+ beats y-)
    p = sigmoid(margin)    what the rewards say:     margin = margin_scale (r(y+) - r(y-)), scaled in `rows.py` only

A new loss is a new function in `LOSSES`.
"""

import inspect
import math
from collections.abc import Callable
from types import MethodType

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from common.cli import UserError

# --- Losses: tensors of shape [pairs] in, one loss per pair out -------------------------------------------------


def sigmoid(h, margin, beta, chosen, rejected):
    """-log q: DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. The margin is not used."""
    return -F.logsigmoid(beta * h)


def hinge(h, margin, beta, chosen, rejected):
    """max(0, 1 - beta h): SLiC-HF (arXiv 2305.10425) on the log-ratios, as in RSO (arXiv 2309.06657)."""
    return F.relu(1 - beta * h)


def ipo(h, margin, beta, chosen, rejected):
    """(h - 1 / (2 beta))^2: IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17; log-probabilities are sums."""
    return (h - 1 / (2 * beta)) ** 2


def kl(h, margin, beta, chosen, rejected):
    """KL(q || p) = q log(q / p) + (1 - q) log((1 - q) / (1 - p)), as `kl` in RLHFlow, without its clamps."""
    a = beta * h
    return F.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(margin)) + F.sigmoid(-a) * (
        F.logsigmoid(-a) - F.logsigmoid(-margin)
    )


def rev_kl(h, margin, beta, chosen, rejected):
    """-p log q - (1 - p) log(1 - q), the paper's loss: KL(p || q) plus the entropy of p, a constant in pi.

    It is the cross-entropy with soft labels. As margin -> +inf it becomes `sigmoid`.
    """
    return -F.sigmoid(margin) * F.logsigmoid(beta * h) - F.sigmoid(-margin) * F.logsigmoid(-beta * h)


def tv(h, margin, beta, chosen, rejected):
    """|q - p|: the total variation between Bernoulli(q) and Bernoulli(p)."""
    return (F.sigmoid(beta * h) - F.sigmoid(margin)).abs()


def hellinger(h, margin, beta, chosen, rejected):
    """[(sqrt q - sqrt p)^2 + (sqrt(1-q) - sqrt(1-p))^2] / 2: the squared Hellinger distance."""

    def root(x):  # sqrt(sigmoid(x)), whose gradient stays finite where sigmoid(x) underflows
        return torch.exp(F.logsigmoid(x) / 2)

    a = beta * h
    return ((root(a) - root(margin)) ** 2 + (root(-a) - root(-margin)) ** 2) / 2


def cross_entropy(h, margin, beta, chosen, rejected):
    """log pi(y-|x) - log pi(y+|x), what RLHFlow calls `cross_entropy`: no reference, no margin, no lower bound.

    The cross-entropy between the rewards' p and the policy's q is `rev_kl`.
    """
    return rejected - chosen


def raft(h, margin, beta, chosen, rejected):
    """-log pi(y+|x): supervised fine-tuning on the chosen response, RAFT (arXiv 2304.06767)."""
    return -chosen


LOSSES: dict[str, Callable] = {
    f.__name__: f for f in (sigmoid, hinge, ipo, kl, rev_kl, tv, hellinger, cross_entropy, raft)
}


def preference_loss(chosen, rejected, ref_chosen, ref_rejected, margin, beta: float, loss_type: str):
    """One loss per pair, and what is worth logging about it.

    Args:
        chosen, rejected: [pairs], log pi(y|x), summed over the response's tokens.
        ref_chosen, ref_rejected: [pairs], the same under the reference.
        margin: [pairs], scaled reward differences.

    Returns:
        (losses [pairs], {name: detached [pairs]}); rewards/* are the implicit rewards beta log(pi / pi_ref).
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    losses = LOSSES[loss_type](h, margin, beta, chosen, rejected)
    metrics = {
        "rewards/chosen": beta * (chosen - ref_chosen),
        "rewards/rejected": beta * (rejected - ref_rejected),
        "rewards/accuracies": (h > 0).float(),
        "rewards/margins": beta * h,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    return losses, {name: value.detach() for name, value in metrics.items()}


# --- Log-probabilities of responses -----------------------------------------------------------------------------

CHUNK_BYTES = 2**27  # of float32 logits alive at a time


def token_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[labels] in float32: logits [N, V] of any float type, labels [N] -> [N].

    Only `CHUNK_BYTES` of float32 logits exist at a time, in the backward pass too (each chunk is computed again).
    """

    def chunk_logps(part, label):
        part = part.float()
        return part.gather(-1, label[:, None]).squeeze(-1) - part.logsumexp(-1)

    rows = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    chunks = zip(logits.split(rows), labels.split(rows), strict=True)
    return torch.cat([checkpoint(chunk_logps, part, label, use_reentrant=False) for part, label in chunks])


def _response_logps(self, input_ids, attention_mask, response_mask, **options) -> torch.Tensor:
    """Stands in for a causal model's forward: [S, T] ids and masks -> [S] summed response log-probabilities.

    Logits are asked for only in columns from which some row's response token is predicted.
    """
    columns = response_mask[:, 1:].any(dim=0).nonzero().squeeze(-1)
    logits = self.logits_forward(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=columns, use_cache=False
    ).logits
    labels, mask = input_ids[:, 1:][:, columns], response_mask[:, 1:][:, columns]
    logps = token_logps(logits.flatten(0, 1), labels.flatten()).view_as(labels)
    return torch.where(mask, logps, 0.0).sum(-1)


def as_scorer(model: torch.nn.Module) -> torch.nn.Module:
    """Makes a causal model's forward return response log-probabilities (see `_response_logps`).

    The work is done inside `forward` because wrappers (DDP, ZeRO, autocast) act there: autocast would turn returned
    logits into float32, and a head that is called outside of the wrapper would find its ZeRO-3 shards not gathered.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"{type(model).__name__}: this architecture cannot restrict its logits (logits_to_keep)"
        )
    model.logits_forward = model.forward
    model.forward = MethodType(_response_logps, model)
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout to 0: pi and pi_ref must be the same function of their weights."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


# --- The trainer ------------------------------------------------------------------------------------------------


class DPOTrainer(Trainer):
    """`transformers.Trainer` on rows that carry margins and reference log-probabilities: there is no reference model.

    Args:
        beta, loss_type: see `preference_loss`.
        options: as for `Trainer`; `model` comes from `as_scorer`, batches from `rows.collate`.
    """

    # compute_loss returns the mean of its micro-batch, so the Trainer has to divide by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(self, beta: float, loss_type: str, **options) -> None:
        super().__init__(**options)
        self.beta, self.loss_type = beta, loss_type
        self._sums: dict[str, dict[str, torch.Tensor]] = {"": {}, "eval_": {}}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of a batch; chosen and rejected responses share one forward pass."""
        sequences = {name: inputs[name] for name in ("input_ids", "attention_mask", "response_mask")}
        chosen, rejected = model(**sequences).chunk(2)
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        losses, metrics = preference_loss(
            chosen, rejected, *reference, inputs["margin"], self.beta, self.loss_type
        )
        self._add(metrics, "" if model.training else "eval_")
        return (losses.mean(), metrics) if return_outputs else losses.mean()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of an evaluation batch; nothing else is kept."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _add(self, metrics: dict[str, torch.Tensor], prefix: str) -> None:
        sums = self._sums[prefix]
        for name, values in {**metrics, "pairs": torch.ones_like(metrics["logps/chosen"])}.items():
            sums[name] = sums.get(name, 0.0) + values.double().sum()

    def _means(self, prefix: str) -> dict[str, float]:
        """Means over all pairs of all processes since the last call."""
        sums, self._sums[prefix] = self._sums[prefix], {}
        if not sums:
            return {}
        total = self.accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()
        by_name = dict(zip(sums, total, strict=True))
        pairs = by_name.pop("pairs")
        return {prefix + name: value / pairs for name, value in by_name.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means to what is logged; stops at a loss that is not a number."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise UserError(
                    f"step {self.state.global_step}: the loss is {logs['loss']}; try a lower --learning_rate"
                )
            logs.update(self._means(""))
        elif "eval_loss" in logs:
            logs.update(self._means("eval_"))
        super().log(logs, start_time)
