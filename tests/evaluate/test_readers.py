"""Readers of benchmark files: what is read, what is refused, and that nothing is run."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.errors import DataError
from mgm_exp.evaluate import readers
from mgm_exp.evaluate.pictures import Pictures

CELL = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00\r"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
def test_a_tsv_is_read_as_it_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("tsv") / "x.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["one", "two"])
        writer.writerows(rows)
    columns, found = readers.read_tsv(path)
    assert columns == ["one", "two"]
    assert [tuple(row.values()) for _, row in found] == rows


def test_a_long_cell_is_no_fault(tmp_path):
    (tmp_path / "x.tsv").write_text(f"a\tb\n{'x' * 500_000}\ty\n")
    _, rows = readers.read_tsv(tmp_path / "x.tsv")
    assert len(next(rows)[1]["a"]) == 500_000


@pytest.mark.parametrize(
    ("content", "says"), [("a\tb\n1\n", "line 2: 1 cells where"), ("a\ta\n", "each once"), ("", "no tab-separated")]
)
def test_a_file_that_is_no_table_is_refused(tmp_path, content, says):
    (tmp_path / "x.tsv").write_text(content)
    with pytest.raises(DataError, match=says):
        list(readers.read_tsv(tmp_path / "x.tsv")[1])


def test_json_lines_name_the_line_that_is_none(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert [number for number, _ in readers.read_json_lines(path)] == [1, 3]
    for content, says in (('{"a": 1}\n{', "line 2 is no JSON"), ("[1]", "holds a list")):
        path.write_text(content)
        with pytest.raises(DataError, match=says):
            list(readers.read_json_lines(path))


def test_lines_and_files_have_limits(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text(json.dumps({"a": "x" * 100}))
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 50)
    monkeypatch.setattr(readers, "MAX_JSON_BYTES", 50)
    with pytest.raises(DataError, match="longer than 50 bytes"):
        list(readers.read_json_lines(tmp_path / "x.json"))
    with pytest.raises(DataError, match="are more than the 50"):
        readers.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("cell", ["['a', 'b']", ["a", "b"], '["a", "b"]'])
def test_a_list_may_be_a_list_or_its_text(cell):
    assert readers.literal_list(cell) == ["a", "b"]


@pytest.mark.parametrize("cell", ["open('x', 'w')", "{'a': 1}", "[" * 5000, "1 + 1", None, "", "x" * 200_000])
def test_what_is_no_list_is_refused_and_not_run(cell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="list"):
        readers.literal_list(cell)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_was_cut_short_is_written_again(tmp_path):
    from benchmark_files import picture

    name = Pictures(tmp_path).keep(picture(1))
    (tmp_path / name).write_bytes(b"torn")
    assert Pictures(tmp_path).keep(picture(1)) == name
    assert (tmp_path / name).read_bytes() == picture(1)
