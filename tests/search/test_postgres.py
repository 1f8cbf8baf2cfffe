"""A study in a real PostgreSQL server, where the machine has one (and the driver psycopg)."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.search import campaign_scenario as scenario
from tests.search.test_crash_points import chaos

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").is_dir() else []


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
    pytest.skip("PostgreSQL does not run as root, and there is no other user")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a database of a server of our own, on a free port of this machine."""
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    if not BINARIES or shutil.which("setpriv") is None:
        pytest.skip("no PostgreSQL server is installed")
    user, binaries = _as_other_user(), BINARIES[-1]
    folder = Path(tempfile.mkdtemp(prefix="mgm-pg-", dir="/tmp"))
    if user:
        os.chown(folder, int(user[1].partition("=")[2]), int(user[2].partition("=")[2]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, options = folder / "data", f"-p {port} -k {folder} -h 127.0.0.1 -c fsync=off"
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


def test_a_search_in_a_database_continues_and_proposes_what_it_does_in_a_file(server: str, tmp_path: Path) -> None:
    in_file = scenario.summary(scenario.search(tmp_path / "s", 4))
    elsewhere = tmp_path / "database" / "s"
    scenario.search(elsewhere, 2, server)
    assert scenario.summary(scenario.search(elsewhere, 4, server)) == in_file
    assert not (elsewhere / "study.journal").exists()
    assert [scenario.calls(elsewhere, number) for number in range(4)] == [1] * 4


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_three_sweepers_and_kills_on_one_database(server: str, tmp_path: Path, kills: int) -> None:
    found = chaos(tmp_path / f"kills{kills}", server, trials=max(6, 2 * kills), kills=kills)
    print("postgresql", found)
    assert found["kills"] >= kills // 2


def test_a_database_that_is_away_is_said_in_one_sentence(server: str, tmp_path: Path) -> None:
    from mgm_exp.errors import UserError
    from mgm_exp.search import open_storage

    with pytest.raises(UserError, match="does not answer"):
        open_storage("postgresql+psycopg://127.0.0.1:1/postgres?user=mgm&connect_timeout=2")


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    from mgm_exp.errors import MissingDependencyError
    from mgm_exp.search import open_storage

    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "psycopg":
            raise ModuleNotFoundError("No module named 'psycopg'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"psycopg\[binary\]"):
        open_storage("postgresql+psycopg://127.0.0.1:1/postgres")
