"""The low-resolution tower: transformers' CLIP behind the official tensor names.

Official files say `model.vision_tower.vision_tower.vision_model.embeddings...`. transformers 5 has no `vision_model.`
level in memory and writes it or not depending on where a model came from; here the level is a module of ours, so
that names in memory and on disk are the official ones, whatever the history.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel


class ClipVisionTransformer(CLIPVisionModel):
    """CLIPVisionModel under a class name of its own: transformers renames tensors of classes by their name."""


class ClipVisionModel(nn.Module):
    """Holds the `vision_model.` level of the official names."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.vision_model = ClipVisionTransformer(config)


class ClipTower(nn.Module):
    """`vision_tower`: (B, 3, H, W) -> patch features of the hidden state `select_layer`, without the CLS token.

    Args:
        config: arguments of `transformers.CLIPVisionConfig`.
        select_layer: index into CLIP's hidden states; -2 is the output of the last layer but one. Layers after it
            are never run.
        attn_implementation: "eager", "sdpa" or "flash_attention_2".
    """

    def __init__(self, config: Mapping[str, Any], select_layer: int, attn_implementation: str | None = None) -> None:
        super().__init__()
        clip_config = CLIPVisionConfig(**{k: v for k, v in config.items() if k not in _NOT_ARGUMENTS})
        clip_config._attn_implementation = attn_implementation
        self.vision_tower = ClipVisionModel(clip_config)
        self.config = clip_config
        n_states = clip_config.num_hidden_layers + 1
        if not -n_states <= select_layer < n_states:
            raise ValueError(f"mm_vision_select_layer {select_layer}: this CLIP tower has {n_states} hidden states.")
        self.n_layers_used = select_layer % n_states

    @property
    def side(self) -> int:
        """Patches along one side of the image."""
        return self.config.image_size // self.config.patch_size

    @property
    def is_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.parameters())

    def train(self, mode: bool = True) -> ClipTower:
        """A frozen tower stays in eval mode, whatever the model around it does."""
        super().train(mode and not self.is_frozen)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, side * side, hidden)."""
        clip = self.vision_tower.vision_model
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            hidden = clip.pre_layrnorm(clip.embeddings(images))
            for layer in clip.encoder.layers[: self.n_layers_used]:
                hidden = layer(hidden, None)
            return hidden[:, 1:]


_NOT_ARGUMENTS = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"}
