"""The language head, and the cross-entropy over a vocabulary that is too wide to keep.

Logits of 2,048 positions over 256,000 words are 2 GB in fp32, and as much again for their gradient. The loss here
goes over the positions a chunk at a time and keeps no logits. Three ways (`train.loss_kernel`), equal in real
arithmetic:

- `torch`: the backward pass makes the logits again (three matrix products a chunk);
- `fused`: the forward pass makes the gradient at once (two; the idea of Liger's kernel and of
  github.com/mgmalek/efficient_cross_entropy), and holds it until the backward pass: that of the hidden states, and
  where the head is trained that of its weight, 4 V D bytes;
- `liger`: the same by Liger's Triton kernel (arXiv 2410.10989), on a GPU.

Everything happens inside one call of the module, so that sharded training gathers the weight once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_ELEMENTS = 1 << 27  # logits alive at a time where no number of rows is given: 512 MB in fp32


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32: softmax and sums over a vocabulary need it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _LateCrossEntropy(torch.autograd.Function):
    """sum over n of -log softmax(hidden W^T)[n, target[n]], logits in the compute dtype, softmax in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, target)
        ctx.dtype, ctx.rows = dtype, rows
        w = weight.to(dtype)
        total = _wide(w.new_zeros(()))
        for h, t in zip(hidden.split(rows), target.split(rows), strict=True):
            total += F.cross_entropy(_wide(h.to(dtype) @ w.t()), t, reduction="sum")
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        hidden, weight, target = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        w = weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # fp32 sums: many chunks in bf16 would lose the small ones
        grad_weight = torch.zeros_like(weight, dtype=_wide(w[:0]).dtype) if needs_weight else None
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            h = hidden[part].to(ctx.dtype)
            p = _wide(h @ w.t()).softmax(-1)
            p[torch.arange(len(p), device=p.device), target[part]] -= 1
            p = p.mul_(grad).to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = p @ w
            if grad_weight is not None:
                grad_weight += p.t() @ h
        return grad_hidden, grad_weight.to(weight.dtype) if grad_weight is not None else None, None, None, None


class _EarlyCrossEntropy(torch.autograd.Function):
    """The same sum; its gradient is made beside it, and only multiplied in the backward pass.

    Not for fp16: what a loss scale is to save would have been rounded to zero before it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, dtype: torch.dtype, rows: int, is_learning: bool
    ) -> Tensor:
        needs_hidden, needs_weight = (is_learning and needed for needed in ctx.needs_input_grad[:2])
        w = weight.to(dtype)
        total = _wide(w.new_zeros(()))
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=total.dtype) if needs_weight else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            h, t = hidden[part].to(dtype), target[part]
            p = _wide(h @ w.t()).log_softmax(-1)
            total += F.nll_loss(p, t, reduction="sum")
            if grad_hidden is None and grad_weight is None:
                continue
            p = p.exp_()
            p[torch.arange(len(p), device=p.device), t] -= 1
            p = p.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = p @ w
            if grad_weight is not None:
                grad_weight += p.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        found = [
            None if made is None else (_wide(made) * grad).to(dtype)
            for made, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return found[0], found[1], None, None, None, None


def _by_liger(hidden: Tensor, weight: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Liger's kernel; it takes chunks of its own, about as many elements of logits as the hidden states have."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # bias, class weights, ignored word, z-loss, smoothing, reduction, soft cap, whether z-loss is given back, and in
    # what the weight's gradient is summed
    settings = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)
    found = LigerFusedLinearCrossEntropyFunction.apply(hidden.to(dtype), weight.to(dtype), target, *settings)
    total: Tensor = found[0] if isinstance(found, tuple) else found
    return total.float()


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, kernel: str = "torch", chunk: int | None = None
) -> Tensor:
    """Summed cross-entropy of a linear head without its logits ever being whole; gradients to both.

    Under autocast the products are made in its dtype.

    Args:
        hidden: (N, D).
        weight: (V, D) of the head.
        target: (N,) word ids, all of them learnt.
        kernel: `torch`, `fused` or `liger`; see above.
        chunk: positions whose logits are alive together; None: as many as make 2^27 logits. `liger` chooses itself.

    Returns:
        A scalar, in fp32 at least (0 for N = 0, still part of the graph).
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    rows = chunk or max(1, CHUNK_ELEMENTS // len(weight))
    with torch.autocast(kind, enabled=False):
        if kernel == "liger" and len(target):
            return _by_liger(hidden, weight, target, dtype)
        if kernel == "fused":
            return _EarlyCrossEntropy.apply(hidden, weight, target, dtype, rows, torch.is_grad_enabled())
        return _LateCrossEntropy.apply(hidden, weight, target, dtype, rows)


class LanguageHead(nn.Linear):
    """Linear without bias: hidden states -> logits; with targets -> their summed cross-entropy.

    Attributes:
        kernel, chunk: how the loss is computed; see :func:`summed_cross_entropy`.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.kernel = "torch"
        self.chunk: int | None = None

    def forward(self, hidden: Tensor, target: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden: (..., D); with `target` (N, D).
            target: (N,) word ids, all of them learnt.

        Returns:
            Logits (..., V), or the summed cross-entropy.
        """
        if target is None:
            return super().forward(hidden)
        return summed_cross_entropy(hidden, self.weight, target, kernel=self.kernel, chunk=self.chunk)
