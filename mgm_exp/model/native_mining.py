"""Patch info mining from the tower's stages as they are: without the joined map, its keys and its values.

Equal to `mgm_exp.model.mining.mine` on the joined map in real arithmetic, gradients too. Three identities:

- Upsampling mixes pixels and linear layers mix channels, so that either may come first. Of stage i a region of k x k
  pixels sees a patch of m x m native ones, `F_i = P_i S_i`: P (k², m²) the bilinear weights, S (m², D_i) the patch.
- A region has one query, so that it can go through the keys' layer instead of all pixels of the region; and attention's
  weights add up to one, so that the values' layer can follow them. Both layers begin with the same normalisation.
- Statistics of the normalisation need no map: means are linear, and the squares of a stage are `diag(P (S Sᵀ) Pᵀ)`,
  inner products of native pixels.

What is the same for all pixels of a region does not change its softmax: biases of the keys' layers are left out, and
their gradient is zero.
MGM-2B: 9 GFLOP an image in place of 436, and 52,224 numbers a region in place of 64 x (2,880 + 2 x 1,024).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mgm_exp.model.mining import counted, does_not_divide

# Counted up where its bits change: what was kept of images before has the bits of then.
ARITHMETIC = 2


def mine_native(
    low: Tensor,
    stages: Sequence[Tensor],
    query: nn.Sequential,
    aux: nn.Sequential,
    val: nn.Sequential,
    *,
    shrink: int = 1,
    faults: Tensor | None = None,
) -> Tensor:
    """As `mine`, from native stages. Runs in fp32 at least, whatever the precision around it.

    Args:
        low: (B, n², C) patch features of the CLIP tower; of crops: all crops of an image put together.
        stages: (B, D_i, H_i, W_i), the first one with the largest sides, multiples of n.
        query, aux, val: `mgm_exp.model.mining.projection`.
        shrink: the map is made smaller by this factor first, as for the whole image beside crops.
        faults: as for `mine`.

    Returns:
        (B, n², C).
    """
    side = round(low.shape[1] ** 0.5)
    height, width = (edge // shrink for edge in stages[0].shape[-2:])
    if height % side or width % side:
        raise does_not_divide(height, width, side)
    wide = torch.promote_types(low.dtype, torch.float32)
    asked = query(low)
    norm: Any = aux[0]
    with torch.autocast(low.device.type, enabled=False):
        patches, weights = _patches(stages, side, shrink, wide)
        rho, offsets, patches = _statistics(patches, weights, norm.eps)
        ask = norm(aux[1](asked.to(wide), backwards=True), only="scale")  # (B, n², C')
        ask = ask / asked.shape[-1] ** 0.5
        parts = ask.split([patch.shape[-1] for patch in patches], -1)
        dots = [
            _raised(weight, (patch @ part[..., None])[..., 0]) + part.sum(-1, keepdim=True) * offset
            for weight, patch, part, offset in zip(weights, patches, parts, offsets, strict=True)
        ]
        attention = counted(rho * _added(dots), faults).softmax(-1)  # (B, n², k²)
        share = attention * rho
        found = [
            (_lowered(weight, share)[:, :, None] @ patch)[:, :, 0] + (share * offset).sum(-1, keepdim=True)
            for weight, patch, offset in zip(weights, patches, offsets, strict=True)
        ]
        normal = torch.cat(found, -1)  # (B, n², C')
        mined = _linear(val[1], val[0](normal, only="affine"))
    return mined.to(low.dtype)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """In the weights' dtype: half under ZeRO."""
    out: Tensor = layer(x.to(layer.weight.dtype))
    return out


def _raised(weight: Tensor | None, values: Tensor) -> Tensor:
    """Values of native pixels (B, n², m²) -> of the region's pixels (B, n², k²)."""
    return values if weight is None else (weight @ values[..., None])[..., 0]


def _lowered(weight: Tensor | None, values: Tensor) -> Tensor:
    """The reverse: (B, n², k²) -> (B, n², m²), shares of the region's pixels as those of native ones."""
    return values if weight is None else (values[..., None, :] @ weight)[..., 0, :]


