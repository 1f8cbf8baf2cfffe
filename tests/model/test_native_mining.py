"""Native mining against the official form: outputs and all gradients, on maps of any kind."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mgm_exp.errors import ModelError
from mgm_exp.model.mining import mine, projection
from mgm_exp.model.native_mining import mine_native

WIDTH = 6
DEAD = ("0.bias", "1.bias")  # of the keys' layers: they shift all scores of a region alike


class Mining(nn.Module):
    """Two towers' outputs and the three projections, all random, all to be differentiated."""

    def __init__(self, seed: int, batch: int, side: int, edge: int, widths: list[int], scale: float = 1.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64))

        self.low = noise(batch, side * side, WIDTH)
        self.stages = nn.ParameterList(
            nn.Parameter(scale * noise(batch, width, edge >> i, edge >> i).detach() + i)
            for i, width in enumerate(widths)
        )
        self.query, self.aux, self.val = (projection(w, WIDTH) for w in (WIDTH, sum(widths), sum(widths)))
        for name, parameter in self.named_parameters():
            if name[:3] in ("que", "aux", "val"):
                parameter.data = noise(*parameter.shape).detach()

    def official(self, shrink: int = 1) -> Tensor:
        first, *rest = self.stages
        size = first.shape[-2:]
        maps = [F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in rest]
        high = torch.cat([first, *maps], 1)
        if shrink > 1:
            high = F.interpolate(high, scale_factor=1 / shrink, mode="bilinear", align_corners=False)
        return mine(self.low, high, self.query, self.aux, self.val)

    def native(self, shrink: int = 1, **words: Any) -> Tensor:
        return mine_native(self.low, list(self.stages), self.query, self.aux, self.val, shrink=shrink, **words)

    def gradients(self, mined: Tensor) -> dict[str, Tensor]:
        self.zero_grad()
        weights = torch.linspace(-1, 2, mined.numel(), dtype=mined.dtype).reshape(mined.shape).sin()
        (mined * weights).sum().backward()
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def assert_equal(mining: Mining, shrink: int = 1) -> None:
    ours, official = mining.native(shrink), mining.official(shrink)
    assert (ours - official).abs().max() <= 1e-12 * max(1.0, float(official.detach().abs().max()))
    found, wanted = mining.gradients(ours), mining.gradients(official)
    assert found.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-11 * max(1.0, largest), name
    assert not any(found[f"aux.{name}"].any() for name in DEAD)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    batch=st.integers(1, 3),
    side=st.integers(1, 4),
    region=st.sampled_from([1, 2, 3, 4, 8]),
    shrink=st.integers(1, 3),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
)
def test_native_mining_is_the_official_one_whatever_the_shapes(
    seed: int, batch: int, side: int, region: int, shrink: int, widths: list[int], scale: float
) -> None:
    edge = side * region * shrink
    assert_equal(Mining(seed, batch, side, edge, widths[: edge.bit_length()], scale), shrink)
