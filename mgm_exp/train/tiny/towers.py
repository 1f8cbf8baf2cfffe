"""Phases 1 and 2 of the tiny base: both vision towers learn to see from dense labels.

1. Glyph pages, ConvNeXt tower only: several times more characters per pixel than scenes.
2. Scenes, both towers: character and its index in the string at each position of the ConvNeXt map; kind, colour and
   shape of the object at each cell of both towers.

Captioning on towers that were not taught this way did not learn to read at this size. The heads are thrown away.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgm_exp.data.demo.corpus import (
    GRID,
    N_CHARACTER,
    N_COLOUR,
    N_INDEX,
    N_KIND,
    N_LAST,
    N_SHAPE,
    Pages,
    SceneSet,
)
from mgm_exp.data.demo.teaching import Report, Sampler, dense_loss, found_share, normalised, optimise


def low_resolution(images_aux: Tensor, side: int) -> Tensor:
    """The CLIP tower's pixels, made from the normalised high-resolution ones as in official MGM preprocessing."""
    return F.interpolate(images_aux, size=(side, side), mode="bilinear", align_corners=False)


class TowerHeads(nn.Module):
    """Throw-away linear classifiers on the ConvNeXt map (`width_aux` channels) and the CLIP tokens (`width`)."""

    def __init__(self, width_aux: int, width: int) -> None:
        super().__init__()
        self.norm_aux, self.norm = nn.LayerNorm(width_aux), nn.LayerNorm(width)
        self.positions = nn.ModuleList(nn.Linear(width_aux, n) for n in (N_CHARACTER, N_INDEX, N_LAST))
        self.cells_aux = nn.ModuleList(nn.Linear(width_aux, n) for n in (N_KIND, N_COLOUR, N_SHAPE))
        self.cells = nn.ModuleList(nn.Linear(width, n) for n in (N_KIND, N_COLOUR, N_SHAPE))

    def position_logits(self, high: Tensor) -> list[Tensor]:
        """(B, C, H, W) map -> character, index and last logits, (B, H, W, classes) each."""
        x = self.norm_aux(high.permute(0, 2, 3, 1))
        return [head(x) for head in self.positions]

    def cell_logits(self, high: Tensor, low: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Kind, colour and shape logits (B, 64, classes) of the ConvNeXt map's cells and of the CLIP tokens."""
        pooled = F.avg_pool2d(high, high.shape[-1] // GRID).flatten(2).transpose(1, 2)  # (B, 64, C)
        x, y = self.norm_aux(pooled), self.norm(low)
        return [head(x) for head in self.cells_aux], [head(y) for head in self.cells]


def train_on_pages(
    tower_aux: nn.Module,
    heads: TowerHeads,
    pages: Pages,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    report: Report | None = None,
) -> None:
    """Phase 1: character classes of glyph pages, ConvNeXt tower."""
    sampler = Sampler(len(pages), min(batch, len(pages)), seed)

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rows = sampler()
        target = torch.from_numpy(pages.characters[rows])
        logits = heads.position_logits(tower_aux(normalised(pages.pixels[rows])))[0]
        return dense_loss(logits, target), {"characters": found_share(logits.detach(), target)}

    optimise("glyph pages", (tower_aux, heads), step_loss, steps=steps, lr=lr, report=report)


def train_on_scenes(
    tower: nn.Module,
    tower_aux: nn.Module,
    heads: TowerHeads,
    scenes: SceneSet,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    low_side: int,
    report: Report | None = None,
) -> None:
    """Phase 2: dense labels of scenes, both towers."""
    sampler = Sampler(len(scenes), min(batch, len(scenes)), seed)

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rows = sampler()
        loss, measures = scene_loss(tower, tower_aux, heads, scenes, rows, low_side)
        return loss, measures

    optimise("scenes, dense", (tower, tower_aux, heads), step_loss, steps=steps, lr=lr, report=report)


def scene_loss(
    tower: nn.Module, tower_aux: nn.Module, heads: TowerHeads, scenes: SceneSet, rows: np.ndarray, low_side: int
) -> tuple[Tensor, dict[str, float]]:
    """Loss of phase 2 on some scenes, and the accuracies over positions and cells that hold something."""
    images_aux = normalised(scenes.pixels[rows])
    positions = torch.from_numpy(scenes.positions[rows])  # (B, 3, 32, 32)
    cells = torch.from_numpy(scenes.cells[rows]).flatten(2)  # (B, 3, 64)
    high = tower_aux(images_aux)
    low = tower(low_resolution(images_aux, low_side))
    character, index, last = heads.position_logits(high)
    loss = 2.0 * dense_loss(character, positions[:, 0]) + dense_loss(index, positions[:, 1])
    loss = loss + 0.3 * dense_loss(last, positions[:, 2])
    of_map, of_tokens = heads.cell_logits(high, low)
    for k in range(3):
        loss = loss + 0.3 * dense_loss(of_map[k], cells[:, k]) + 0.4 * dense_loss(of_tokens[k], cells[:, k])
    with torch.no_grad():
        measures = {
            "characters": found_share(character, positions[:, 0]),
            "index": found_share(index, positions[:, 1]),
            "kinds": found_share(of_tokens[0], cells[:, 0]),
            "colours": found_share(of_tokens[1], cells[:, 1]),
            "shapes": found_share(of_tokens[2], cells[:, 2]),
        }
    return loss, measures
