"""Dropout's random numbers on the CPU, faster than torch draws them: the same bits, the same generator after it.

Torch draws for each element one number of 64 bits from a Mersenne twister, makes a fraction of its lower 53 bits, and
keeps the element where that is below 1 - rate, one after the other. Here torch fills an array with these numbers as
they are, in half the time, and all of it is compared at once.

Torch promises none of this. Once for each dtype of a process a draw is compared with torch's own; where they differ
(MKL's generator on some machines) torch's own is used ever after.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Fewer take no less time so; what is drawn at once stays in the L2 cache
SMALLEST, AT_ONCE = 16384, 32768
_COMPARED = 20_001
_MOST = 2**64 - 1


def dropout(x: Tensor, rate: float) -> Tensor:
    """``F.dropout(x, rate)``, bit for bit, gradients and the generator after it too.

    Args:
        x: Of any shape, device and dtype.
        rate: In [0, 1].
    """
    kept = noise(x, x.shape, rate) if x.is_contiguous() else None
    return F.dropout(x, rate) if kept is None else x * kept


def noise(like: Tensor, shape: tuple[int, ...], rate: float, rows: Tensor | None = None) -> Tensor | None:
    """What dropout of a contiguous tensor multiplies it by: 0, or 1 / (1 - rate).

    Args:
        like: Of the device and dtype wanted.
        shape: Of the tensor.
        rate: In [0, 1].
        rows: Flat indices into all its dimensions but the last: only these are made; all are drawn.

    Returns:
        Of ``shape``, or (rows, shape[-1]); None, and nothing drawn, where only torch's own way will do.
    """
    if math.prod(shape) < SMALLEST or not 0 < rate < 1 or not _is_plain(like) or not _agrees(like.dtype):
        return None
    scale = _scale(rate, like.dtype)
    if math.isinf(scale):  # zeros times it are no zeros
        return None
    kept = _kept(math.prod(shape), rate).view(shape)
    if rows is not None:
        kept = kept.flatten(0, -2).index_select(0, rows)
    return kept.to(like.dtype).mul_(scale)


def _is_plain(like: Tensor) -> bool:
    """Whether numbers on the CPU are asked for: none of a GPU, a compiler, or a tensor without memory."""
    return like.device.type == "cpu" and type(like) is Tensor and not torch.compiler.is_compiling()


def _scale(rate: float, dtype: torch.dtype) -> float:
    return float(torch.ones(1, dtype=dtype, device="cpu").div_(1 - rate))


def _kept(count: int, rate: float) -> Tensor:
    """(count,) uint8, 1 or 0: torch turns bytes into floats faster than booleans."""
    # Shifted, the lower 53 bits are the number; without rounding: both sides are whole
    below = np.uint64(min(math.ceil((1 - rate) * 2.0**53) << 11, _MOST))
    kept = np.empty(count, np.bool_)
    drawn = torch.empty(min(count, AT_ONCE), dtype=torch.int64, device="cpu")
    words = drawn.numpy().view(np.uint64)
    for start in range(0, count, AT_ONCE):
        some = kept[start : start + AT_ONCE]
        drawn[: len(some)].random_()  # all bits but the highest
        numbers = words[: len(some)]
        np.left_shift(numbers, np.uint64(11), out=numbers)
        np.less(numbers, below, out=some)
    return torch.from_numpy(kept.view(np.uint8))


@cache
def _agrees(dtype: torch.dtype) -> bool:
    """Whether torch's dropout of this dtype is what is drawn here; leaves its generator as it was."""
    if not dtype.is_floating_point:
        return False
    before = torch.get_rng_state()
    try:
        for rate, skipped in ((0.1, 0), (0.5, 1)):  # from the first number on, and from an odd one
            torch.default_generator.manual_seed(7)
            torch.rand(skipped)
            start = torch.get_rng_state()
            theirs, after = F.dropout(torch.ones(_COMPARED, dtype=dtype, device="cpu"), rate), torch.get_rng_state()
            torch.set_rng_state(start)
            ours = _kept(_COMPARED, rate).to(dtype).mul_(_scale(rate, dtype))
            if not torch.equal(theirs, ours) or not torch.equal(after, torch.get_rng_state()):
                return False
        return True
    finally:
        torch.set_rng_state(before)
