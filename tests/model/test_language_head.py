"""The chunked cross-entropy against the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mgm_exp.model import head
from mgm_exp.model.head import LanguageHead


@pytest.fixture(params=[1, 3, 1000], ids=["one row a chunk", "uneven chunks", "one chunk"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", request.param * 50)


def make(n: int = 7) -> tuple[LanguageHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return LanguageHead(16, 50), torch.randn(n, 16, requires_grad=True), torch.randint(0, 50, (n,))


def test_loss_and_gradients_equal_plain_cross_entropy(chunked: None) -> None:
    lm, hidden, target = make()
    total = lm(hidden, target)
    (total / 3).backward()
    ours = (total.detach(), hidden.grad.clone(), lm.weight.grad.clone())
    hidden.grad = lm.weight.grad = None
    plain = F.cross_entropy(F.linear(hidden, lm.weight), target, reduction="sum")
    (plain / 3).backward()
    for a, b in zip(ours, (plain.detach(), hidden.grad, lm.weight.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    lm, hidden, target = make()
    lm.weight.requires_grad_(False)
    lm(hidden, target).backward()
    assert lm.weight.grad is None and hidden.grad is not None


def test_nothing_to_learn_is_zero_and_stays_in_the_graph() -> None:
    lm, hidden, target = make(0)
    total = lm(hidden, target)
    total.backward()
    assert total.item() == 0.0
    assert lm.weight.grad is not None and not lm.weight.grad.any()


def test_loss_scaling_reaches_the_gradient_before_it_is_rounded() -> None:
    # fp16 gradients of rare words are below its smallest number; scaling must come first
    lm, hidden, target = make()
    lm, hidden = lm.half(), hidden.detach().half().requires_grad_()
    (lm(hidden, target) * 1024).backward()
    scaled = hidden.grad.float() / 1024
    exact = hidden.detach().float().requires_grad_()
    F.cross_entropy(F.linear(exact, lm.weight.float()), target, reduction="sum").backward()
    torch.testing.assert_close(scaled, exact.grad, rtol=2e-2, atol=2e-3)


def test_autocast_multiplies_in_bf16_and_sums_in_fp32() -> None:
    lm, hidden, target = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = lm(hidden, target)
        plain = F.cross_entropy(F.linear(hidden, lm.weight).float(), target, reduction="sum")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, plain, rtol=1e-6, atol=1e-6)
    total.backward()
    assert hidden.grad.dtype == torch.float32
