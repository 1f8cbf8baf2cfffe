"""The high-resolution tower: ConvNeXt blocks behind timm's (open_clip's) tensor names.

Liu et al., "A ConvNet for the 2020s" (arXiv 2201.03545). Written here because timm needs torchvision, which does
not fit the CPU build of torch. Without drop path: the tower is frozen in MGM, and a frozen tower must not be noisy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtMlp(nn.Module):
    """Linear (C -> 4C), exact GELU, Linear (4C -> C), on channels-last input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ConvNeXtBlock(nn.Module):
    """x + gamma * mlp(norm(depthwise 7x7(x))), gamma the layer scale of shape (C,)."""

    def __init__(self, width: int, layer_scale_init: float) -> None:
        super().__init__()
        self.layer_scale_init = layer_scale_init
        self.conv_dw = nn.Conv2d(width, width, kernel_size=7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = ConvNeXtMlp(width)
        self.gamma = nn.Parameter(torch.full((width,), layer_scale_init))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # (B, H, W, C): a view, the map is stored channels-last
        y = self.mlp(self.norm(y)).mul(self.gamma)
        return x + y.permute(0, 3, 1, 2).to(x.dtype)  # a trained block is fp32, those behind it may be half


class ConvNeXtStage(nn.Module):
    """Downsampling by 2 (LayerNorm2d, 2x2 convolution; none in the first stage) and `depth` blocks."""

    def __init__(self, width_in: int, width: int, depth: int, layer_scale_init: float, is_first: bool) -> None:
        super().__init__()
        self.downsample: nn.Module = (
            nn.Identity()
            if is_first
            else nn.Sequential(LayerNorm2d(width_in, eps=NORM_EPS), nn.Conv2d(width_in, width, kernel_size=2, stride=2))
        )
        self.blocks = nn.Sequential(*[ConvNeXtBlock(width, layer_scale_init) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvNeXtTower(nn.Module):
    """`vision_tower_aux`: images -> all stages at the resolution of the first, concatenated over channels.

    Args:
        config: `{"dims": [...], "depths": [...], "layer_scale_init": float}`, one entry a stage.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dims: Sequence[int] = config["dims"]
        depths: Sequence[int] = config["depths"]
        if len(dims) != len(depths):
            raise ValueError(f"vision_aux_config: {len(dims)} dims but {len(depths)} depths; give one of each a stage.")
        scale = float(config.get("layer_scale_init", 1e-6))
        self.vision_stem = nn.Sequential(
            nn.Conv2d(3, dims[0], kernel_size=4, stride=4), LayerNorm2d(dims[0], eps=NORM_EPS)
        )
        self.vision_stages = nn.Sequential(
            *[
                ConvNeXtStage(dims[max(i - 1, 0)], width, depth, scale, is_first=i == 0)
                for i, (width, depth) in enumerate(zip(dims, depths, strict=True))
            ]
        )
        self.num_channels = sum(dims)

    @property
    def is_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.parameters())

    def train(self, mode: bool = True) -> ConvNeXtTower:
        """A frozen tower stays in eval mode, whatever the model around it does."""
        super().train(mode and not self.is_frozen)
        return self

    def stages(self, images_aux: Tensor) -> list[Tensor]:
        """The stages' own maps: `images_aux` (B, 3, S, S) -> (B, dims[i], S / 2**(2+i), S / 2**(2+i)) each."""
        stem: Any = self.vision_stem[0]
        x = images_aux.to(stem.bias.dtype).contiguous(memory_format=torch.channels_last)
        x = self.vision_stem(x)
        maps = []
        for stage in self.vision_stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images_aux: Tensor, joined: bool = True) -> Tensor | list[Tensor]:
        """(B, 3, S, S) -> (B, sum(dims), S/4, S/4): later stages are upsampled in fp32 (bilinear).

        Not joined: the stages' own maps, as of `stages`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            maps = self.stages(images_aux)
            return join_stages(maps) if joined else maps


def join_stages(maps: Sequence[Tensor]) -> Tensor:
    """All stages at the size of the first, over channels: (B, D_i, H_i, W_i) -> (B, sum(D_i), H_0, W_0)."""
    first, *rest = maps
    size = first.shape[-2:]
    upsampled = [
        F.interpolate(m.float(), size=size, mode="bilinear", align_corners=False).to(first.dtype) for m in rest
    ]
    return torch.cat([first, *upsampled], dim=1)
