"""The losses and the trainer; the log-probabilities they are made of come from response_logps.py.

Notation: pi is the policy, pi_ref the reference, x a prompt, y+ / y- the chosen / rejected response,

    h = [log pi(y+|x) - log pi_ref(y+|x)] - [log pi(y-|x) - log pi_ref(y-|x)]
    q = sigmoid(beta h)    what the policy says:     P(y+ beats y-)
    p = sigmoid(margin)    what the rewards say:     margin = margin_scale (r(y+) - r(y-)), scaled in `rows.py` only

A new loss is a new function in `LOSSES`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import Trainer

from common.cli import UserError
from dpo_iteration.response_logps import SEQUENCES, forms_agree

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


# --- The trainer ------------------------------------------------------------------------------------------------


class DPOTrainer(Trainer):
    """`transformers.Trainer` on rows that carry margins and reference log-probabilities: there is no reference model.

    Args:
        beta, loss_type: see `preference_loss`.
        share: whether prefixes are shared (prefixes.py), as far as the first pair bears it out.
        options: as for `Trainer`; `model` comes from `as_scorer`, batches from `rows.collate`.
    """

    # compute_loss returns the mean of its micro-batch, so the Trainer has to divide by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(self, beta: float, loss_type: str, share: bool, **options) -> None:
        super().__init__(**options)
        self.beta, self.loss_type = beta, loss_type
        self.share = None if share else False  # None: not decided yet
        self._sums: dict[str, dict[str, torch.Tensor]] = {"": {}, "eval_": {}}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of a batch; chosen and rejected responses share one forward pass."""
        if self.share is None:
            first = self._prepare_inputs(self.data_collator(self.train_dataset[:1]))
            self.share = forms_agree(model, first, self.args.bf16)
        sequences = {name: inputs[name] for name in SEQUENCES}
        chosen, rejected = model(**sequences, share=self.share).chunk(2)
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        losses, metrics = preference_loss(chosen, rejected, *reference, inputs["margin"], self.beta, self.loss_type)
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
