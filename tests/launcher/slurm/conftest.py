"""A Slurm of its own for these tests: real daemons on this machine, four pretended nodes, taken down at the end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

TESTCLUSTER = Path(__file__).resolve().parents[3] / "launcher" / "slurm" / "testcluster"
NODES = 4


class Cluster:
    """The running test cluster."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def up(self) -> None:
        """Starts what does not run."""
        subprocess.run([TESTCLUSTER / "up", self.folder], check=True, env=self.environment, timeout=120)

    def down(self) -> None:
        subprocess.run([TESTCLUSTER / "down", self.folder, "--purge"], check=True, env=self.environment, timeout=120)

    def kill_controller(self) -> None:
        """kill -9 of slurmctld, as when its machine goes away.

        It keeps its state some seconds late. Killed before that, it would give the last job's number out again, which
        slurmd refuses to run.
        """
        submitted = max(self.call("squeue", "--noheader", "--states=all", "--format=%V").split(), default="")
        last = datetime.fromisoformat(submitted).timestamp() if submitted else 0.0
        kept, latest = self.folder / "state" / "job_state", time.monotonic() + 8  # it waits for 5 s at most
        wait_until(lambda: kept.stat().st_mtime > last + 1 or time.monotonic() > latest, "jobs are kept")
        process = int((self.folder / "run" / "slurmctld.pid").read_text())
        os.kill(process, signal.SIGKILL)
        wait_until(
            lambda: not Path(f"/proc/{process}/fd").exists() or not os.listdir(f"/proc/{process}/fd"), "it is dead"
        )

    def call(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """Job -> state, of all that the controller knows."""
        lines = self.call("squeue", "--noheader", "--array", "--states=all", "--format=%i %T").splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def node_of(self, job: str) -> str:
        return self.call("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%N").strip()


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not _found(name)]
    if missing:
        pytest.skip(f"no Slurm on this machine: {', '.join(missing)} missing (packages slurm-wlm, munge)")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a socket's path must be short
    settings = {"TESTCLUSTER_PORT": str(_free_ports()), "TESTCLUSTER_NODES": str(NODES)}
    cluster = Cluster(folder, {**os.environ, **settings, "SLURM_CONF": str(folder / "slurm.conf")})
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, with none of its jobs left by another test; Slurm's commands find it."""
    monkeypatch.setenv("SLURM_CONF", _cluster.environment["SLURM_CONF"])
    yield _cluster
    subprocess.run(["scancel", f"--user={os.getuid()}"], env=_cluster.environment, timeout=60, check=False)
    wait_until(lambda: not _cluster.call("squeue", "--noheader", "--states=PENDING,RUNNING"), "its jobs have ended")


@pytest.fixture
def slurm(app: Any, cluster: Cluster) -> tuple[Any, Cluster]:
    """The command line with the small task, and the cluster."""
    return app, cluster


def wait_until(is_so: Callable[[], Any], what: str, timeout_s: float = 300) -> Any:
    """Waits for a condition; gives what it gave."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = is_so()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"after {timeout_s:g} s it is not so that {what}")


def _found(name: str) -> bool:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None


def _free_ports() -> int:
    """The first of a few ports in a row that nobody has."""
    for port in range(20_000 + os.getpid() % 200 * 50, 32_000, 50):
        try:
            for number in range(NODES + 1):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + number))
        except OSError:
            continue
        return port
    raise AssertionError("no ports are free")
