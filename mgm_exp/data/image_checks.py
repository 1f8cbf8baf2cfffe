"""Checks many images in several processes: every one is decoded once, and its verdict kept.

    with ImageChecks(root, max_megapixels=50, workers=2) as checks:
        checks.begin(["a.jpg", "b.jpg"])        # starts; returns within a second
        verdict = checks.verdict("a.jpg")       # waits for it

Verdicts do not depend on the number of processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from mgm_exp.data.images import ImageFault, ImageInfo, probe_image
from mgm_exp.errors import DataError
from mgm_exp.store import spawned_pool, usable_cores

_PACK = 16  # images that one message to a process carries
_FEW = 64  # so many are checked before it is worth starting processes,
_SOON_S = 1.0  # and as many as take so long: starting two takes as much


class Verdict(NamedTuple):
    """What is known of one image.

    Args:
        kind: One of :data:`mgm_exp.data.kinds.IMAGE_KINDS`; None: it can be used.
        detail: What exactly was found.
        sha256: Of the file; empty where it could not be read or used.
        info: What was seen while it was decoded; None where it cannot be used.
    """

    kind: str | None
    detail: str
    sha256: str
    info: ImageInfo | None = None


def _check(root: str, image: str, max_megapixels: float) -> Verdict:
    try:
        info = probe_image(root, image, max_megapixels)
        return Verdict(None, "", info.sha256, info)
    except ImageFault as fault:
        return Verdict(fault.kind, fault.detail, "")


def _check_pack(root: str, images: list[str], max_megapixels: float) -> list[Verdict]:
    return [_check(root, image, max_megapixels) for image in images]


class ImageChecks:
    """Verdicts on the images below one root.

    Args:
        root: Image root.
        max_megapixels: Most pixels of one image, in millions.
        workers: Processes; None: all usable cores, two at least, if there is work for them. 0: in this process.
    """

    def __init__(self, root: Path | str, max_megapixels: float, workers: int | None = None) -> None:
        self.root = os.path.realpath(root)
        self.max_megapixels = max_megapixels
        self.workers = max(2, usable_cores()) if workers is None else workers
        self._may_wait = workers is None
        self._done, self._spent_s = 0, 0.0  # in this process
        self._verdicts: dict[str, Verdict] = {}
        self._waiting: dict[str, tuple[Future[list[Verdict]], int]] = {}
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> ImageChecks:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __len__(self) -> int:
        """Images that have a verdict."""
        return len(self._verdicts)

    def begin(self, images: Iterable[str]) -> None:
        """Starts checking the images that are not known yet."""
        new = [i for i in dict.fromkeys(images) if i not in self._verdicts and i not in self._waiting]
        if self._pool is None:
            are_few = self.workers < 2 or len(new) + len(self._verdicts) <= _FEW
            done = 0
            while done < len(new) and (are_few or self._is_soon(len(new) - done)):
                began, image = time.perf_counter(), new[done]
                self._verdicts[image] = _check(self.root, image, self.max_megapixels)
                self._spent_s += time.perf_counter() - began
                self._done, done = self._done + 1, done + 1
            new = new[done:]
            if not new:
                return
            self._pool = spawned_pool(self.workers)
        for start in range(0, len(new), _PACK):
            pack = new[start : start + _PACK]
            future = self._pool.submit(_check_pack, self.root, pack, self.max_megapixels)
            self._waiting.update((image, (future, place)) for place, image in enumerate(pack))

    def _is_soon(self, count: int) -> bool:
        """Whether so many more are checked here before processes would have started."""
        if not self._may_wait or self._done < _PACK:
            return self._may_wait
        return self._spent_s * (self._done + count) / self._done <= _SOON_S

    def verdict(self, image: str) -> Verdict:
        """The verdict on an image, waiting for it where it is being checked.

        Raises:
            DataError: a checking process was killed (by the kernel for its memory, or a crash in a decoder).
        """
        if image not in self._verdicts and image not in self._waiting:
            self.begin([image])
        if image in self._waiting:
            future, place = self._waiting.pop(image)
            try:
                self._verdicts[image] = future.result()[place]
            except BrokenProcessPool as error:
                raise DataError(
                    f"A process that checks images was killed; {image} or one of the images beside it in the file was "
                    "being decoded.",
                    advice="Lower data.max_megapixels if memory ran out, or remove that image.",
                ) from error
        return self._verdicts[image]

    def forget(self, images: Iterable[str]) -> None:
        """Drops verdicts that nobody will ask for again, so that memory does not grow with the data."""
        for image in images:
            self._verdicts.pop(image, None)
