"""Images decoded in several processes, ahead of whoever needs them.

    with ImageLoader(root, max_megapixels=50, workers=2) as loader:
        pending = loader.begin(["a.jpg", "b.jpg"])     # starts; returns at once
        images = pending()                             # waits: each an image, or the fault of one that cannot be used

The result does not depend on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from PIL import Image

from mgm_exp.data.images import ImageFault, open_image
from mgm_exp.errors import DataError
from mgm_exp.store import spawned_pool

Opened = Image.Image | ImageFault
_PACK = 4  # images that one message to a process carries


def open_images(root: str, images: Sequence[str], max_megapixels: float) -> list[Opened]:
    """Images as 8-bit RGB, or what is wrong with them."""
    opened: list[Opened] = []
    for image in images:
        try:
            opened.append(open_image(root, image, max_megapixels))
        except ImageFault as fault:
            opened.append(fault)
    return opened


class ImageLoader:
    """Opens images below one root.

    Args:
        root: Image root.
        max_megapixels: Most pixels of one image, in millions.
        workers: Processes; 0: in this process, when the images are asked for.
    """

    def __init__(self, root: Path | str, max_megapixels: float, workers: int = 0) -> None:
        self.root, self.max_megapixels, self.workers = os.fspath(root), max_megapixels, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> ImageLoader:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def begin(self, images: Sequence[str]) -> Callable[[], list[Opened]]:
        """Starts opening images; the function that comes back waits for them, in their order.

        Raises:
            DataError: (by that function) a process was killed, by the kernel for its memory or in a decoder.
        """
        if self.workers < 1:
            return lambda: open_images(self.root, images, self.max_megapixels)
        if self._pool is None:
            self._pool = spawned_pool(self.workers)
        packs = [images[start : start + _PACK] for start in range(0, len(images), _PACK)]
        futures = [self._pool.submit(open_images, self.root, pack, self.max_megapixels) for pack in packs]

        def wait() -> list[Opened]:
            try:
                return [opened for future in futures for opened in future.result()]
            except BrokenProcessPool as error:
                raise DataError(
                    f"A process that decodes images was killed; one of {', '.join(images[:3])}, ... was being decoded.",
                    advice="Lower data.max_megapixels if memory ran out, or remove that image.",
                ) from error

        return wait
