"""Perceptual hashes: 64 bits that stay nearly the same when an image is scaled, recompressed or slightly changed.

The hash is that of Zauner (2010), as common tools compute it: a grey miniature of 32 x 32 pixels, its discrete cosine
transform, the 8 x 8 lowest frequencies, and of each whether it lies above their median.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from mgm_exp.data.exploration.grouping import groups_of, pairs_with_equal_keys

if TYPE_CHECKING:
    import numpy as np

SIDE = 32
"""Width and height of the miniature."""
GLIMPSE = 8
"""Width and height of the coarse picture that a match is checked with."""
LARGEST_DISTANCE = 4
"""Bits in which the hashes of two near-identical images differ at most."""
LARGEST_DIFFERENCE = 10.0
"""Mean difference of the coarse pictures of two near-identical images at most, of 255."""
_BANDS = (13, 13, 13, 13, 12)  # bits: of two hashes that differ in 4 bits, one of 5 bands is equal


@cache
def _cosines() -> np.ndarray:
    import numpy as np

    places = np.arange(SIDE)
    return np.cos(np.pi * (2 * places[None, :] + 1) * np.arange(GLIMPSE)[:, None] / (2 * SIDE))


def perceptual_hash(miniature: np.ndarray) -> int:
    """The hash of a grey miniature: uint8 (32, 32) -> 64 bits."""
    import numpy as np

    cosines = _cosines()
    low = cosines @ miniature.astype(np.float64) @ cosines.T
    bits = np.packbits((low > np.median(low)).ravel())
    return int.from_bytes(bits.tobytes(), "big")


def glimpse(miniature: np.ndarray) -> np.ndarray:
    """The coarse picture of a grey miniature: uint8 (64,)."""
    import numpy as np

    block = SIDE // GLIMPSE
    means = miniature.reshape(GLIMPSE, block, GLIMPSE, block).mean(axis=(1, 3))
    return np.round(means).astype(np.uint8).ravel()


def look_alikes(hashes: np.ndarray, glimpses: np.ndarray) -> list[list[int]]:
    """Groups of images that look the same, largest first: hashes that differ in 4 bits at most, and so do not deceive.

    Nearly empty pictures have hashes made of noise; that the coarse pictures agree as well keeps them apart.

    Args:
        hashes: uint64 (images,)
        glimpses: uint8 (images, 64)
    """
    import numpy as np

    if len(hashes) < 2:
        return []
    found: set[tuple[int, int]] = set()
    shift = 0
    for width in _BANDS:
        band = hashes >> np.uint64(shift) & np.uint64((1 << width) - 1)
        shift += width
        # Equal bands are common among many images: neighbours in the order of the whole hash are looked at first.
        for low, high in pairs_with_equal_keys(band, most=4096):
            is_near = np.bitwise_count(hashes[low] ^ hashes[high]) <= LARGEST_DISTANCE
            low, high = low[is_near], high[is_near]
            apart = np.abs(glimpses[low].astype(np.int16) - glimpses[high]).mean(axis=1)
            is_same = apart <= LARGEST_DIFFERENCE
            found.update(zip(low[is_same].tolist(), high[is_same].tolist(), strict=True))
    return groups_of(sorted(found))
