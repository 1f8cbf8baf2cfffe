"""Patch info mining: each low-resolution patch asks the high-resolution pixels below it for detail.

Li et al., "Mini-Gemini" (arXiv 2403.18814), section 3.2; official code mgm/model/mgm_arch.py `unified_resampler`.
This is the official form: keys and values of every pixel of the joined map. `mgm_exp.model.native_mining` computes the
same from the tower's stages as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgm_exp.errors import ModelError


class ConnectorLinear(nn.Linear):
    """A linear layer of the connector: starts from torch's own initialisation, as in the official code.

    What native mining needs of its weights is computed inside calls of the module, so that sharded training gathers
    them.
    """

    def forward(self, x: Tensor, backwards: bool = False) -> Tensor:
        """`x @ W.T + b`; backwards (..., outputs) -> (..., inputs): `x @ W`, computed in the dtype of `x`.

        The bias has no part in `x @ W`; it gets a gradient of zero, so that no trained parameter is left without one.
        """
        if not backwards:
            return super().forward(x)
        return x @ self.weight.to(x.dtype) + 0 * self.bias.to(x.dtype).sum()


class ConnectorNorm(nn.LayerNorm):
    """LayerNorm of the connector, whose normalisation and affine part can be had apart."""

    def forward(self, x: Tensor, only: str | None = None) -> Tensor:
        """The usual; `only="affine"`: of values that are normal already; `only="scale"`: without the bias, which gets
        a gradient of zero. Both in the dtype of `x`."""
        if only is None:
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return x * weight + (bias if only == "affine" else 0 * bias)


def projection(width_in: int, width: int) -> nn.Sequential:
    """LayerNorm and Linear, as of query, aux (keys) and val."""
    return nn.Sequential(ConnectorNorm(width_in), ConnectorLinear(width_in, width))


def regions(high: Tensor, side: int) -> Tensor:
    """Cuts a map into side x side regions: (B, C, H, W) -> (B, side², (H/side)(W/side), C), row-major.

    Raises:
        ModelError: the map's sides are not multiples of `side`.
    """
    batch, channels, height, width = high.shape
    if height % side or width % side:
        raise does_not_divide(height, width, side)
    h, w = height // side, width // side
    high = high.permute(0, 2, 3, 1).reshape(batch, side, h, side, w, channels)
    return high.permute(0, 1, 3, 2, 4, 5).reshape(batch, side * side, h * w, channels)


def does_not_divide(height: int, width: int, side: int) -> ModelError:
    """The error of a map that cannot be cut into side x side regions."""
    return ModelError(
        f"A high-resolution map of {height} x {width} cannot be cut into {side} x {side} regions: "
        f"image_size_aux / 4 must be a multiple of the CLIP tower's {side} patches a side."
    )


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
    q = query(low)[:, :, None]  # (B, n², 1, C)
    k = aux(high)  # (B, n², k², C)
    v = val(high)
    scores = q @ (k.transpose(-1, -2) / (q.shape[-1] ** 0.5))
    return (counted(scores, faults).softmax(-1) @ v).mean(2)


def counted(scores: Tensor, faults: Tensor | None) -> Tensor:
    """`scores` without NaN and infinities, their numbers added to `faults` (see `mine`)."""
    if faults is not None:
        faults += torch.stack([scores.detach().isnan().sum(), scores.detach().isinf().sum()])
    return torch.nan_to_num(scores)


def shrunk(high: Tensor, factor: int) -> Tensor:
    """The map of the whole image beside crops: (B, C', H, W) -> (B, C', H / factor, W / factor), bilinear in fp32."""
    small = F.interpolate(high.float(), scale_factor=1 / factor, mode="bilinear", align_corners=False)
    return small.to(high.dtype)
