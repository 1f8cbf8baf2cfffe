"""Digests of tensors' bits that are made where the tensors are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, int64

# Columns of 64 bits, and bytes up to which there is no table.
COLUMNS, HASHED_BYTES = 1024, 1 << 16


def add_bits(digest: Any, bits: Tensor) -> None:
    """Adds bytes to a digest: few as they are, many as the sums of columns of 64-bit integers, none left out.

    A change of many is missed only where several elements of a column change so that their sum is the same.

    Args:
        digest: Of `hashlib`.
        bits: (n,) uint8, contiguous, on any device.
    """
    if bits.numel() <= HASHED_BYTES:
        digest.update(bits.cpu().numpy().data)
        return
    if bits.storage_offset() % 8:
        bits = bits.clone()
    table = bits[: len(bits) // (8 * COLUMNS) * 8 * COLUMNS].view(int64).view(-1, COLUMNS)
    digest.update(table.sum(0).cpu().numpy().data)
    digest.update(bits[8 * table.numel() :].cpu().numpy().data)
