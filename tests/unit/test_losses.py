"""The DPO losses against scalar closed forms, their gradients, their limits, and real trl."""

import math

import pytest
import torch

from dpo_iteration import logps
from dpo_iteration.logps import token_logps
from dpo_iteration.losses import LOSSES, looks_at_margin, preference_loss, takes_hard_labels

BETA = 0.1
MODERATE = [-30.0, -3.0, -0.5, 0.0, 0.2, 4.0, 25.0]  # of h; margins are a third of it


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# The textbook formulas of the published losses, in Python's own floats. A new loss may bring one; it need not.
PUBLISHED = {
    "sigmoid": lambda p, not_p, q, not_q, h, beta, chosen, rejected: -math.log(q),
    "hinge": lambda p, not_p, q, not_q, h, beta, chosen, rejected: max(0.0, 1 - beta * h),
    "ipo": lambda p, not_p, q, not_q, h, beta, chosen, rejected: (h - 1 / (2 * beta)) ** 2,
    "kl": lambda p, not_p, q, not_q, *_: q * math.log(q / p) + not_q * math.log(not_q / not_p),
    "rev_kl": lambda p, not_p, q, not_q, *_: -p * math.log(q) - not_p * math.log(not_q),
    "tv": lambda p, not_p, q, not_q, *_: abs(q - p),
    # one less the Bhattacharyya coefficient: the same distance, another formula
    "hellinger": lambda p, not_p, q, not_q, *_: 1 - math.sqrt(q * p) - math.sqrt(not_q * not_p),
    "cross_entropy": lambda p, not_p, q, not_q, h, beta, chosen, rejected: rejected - chosen,
    "raft": lambda p, not_p, q, not_q, h, beta, chosen, rejected: -chosen,
}


def grid() -> tuple[torch.Tensor, ...]:
    """h, margin, chosen, rejected: every combination of MODERATE values, in float64."""
    h, m = torch.cartesian_prod(
        torch.tensor(MODERATE, dtype=torch.float64), torch.tensor(MODERATE, dtype=torch.float64) / 3
    ).unbind(-1)
    return h, m, -h.abs() - 5, -h.abs() - 5 - h


def test_every_loss_is_called_by_its_name_and_says_what_it_is():
    assert all(name == function.__name__ and function.__doc__ for name, function in LOSSES.items())


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("beta", [BETA, 1.0])
def test_equals_closed_form(name, beta):
    h, m, chosen, rejected = grid()
    got = LOSSES[name](h, m, beta, chosen, rejected)
    rows = zip(h.tolist(), m.tolist(), chosen.tolist(), rejected.tolist(), strict=True)
    wanted = [
        PUBLISHED[name](sig(m), sig(-m), sig(beta * h), sig(-beta * h), h, beta, *logps) for h, m, *logps in rows
    ]
    assert got.shape == h.shape
    assert got.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_equals_finite_differences(name):
    torch.manual_seed(0)
    margin = torch.randn(12, dtype=torch.float64) * 2
    reference = torch.randn(2, 12, dtype=torch.float64)

    def loss(chosen, rejected):
        return preference_loss(chosen, rejected, *reference, margin, 0.7, name)[0]

    inputs = [torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_far_out(name, dtype):
    """|beta h| and |margin| up to 300: losses and gradients are numbers."""
    far = torch.tensor([-300.0, -100.0, -89.0, -17.0, 0.0, 17.0, 89.0, 100.0, 300.0], dtype=dtype)
    a, margin = torch.cartesian_prod(far, far).unbind(-1)
    chosen = (a / BETA).requires_grad_()
    losses, _ = preference_loss(chosen, *torch.zeros(3, len(a), dtype=dtype), margin, BETA, name)
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(chosen.grad).all()


def test_divergences_are_zero_only_at_the_target():
    m = torch.linspace(-8, 8, 33, dtype=torch.float64)
    entropy = LOSSES["rev_kl"](m / BETA, m, BETA, m, m)
    for name in ("kl", "tv", "hellinger"):
        assert LOSSES[name](m / BETA, m, BETA, m, m).abs().max() < 1e-12
        assert LOSSES[name](m / BETA + 5, m, BETA, m, m).min() > 0
    assert (LOSSES["rev_kl"](m / BETA + 5, m, BETA, m, m) > entropy).all()


def test_rev_kl_gradient_is_target_minus_policy():
    """d/dh = beta (q - p): facts of the exact gradient of DPO with soft labels."""
    h, m, chosen, rejected = grid()
    h.requires_grad_()
    LOSSES["rev_kl"](h, m, BETA, chosen, rejected).sum().backward()
    wanted = BETA * (torch.sigmoid(BETA * h) - torch.sigmoid(m))
    assert torch.allclose(h.grad, wanted.detach(), atol=1e-12)


@pytest.mark.parametrize("margin, sign", [(60.0, 1), (-60.0, -1)])
def test_rev_kl_with_a_certain_target_is_sigmoid(margin, sign):
    h, _, chosen, rejected = grid()
    got = LOSSES["rev_kl"](h, torch.full_like(h, margin), BETA, chosen, rejected)
    wanted = LOSSES["sigmoid"](sign * h, None, BETA, chosen, rejected)
    assert torch.allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logps_in_chunks(monkeypatch, dtype):
    """Chunks of any size give the values and gradients of log_softmax over everything."""
    torch.manual_seed(0)
    logits = (torch.randn(23, 11) * 5).to(dtype).requires_grad_()
    labels = torch.randint(11, (23,))
    weights = torch.randn(23)
    whole = torch.log_softmax(logits.float(), -1)[torch.arange(23), labels]
    (whole * weights).sum().backward()
    wanted, logits.grad = logits.grad, None
    monkeypatch.setattr(logps, "CHUNK_BYTES", 4 * 11 * 5)  # five rows at a time
    chunked = token_logps(logits, labels)
    (chunked * weights).sum().backward()
    assert chunked.dtype == torch.float32
    assert torch.allclose(chunked, whole, atol=1e-6)
    assert torch.allclose(logits.grad.float(), wanted.float(), atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_rewards_are_logged_as_beta_log_ratios():
    chosen, rejected = torch.tensor([-1.0, -4.0]), torch.tensor([-3.0, -2.0])
    _, metrics = preference_loss(chosen, rejected, torch.zeros(2), torch.ones(2), torch.ones(2), 0.5, "tv")
    assert metrics["rewards/chosen"].tolist() == [-0.5, -2.0]
    assert metrics["rewards/rejected"].tolist() == [-2.0, -1.5]
    assert metrics["rewards/margins"].tolist() == [1.5, -0.5]
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", LOSSES)
def test_hard_labels_are_the_limit_of_large_margins(name):
    """Where a loss takes a margin of +inf it is the limit of growing margins; where not, there is no limit."""
    h, _, chosen, rejected = grid()
    limits = [LOSSES[name](h, torch.full_like(h, m), BETA, chosen, rejected) for m in (80.0, 160.0)]
    if takes_hard_labels(name):
        hard = LOSSES[name](h, torch.full_like(h, math.inf), BETA, chosen, rejected)
        assert torch.allclose(limits[1], hard, atol=1e-9)
    else:
        assert (limits[1] > limits[0] + 1e-3).any()


@pytest.mark.parametrize("name", LOSSES)
def test_which_losses_look_at_the_margin(name):
    """By two margins on a grid, and by the gradient: the margin enters or it does not."""
    h, m, chosen, rejected = grid()
    same = torch.equal(LOSSES[name](h, m, BETA, chosen, rejected), LOSSES[name](h, m + 1, BETA, chosen, rejected))
    assert looks_at_margin(name) is not same
