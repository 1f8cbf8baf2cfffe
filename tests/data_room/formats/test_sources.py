from __future__ import annotations

import os
from pathlib import Path

import pytest

from mgm_exp.data import BadRow, Row, find_source, read_rows, source_fingerprint
from mgm_exp.data.formats import RowWriter
from mgm_exp.errors import DataError

from ..conftest import chat, pair, write_lines


def test_a_file_is_itself_and_its_folder_the_image_root(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [pair("1", "a.jpg")])
    found = find_source(path)
    assert (found.path, found.image_root) == (path, tmp_path)
    (tmp_path / "pictures").mkdir()
    assert find_source(str(path), tmp_path / "pictures").image_root == tmp_path / "pictures"


def test_a_folder_with_one_file_of_rows_is_that_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [pair("1", "a.jpg")])
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "images").mkdir()
    assert find_source(tmp_path).path == path
    # Reports lie beside the rows that they are about.
    write_lines(tmp_path / "a.jsonl.rejected.jsonl", [{"id": "1", "kind": "missing"}])
    write_lines(tmp_path / "report.json", ['{"rows": 3}'])
    (tmp_path / "empty.jsonl").write_text("")
    assert find_source(tmp_path).path == path
    write_lines(tmp_path / "b.jsonl", [pair("1", "a.jpg")])
    with pytest.raises(DataError, match=r"several.*a\.jsonl, b\.jsonl"):
        find_source(tmp_path)


def test_files_that_differ_in_their_numbers_are_shards(tmp_path: Path) -> None:
    for i in (10, 2, 1):
        write_lines(tmp_path / f"part-{i:05d}-of-00010.jsonl", [pair(f"{i}", "a.jpg"), pair(f"{i}b", "a.jpg")])
    (tmp_path / "part-00003-of-00010.jsonl").write_text("")  # a shard without rows
    assert find_source(tmp_path).path == tmp_path
    rows = [row for row in read_rows(tmp_path) if isinstance(row, Row)]
    assert [(row.id, row.index) for row in rows] == [("1", 0), ("1b", 1), ("2", 2), ("2b", 3), ("10", 4), ("10b", 5)]
    assert rows[-1].file == "part-00010-of-00010.jsonl" and rows[-1].line == 2


def test_an_id_in_two_shards_is_found(tmp_path: Path) -> None:
    for i in range(2):
        write_lines(tmp_path / f"{i}.jsonl", [pair("same", "a.jpg")])
    assert [isinstance(row, BadRow) for row in read_rows(tmp_path)] == [False, True]


def test_the_parts_of_a_split_are_no_shards(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [pair("1", "a.jpg")])
    for found in (find_source, read_rows):
        with pytest.raises(DataError, match="several files"):
            found(tmp_path)


@pytest.mark.parametrize("content", [None, {}, {"a.txt": "x"}, {"a.json": '{"rows": 3}', "b.json": "{}"}])
def test_what_holds_no_rows_is_named(tmp_path: Path, content: dict[str, str] | None) -> None:
    path = tmp_path / "data"
    if content is not None:
        path.mkdir()
        for name, text in content.items():
            (path / name).write_text(text)
    with pytest.raises(DataError, match=r"not there|without rows"):
        find_source(path)


def test_an_image_root_that_is_none_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [pair("1", "a.jpg")])
    with pytest.raises(DataError, match="image root"):
        find_source(path, tmp_path / "nothing")


def test_renamed_duplicates_have_ids_of_their_own(tmp_path: Path) -> None:
    ids = ["a", "a", "a#2", "a", "b", "a#2", "b"]
    path = write_lines(tmp_path / "a.jsonl", [pair(name, "a.jpg") for name in ids])
    rows = [row for row in read_rows(path, rename_duplicates=True) if isinstance(row, Row)]
    assert [row.id for row in rows] == ["a", "a#2", "a#2#2", "a#3", "b", "a#2#3", "b#2"]
    assert [row.renamed_from for row in rows] == [None, "a", "a#2", "a", None, "a#2", "b"]


def test_unknown_keys_stay_with_a_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{**chat("1", None, "q", "a"), "source": "x", "n": [1]}])
    (row,) = read_rows(path)
    assert isinstance(row, Row) and row.extra == {"source": "x", "n": [1]}


def test_rows_bring_what_they_were_given_as_when_asked(tmp_path: Path) -> None:
    given = [{**pair("1", "a.jpg"), "x": 1}, {"id": "2"}]
    good, bad = read_rows(write_lines(tmp_path / "a.jsonl", given), keep_given=True)
    assert [good.given, bad.given] == given


SHAREGPT = [
    {"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}], "images": ["a.jpg"]},
    {"conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}], "images": ["a.jpg"]},
    {
        "conversations": [{"from": "user", "value": "<image>q"}, {"from": "assistant", "value": "a"}],
        "images": ["a.jpg"],
    },
    {"messages": [{"role": "human", "content": "<image>q"}, {"role": "gpt", "content": "a"}], "image": "a.jpg"},
]


@pytest.mark.parametrize("value", SHAREGPT)
def test_sharegpt_is_read_in_every_spelling(tmp_path: Path, value: dict[str, object]) -> None:
    (row,) = read_rows(write_lines(tmp_path / "a.json", [value]))
    assert isinstance(row, Row) and row.image == "a.jpg" and row.conversations is not None
    assert [(turn.speaker, turn.text) for turn in row.conversations] == [("human", "<image>q"), ("gpt", "a")]


def test_a_system_text_is_kept_beside_the_turns(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]
    first, second, bad = read_rows(
        write_lines(
            tmp_path / "a.jsonl",
            [{"messages": turns}, {"messages": turns[1:], "system": "be long"}, {"messages": turns, "system": "both"}],
        )
    )
    assert isinstance(first, Row) and first.extra == {"system": "be brief"} and len(first.conversations or ()) == 1
    assert isinstance(second, Row) and second.extra == {"system": "be long"}
    assert isinstance(bad, BadRow) and bad.kind == "bad_turn"


def test_the_fingerprint_follows_shards(tmp_path: Path, root: Path) -> None:
    rows = write_lines(tmp_path / "a.jsonl", [pair(str(i), f"{i}.png") for i in range(4)])
    with RowWriter(tmp_path / "shards", "webdataset", image_root=root, shard_rows=2) as writer:
        for row in read_rows(rows):
            assert isinstance(row, Row)
            writer.write(row)
    shards = tmp_path / "shards"
    before = source_fingerprint(shards, shards)
    assert source_fingerprint(shards, shards) == before
    os.utime(shards / "shard-000001.tar", ns=(1, 1))
    assert source_fingerprint(shards, shards) != before
