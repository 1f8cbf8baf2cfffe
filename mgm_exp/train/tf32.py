"""``train.tf32``: whether fp32 products on a GPU may read their inputs with TF32's 10 bits of mantissa.

Products of bf16 and fp16 tensors are not touched. Under bf16 that leaves patch info mining and whatever else stays in
fp32; with ``train.precision=fp32`` it is every product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def tf32(is_allowed: bool) -> Iterator[None]:
    """One policy for matrix products and convolutions inside; outside, whatever was set before."""
    import torch

    # The older of torch's two interfaces: its compiler reads it, and fails where the newer one was set
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")
    torch.backends.cudnn.allow_tf32 = is_allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
