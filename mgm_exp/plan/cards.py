"""Cards and what fits on them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mgm_exp.config import Card

GIB = 1024**3
# How far the memory that a driver reports may be from a known card's, as a share.
_NEAR = 0.05
# In a name: a part of a card, or a slower one of the same name (of the H100 the sheet of SXM is taken).
_OTHER_CARDS = ("MIG", "H100 PCIe")


@dataclass(frozen=True)
class Device:
    """Where a run would be.

    Args:
        name: For people.
        memory_gib: What one process can allocate at most, as ``torch.cuda.get_device_properties`` reports it.
        tflops: Dense bf16 matrix work with fp32 sums, 10^12 operations a second, from the maker's data sheet; None: not
            known.
        reserve_gib: Held beside tensors: CUDA's context and workspaces; on the CPU Python and its packages.
        bandwidth_gb_s: Of its memory, 10^9 bytes a second, from the same sheet; None: not known.
        is_main_memory: No card: what is offloaded would stay in it.
    """

    name: str
    memory_gib: float
    tflops: float | None
    reserve_gib: float = 0.8
    bandwidth_gb_s: float | None = None
    is_main_memory: bool = False

    @property
    def room_gib(self) -> float:
        """What tensors may take."""
        return self.memory_gib - self.reserve_gib


# Memory is some percent below the number on the box: error correction and the driver keep a part.
CARDS: dict[Card, Device] = {
    Card.rtx3090: Device("RTX 3090", 23.6, 71.0, bandwidth_gb_s=936.0),
    Card.rtx4090: Device("RTX 4090", 23.5, 165.2, bandwidth_gb_s=1_008.0),
    Card.a10: Device("A10", 22.0, 125.0, bandwidth_gb_s=600.0),
    Card.a100_40: Device("A100 40 GB", 39.4, 312.0, bandwidth_gb_s=1_555.0),
    Card.a100_80: Device("A100 80 GB", 79.1, 312.0, bandwidth_gb_s=1_935.0),
    Card.h100: Device("H100 80 GB", 79.1, 989.0, bandwidth_gb_s=3_350.0),
    Card.h200: Device("H200", 139.8, 989.0, bandwidth_gb_s=4_800.0),
    Card.l40s: Device("L40S", 44.3, 362.0, bandwidth_gb_s=864.0),
}


def device_of(card: Card, *, is_cpu: bool) -> Device:
    """The card that ``plan.device`` names; ``auto``: this machine's GPU, or its memory where it has none.

    Args:
        is_cpu: Whether the run is to be on the CPU (``device=cpu``).
    """
    if card is not Card.auto:
        return CARDS[card]
    import torch

    if torch.cuda.is_available() and not is_cpu:
        properties = torch.cuda.get_device_properties(0)
        return device_named(properties.name, properties.total_memory / GIB)
    return Device("this machine's memory (no GPU)", main_memory_gib(), None, reserve_gib=1.0, is_main_memory=True)


def device_named(name: str, memory_gib: float) -> Device:
    """A card as its driver reports it, with the speed of the one in :data:`CARDS` that has its name and its memory.

    Both decide: an A100 comes with 40 or 80 GB, and a laptop's RTX 4090 is another card than a desktop's.
    """
    words = f" {name.replace('-', ' ')} "
    if not any(f" {other} " in words for other in _OTHER_CARDS):
        for card in CARDS.values():
            model = re.sub(r" \d+ GB$", "", card.name)
            if f" {model} " in words and abs(memory_gib / card.memory_gib - 1) < _NEAR:
                return replace(card, name=name, memory_gib=memory_gib)
    return Device(name, memory_gib, None)


def main_memory_gib() -> float:
    """Of this machine."""
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def verdict(peak_gib: float, device: Device) -> str:
    """``fits``, ``tight`` (it should, with less than a tenth to spare for fragments and longer samples), or not."""
    room = device.room_gib
    if peak_gib > room:
        return "does not fit"
    return "fits" if peak_gib * 1.1 <= room else "tight"
