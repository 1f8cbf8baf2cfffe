"""Features of images give the tokens that pixels give, bit for bit: HD crops, both forms of mining, some missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgm_exp.model.features import TIERS, bytes_of_tier, depends_on_place, features_of, tensors_sha256, tokens_of


@pytest.mark.parametrize("name", ["basic", "grid2_global"])
@pytest.mark.parametrize("natively", [True, False])
def test_tokens_of_features_are_those_of_pixels(model: Any, case: Any, golden: Path, name: str, natively: bool) -> None:
    for key, value in json.loads((golden / "cases.json").read_text())[name]["config_override"].items():
        setattr(model.config, key, value)
    body, tensors = model.model, case(name)
    body.mines_natively = natively
    images, images_aux = (
        torch.stack([tensors[key][0] * factor for factor in (1.0, 0.7, 1.3)]) for key in ("images", "images_aux")
    )
    with torch.no_grad():
        expected = body.encode_images(images, images_aux)
        for tier in TIERS:
            found = features_of(body, tier, images, images_aux)
            whole = {key: torch.stack([one[key] for one in found]) for key in found[0]}
            assert tokens_of(body, whole, None, images_aux if tier == "clip" else None).equal(expected), tier
            # The first and the last have features; the pixels of the second are filled up to three
            some = {key: torch.stack([one[key] for one in (found[0], found[2])]) for key in found[0]}
            some["order"] = torch.tensor([0, 2, 1])
            filled, filled_aux = images[1:2].repeat_interleave(3, 0), images_aux[1:2].repeat_interleave(3, 0)
            detail = images_aux if tier == "clip" else filled_aux
            assert tokens_of(body, some, filled, detail).equal(expected), tier


def test_the_place_of_an_image_is_looked_at() -> None:
    images, images_aux = torch.randn(3, 2), torch.randn(3, 2)

    def seen(low: Tensor, high: Tensor, slope: float = 0.0) -> list[dict[str, Tensor]]:
        return [{"low": one + other + slope * place} for place, (one, other) in enumerate(zip(low, high, strict=True))]

    assert not depends_on_place(images, images_aux, seen)
    assert depends_on_place(images, images_aux, lambda low, high: seen(low, high, 1e-3))


def test_bytes_of_mgm_2b() -> None:
    sizes: dict[str, Any] = {
        "low": (576, 1024), "map_side": 192, "map_widths": (192, 384, 768, 1536), "tokens": (576, 2048), "itemsize": 2,
    }  # fmt: skip
    found = {tier: bytes_of_tier(tier, **sizes) / 1e6 for tier in TIERS}
    assert found == {"clip": 1.179648, "towers": 27.721728, "tokens": 2.359296}


def test_a_changed_tower_has_another_name() -> None:
    tower = nn.Linear(2, 2)
    before = tensors_sha256(tower)
    assert tensors_sha256(tower) == before
    with torch.no_grad():
        tower.bias.add_(1)
    assert tensors_sha256(tower) != before
