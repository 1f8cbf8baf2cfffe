"""Garbage collection: what nobody used for a while goes, and what a crash left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from .files import temporary_name
from .layout import beside, stored_folders
from .lease import Lease, LeaseHeld
from .sealed import MARK, remove_folder


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

    def collect(self, keep_keys: Collection[str]) -> list[Dropped]:
        """Drops what may go but for these keys (or ``stage/key``), and says what it was, oldest first."""
        dropped = []
        for stage, key, kind, path in stored_folders(self.root):
            if key in keep_keys or f"{stage}/{key}" in keep_keys:
                continue
            found = self._collect(stage, key, kind, path)
            if found is not None:
                dropped.append(found)
        return sorted(dropped, key=lambda item: -item.idle_s)

    def _collect(self, stage: str, key: str, kind: str, path: Path) -> Dropped | None:
        is_leftover = kind == "trash" or (kind in ("work", "lease") and (self.root / stage / key / MARK).exists())
        limit_s = 0.0 if is_leftover else self.older_than_s
        try:
            idle_s = _idle_s(path)
            if idle_s < limit_s or (kind == "lease" and any(path.parent.glob(f"{key}.work*"))):
                return None
            lease = self.lease(stage, key)
            if self.dry_run:
                return None if lease.holder() else Dropped(path, kind, _own_bytes(path), idle_s)
            lease.acquire(wait=False)
        except (LeaseHeld, FileNotFoundError):
            return None
        try:
            if kind != "lease" and (not path.is_dir() or _idle_s(path) < limit_s):
                return None  # used, or dropped by another collector, before we had the lease
            found = Dropped(path, kind, _own_bytes(path), idle_s)
            if kind == "entry":
                trash = beside(path, f"trash-{temporary_name().rpartition('-')[2]}")
                os.rename(path, trash)  # from here on it is not published
                if _idle_s(trash) < limit_s:  # touched in the instant before
                    os.rename(trash, path)
                    return None
                path = trash
            if kind != "lease":
                remove_folder(path)
            return found
        finally:
            lease.release(forget=True)


def _idle_s(path: Path) -> float:
    """Seconds since a folder or, for a work folder, anything in it was last changed or touched."""
    newest = path.stat().st_mtime
    if not (path / MARK).exists():
        for parent, folders, files in os.walk(path):
            for name in (*folders, *files):
                newest = max(newest, os.lstat(os.path.join(parent, name)).st_mtime)
    return max(0.0, time.time() - newest)


def _own_bytes(path: Path) -> int:
    total = 0
    for parent, _, files in os.walk(path):
        for name in files:
            facts = os.lstat(os.path.join(parent, name))
            total += facts.st_blocks * 512 if facts.st_nlink == 1 else 0
    return total
