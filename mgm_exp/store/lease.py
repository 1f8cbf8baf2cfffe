"""Leases: one writer for a folder, known by name, replaced at once when it dies and shut out when it is replaced.

A lease is a folder of its own beside (or in) what it guards:

    lock                  flock, exclusive: held by the owner and freed by the kernel the moment it dies
    workers               flock, shared: held by every process that works for the owner
    claim-000007.json     who took it, with the fencing token 7; its modification time is the heartbeat
    worker-<id>.json      one for each process in ``workers``, with a heartbeat: for machines whose locks we cannot see

On one machine the locks decide. Locks are not enough on shared file systems (some mounts keep them to each machine,
some have none), so a claim is also made by hard-linking the next number into place, which is atomic everywhere, and an
owner on another machine counts as gone only when its heartbeat has stood still for ``ttl_s``. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from mgm_exp.errors import DiskFullError, LeaseLost, UserError

from .claims import (
    BEATS_PER_TTL,
    TTL_S,
    Claim,
    FileLock,
    Heartbeat,
    create_once,
    newest_claim,
    now_on,
    read_claim,
    tokens_in,
    unlink_if_there,
    utc_now,
)
from .files import PathLike, encode_json, read_json, write_json_atomic
from .predecessors import Predecessors
from .processes import Process

_log = logging.getLogger(__name__)

GRACE_S = 10.0
_NOT_WAITING_S = 0.25  # somebody who only looks (`holder`) has the lock for an instant
_SAY_AGAIN_S = 30.0


class LeaseHeld(UserError):
    """Somebody else is writing this folder, and we were told not to wait (any longer)."""


class Lease:
    """The right to write a folder: at most one owner, with a token that grows from owner to owner.

    Example:
        >>> with Lease(run_dir / ".lease") as lease:      # waits for another owner
        ...     write_something()
        ...     lease.check()                             # still ours? else LeaseLost
        ...     publish_it()

    Args:
        path: The lease's own folder, made as needed (``<run>/.lease``, ``<stage>/<key>.lease``).
        ttl_s: An owner on another machine counts as gone when its heartbeat stands still for so long. Lower takes over
            sooner; higher survives longer stalls of a network file system. The same for all who share the folder.
        grace_s: How long processes of a dead owner may take to end by themselves before they are killed.
        on_lost: Called once, in the heartbeat thread, when the lease is found to be lost.
        on_beat: Called with each heartbeat, in its thread.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        ttl_s: float = TTL_S,
        grace_s: float = GRACE_S,
        on_lost: Callable[[str], None] | None = None,
        on_beat: Callable[[], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.ttl_s, self.grace_s = ttl_s, grace_s
        self.token: int = 0
        self._on_lost, self._on_beat = on_lost, on_beat
        self._lock: FileLock | None = None
        self._claim: Claim | None = None
        self._heartbeat: Heartbeat | None = None
        self._lost: str | None = None
        self._pid = 0
        self._predecessors = Predecessors(self.path, ttl_s, grace_s)
        self._renewed_at = 0.0

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def acquire(
        self, wait: bool = True, on_wait: Callable[[str], None] | None = None, timeout_s: float | None = None
    ) -> None:
        """Takes the lease; when this returns, every process of an earlier owner has ended or is shut out.

        Args:
            wait: If False, somebody else's lease raises at once.
            on_wait: Called with a sentence that says who is waited for: at the start, when it changes, every 30 s.
            timeout_s: Wait no longer than this.

        Raises:
            LeaseHeld: It was not free (in time); says who has it.
            UserError: The folder cannot be written.
        """
        if self._claim is not None:
            raise RuntimeError(f"{self.path} is already held by this object.")
        self._predecessors = Predecessors(self.path, self.ttl_s, self.grace_s)
        started, pause_s, said, said_at = time.monotonic(), 0.02, "", 0.0
        limit_s = timeout_s if wait else _NOT_WAITING_S
        try:
            while obstacle := self._attempt():
                now = time.monotonic()
                if limit_s is not None and now - started >= limit_s:
                    raise LeaseHeld(
                        f"{self.path} is in use by {obstacle}.",
                        advice="Wait for it to end, or stop it, and give the same command again.",
                    )
                if on_wait is not None and (obstacle != said or now - said_at >= _SAY_AGAIN_S):
                    on_wait(f"{self.path}: waiting for {obstacle}")
                    said, said_at = obstacle, now
                time.sleep(pause_s)
                pause_s = min(pause_s * 1.5, 0.5)
            self.check()  # the wait for workers may have been long
        except OSError as error:
            self.release()
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            message = f"{self.path} cannot be written ({error.strerror})."
            raise UserError(message, advice="Choose another folder, or ask for access to this one.") from error
        except BaseException:
            self.release()
            raise

    def _attempt(self) -> str | None:
        """One try. None: it is ours and nobody of an earlier owner is left. Else who stands in the way."""
        if self._lock is None:
            self._lock = FileLock.attempt(self.path / "lock", is_shared=False)
            if self._lock is None:
                return self._predecessors.who_locks()
        if self._claim is None:
            current = newest_claim(self.path)
            if current is not None and not current.is_released:
                obstacle = self._predecessors.who_claims(current, self._lock)
                if obstacle is not None:
                    return obstacle
            if not self._link_claim(current, self._lock):
                self._lock.release()
                self._lock = None
                return "another process, which was quicker"
        return self._predecessors.who_works(self._lock)

    def _link_claim(self, predecessor: Claim | None, lock: FileLock) -> bool:
        token = (predecessor.token if predecessor else 0) + 1
        path = self.path / f"claim-{token:06d}.json"
        nonce = secrets.token_hex(8)
        content = {
            "schema_version": 1,
            "token": token,
            "nonce": nonce,
            "holder": Process.current().to_json(),
            "has_lock": lock.works,
            "acquired_at": utc_now(),
            "released_at": None,
        }
        if not create_once(path, encode_json(content)):
            return False
        if not self._follows(predecessor, token):
            unlink_if_there(path)
            return False
        self._claim = read_claim(path)
        self.token, self._pid, self._lost, self._renewed_at = token, os.getpid(), None, time.monotonic()
        for older in sorted(tokens_in(self.path)):
            if older < token:  # ascending: see _renew
                unlink_if_there(self.path / f"claim-{older:06d}.json")
        self._heartbeat = Heartbeat(self._beat, self.ttl_s / BEATS_PER_TTL)
        self._heartbeat.start()
        return True

    def _follows(self, predecessor: Claim | None, token: int) -> bool:
        """Whether our new claim really is the next one.

        The number may have been free because others had taken it and moved on since we looked. Claims are removed in
        ascending order: if the predecessor is still there, ours is the first of its number.
        """
        others = set(tokens_in(self.path)) - {token}
        if predecessor is None:
            return not others
        still = read_claim(predecessor.path)
        return still is not None and still.nonce == predecessor.nonce and max(others) == predecessor.token

    @property
    def took_over_expired(self) -> bool:
        """Whether the owner before is not known to be dead, only not heard of: it may wake up."""
        return self._predecessors.took_over_expired

    def check(self) -> None:
        """Confirms, on disk, that the lease is still ours; call it before anything becomes visible to others.

        Raises:
            LeaseLost: Another process took it over (or the lease was not acquired).
            OSError: The file system does not answer; then nothing is confirmed.
        """
        if self._claim is None:
            raise LeaseLost(f"{self.path} is not held by this process.")
        if self._lost is None:
            self._lost = self._renew(self._claim)
        if self._lost is not None:
            raise LeaseLost(self._lost, advice="Give the same command again: it waits for the new owner.")

    def _renew(self, claim: Claim) -> str | None:
        """Beats once; None, or why the lease is lost."""
        successor = read_claim(self.path / f"claim-{claim.token + 1:06d}.json")
        if successor is None:
            # Ours second: claims are removed in ascending order, so a successor that came and went took ours first. The
            # look above may be answered from what this machine remembers; changing a file's time asks the server.
            try:
                os.utime(claim.path)
                current = read_claim(claim.path)
                if current is not None and current.nonce == claim.nonce:
                    self._renewed_at = time.monotonic()
                    return None
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
            successor = newest_claim(self.path)
        who = f"was taken over by {successor.holder}" if successor and successor.holder else "was taken over or removed"
        return f"{self.path} {who} while this process held it (token {claim.token})."

    def _beat(self) -> bool:
        claim = self._claim
        if claim is None:
            return False
        try:
            lost = self._renew(claim)
        except OSError as error:  # a network file system may be away for a while: nobody takes over before ttl_s
            lost = f"{self.path}: no heartbeat for {self.ttl_s:g} s ({error})." if self._is_overdue() else None
        if lost is None:
            if self._on_beat is not None:
                self._on_beat()
            return True
        self._lost = lost
        _log.error("%s", lost)
        if self._on_lost is not None:
            self._on_lost(lost)
        return False

    def _is_overdue(self) -> bool:
        return time.monotonic() - self._renewed_at > self.ttl_s

    def release(self, *, forget: bool = False) -> None:
        """Gives the lease back; no error if it is lost, was never taken, or the disk is full.

        Args:
            forget: Also delete the lease's folder (what it guarded is finished or gone); tokens begin anew then.
        """
        if self._lock is None and self._claim is None:
            return
        if self._pid not in (0, os.getpid()):  # a forked child: the lease is the parent's
            if self._lock is not None:
                self._lock.leave_to_parent()
            self._lock = self._claim = self._heartbeat = None
            return
        if self._heartbeat is not None:
            self._heartbeat.stop()
        claim, is_forgotten = self._claim, False
        try:
            is_ours = claim is not None and self._lost is None and self._renew(claim) is None
            is_forgotten = claim is not None and is_ours and forget and self._forget(claim)
            if claim is not None and is_ours and not is_forgotten:
                write_json_atomic(claim.path, {**read_json(claim.path), "released_at": utc_now()})
        except (OSError, DiskFullError) as error:  # no reason to hide what the work itself ended with
            _log.warning("%s is given up without a note of it (%s)", self.path, error)
        finally:
            self._abandon()
        if is_forgotten:  # after the lock was closed: NFS keeps what is open under another name in the folder
            with contextlib.suppress(OSError):  # a successor is in it already
                self.path.rmdir()

    def _forget(self, claim: Claim) -> bool:
        workers = FileLock.attempt(self.path / "workers", is_shared=False)
        if workers is None:
            return False  # somebody still works; the folder has to stay for the next owner to see it
        for path in (*self.path.glob("worker-*.json"), *self.path.glob(".tmp-*")):
            unlink_if_there(path)
        unlink_if_there(self.path / "workers")
        workers.release()
        # The claim last: while it is there nobody begins anew, and afterwards nothing of a successor's is deleted. One
        # that waits on this machine finds a new lock free and this claim without one: it goes on as after a death.
        unlink_if_there(self.path / "lock")
        unlink_if_there(claim.path)
        return True

    def _abandon(self) -> None:
        """Drops everything in memory and the lock; an unreleased claim stays as that of a dead owner would."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._lock is not None:
            self._lock.release()
        self._lock = self._claim = self._heartbeat = None

    def holder(self) -> Claim | None:
        """Who has it now, without taking it; None if it is free. On another machine the last heartbeat tells."""
        claim = newest_claim(self.path)
        if not (self.path / "lock").exists():
            return None
        lock = FileLock.attempt(self.path / "lock", is_shared=False)
        if lock is None:
            return claim or Claim(self.path, 0, "", None, True, False, 0.0)
        try:
            if claim is None or claim.is_released:
                return None
            if claim.holder is not None and claim.holder.is_on_this_machine():
                is_dead = (lock.works and claim.has_lock) or (claim.holder.is_visible() and not claim.holder.is_alive())
                return None if is_dead else claim
            return claim if now_on(self.path) - claim.heartbeat <= self.ttl_s else None
        except FileNotFoundError:  # forgotten at this moment
            return None
        finally:
            lock.release()
