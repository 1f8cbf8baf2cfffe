"""Patch info mining: each low-resolution patch asks the high-resolution pixels below it for detail.

Li et al., "Mini-Gemini" (arXiv 2403.18814), section 3.2; official code mgm/model/mgm_arch.py `unified_resampler`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgm_exp.errors import ModelError


def regions(high: Tensor, side: int) -> Tensor:
    """Cuts a map into side x side regions: (B, C, H, W) -> (B, side², (H/side)(W/side), C), row-major.

    Raises:
        ModelError: the map's sides are not multiples of `side`.
    """
    batch, channels, height, width = high.shape
    if height % side or width % side:
        raise ModelError(
            f"A high-resolution map of {height} x {width} cannot be cut into {side} x {side} regions: "
            f"image_size_aux / 4 must be a multiple of the CLIP tower's {side} patches a side."
        )
    h, w = height // side, width // side
    high = high.permute(0, 2, 3, 1).reshape(batch, side, h, side, w, channels)
    return high.permute(0, 1, 3, 2, 4, 5).reshape(batch, side * side, h * w, channels)


def mine(
    low: Tensor, high: Tensor, query: nn.Module, aux: nn.Module, val: nn.Module, faults: Tensor | None = None
) -> Tensor:
    """Attention of each patch over its own region, added by the caller to `low` before the projector.

    `mined = softmax(Q Kᵀ / sqrt(C)) V` with Q = query(low) and K = aux(high), V = val(high) of the same region.

    Args:
        low: (B, n², C) patch features of the CLIP tower.
        high: (B, C', H, W) map of the ConvNeXt tower; H and W multiples of n.
        query, aux, val: LayerNorm and Linear into C.
        faults: (2,) integers that the numbers of scores that are NaN and infinite are added to: they are replaced
            here, as in the official code, and nobody would hear of them; None: nobody wants to.

    Returns:
        (B, n², C).
    """
    side = round(low.shape[1] ** 0.5)
    high = regions(high, side)  # (B, n², k², C')
    if torch.is_inference_mode_enabled() and high.dtype == torch.float32:
        return _mine_without_keys(low, high, query, aux, val)
    q = query(low)[:, :, None]  # (B, n², 1, C)
    k = aux(high)  # (B, n², k², C)
    v = val(high)
    scores = q @ (k.transpose(-1, -2) / (q.shape[-1] ** 0.5))
    if faults is not None:
        faults += torch.stack([scores.detach().isnan().sum(), scores.detach().isinf().sum()])
    attention = torch.nan_to_num(scores)
    return (attention.softmax(-1) @ v).mean(2)


def _mine_without_keys(low: Tensor, high: Tensor, query: nn.Module, aux: nn.Module, val: nn.Module) -> Tensor:
    """The same sums in another order, for answers: keys and values of all pixels are never made.

    Every region has one query, so that it can go through the keys' layer instead of all pixels of the region, and the
    attention's weights add up to one, so that the values' layer can follow them. Both layers begin with the same
    normalisation. What is the same for all pixels of a region does not change the softmax and is left out. Differs in
    the last digits (3e-7 relative); in half precision it would be the less exact form.
    """
    layers: tuple[Any, ...] = (*aux.children(), *val.children())
    norm_aux, linear_aux, norm_val, linear_val = layers
    normal = F.layer_norm(high, norm_aux.normalized_shape, eps=norm_aux.eps)  # (B, n², k², C')
    asked = query(low) @ (linear_aux.weight * norm_aux.weight)  # (B, n², C')
    scores = torch.nan_to_num(normal @ asked[..., None] / linear_aux.out_features**0.5)  # (B, n², k², 1)
    found = (scores.softmax(2).transpose(2, 3) @ normal)[:, :, 0]  # (B, n², C')
    mined: Tensor = linear_val(found * norm_val.weight + norm_val.bias)
    return mined
