"""A PostgreSQL server of our own, for tests and benchmarks, where the machine has one installed."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").is_dir() else []


def why_not() -> str:
    """Why there can be no server; empty where there can."""
    if importlib.util.find_spec("psycopg") is None:
        return "the driver psycopg is not installed"
    if not BINARIES or shutil.which("setpriv") is None:
        return "no PostgreSQL server is installed"
    if os.geteuid() == 0 and not _as_other_user():
        return "PostgreSQL does not run as root, and there is no other user"
    return ""


def _as_other_user() -> list[str]:
    """PostgreSQL does not run as root."""
    if os.geteuid() != 0:
        return []
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return []


@contextmanager
def postgres_server(settings: str = "-c fsync=off") -> Iterator[str]:
    """The URL of a database of a server on a free port of this machine.

    Args:
        settings: Further arguments of the server.

    Raises:
        RuntimeError: there can be none (:func:`why_not`).
    """
    if why_not():
        raise RuntimeError(why_not())
    user, binaries = _as_other_user(), BINARIES[-1]
    folder = Path(tempfile.mkdtemp(prefix="mgm-pg-", dir="/tmp"))
    if user:
        os.chown(folder, int(user[1].partition("=")[2]), int(user[2].partition("=")[2]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, options = folder / "data", f"-p {port} -k {folder} -h 127.0.0.1 {settings}"
    environment = {**os.environ, "LC_ALL": "C", "HOME": str(folder)}

    def run(*command: object) -> None:
        done = subprocess.run([*user, *map(str, command)], env=environment, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        run(binaries / "initdb", "-D", data, "-U", "mgm", "-A", "trust", "-E", "UTF8", "--no-sync")
        run(binaries / "pg_ctl", "-D", data, "-w", "-o", options, "-l", folder / "log", "start")
        yield f"postgresql+psycopg://127.0.0.1:{port}/postgres?user=mgm"
    finally:
        if (data / "postmaster.pid").exists():
            run(binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)
