"""The losses of DPO: pure functions in one table, on log-probabilities that logps.py computes.

Notation: pi is the policy, pi_ref the reference, x a prompt, y+ / y- the chosen / rejected response,

    h = [log pi(y+|x) - log pi_ref(y+|x)] - [log pi(y-|x) - log pi_ref(y-|x)]
    q = sigmoid(beta h)    what the policy says:     P(y+ beats y-)
    p = sigmoid(margin)    what the rewards say:     margin = margin_scale (r(y+) - r(y-)), scaled in `rows.py` only
                           (+inf: a hard label, p = 1)

A new loss is a new function in `LOSSES`. Nothing but torch is imported here: the lab uses the same functions.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor]

# --- Losses: tensors of shape [pairs] in, one loss per pair out -------------------------------------------------


def sigmoid(h: Tensor, margin: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log q: DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. The margin is not used."""
    return -F.logsigmoid(beta * h)


def hinge(h: Tensor, margin: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """max(0, 1 - beta h): SLiC-HF (arXiv 2305.10425) on the log-ratios, as in RSO (arXiv 2309.06657)."""
    return F.relu(1 - beta * h)


def ipo(h: Tensor, margin: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """(h - 1 / (2 beta))^2: IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17; log-probabilities are sums."""
    return (h - 1 / (2 * beta)) ** 2


def kl(h: Tensor, margin: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """KL(q || p) = q log(q / p) + (1 - q) log((1 - q) / (1 - p)), as `kl` in RLHFlow, without its clamps."""
    a = beta * h
    return F.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(margin)) + F.sigmoid(-a) * (
        F.logsigmoid(-a) - F.logsigmoid(-margin)
    )


def rev_kl(h: Tensor, margin: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """-p log q - (1 - p) log(1 - q), the paper's loss: KL(p || q) plus the entropy of p, a constant in pi.

    It is the cross-entropy with soft labels. As margin -> +inf it becomes `sigmoid`.
    """
    return -F.sigmoid(margin) * F.logsigmoid(beta * h) - F.sigmoid(-margin) * F.logsigmoid(-beta * h)


def tv(h: Tensor, margin: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """|q - p|: the total variation between Bernoulli(q) and Bernoulli(p)."""
    return (F.sigmoid(beta * h) - F.sigmoid(margin)).abs()


def hellinger(h: Tensor, margin: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """[(sqrt q - sqrt p)^2 + (sqrt(1-q) - sqrt(1-p))^2] / 2: the squared Hellinger distance."""

    def root(x: Tensor) -> Tensor:  # sqrt(sigmoid(x)), whose gradient stays finite where sigmoid(x) underflows
        return torch.exp(F.logsigmoid(x) / 2)

    a = beta * h
    return ((root(a) - root(margin)) ** 2 + (root(-a) - root(-margin)) ** 2) / 2


def cross_entropy(h: Tensor, margin: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """log pi(y-|x) - log pi(y+|x), what RLHFlow calls `cross_entropy`: no reference, no margin, no lower bound.

    The cross-entropy between the rewards' p and the policy's q is `rev_kl`.
    """
    return rejected - chosen


def raft(h: Tensor, margin: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log pi(y+|x): supervised fine-tuning on the chosen response, RAFT (arXiv 2304.06767)."""
    return -chosen


LOSSES: dict[str, Loss] = {
    f.__name__: f for f in (sigmoid, hinge, ipo, kl, rev_kl, tv, hellinger, cross_entropy, raft)
}


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    margin: Tensor,
    beta: float,
    loss_type: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return one loss per pair, and what is worth logging about it.

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


def looks_at_margin(loss_type: str) -> bool:
    """Return whether a loss depends on the margin at all."""
    low, high = (LOSSES[loss_type](*_example(margin)) for margin in (0.0, 1.0))
    return not torch.equal(low, high)


def takes_hard_labels(loss_type: str) -> bool:
    """Return whether a loss and its gradient are finite at a margin of +inf, which stands for a drawn label."""
    h, *rest = _example(float("inf"))
    loss = LOSSES[loss_type](h.requires_grad_(), *rest).sum()
    if not loss.requires_grad:  # the loss does not look at h
        return bool(loss.isfinite())
    return bool(loss.isfinite() and torch.autograd.grad(loss, h)[0].isfinite().all())


def _example(margin: float) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    h = torch.tensor([-2.0, 0.0, 3.0])
    return h, torch.full_like(h, margin), 0.5, -h - 5, -2 * h - 9
