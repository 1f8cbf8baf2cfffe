"""What is seen of every image of a dataset, each file read and decoded once, on all cores.

facts = measure_images(root, paths, pool, max_megapixels=50)
facts.width, facts.format_names[facts.format], facts.faults       # one entry an image
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mgm_exp.data.exploration.perceptual_hash import SIDE, glimpse, perceptual_hash
from mgm_exp.data.exploration.processes import WorkerPool
from mgm_exp.data.images import ImageFault, probe_miniature

if TYPE_CHECKING:
    import numpy as np

_PACK = 32
_FEW = 128  # so many are looked at before it is worth starting processes


class Fault(NamedTuple):
    """Why an image cannot be used.

    Args:
        kind: One of :data:`mgm_exp.data.kinds.IMAGE_KINDS`.
        detail: What exactly was found.
    """

    kind: str
    detail: str


@dataclass
class ImageFacts:
    """One entry an image, in order; those of images that cannot be used hold zeros and -1.

    Args:
        width, height: int32, pixels.
        bytes: int64, of the file.
        format, mode: int16, places in ``format_names`` and ``mode_names``; -1: cannot be used.
        sha256: void of 32 bytes, of the file.
        hash: uint64, perceptual.
        glimpse: uint8 (images, 64), the picture at 8 x 8.
        contrast: float32, standard deviation of the grey miniature, of 255.
        faults: By place, of images that cannot be used.
    """

    width: np.ndarray
    height: np.ndarray
    bytes: np.ndarray
    format: np.ndarray
    mode: np.ndarray
    sha256: np.ndarray
    hash: np.ndarray
    glimpse: np.ndarray
    contrast: np.ndarray
    format_names: list[str] = field(default_factory=list)
    mode_names: list[str] = field(default_factory=list)
    faults: dict[int, Fault] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.width)

    @property
    def is_usable(self) -> np.ndarray:
        """bool (images,)"""
        return self.format >= 0


class _Seen(NamedTuple):
    width: int
    height: int
    size: int
    format: str
    mode: str
    sha256: bytes
    hash: int
    glimpse: bytes
    contrast: float


def _look(root: str, max_megapixels: float, images: list[str]) -> list[_Seen | Fault]:
    return [_look_at(root, image, max_megapixels) for image in images]


def _look_at(root: str, image: str, max_megapixels: float) -> _Seen | Fault:
    import numpy as np

    try:
        info, miniature = probe_miniature(root, image, max_megapixels, SIDE)
    except ImageFault as fault:
        return Fault(fault.kind, fault.detail)
    pixels = np.asarray(miniature)
    return _Seen(
        info.width,
        info.height,
        info.bytes,
        info.format,
        info.mode,
        bytes.fromhex(info.sha256),
        perceptual_hash(pixels),
        glimpse(pixels).tobytes(),
        float(pixels.std()),
    )


def measure_images(
    root: Path,
    images: Iterable[str],
    count: int,
    pool: WorkerPool,
    *,
    max_megapixels: float,
    on_progress: Callable[[int], None] | None = None,
) -> ImageFacts:
    """Looks at every image.

    Args:
        root: Folder that the paths are relative to.
        images: Paths, each once.
        count: How many there are.
        pool: Processes to share the work among.
        max_megapixels: Most pixels of one image, in millions.
        on_progress: Called with the number of images that are done.
    """
    import numpy as np

    facts = ImageFacts(
        width=np.zeros(count, np.int32),
        height=np.zeros(count, np.int32),
        bytes=np.zeros(count, np.int64),
        format=np.full(count, -1, np.int16),
        mode=np.full(count, -1, np.int16),
        sha256=np.zeros(count, "V32"),
        hash=np.zeros(count, np.uint64),
        glimpse=np.zeros((count, 64), np.uint8),
        contrast=np.zeros(count, np.float32),
    )
    place = 0
    work = partial(_look, os.path.realpath(root), max_megapixels)
    for seen in pool.map(work, _packs(images), is_worth_it=count > _FEW):
        for item in seen:
            if isinstance(item, Fault):
                facts.faults[place] = item
            else:
                _set(facts, place, item)
            place += 1
        if on_progress is not None:
            on_progress(place)
    return facts


def _set(facts: ImageFacts, place: int, seen: _Seen) -> None:
    import numpy as np

    for names, name in ((facts.format_names, seen.format), (facts.mode_names, seen.mode)):
        if name not in names:
            names.append(name)
    facts.width[place], facts.height[place], facts.bytes[place] = seen.width, seen.height, seen.size
    facts.format[place] = facts.format_names.index(seen.format)
    facts.mode[place] = facts.mode_names.index(seen.mode)
    facts.sha256[place], facts.hash[place] = np.void(seen.sha256), seen.hash
    facts.glimpse[place] = np.frombuffer(seen.glimpse, np.uint8)
    facts.contrast[place] = seen.contrast


def _packs(images: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(images)
    while pack := list(islice(iterator, _PACK)):
        yield pack
