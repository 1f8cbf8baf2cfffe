"""``mgm-exp study-server``: a search through it is the search that it would be in a file."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgm_exp.errors import EXIT_INTERRUPTED, ConfigError, UserError
from mgm_exp.search import open_storage
from mgm_exp.study_server import serve
from tests.search import campaign_scenario as scenario

pytest.importorskip("grpc", reason="grpcio is not installed")
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "mgm_exp.cli", "study-server", f"sqlite:///{tmp_path / 'study.db'}", "--port", "0"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_search_through_a_server_continues_and_proposes_what_it_does_in_a_file(
    server: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert server.stdout is not None
    address = server.stdout.readline().split()[0].removeprefix("sweep.storage=")
    in_file = scenario.summary(scenario.search(tmp_path / "s", 3))
    served = tmp_path / "served" / "s"
    scenario.search(served, 2, address)
    assert scenario.summary(scenario.search(served, 3, address)) == in_file
    assert not (served / "study.journal").exists()
    server.send_signal(signal.SIGINT)
    _, errors = server.communicate(timeout=30)
    assert server.returncode == EXIT_INTERRUPTED and "Traceback" not in errors


def test_a_server_that_is_away_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgm_exp.search.study._SERVER_TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match="no study server answers"):
        open_storage("grpc://127.0.0.1:1")


@pytest.mark.parametrize("place", ["grpc://", "grpc://host", "grpc://user:pw@host:1"])
def test_an_address_without_a_port_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match="grpc://HOST:PORT") as caught:
        open_storage(place)
    assert "pw" not in str(caught.value)


def test_a_journal_is_not_served_and_a_port_in_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="journal"):
        serve(str(tmp_path / "study.journal"), host="127.0.0.1", port=0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot listen"):
            serve(f"sqlite:///{tmp_path / 's.db'}", host="127.0.0.1", port=taken.getsockname()[1])
