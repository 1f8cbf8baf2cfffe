"""The language head, and the cross-entropy over a vocabulary that is too wide to keep.

Logits of 2,048 positions over 256,000 words are 2 GB in fp32, and as much again for their gradient. The loss here
goes over the positions a chunk at a time and keeps no logits: the backward pass makes them again (one more matrix
product). Everything happens inside one call of the module, so that sharded training gathers the weight once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_ELEMENTS = 1 << 27  # logits alive at a time: 512 MB in fp32


class _SummedCrossEntropy(torch.autograd.Function):
    """sum over n of -log softmax(hidden W^T)[n, target[n]], logits in the compute dtype, softmax in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, target)
        ctx.dtype, ctx.rows = dtype, rows
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        w = weight.to(dtype)
        for h, t in zip(hidden.split(rows), target.split(rows), strict=True):
            total += F.cross_entropy((h.to(dtype) @ w.t()).to(wide), t, reduction="sum")
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        hidden, weight, target = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        w = weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # fp32 sums: many chunks in bf16 would lose the small ones
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            h = hidden[part].to(ctx.dtype)
            p = (h @ w.t()).to(torch.promote_types(ctx.dtype, torch.float32)).softmax(-1)
            p[torch.arange(len(p), device=p.device), target[part]] -= 1
            p = (p * grad).to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = p @ w
            if grad_weight is not None:
                grad_weight += p.t() @ h
        return grad_hidden, grad_weight.to(weight.dtype) if grad_weight is not None else None, None, None, None


class LanguageHead(nn.Linear):
    """Linear without bias: hidden states -> logits; with targets -> their summed cross-entropy."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, hidden: Tensor, target: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden: (..., D); with `target` (N, D).
            target: (N,) word ids, all of them learnt.

        Returns:
            Logits (..., V), or the summed cross-entropy, a scalar in fp32 (0 for N = 0, still part of the graph).
        """
        if target is None:
            return super().forward(hidden)
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        rows = max(1, CHUNK_ELEMENTS // self.out_features)
        with torch.autocast(kind, enabled=False):
            return _SummedCrossEntropy.apply(hidden, self.weight, target, dtype, rows)
