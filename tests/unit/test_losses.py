"""The DPO losses against scalar closed forms, their gradients, their limits, and real trl."""

import math

import pytest
import torch

from dpo_iteration import response_logps
from dpo_iteration.dpo import LOSSES, preference_loss
from dpo_iteration.response_logps import token_logps

BETA = 0.1
MODERATE = [-30.0, -3.0, -0.5, 0.0, 0.2, 4.0, 25.0]  # of h; margins are a third of it


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def scalar_loss(name: str, h: float, m: float, beta: float, chosen: float, rejected: float) -> float:
    """The textbook formula of each loss, in Python's own floats."""
    q, p, not_q, not_p = sig(beta * h), sig(m), sig(-beta * h), sig(-m)
    return {
        "sigmoid": lambda: -math.log(q),
        "hinge": lambda: max(0.0, 1 - beta * h),
        "ipo": lambda: (h - 1 / (2 * beta)) ** 2,
        "kl": lambda: q * math.log(q / p) + not_q * math.log(not_q / not_p),
        "rev_kl": lambda: -p * math.log(q) - not_p * math.log(not_q),
        "tv": lambda: abs(q - p),
        # one less the Bhattacharyya coefficient: the same distance, another formula
        "hellinger": lambda: 1 - math.sqrt(q * p) - math.sqrt(not_q * not_p),
        "cross_entropy": lambda: rejected - chosen,
        "raft": lambda: -chosen,
    }[name]()


def grid() -> tuple[torch.Tensor, ...]:
    """h, margin, chosen, rejected: every combination of MODERATE values, in float64."""
    h, m = torch.cartesian_prod(
        torch.tensor(MODERATE, dtype=torch.float64), torch.tensor(MODERATE, dtype=torch.float64) / 3
    ).unbind(-1)
    return h, m, -h.abs() - 5, -h.abs() - 5 - h


def test_table_holds_the_nine_losses():
    assert list(LOSSES) == [
        "sigmoid",
        "hinge",
        "ipo",
        "kl",
        "rev_kl",
        "tv",
        "hellinger",
        "cross_entropy",
        "raft",
    ]
    assert all(function.__doc__ for function in LOSSES.values())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [BETA, 1.0])
def test_equals_closed_form(name, beta):
    h, m, chosen, rejected = grid()
    got = LOSSES[name](h, m, beta, chosen, rejected)
    wanted = [
        scalar_loss(name, *row[:2], beta, *row[2:])
        for row in zip(h.tolist(), m.tolist(), chosen.tolist(), rejected.tolist(), strict=True)
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
    monkeypatch.setattr(response_logps, "CHUNK_BYTES", 4 * 11 * 5)  # five rows at a time
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
