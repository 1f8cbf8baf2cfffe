"""Garbage collection: what nobody used for a while goes, and what a crash left behind."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from .claims import now_on
from .files import temporary_name
from .layout import beside, stored_folders
from .lease import Lease, LeaseHeld
from .sealed import MARK, remove_folder

_log = logging.getLogger(__name__)
# NFS: a file of it is open on this machine; another machine was quicker.
_NOT_NOW = {errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ESTALE}


@dataclass(frozen=True)
class Dropped:
    """Something that ``Store.gc`` dropped, or would drop.

    Attributes:
        path: The folder.
        kind: ``entry``, ``work`` (of a stage nobody finished), ``damaged``, ``trash`` (of an interrupted deletion) or
            ``lease``.
        size: Bytes on disk that only it held: files with other hard links do not count.
        idle_s: Seconds since it was last used.
    """

    path: Path
    kind: str
    size: int
    idle_s: float


class Collector:
    """One collection of a store; see ``Store.gc``.

    Args:
        root: The store's folder.
        lease: The lease of a stage and a key.
        older_than_s: Seconds since the last use.
        dry_run: Change nothing.
    """

    def __init__(self, root: Path, lease: Callable[[str, str], Lease], older_than_s: float, dry_run: bool) -> None:
        self.root, self.lease = root, lease
        self.older_than_s, self.dry_run = older_than_s, dry_run
        self._now = 0.0
        self._begun: set[tuple[str, str]] = set()

    def collect(self, keep_keys: Collection[str]) -> list[Dropped]:
        """Drops what may go but for these keys (or ``stage/key``), and says what it was, oldest first."""
        if not self.root.is_dir():
            return []
        # By the clock that stamps the files (this machine's may be wrong), as it was when the collection began: what is
        # used meanwhile is younger.
        can_write = os.access(self.root, os.W_OK)
        self._now = now_on(self.root) if can_write or not self.dry_run else time.time()
        keep = frozenset(keep_keys)
        folders = list(stored_folders(self.root))
        self._begun = {(stage, key) for stage, key, kind, _ in folders if kind == "work"}
        dropped = []
        for stage, key, kind, path in folders:
            if key in keep or f"{stage}/{key}" in keep:
                continue
            try:
                found = self._collect(stage, key, kind, path)
            except OSError as error:
                if error.errno not in _NOT_NOW:
                    raise
                _log.warning("%s cannot be dropped now (%s); the next collection tries again", path, error)
                continue
            if found is not None:
                dropped.append(found)
        return sorted(dropped, key=lambda item: -item.idle_s)

    def _collect(self, stage: str, key: str, kind: str, path: Path) -> Dropped | None:
        is_leftover = kind == "trash" or (kind in ("work", "lease") and (self.root / stage / key / MARK).exists())
        limit_s = 0.0 if is_leftover else self.older_than_s
        try:
            idle_s = self._idle_s(path)
            if idle_s < limit_s or (kind == "lease" and (stage, key) in self._begun):
                return None
            lease = self.lease(stage, key)
            if self.dry_run:
                return None if lease.holder() else Dropped(path, kind, _own_bytes(path), idle_s)
            lease.acquire(wait=False)
        except (LeaseHeld, FileNotFoundError):
            return None
        try:
            if kind != "lease" and (not path.is_dir() or self._idle_s(path) < limit_s):
                return None  # used, or dropped by another collector, before we had the lease
            found = Dropped(path, kind, _own_bytes(path), idle_s)
            if kind == "entry":
                trash = beside(path, f"trash-{temporary_name().rpartition('-')[2]}")
                os.rename(path, trash)  # from here on it is not published
                if self._idle_s(trash) < limit_s:  # touched in the instant before
                    os.rename(trash, path)
                    return None
                path = trash
            if kind != "lease":
                remove_folder(path)
            return found
        finally:
            lease.release(forget=True)

    def _idle_s(self, path: Path) -> float:
        """Seconds since a folder or, for a work folder, anything in it was last changed or touched."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # opened: NFS then asks its server
        try:
            newest = os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
        if not (path / MARK).exists():
            for parent, folders, files in os.walk(path):
                for name in (*folders, *files):
                    newest = max(newest, os.lstat(os.path.join(parent, name)).st_mtime)
        return max(0.0, self._now - newest)


def _own_bytes(path: Path) -> int:
    total = 0
    for parent, _, files in os.walk(path):
        for name in files:
            facts = os.lstat(os.path.join(parent, name))
            total += facts.st_blocks * 512 if facts.st_nlink == 1 else 0
    return total
