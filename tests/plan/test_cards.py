"""Cards as their drivers name them: each has its own speed, and one that is not known has none."""

from __future__ import annotations

import pytest

from mgm_exp.config import Card
from mgm_exp.plan.cards import CARDS, device_named


@pytest.mark.parametrize(
    ("name", "memory_gib", "card"),
    [
        ("NVIDIA GeForce RTX 3090", 23.69, Card.rtx3090),
        ("NVIDIA GeForce RTX 4090", 23.64, Card.rtx4090),
        ("NVIDIA A10", 22.06, Card.a10),
        ("NVIDIA A100-SXM4-40GB", 39.39, Card.a100_40),
        ("NVIDIA A100-PCIE-40GB", 39.39, Card.a100_40),
        ("NVIDIA A100-SXM4-80GB", 79.25, Card.a100_80),
        ("NVIDIA A100 80GB PCIe", 79.14, Card.a100_80),
        ("NVIDIA H100 80GB HBM3", 79.19, Card.h100),
        ("NVIDIA H200", 139.81, Card.h200),
        ("NVIDIA L40S", 44.39, Card.l40s),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.99, None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 39.25, None),
        ("NVIDIA H100 PCIe", 79.11, None),
        ("NVIDIA A10G", 22.06, None),
        ("NVIDIA RTX A6000", 47.54, None),
    ],
)
def test_a_card_has_the_speed_of_the_known_one_with_its_name_and_memory(
    name: str, memory_gib: float, card: Card | None
) -> None:
    found = device_named(name, memory_gib)
    assert (found.name, found.memory_gib) == (name, memory_gib)
    expected = (None, None) if card is None else (CARDS[card].tflops, CARDS[card].bandwidth_gb_s)
    assert (found.tflops, found.bandwidth_gb_s) == expected
