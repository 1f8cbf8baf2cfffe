"""Native mining against the official form: outputs and all gradients, on maps of any kind."""

from __future__ import annotations

import os
import subprocess
import sys
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


def assert_equal(mining: Mining, shrink: int = 1, near: float = 1e-12) -> None:
    ours, official = mining.native(shrink), mining.official(shrink)
    assert (ours - official).abs().max() <= near * max(1.0, float(official.detach().abs().max()))
    found, wanted = mining.gradients(ours), mining.gradients(official)
    assert found.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 10 * near * max(1.0, largest), name
    assert not any(found[f"aux.{name}"].any() for name in DEAD)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1 << 30),
    batch=st.integers(1, 3),
    side=st.integers(1, 4),
    region=st.sampled_from([1, 2, 3, 4, 8]),
    shrink=st.integers(1, 3),
    widths=st.lists(st.integers(4, 8), min_size=1, max_size=4),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
)
def test_native_mining_is_the_official_one_whatever_the_shapes(
    seed: int, batch: int, side: int, region: int, shrink: int, widths: list[int], scale: float
) -> None:
    edge = side * region * shrink
    # Regions of few channels can be nearly constant, and then the normalisation enlarges rounding
    assert_equal(Mining(seed, batch, side, edge, widths[: edge.bit_length()], scale), shrink, near=1e-11)


@pytest.mark.parametrize("shrink", [1, 2])
def test_four_stages_of_regions_of_eight_pixels_equal_the_official_form(shrink: int) -> None:
    """As in MGM-2B: 8, 6, 4 and 3 native pixels a side below a region; and the whole image beside crops."""
    assert_equal(Mining(7, 2, 3, 24 * shrink, [3, 4, 5, 6]), shrink)


def test_half_precision_around_it_does_not_make_it_less_exact_than_the_official_form() -> None:
    mining = Mining(3, 2, 4, 32, [16, 24, 32, 48])
    exact = mining.official()
    for dtype in (torch.float32, torch.bfloat16):
        mining.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            ours, official = ((form().double() - exact).abs().mean() for form in (mining.native, mining.official))
        assert ours <= official, "trained in autocast, or all in bf16 as under ZeRO"


def test_scores_that_are_not_finite_are_counted_and_replaced() -> None:
    mining, faults = Mining(0, 1, 2, 4, [3, 2]), torch.zeros(2, dtype=torch.int64)
    clean = mining.native(faults=faults)
    assert faults.tolist() == [0, 0] and torch.equal(clean, mining.native())
    mining.low.data[0, 0, 0] = float("nan")
    broken = mining.native(faults=faults)
    assert faults.tolist() == [4, 0], "one patch asks its four pixels"
    assert broken.isfinite().all() and torch.equal(broken[0, 1:], clean[0, 1:])


def test_the_same_gradients_when_computed_again_in_the_backward_pass() -> None:
    mining = Mining(1, 1, 2, 8, [3, 2])
    again = torch.utils.checkpoint.checkpoint(mining.native, use_reentrant=False)
    found, wanted = mining.gradients(again), mining.gradients(mining.native())
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


@pytest.mark.parametrize(
    ("side", "edge", "widths"), [(8, 64, [24, 48, 96, 192]), (4, 32, [3, 4, 5, 6]), (4, 8, [5, 7])]
)
def test_an_image_has_the_same_bits_in_every_place_of_a_batch(side: int, edge: int, widths: list[int]) -> None:
    """So that what was made of it may be kept. Products that took all images at once gave it others without AVX-512."""
    mining = Mining(2, 4, side, edge, widths).float()
    with torch.no_grad():
        here = mining.native()
        for tensor in (mining.low, *mining.stages):
            tensor.data = tensor.roll(1, 0)
        assert mining.native().roll(-1, 0).equal(here)


@pytest.mark.parametrize("instructions", ["SSE4_2", "AVX2"])
def test_so_it_has_on_older_processors(instructions: str) -> None:
    """MKL's kernels for those, wherever this runs."""
    chosen = f"{__file__}::{test_an_image_has_the_same_bits_in_every_place_of_a_batch.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", chosen]
    ran = subprocess.run(
        command, env={**os.environ, "MKL_ENABLE_INSTRUCTIONS": instructions}, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "3 passed" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-1000:]


def test_maps_that_cannot_be_cut_into_regions_are_refused() -> None:
    with pytest.raises(ModelError, match="8 x 8 cannot be cut into 3 x 3 regions"):
        Mining(0, 1, 3, 8, [2, 2]).native()


def test_frozen_stages_take_no_part_in_the_graph_and_are_left_as_they_are() -> None:
    mining = Mining(5, 1, 2, 16, [3, 4, 2])
    mining.stages.requires_grad_(False)
    before = [stage.clone() for stage in mining.stages]
    wanted = mining.gradients(mining.official())
    found = mining.gradients(mining.native())
    assert found.keys() == wanted.keys() and all(torch.equal(a, b) for a, b in zip(before, mining.stages, strict=True))
