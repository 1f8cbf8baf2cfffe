"""Processes that work for a lease's owner: no new owner begins before they have ended."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
from pathlib import Path

from mgm_exp.errors import LeaseLost

from .claims import BEATS_PER_TTL, TTL_S, FileLock, Heartbeat, newest_claim, tokens_in, unlink_if_there
from .files import PathLike, read_json, write_json_atomic
from .processes import Process, is_descendant_of

_log = logging.getLogger(__name__)


class WorkerHold:
    """A worker's share in a lease; see ``hold_shared``."""

    def __init__(self, path: Path, token: int, lock: FileLock, ttl_s: float) -> None:
        self.path, self.token = path, token
        self._lock: FileLock | None = lock
        self._record = path / f"worker-{secrets.token_hex(8)}.json"
        write_json_atomic(self._record, {"token": token, "worker": Process.current().to_json()})
        self._heartbeat = Heartbeat(self._beat, ttl_s / BEATS_PER_TTL)
        self._heartbeat.start()

    def _beat(self) -> bool:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._record)
            newest = max(tokens_in(self.path), default=0)
        except OSError as error:
            _log.warning("%s: the heartbeat failed (%s)", self._record, error)
            return True
        if newest > self.token:
            sys.stderr.write(f"{self.path} has a new owner; this worker of the old one ends.\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)  # no clean-up: everything it could write belongs to somebody else
        return True

    def check(self) -> None:
        """Raises LeaseLost if the owner this process works for has been replaced."""
        newest = newest_claim(self.path)
        if newest is None or newest.token != self.token:
            raise LeaseLost(f"{self.path} has a new owner; this process worked for token {self.token}.")

    def release(self) -> None:
        """Ends the share before the process ends."""
        if self._lock is not None:
            self._heartbeat.stop()
            unlink_if_there(self._record)
            self._lock.release()
            self._lock = None
            _HELD.discard(self)


_HELD: set[WorkerHold] = set()  # a share lives as long as its process, whatever the caller keeps


def hold_shared(path: PathLike, token: int | None = None, *, ttl_s: float = TTL_S) -> WorkerHold:
    """Makes this process a worker of a lease's owner for the rest of its life: no new owner begins before it ends.

    Children that it forks share the hold. When it is shut out from another machine it kills itself.

    Args:
        path: The lease's folder.
        token: The owner's ``Lease.token``, passed down by it. Without it the owner must be an ancestor of this process,
            where that can be seen.
        ttl_s: As the owner's.

    Raises:
        LeaseLost: The owner is dead or has been replaced: this process came too late and must not write.
    """
    path = Path(path)
    lock = FileLock.attempt(path / "workers", is_shared=True)
    if lock is None:
        raise LeaseLost(f"{path} is being taken over from the owner this process was to work for.")
    try:
        claim = newest_claim(path)
        if claim is None or claim.is_released:
            raise LeaseLost(f"{path} has no owner this process could work for.")
        if token is not None and claim.token != token:
            raise LeaseLost(
                f"{path} has a new owner (token {claim.token}, not {token}, which this process worked for)."
            )
        if token is None and claim.holder and claim.holder.is_visible() and is_descendant_of(claim.holder.pid) is False:
            raise LeaseLost(f"{path} belongs to {claim.holder}, which did not start this process.")
        hold = WorkerHold(path, claim.token, lock, ttl_s)
    except BaseException:
        lock.release()
        raise
    _HELD.add(hold)
    return hold


def read_worker(path: Path) -> Process | None:
    """The process that a ``worker-<id>.json`` names; None if it is gone or cannot be read."""
    try:
        return Process.from_json(read_json(path)["worker"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
