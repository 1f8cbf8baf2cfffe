"""A study in a real PostgreSQL server, where the machine has one (and the driver psycopg)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.search import campaign_scenario as scenario
from tests.search.postgres_server import postgres_server, why_not
from tests.search.test_crash_points import chaos


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a database of a server of our own."""
    if reason := why_not():
        pytest.skip(reason)
    with postgres_server() as url:
        yield url


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
    assert found["kills"] == kills


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