def _statistics(
    patches: list[Tensor], weights: list[Tensor | None], eps: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What normalises the joined map: 1 / standard deviation (B, n², k²), each stage's own mean less that of all
    channels (B, n², k²), and the patches less their pixels' means.

    The variance is what lies within the stages and what lies between them: sums of squares, no differences.
    """
    widths = [patch.shape[-1] for patch in patches]
    own = [patch.mean(-1) for patch in patches]
    # In place where nobody differentiates: patches are the largest tensors here
    patches = [
        patch - mean[..., None] if patch.requires_grad else patch.sub_(mean[..., None])
        for patch, mean in zip(patches, own, strict=True)
    ]
    means = [_raised(weight, mean) for weight, mean in zip(weights, own, strict=True)]
    whole = _added([width * mean for width, mean in zip(widths, means, strict=True)]) / sum(widths)
    offsets = [mean - whole for mean in means]
    within = _added([_squares(weight, patch) for weight, patch in zip(weights, patches, strict=True)])
    between = _added([width * offset.square() for width, offset in zip(widths, offsets, strict=True)])
    return (((within + between) / sum(widths)).clamp(min=0) + eps).rsqrt(), offsets, patches


def _added(tensors: list[Tensor]) -> Tensor:
    first, *rest = tensors
    for tensor in rest:
        first = first + tensor
    return first


def _squares(weight: Tensor | None, patch: Tensor) -> Tensor:
    """Squares of a stage's upsampled channels, added up: (B, n², k²)."""
    if weight is None:
        return patch.square().sum(-1)
    products = patch @ patch.transpose(-1, -2)  # (B, n², m², m²)
    return ((weight @ products) * weight).sum(-1)


def _patches(
    stages: Sequence[Tensor], side: int, shrink: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Of each stage the native pixels below every region (B, n², m², D), and their bilinear weights (B, n², k², m²).

    Weights are the same for all images and yet there for each: a product that takes several images at once gives one
    of them other bits in another place of the batch, with some machines' kernels, and features could not be kept.
    A stage with no fewer pixels in a patch than the region has is raised at once; it has no weights: None.
    """
    patches: list[Tensor] = []
    weights: list[Tensor | None] = []
    full = stages[0].shape[-2:]
    for stage in stages:
        (first_y, down), (first_x, across) = (
            _taps(native, edge, shrink, side) for native, edge in zip(stage.shape[-2:], full, strict=True)
        )
        rows = first_y[:, None] + np.arange(down.shape[2])  # (n, m)
        columns = first_x[:, None] + np.arange(across.shape[2])
        index = rows[:, None, :, None] * stage.shape[-1] + columns[None, :, None, :]  # (n, n, m, m)
        pixels = stage.permute(0, 2, 3, 1).flatten(1, 2)  # a view where the map is stored channels-last
        patch = pixels.index_select(1, torch.from_numpy(index.reshape(-1)).to(stage.device)).to(dtype)
        patch = patch.reshape(len(stage), side * side, -1, stage.shape[1])
        n_pixels = down.shape[1] * across.shape[1]
        weight = None
        if not (_is_identity(down) and _is_identity(across)):
            both = np.einsum("yab,xcd->yxacbd", down, across).reshape(side * side, n_pixels, -1)
            weight = torch.from_numpy(both).to(stage.device, dtype).repeat(len(stage), 1, 1, 1)
            if patch.shape[2] >= n_pixels:
                patch, weight = weight @ patch, None
        patches.append(patch)
        weights.append(weight)
    return patches, weights


def _is_identity(taps: np.ndarray) -> bool:
    return taps.shape[1] == taps.shape[2] and bool((taps == np.eye(taps.shape[1])).all())


@lru_cache(maxsize=64)
def _taps(native: int, size: int, shrink: int, regions: int) -> tuple[np.ndarray, np.ndarray]:
    """One side: the first native pixel that each region sees (n,), and the weights (n, k, m) of m pixels from there.

    Bilinear upsampling of `native` pixels to `size` and then to size / shrink, both with torch's `align_corners=False`.
    """
    out = size // shrink
    dense = np.zeros((out, native))
    for pixel in range(out):
        for fine, share in _two((pixel + 0.5) * shrink - 0.5, size):
            for source, part in _two((fine + 0.5) * native / size - 0.5, native):
                dense[pixel, source] += share * part
    blocks = dense.reshape(regions, out // regions, native)
    seen = [np.flatnonzero(block.any(0)) for block in blocks]
    count = max(int(columns[-1] - columns[0]) + 1 for columns in seen)
    first = np.array([min(int(columns[0]), native - count) for columns in seen])
    return first, np.stack([block[:, at : at + count] for block, at in zip(blocks, first, strict=True)])


def _two(position: float, size: int) -> tuple[tuple[int, float], tuple[int, float]]:
    """The two pixels beside a position, and their weights."""
    position = max(position, 0.0)
    lower = min(int(position), size - 1)
    return (lower, 1 - (position - lower)), (min(lower + 1, size - 1), position - lower)
