"""Copies the images of a dataset, a few at a time, and makes sure that they are what was validated."""

from __future__ import annotations

import os
import posixpath
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mgm_exp.data.formats.id_set import IdSet
from mgm_exp.data.images import locate, probe_image
from mgm_exp.data.tar_members import SEPARATOR
from mgm_exp.errors import DataError
from mgm_exp.store import file_sha256

_COPIERS = 4
_MOST_WAITING = 256


class ImageCopies:
    """Copies image files, a few at a time, and checks that they are what was validated."""

    def __init__(self, building: Path, root: Path, max_megapixels: float) -> None:
        self._building, self._root, self._max_megapixels = building, root, max_megapixels
        self._done = IdSet()
        self._pool = ThreadPoolExecutor(_COPIERS)
        self._waiting: deque[Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, relative: str) -> bool:
        return relative in self._done

    def add(self, target: str, image: str, sha256: str) -> None:
        """Copies an image, once.

        Args:
            target: Its path in the copy.
            image: Its path in the row.
            sha256: What was validated; empty where an earlier row has the image too.
        """
        shard, is_packed, _ = target.partition(SEPARATOR)
        path = posixpath.normpath(f"{shard}.tar" if is_packed else target)
        if not self._done.add(path):
            return
        if is_packed:
            original = locate(self._root, f"{image.partition(SEPARATOR)[0]}.tar")
            self._submit(lambda: self._copy(original, path, file_sha256(original)))
        else:
            known = sha256 or probe_image(self._root, image, self._max_megapixels).sha256
            self._submit(lambda: self._copy(locate(self._root, image), path, known))

    def _submit(self, job: Callable[[], None]) -> None:
        self._waiting.append(self._pool.submit(job))
        while len(self._waiting) > _MOST_WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def _copy(self, original: Path, relative: str, sha256: str) -> None:
        target = self._building / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file() and file_sha256(target) == sha256:  # of an interrupted attempt
            return
        temporary = target.with_name(f".{target.name[:100]}.copying")
        shutil.copyfile(original, temporary)
        if file_sha256(temporary) != sha256:
            temporary.unlink()
            raise DataError(f"{original} changed while it was copied.", advice="Give the command again.")
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        shutil.copystat(original, temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)

    def finish(self) -> None:
        """Waits until all are copied."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Stops; what was copied stays for the next attempt."""
        self._pool.shutdown(wait=True, cancel_futures=True)
