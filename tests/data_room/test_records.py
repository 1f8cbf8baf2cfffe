from __future__ import annotations

import json
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest

from mgm_exp.data import Record, RecordFile, Turn, read_records, write_records
from mgm_exp.errors import DataError


def made(count: int = 5) -> list[Record]:
    """Records whose texts hold what a line must survive."""
    return [
        Record(f"é{i}", None if i % 2 else f"a{i}.jpg", (Turn("human", "q\n\u2028\x85 🦊"), Turn("gpt", "a" * i)), None)
        for i in range(count)
    ]


def test_records_are_read_back_in_any_order(tmp_path: Path) -> None:
    assert write_records(tmp_path / "a.jsonl", made()) == 5
    read = read_records(tmp_path / "a.jsonl")
    assert list(read) == made() and len(read) == 5
    assert [read[i] for i in (3, 0, -1)] == [made()[i] for i in (3, 0, -1)]
    assert read[1:4] == made()[1:4]
    with pytest.raises(IndexError):
        read[5]


def test_a_record_file_travels_to_another_process(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", made())
    read = read_records(tmp_path / "a.jsonl")
    copied = ForkingPickler.loads(ForkingPickler.dumps(read))
    assert isinstance(copied, RecordFile) and list(copied) == made()
    assert copied.fingerprint() == read.fingerprint()


def test_an_empty_file_holds_no_records(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", [])
    assert list(read_records(tmp_path / "a.jsonl")) == []


def test_a_line_is_a_llava_row(tmp_path: Path) -> None:
    record = Record("1", "a.jpg", (Turn("human", "<image>\nq"), Turn("gpt", "new")), "old")
    write_records(tmp_path / "a.jsonl", [record])
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {
        "id": "1",
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "new"}],
        "raw_caption": "old",
    }


def test_damage_and_absence_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not there"):
        read_records(tmp_path / "nothing.jsonl")
    (tmp_path / "a.jsonl").write_text('{"id": "1", "conversations": []}\n{"id": \n')
    read = read_records(tmp_path / "a.jsonl")
    assert read[0] == Record("1", None, ())
    with pytest.raises(DataError, match="Line 2"):
        read[1]
