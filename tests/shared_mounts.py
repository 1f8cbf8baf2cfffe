"""Two machines on one file server, as far as one machine can be two.

Each "host" sees the same folder through a mount of its own (bindfs), with caches and file locks of its own: what the
other host creates, changes or deletes shows up late, and a flock here is no lock there. It has a host name of its own
(a UTS namespace), so nothing takes the other's processes for local ones, and a clock that may be wrong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# Wrong clocks: everything that Python asks for the time of day is so many seconds off.
_SKEWED = """
import sys, time
_real = time.time
time.time = lambda: _real() + {offset_s}
time.time_ns = lambda: int(time.time() * 1e9)
"""


@dataclass(frozen=True)
class Host:
    """One of the two: where it sees the shared folder, and how Python is started on it."""

    name: str
    folder: Path
    offset_s: float = 0.0

    def start(self, program: str, *arguments: object) -> subprocess.Popen[str]:
        """A Python program on this host; its arguments are the shared folder and ``arguments``."""
        code = _SKEWED.format(offset_s=self.offset_s) + program
        python = [sys.executable, "-c", code, str(self.folder), *map(str, arguments)]
        shell = f'hostname {self.name} && exec "$@"'
        return subprocess.Popen(
            ["unshare", "--uts", "sh", "-c", shell, "sh", *python],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def why_not() -> str:
    """Why there can be no such pair of hosts; empty where there can."""
    if not os.access("/dev/fuse", os.W_OK) or shutil.which("bindfs") is None:
        return "no FUSE (/dev/fuse and bindfs), which makes the two mounts"
    if subprocess.run(["unshare", "--uts", "hostname", "x"], capture_output=True).returncode != 0:
        return "a host name of one's own needs root"
    return ""


@contextmanager
def two_hosts(
    folder: Path, *, late_s: float, offset_s: float = 0.0, attributes_s: float | None = None
) -> Iterator[tuple[Host, Host]]:
    """Two hosts with one folder.

    Args:
        folder: Empty; the mount points and what is shared come here.
        late_s: How long a host goes on believing what it has seen of names: that one is there, or is not.
        offset_s: By how much the second host's clock is wrong.
        attributes_s: The same for sizes and times; None: as ``late_s``.
    """
    (folder / "server").mkdir()
    attributes_s = late_s if attributes_s is None else attributes_s
    options = f"entry_timeout={late_s},negative_timeout={late_s},attr_timeout={attributes_s}"
    mounts = [folder / "a", folder / "b"]
    try:
        for mount in mounts:
            mount.mkdir()
            subprocess.run(["bindfs", "-o", options, str(folder / "server"), str(mount)], check=True, timeout=30)
        yield Host("host-a", mounts[0]), Host("host-b", mounts[1], offset_s)
    finally:
        for mount in mounts:
            _unmount(mount)


def _unmount(mount: Path) -> None:
    command = ["umount" if os.geteuid() == 0 else "fusermount3", *([] if os.geteuid() == 0 else ["-u"]), str(mount)]
    for _ in range(100):
        if not os.path.ismount(mount):
            return
        if subprocess.run(command, capture_output=True).returncode != 0:
            time.sleep(0.05)
    raise RuntimeError(f"{mount} cannot be unmounted")
