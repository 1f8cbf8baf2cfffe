from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgm_exp.data import BadRow, Row, read_rows
from mgm_exp.data.formats import RowWriter
from mgm_exp.errors import DataError

from ..conftest import chat, pair, write_lines


def test_columns_of_a_written_table_are_what_readers_expect(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "a.jsonl", [chat("1", "a.jpg", "<image>\nq", "a"), {**pair("2", "b.jpg", "cap"), "tag": [1, 2]}]
    )
    with RowWriter(tmp_path / "a.parquet", "parquet") as writer:
        for row in read_rows(source, keep_given=True):
            assert isinstance(row, Row)
            writer.write(row)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["id", "image", "conversations", "caption", "raw_caption", "extra"]
    one, two = table.to_pylist()
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    assert (one["id"], one["image"], one["conversations"], one["caption"]) == ("1", "a.jpg", turns, None)
    assert (two["id"], two["image"], two["caption"], two["extra"]) == ("2", "b.jpg", "cap", '{"tag": [1, 2]}')


def test_tables_of_others_are_read_and_their_columns_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    columns = {
        "id": [1, 2],
        "text": ["<__dj__image> one", "<__dj__image> two"],
        "images": [["a.jpg"], ["b.jpg"]],
        "score": [0.5, float("nan")],
        "when": [datetime.date(2024, 1, 2), None],
        "price": [Decimal("1.50"), None],
        "hash": [b"\x00", b"\x01"],
    }
    pq.write_table(pa.table(columns), path)
    reader = read_rows(path)
    one, two = reader
    assert isinstance(one, Row) and isinstance(two, Row)
    assert (one.id, one.caption, one.image, one.line) == ("1", "one", "a.jpg", 1)
    assert one.extra == {"score": 0.5, "when": "2024-01-02", "price": "1.50"} and two.extra == {"score": None}
    assert reader.ignored == ("hash",)


def test_an_image_inside_the_row_is_named_as_what_is_not_supported(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [{"bytes": b"123", "path": "a.jpg"}], "caption": ["x"]}), path)
    (bad,) = read_rows(path)
    assert isinstance(bad, BadRow) and bad.kind == "bad_image_field" and "inside the row" in bad.detail


def test_a_text_that_is_not_utf8_costs_its_own_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = pa.array([b"one", b"\xff\xfe", b"three"]).view(pa.string())
    pq.write_table(pa.table({"id": ["1", "2", "3"], "image": ["a", "b", "c"], "caption": texts}), path)
    one, bad, three = read_rows(path)
    assert isinstance(one, Row) and isinstance(three, Row) and three.caption == "three"
    assert isinstance(bad, BadRow) and (bad.kind, bad.line, bad.index) == ("encoding", 2, 1)


@pytest.mark.parametrize("n_rows", [0, 1, 700])
def test_every_row_of_every_group_is_read_once(tmp_path: Path, n_rows: int) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"id": [str(i) for i in range(n_rows)], "image": ["a"] * n_rows, "caption": ["x"] * n_rows})
    pq.write_table(
        table.cast(pa.schema([(name, pa.string()) for name in table.column_names])), path, row_group_size=300
    )
    rows = [row for row in read_rows(path) if isinstance(row, Row)]
    assert [row.id for row in rows] == [str(i) for i in range(n_rows)]


def test_a_damaged_table_is_refused_or_called_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    n = 20_000
    table = pa.table({"id": [str(i) for i in range(n)], "image": ["a"] * n, "caption": [f"{i * i}" for i in range(n)]})
    pq.write_table(table, path, row_group_size=5_000, compression="none", use_dictionary=False)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged"):
        read_rows(path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"\xff" * 3000 + content[middle + 3000 :])
    rows = list(read_rows(path))
    assert any(isinstance(row, BadRow) for row in rows)
