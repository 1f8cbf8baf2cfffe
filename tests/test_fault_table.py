"""The table of faults says what the tests noted, and nothing where they noted nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fault_table import BEGIN, END, FAULTS, met, table, write_table

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every fault was met three times, by two processes."""
    folder = tmp_path / "notes"
    monkeypatch.setenv("FAULT_NOTES", str(folder))
    for fault in FAULTS:
        met(fault, 2)
    next(folder.iterdir()).rename(folder / "other.jsonl")
    for fault in FAULTS:
        met(fault, 1)
    return folder


def test_each_fault_has_a_row_with_how_often_it_was_met(notes: Path) -> None:
    met("kill: store", 1197)
    header, _, *rows = table(notes).splitlines()
    assert header.count("|") == 7 and all(row.count("|") == 7 for row in rows)
    assert len(rows) == len({fault.what for fault in FAULTS.values()}) == len(FAULTS)
    times = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[2] for row in rows}
    assert times.pop(FAULTS["kill: store"].what) == "1,200"
    assert set(times.values()) == {"3"}


def test_a_fault_that_no_test_met_is_an_error_and_the_page_stays(notes: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for path in notes.iterdir():
        path.write_text("".join(line for line in path.read_text().splitlines(True) if '"hang"' not in line))
    with pytest.raises(SystemExit, match=r"no test has met .*: hang$"):
        write_table(notes, page)
    assert "old" in page.read_text()


def test_only_the_place_between_the_marks_is_written(notes: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_table(notes, page)
    assert page.read_text() == f"before\n{BEGIN}\n{table(notes)}\n{END}\nafter\n"
    (tmp_path / "other.md").write_text("no place")
    with pytest.raises(SystemExit, match="no place"):
        write_table(notes, tmp_path / "other.md")


def test_nothing_is_noted_unless_it_was_asked_for_and_an_unknown_fault_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAULT_NOTES", raising=False)
    monkeypatch.chdir(tmp_path)
    met("hang", 1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="flood"):
        met("flood", 1)


def test_every_fault_has_a_test_and_every_row_of_the_page_is_one_of_them() -> None:
    sources = "".join(path.read_text() for path in sorted((REPOSITORY / "tests").glob("*/**/test_*.py")))
    named = set(re.findall(r"""met\(f?"([^"]+)",""", sources))
    assert {fault for fault in FAULTS if not fault.startswith(("soak: ", "error: "))} <= named
    assert {"soak: {fault}", "error: {fault}"} <= named
    page = (REPOSITORY / "docs" / "reliability.md").read_text()
    region = page[page.index(BEGIN) : page.index(END)]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in region.splitlines() if line.startswith("| ")][2:]
    assert rows == [fault.what for fault in FAULTS.values()]
