"""What is left of a lease's earlier owners, and when it is out of the way.

Each method answers with None or with who stands in the way, as it is shown to the one who waits.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from .claims import Claim, FileLock, newest_claim, now_on, unlink_if_there
from .processes import kill, lock_holders, start_time
from .workers import read_worker

_log = logging.getLogger(__name__)

_LONG_GONE_S = 86_400.0


class Predecessors:
    """The owners before us, their claims, their workers, and the processes that were forked from them.

    Args:
        path: The lease's folder.
        ttl_s: See ``Lease``.
        grace_s: See ``Lease``.
    """

    def __init__(self, path: Path, ttl_s: float, grace_s: float) -> None:
        self.path, self.ttl_s, self.grace_s = path, ttl_s, grace_s
        self.took_over_expired = False
        self._seen: dict[str, tuple[object, float]] = {}

    def who_locks(self) -> str:
        """Who has the lock that we could not get."""
        claim = newest_claim(self.path)
        if claim is None or claim.holder is None:
            return "a process that has just begun"
        if claim.holder.is_visible() and not claim.holder.is_alive():
            # The lock outlives a dead owner in children that were forked from it and inherited its descriptor.
            orphans = [pid for pid, taken_by in lock_holders(self.path / "lock") if pid != taken_by]
            if orphans:
                return self._end_orphans("lock", orphans)
        return (
            f"{claim.holder}, which is stopped: continue or kill it" if claim.holder.is_stopped() else str(claim.holder)
        )

    def who_claims(self, claim: Claim, lock: FileLock) -> str | None:
        """Whose unreleased claim stands in the way of us, who have the lock; None if it is of the dead."""
        holder = claim.holder
        if holder is not None and holder.is_on_this_machine():
            if lock.works and claim.has_lock:
                return None  # its lock was free, so it is dead
            if holder.is_visible():
                return str(holder) if holder.is_alive() else None
        if self._stands_still(claim.path):
            self.took_over_expired = True
            return None
        name = str(holder) if holder else f"an owner that {claim.path.name} does not name"
        return f"{name}, unless its heartbeat stands still for {self.ttl_s:g} s"

    def _stands_still(self, path: Path) -> bool:
        """Whether a heartbeat has not moved for ``ttl_s`` since we first looked, or for a day when we first look."""
        try:
            with open(path, "rb") as file:  # opening it makes a network file system ask its server
                beat = os.fstat(file.fileno()).st_mtime_ns
            now = time.monotonic()
            if path.name not in self._seen:
                self._seen[path.name] = (beat, now)
                return now_on(self.path) - beat / 1e9 > max(_LONG_GONE_S, self.ttl_s)
        except FileNotFoundError:  # given back at this moment
            return False
        before, since = self._seen[path.name]
        if before != beat:
            self._seen[path.name] = (beat, now)
            return False
        return now - since >= self.ttl_s

    def who_works(self, lock: FileLock) -> str | None:
        """Waits for, ends or shuts out the workers of earlier owners; None when there are none."""
        for path in self.path.glob("worker-*.json"):
            worker = read_worker(path)
            if worker is not None and worker.is_visible():
                if not worker.is_alive():
                    unlink_if_there(path)
                continue
            if worker is not None and worker.is_on_this_machine() and lock.works:
                continue  # another container on this machine: its lock tells
            if not self._stands_still(path):
                name = f"{worker or path.name}, a worker of the owner before"
                return f"{name}, unless its heartbeat stands still for {self.ttl_s:g} s"
            unlink_if_there(path)
        workers_lock = FileLock.attempt(self.path / "workers", is_shared=False)
        if workers_lock is None:
            return self._end_orphans("workers", [pid for pid, _ in lock_holders(self.path / "workers")])
        workers_lock.release()
        if not workers_lock.works:
            workers = [read_worker(path) for path in self.path.glob("worker-*.json")]
            if alive := [worker.pid for worker in workers if worker and worker.is_alive()]:
                return self._end_orphans("workers", alive)
        for path in self.path.glob("worker-*.json"):
            unlink_if_there(path)  # the lock was free, so these are dead
        return None

    def _end_orphans(self, what: str, pids: list[int]) -> str:
        """Names processes of a dead owner on this machine, and after the grace period kills them."""
        if not pids:
            return f"a process that holds {self.path / what} and cannot be seen from here (another user or container)"
        now, names = time.monotonic(), []
        for pid in sorted(pids):
            started = start_time(pid)
            if started is None or pid == os.getpid():
                continue
            _, since = self._seen.setdefault(f"{what} {pid} {started}", (None, now))
            if now - since >= self.grace_s and kill(pid, started):
                _log.warning("%s: killed process %d, which outlived the owner it worked for", self.path, pid)
            names.append(str(pid))
        who = f"process {', '.join(names) or '(ending)'} of an owner that is dead"
        return f"{who}; killed if still there after {self.grace_s:g} s"
