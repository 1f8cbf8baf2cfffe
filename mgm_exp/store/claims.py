"""What a lease is made of: claims with growing tokens, locks on files that may be deleted under us, heartbeats."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from .files import fsync_folder, read_json, temporary_name, write_new
from .processes import Process

TTL_S = 120.0
BEATS_PER_TTL = 12
_CLAIM = re.compile(r"^claim-(\d{6,})\.json$")
_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_NO_HARD_LINK = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class Claim:
    """One taking of a lease, as it stands in ``claim-<token>.json``.

    Attributes:
        path: The file.
        token: The fencing token; each new owner has a higher one.
        nonce: Distinguishes two claims of one number when the lease was forgotten in between.
        holder: The owner; None while (or because) the file cannot be read.
        has_lock: Whether the owner could take a file lock; some file systems have none.
        is_released: The owner gave it back.
        heartbeat: Time of the last sign of life in seconds since the epoch, by the file system's clock.
    """

    path: Path
    token: int
    nonce: str
    holder: Process | None
    has_lock: bool
    is_released: bool
    heartbeat: float


class FileLock:
    """A ``flock`` on a file that may be deleted and made again under us."""

    def __init__(self, descriptor: int, works: bool) -> None:
        self._descriptor = descriptor
        self.works = works

    @classmethod
    def attempt(cls, path: Path, *, is_shared: bool) -> FileLock | None:
        """The lock, or None if another process stands in the way."""
        kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
        while True:
            with contextlib.suppress(
                FileExistsError
            ):  # not exist_ok=True: it raises if the folder is forgotten meanwhile
                path.parent.mkdir(parents=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue  # the folder was forgotten between the two lines
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                works = True
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    os.close(descriptor)
                    raise
                works = False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return cls(descriptor, works)
            os.close(descriptor)

    def release(self) -> None:
        """Frees the lock, also in children that inherited the descriptor."""
        if self.works:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)

    def leave_to_parent(self) -> None:
        """In a forked child: drops our copy of the descriptor; the lock stays with the parent."""
        os.close(self._descriptor)


class Heartbeat(threading.Thread):
    """Calls ``beat`` every ``interval_s`` until it is stopped or ``beat`` returns False."""

    def __init__(self, beat: Callable[[], bool], interval_s: float) -> None:
        super().__init__(name="lease-heartbeat", daemon=True)
        self._beat, self._interval_s, self._stopped = beat, interval_s, threading.Event()

    def run(self) -> None:
        """The thread's work."""
        while not self._stopped.wait(self._interval_s) and self._beat():
            pass

    def stop(self) -> None:
        """Ends the thread and waits for a beat that is under way."""
        self._stopped.set()
        if self is not threading.current_thread():
            self.join()


def newest_claim(path: Path) -> Claim | None:
    """The claim in force in a lease's folder, released or not; None if there is none."""
    while tokens := tokens_in(path):
        claim = read_claim(path / f"claim-{max(tokens):06d}.json")
        if claim is not None:
            return claim
    return None


def tokens_in(path: Path) -> list[int]:
    """The tokens of all claims in a lease's folder, in no order."""
    try:
        return [int(match.group(1)) for name in os.listdir(path) if (match := _CLAIM.match(name))]
    except FileNotFoundError:
        return []


def read_claim(path: Path) -> Claim | None:
    """The claim in a file; None if there is none."""
    try:
        heartbeat = path.stat().st_mtime
        content = read_json(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # ESTALE: NFS, deleted on another machine while we read
            raise
        return None
    except ValueError:  # without hard links a claim is created and then written: this one is (or was) half-way
        content = {}
    token = int(path.stem.partition("-")[2])
    try:
        holder = Process.from_json(content["holder"])
        is_released = content["released_at"] is not None
        return Claim(path, token, content["nonce"], holder, bool(content["has_lock"]), is_released, heartbeat)
    except (KeyError, TypeError):
        return Claim(path, token, "", None, False, False, heartbeat)


def create_once(path: Path, raw: bytes) -> bool:
    """Creates ``path`` with its content if nobody else has: True for exactly one of all who try, on any file system."""
    temporary = path.parent / temporary_name()
    try:
        write_new(temporary, raw)
        os.link(temporary, path)
    except FileNotFoundError:  # the folder was forgotten at this moment
        return False
    except FileExistsError:
        return _holds(path, raw)  # a network file system may have done it and lost the answer
    except OSError as error:
        if error.errno not in _NO_HARD_LINK:
            raise
        try:
            write_new(path, raw)
        except FileExistsError:
            return False
    finally:
        unlink_if_there(temporary)
    fsync_folder(path.parent)
    return True


def _holds(path: Path, raw: bytes) -> bool:
    """Whether a file has this content: asks the server, while a remembered link count may be an old one."""
    try:
        return path.read_bytes() == raw
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return False


def unlink_if_there(path: Path) -> None:
    """Deletes a file; no error if there is none."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def now_on(folder: Path) -> float:
    """The time by the clock that stamps files in ``folder``: a server's, on a network file system."""
    probe = folder / temporary_name()
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        return probe.stat().st_mtime
    finally:
        unlink_if_there(probe)


def utc_now() -> str:
    """Now, as written into our files."""
    return datetime.now(UTC).isoformat(timespec="seconds")
