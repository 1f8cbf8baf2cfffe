"""At most one message of a kind in so many minutes, for a run or for all trials of a sweep together."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mgm_exp.errors import DiskFullError
from mgm_exp.store import read_record, write_json_atomic

log = logging.getLogger(__name__)

FILE = "alerts.json"


class Rate:
    """Counts in a file, so that trials in other processes and a continued run go by the same.

    Args:
        folder: Of the run, or of its sweep.
        every_s: Seconds between two messages of a kind.
    """

    def __init__(self, folder: Path, every_s: float) -> None:
        self._path, self._lock, self._every_s = folder / FILE, folder / ".alerts.lock", every_s

    def take(self, kind: str, now: float) -> int | None:
        """Whether a message of a kind may be sent: how many of them were held back before it; None: it may not.

        Where nothing can be written, as on a full disk, all of them may: one too many is better than none.

        Args:
            now: ``time.time()``.
        """
        try:
            with self._locked():
                return self._counted(kind, now)
        except (OSError, DiskFullError) as error:
            log.warning("the rate of messages cannot be kept (%s): %s is sent", error, kind)
            return 0

    def _counted(self, kind: str, now: float) -> int | None:
        counts = self._read()
        known = counts.get(kind) or {}
        sent_at, held_back = known.get("sent_at"), int(known.get("held_back") or 0)
        if isinstance(sent_at, (int, float)) and 0 <= now - sent_at < self._every_s:
            counts[kind] = {"sent_at": sent_at, "held_back": held_back + 1}
            write_json_atomic(self._path, counts)
            return None
        counts[kind] = {"sent_at": now, "held_back": 0}
        write_json_atomic(self._path, counts)
        return held_back

    def held_back(self) -> int:
        """Messages that nobody got, of all kinds, since the last one of their kind."""
        return sum(int(known.get("held_back") or 0) for known in self._read().values())

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = read_record(self._path)
        except (OSError, ValueError):
            return {}
        return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
