"""Rows in Parquet: one column for each key that rows have in common, and one for everything else.

What is written has the columns ``id``, ``image``, ``conversations`` (a list of ``from``/``value``), ``caption``,
``raw_caption`` and ``extra`` (the remaining keys of the row, as one JSON text); the schema's metadata says so. Any
other table is read with its columns as keys, so that a Data-Juicer export (``text``, ``images``) or a table of
``image`` and ``caption`` is a file of rows too; a null is a key that is not there.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mgm_exp.data.strict_json import MAX_NESTING, MAX_ROW_BYTES, Element, Fault, fault_in
from mgm_exp.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 256
_EXTRA = "extra"
_TEXT_COLUMNS = ("id", "image", "caption", "raw_caption")
_MARK = (b"mgm_exp.rows", b"1")
_IMAGE_COLUMNS = ("image", "images")


class ParquetElements(Iterator[Element]):
    """The rows of a Parquet file, as JSON objects.

    Args:
        file: The file, open for reading.
        path: Its path, for messages.

    Attributes:
        bytes_read: How far the file has been read, estimated by the share of its rows.
        ignored: Columns that are left out because JSON has no values for them (raw bytes).

    Raises:
        DataError: the file is damaged.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        pa = _pyarrow()
        import pyarrow.parquet as parquet

        try:
            self._table = parquet.ParquetFile(file, pre_buffer=False)
            schema = self._table.schema_arrow
            self.ignored = tuple(
                field.name for field in schema if field.name not in _IMAGE_COLUMNS and _holds_bytes(field.type)
            )
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # also a column's name that is no text
            raise DataError(
                f"{path} is Parquet, but damaged: {_first_line(error)}.", advice="Get the whole file again."
            ) from error
        self._size = path.stat().st_size
        self._is_ours = (schema.metadata or {}).get(_MARK[0]) == _MARK[1]
        columns = [field.name for field in schema if field.name not in self.ignored]
        self._batches = self._table.iter_batches(batch_size=_BATCH, columns=columns, use_threads=False)
        self._rows: Iterator[Element] = iter(())
        self._n_rows = self._table.metadata.num_rows
        self._index = 0
        self._is_done = False

    @property
    def bytes_read(self) -> int:
        return self._size * self._index // max(1, self._n_rows)

    def __next__(self) -> Element:
        while not self._is_done:
            element = next(self._rows, None)
            if element is not None:
                self._index = element.index + 1
                return element
            try:
                batch = next(self._batches, None)
            except (_pyarrow().ArrowException, OSError) as error:
                self._is_done = True
                return self._cut(f"row {self._index + 1} of {self._n_rows} cannot be read: {_first_line(error)}")
            if batch is None:
                self._is_done = True
                if self._index < self._n_rows:
                    return self._cut(f"the file says it has {self._n_rows} rows and ends after {self._index}")
            else:
                self._rows = self._elements(batch, self._index)
        raise StopIteration

    def _cut(self, detail: str) -> Element:
        return Element(self._index + 1, self._index, fault=Fault("file_ends_early", detail))

    def _elements(self, batch: pa.RecordBatch, first: int) -> Iterator[Element]:
        try:
            values = batch.to_pylist()
        except UnicodeDecodeError:  # one text of the batch is not UTF-8: every row by itself
            values = None
        for number in range(batch.num_rows):
            index = first + number
            try:
                value = batch.slice(number, 1).to_pylist()[0] if values is None else values[number]
                yield self._element(value, index)
            except UnicodeDecodeError as error:
                detail = f"a text of the row is not UTF-8 (byte {error.start + 1})"
                yield Element(index + 1, index, fault=Fault("encoding", detail))

    def _element(self, row: dict[str, Any], index: int) -> Element:
        fault: Fault | None = None
        value = {key: _plain(item) for key, item in row.items() if item is not None}
        if self._is_ours and _EXTRA in value:
            extra, fault = fault_in(value.pop(_EXTRA), MAX_NESTING)
            if fault is None and not isinstance(extra, dict):
                fault = Fault("not_an_object", f"the column {_EXTRA} holds no JSON object")
            value = {**value, **extra} if fault is None else {"id": value.get("id")}
        if sum(len(item) for item in value.values() if isinstance(item, str)) > MAX_ROW_BYTES:
            value, fault = {"id": value.get("id")}, Fault("row_too_large", f"longer than {MAX_ROW_BYTES} bytes")
        return Element(index + 1, index, value, fault)


class ParquetWriter:
    """Writes rows, given as JSON objects of any form, to a Parquet file.

    Args:
        path: The file, which is written in place: give a temporary one and rename it.
        group_rows: Rows of a row group. Fewer need less memory, more compress better.
    """

    def __init__(self, path: Path, *, group_rows: int = 5_000) -> None:
        pa = _pyarrow()
        import pyarrow.parquet as parquet

        turn = pa.struct([("from", pa.string()), ("value", pa.string())])
        fields = [(name, pa.string()) for name in (*_TEXT_COLUMNS, _EXTRA)]
        fields.insert(2, ("conversations", pa.list_(turn)))
        self._schema = pa.schema(fields, metadata=dict([_MARK]))
        self._writer = parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._group_rows = group_rows
        self._waiting: list[dict[str, Any]] = []

    def write(self, value: dict[str, Any], line: bytes) -> None:
        """Adds a row; its ``line`` of JSON is of no use here."""
        row: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for key, item in value.items():
            is_column = (key in _TEXT_COLUMNS and isinstance(item, str)) or (
                key == "conversations" and _is_plain_turns(item)
            )
            (row if is_column else rest)[key] = item
        if rest:
            row[_EXTRA] = json.dumps(rest, ensure_ascii=True, allow_nan=False)
        self._waiting.append(row)
        if len(self._waiting) >= self._group_rows:
            self._flush()

    def close(self) -> None:
        """Writes what waits, and the file's end."""
        if self._waiting:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        table = _pyarrow().Table.from_pylist(self._waiting, schema=self._schema)
        self._writer.write_table(table, row_group_size=self._group_rows)
        self._waiting = []


def _is_plain_turns(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, dict)
        and set(turn) == {"from", "value"}
        and all(isinstance(text, str) for text in turn.values())
        for turn in value
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    pa = _pyarrow()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))


def _plain(value: Any) -> Any:
    """A value of a column as JSON has it: times and decimals become texts, numbers that are not finite null."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, bytes):  # an image inside the row: its reader says that this is not supported
        return f"{len(value)} bytes"
    return str(value) if isinstance(value, (decimal.Decimal, datetime.timedelta)) else repr(value)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")[:200]


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingDependencyError(
            "Reading and writing Parquet needs pyarrow.", advice="Install it: pip install pyarrow"
        ) from error
    return pyarrow
