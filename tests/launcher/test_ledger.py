"""The books of a sweep: numbers that stay, and what they say of a trial is what its folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.config import Direction
from mgm_exp.errors import UserError
from mgm_exp.grid import Cell
from mgm_exp.ledger import FILE, Ledger, in_words


def ledger(folder: Path, direction: Direction = Direction.maximize) -> Ledger:
    return Ledger(folder, "mine", "demo/accuracy", direction)


def cell(**params: Any) -> Cell:
    return Cell(tuple(f"{key}={value}" for key, value in params.items()), params)


def end(book: Ledger, number: int, status: str | None, score: float | None = None) -> None:
    folder = book.folder / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").touch()
    metrics = {} if score is None else {"demo/accuracy": score}
    if status is not None:
        (folder / "result.json").write_text(json.dumps({"status": status, "metrics": metrics, "wall_s": 2.0}))
    book.note(book.trials[number])


def test_a_trial_has_what_its_folder_says(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.enrol([(cell(a=number), f"h{number}") for number in range(5)])
    end(book, 0, "completed", 0.5)
    end(book, 1, "failed")
    end(book, 2, None)
    end(book, 3, "nonsense")
    written = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert [trial["status"] for trial in written["trials"]] == ["completed", "failed", "interrupted", "interrupted"]
    assert [trial["number"] for trial in written["pending"]] == [4]
    assert (written["trials"][0]["seconds"], written["trials"][0]["metrics"]) == (2.0, {"demo/accuracy": 0.5})
    (tmp_path / "1" / "result.json").write_text(json.dumps({"status": "completed", "metrics": {"demo/accuracy": 0.9}}))
    assert ledger(tmp_path).trials[1].status == "completed", "the folder is the truth, not the book"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), unique=True, min_size=1), min_size=1, max_size=5))
def test_a_cell_keeps_its_number_whatever_grids_come_and_go(
    tmp_path_factory: pytest.TempPathFactory, grids: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("sweep")
    numbers: dict[int, int] = {}
    for grid in grids:
        book = ledger(folder)
        for trial in book.enrol([(cell(a=value), f"h{value}") for value in grid]):
            value = trial.params["a"]
            assert numbers.setdefault(value, trial.number) == trial.number
            end(book, trial.number, "completed", 0.1)
        assert len(set(numbers.values())) == len(numbers)


def test_a_cell_that_composes_at_last_keeps_the_number_of_its_refusal(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    (trial,) = book.enrol([(cell(a=1), None)])
    end(book, trial.number, "failed")
    (again,) = ledger(tmp_path).enrol([(cell(a=1), "hash")])
    assert (again.number, again.config_hash) == (trial.number, "hash")


def test_a_trial_that_was_announced_and_never_begun_is_forgotten(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.enrol([(cell(a=1), "h1"), (cell(a=2), "h2")])
    book.write()
    again = ledger(tmp_path)
    (kept,) = again.enrol([(cell(a=2), "h2")])
    assert kept.number == 1
    assert list(again.trials) == [1]


def test_the_best_is_completed_and_finite_and_the_first_of_equals(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.enrol([(cell(a=number), f"h{number}") for number in range(5)])
    assert book.best() is None
    end(book, 0, "failed", 0.99)
    end(book, 1, "completed", float("nan"))
    end(book, 2, "completed", 0.5)
    end(book, 3, "completed", 0.7)
    end(book, 4, "completed", 0.7)
    best = book.best()
    assert best is not None and best.number == 3
    least = ledger(tmp_path, Direction.minimize).best()
    assert least is not None and least.number == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"trials": [{"number": "x"}]}', '{"trials": 3}', "\xff"])
def test_a_damaged_book_is_an_error_and_stays(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read"):
        ledger(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content.encode("latin-1")


def test_params_are_shown_as_they_are_typed() -> None:
    assert in_words({"data.path": None, "eval.ocr": True, "zero": "2"}) == "data.path=null eval.ocr=true zero=2"
    assert in_words({}) == "(nothing is swept)"
