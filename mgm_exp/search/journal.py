"""The study as a file: one JSON record a line, in Optuna's own journal format, safe against ``kill -9`` at any instant.

Optuna's backend has two weak points, which this one does not have. A writer that is killed in the middle of a line
leaves half of it; the next writer appends behind, and from then on nobody can read the file: here a torn line (which
nobody was told of) is cut off before something is appended. A writer that is killed while it holds Optuna's lock file
stops all others for 30 seconds; here the lock is ``flock``, which the kernel frees. On a file system that other
machines may write (NFS and the like) ``flock`` may be kept to each machine; there Optuna's lock file is held, too.
Optuna's tools read the file as it is: ``JournalStorage(JournalFileBackend("study.journal"))``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileSymlinkLock

from mgm_exp.store import disk_full_named, is_shared

_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_BLOCK = 4096


class StudyJournal(BaseJournalBackend):
    """See the module.

    Args:
        path: The file; made as needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).resolve()
        self._offsets = [0]  # where record 0, 1, ... begins
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        self._is_shared = is_shared(self.path)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The whole records from a number on; what is being written, or was torn, is not one."""
        start = min(log_number_from, len(self._offsets) - 1)
        with open(self.path, "rb") as file:
            file.seek(self._offsets[start])
            content = file.read()
        position = self._offsets[start]
        for number, line in enumerate(content.split(b"\n")[:-1], start):
            position += len(line) + 1
            if number + 1 == len(self._offsets):
                self._offsets.append(position)
            if number >= log_number_from:
                yield json.loads(line)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Adds records; they are on disk when this returns.

        Raises:
            DiskFullError: no space is left; nothing of them stays.
        """
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._locked() as descriptor, disk_full_named(self.path, len(lines)):
            end = _whole_lines(descriptor)
            os.ftruncate(descriptor, end)
            try:
                os.lseek(descriptor, end, os.SEEK_SET)
                while lines:
                    lines = lines[os.write(descriptor, lines) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        with _opened(self.path) as descriptor:
            is_enough = not self._is_shared
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                is_enough = False
            if is_enough:
                yield descriptor
                return
            # Optuna's own way, which holds between machines; opened under the lock: then a network file system asks its
            # server how long the file is.
            with _link_lock(self.path), _opened(self.path) as current:
                yield current


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _link_lock(path: Path) -> Iterator[None]:
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _whole_lines(descriptor: int) -> int:
    """Where the last whole line ends."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        size = min(_BLOCK, end)
        block = os.pread(descriptor, size, end - size)
        newline = block.rfind(b"\n")
        if newline >= 0:
            return end - size + newline + 1
        end -= size
    return 0
