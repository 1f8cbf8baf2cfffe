"""Who is a process, is it still there, which processes hold a lock, and how a child dies with its parent.

A process id alone names nobody: it is used again, differs between containers, and says nothing on another machine. Here
a process is host, boot, pid namespace, pid and start time together.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_FLOCK_LINE = re.compile(r"^lock:\s*\d+:\s*FLOCK\s+\S+\s+\S+\s+(-?\d+)\s", re.MULTILINE)


@dataclass(frozen=True)
class Process:
    """One process of one boot of one machine.

    Attributes:
        host: Host name.
        boot_id: The kernel's random id of this boot; empty where there is none.
        pid_namespace: Which numbering ``pid`` belongs to (containers have their own); empty where there is none.
        pid: Process id.
        started: Start time in clock ticks since boot; -1 where it cannot be read.
        command: The program's name, without its arguments: these may hold secrets, and this is written to disk.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    started: int
    command: str

    @classmethod
    def current(cls) -> Process:
        """This process."""
        command = "/".join(Path(sys.argv[0]).parts[-2:]) if sys.argv and sys.argv[0] else "python"
        pid = os.getpid()
        return cls(socket.gethostname(), _boot_id(), _pid_namespace(), pid, start_time(pid) or -1, command)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Process:
        """The inverse of ``to_json``. Raises TypeError or KeyError for anything else."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return asdict(self)

    def is_on_this_machine(self) -> bool:
        """The same boot of the same host: its file locks and ours are kept by one kernel."""
        return (self.host, self.boot_id) == (socket.gethostname(), _boot_id())

    def is_visible(self) -> bool:
        """Its pid means the same process to us."""
        return self.is_on_this_machine() and self.pid_namespace == _pid_namespace()

    def is_alive(self) -> bool:
        """Whether a visible process still runs; a zombie does not."""
        started = start_time(self.pid)
        return started is not None and self.started in (-1, started)

    def is_stopped(self) -> bool:
        """Whether a visible process was stopped (SIGSTOP, a debugger) and not continued."""
        fields = _stat(self.pid) if self.is_visible() else None
        return fields is not None and fields[0] in "Tt"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command})"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_time(pid: int) -> int | None:
    """Start time of a running process in clock ticks since boot; -1 without /proc; None if it does not run."""
    fields = _stat(pid)
    if fields is not None:
        return None if fields[0] in "ZX" else int(fields[19])
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return -1


def _stat(pid: int) -> list[str] | None:
    """/proc/<pid>/stat from the state on (the name before it may hold blanks and brackets)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return None


def is_descendant_of(pid: int) -> bool | None:
    """Whether this process is ``pid`` or a child, grandchild, ... of it; None where that cannot be found out."""
    if _stat(os.getpid()) is None:
        return None
    current = os.getpid()
    while current > 0:
        if current == pid:
            return True
        fields = _stat(current)
        if fields is None:
            return False
        current = int(fields[1])
    return False


def lock_holders(path: Path) -> list[tuple[int, int]]:
    """The processes that have a ``flock`` on a file: ``(pid, pid that took it)``; they differ where it was inherited.

    Only processes of ours that can be seen from here (Linux, same user, same container).
    """
    try:
        wanted = path.stat()
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    holders = []
    for pid in pids:
        try:
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                facts = os.stat(f"/proc/{pid}/fd/{descriptor}")
                if (facts.st_dev, facts.st_ino) != (wanted.st_dev, wanted.st_ino):
                    continue
                taken = _FLOCK_LINE.search(Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text())
                if taken:
                    holders.append((pid, int(taken.group(1))))
                    break
        except OSError:
            continue  # it ended meanwhile, or belongs to another user
    return holders


def kill(pid: int, started: int) -> bool:
    """SIGKILL for exactly the process that had ``pid`` and start time ``started``; False if it may not or is gone."""
    try:
        if not hasattr(os, "pidfd_open"):
            if start_time(pid) != started:
                return False
            os.kill(pid, signal.SIGKILL)
            return True
        descriptor = os.pidfd_open(pid)
        try:
            if start_time(pid) != started:  # the number was used again before it could be pinned
                return False
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def die_with_parent(signal_number: int = signal.SIGKILL, *, parent_pid: int | None = None) -> str | None:
    """Has the kernel send this process a signal when its parent ends, however it ends. Call it first in a child.

    The kernel watches the *thread* that made this process: a child that was started by a short-lived thread dies with
    that thread. Start such children from the main thread. The setting survives ``exec``; children do not inherit it.

    Args:
        signal_number: What to send.
        parent_pid: The parent's ``os.getpid()``, passed down by it: closes the gap in which the parent died before this
            call. Without it the process that is the parent now is taken for the right one.

    Returns:
        None if it is in force, else the reason why not (another operating system). A parent that is gone already means
        that the signal is sent at once.
    """
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no parent-death signal"
    expected = os.getppid() if parent_pid is None else parent_pid
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal_number), 0, 0, 0) != 0:
        return f"prctl failed: {os.strerror(ctypes.get_errno())}"
    if os.getppid() != expected:
        os.kill(os.getpid(), signal_number)
    return None


def start_pool_process(parent_pid: int) -> None:
    """The initializer of a pool's processes: the parent decides what a stop signal means; its children end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent_pid=parent_pid)
