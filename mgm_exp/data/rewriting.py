"""Writes some of the rows of a dataset again, in the files and the format that they came in.

    with Rewriter(source, folder) as rewriter:
        for row in rows:                        # with ``given``, in order
            rewriter.write(row)

JSON keeps every value of a row, Parquet its schema, a tar shard its images. A file whose rows were all left out is not
written. What is written lies in a folder that nobody reads yet: it is fsynced, and put into place by the caller.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from mgm_exp.data.formats import Location, Row
from mgm_exp.data.formats.aside import as_caption
from mgm_exp.data.formats.files import Container, container_of, open_file, row_files
from mgm_exp.data.formats.webdataset import TarWriter
from mgm_exp.data.formats.writing import JsonWriter, json_text
from mgm_exp.data.images import read_image_file

if TYPE_CHECKING:
    import pyarrow as pa

EXTRA = "extra"
"""The column in which :mod:`mgm_exp.data.formats.parquet` keeps other keys."""


class _File(Protocol):
    """One file being written."""

    has_text_ids: bool

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


class Rewriter:
    """Writes rows to files of the names that they came from.

    Args:
        source: Where they came from.
        folder: Existing folder to write to.

    Attributes:
        names: Names of the files of the source.
        is_packed: Images lie in the same files as the rows and are written with them.
    """

    def __init__(self, source: Location, folder: Path) -> None:
        self._source, self._folder = source, folder
        self._paths = {path.name: path for path in row_files(source.path)}
        self.names = tuple(self._paths)
        self.is_packed = _container(next(iter(self._paths.values()))) == "tar"
        self._name = ""
        self._file: _File | None = None

    def __enter__(self) -> Rewriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, row: Row) -> None:
        """Adds a row, which must bring ``given``, the JSON object that is written."""
        self._file_of(row).write(row)

    def can_rename(self, row: Row) -> bool:
        """Whether the row's file has a place for any text as an id; a Parquet column of numbers has none."""
        return self._file_of(row).has_text_ids

    def _file_of(self, row: Row) -> _File:
        if self._file is None or row.file != self._name:
            self.close()
            self._name = row.file
            self._file = self._open(self._paths[row.file])
        return self._file

    def close(self) -> None:
        """Completes the file that is being written."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, original: Path) -> _File:
        target = self._folder / original.name
        container = _container(original)
        if container == "tar":
            return _Shard(target, self._source.image_root)
        if container == "parquet":
            return _Table(target, original)
        return _Json(target, as_list=container == "list")


def _container(path: Path) -> Container:
    with open_file(path) as file:
        return container_of(file, path)


class _Json:
    """A JSON list with a row on each line, or JSON lines."""

    has_text_ids = True

    def __init__(self, target: Path, *, as_list: bool) -> None:
        self._target = target
        self._writer = JsonWriter(target, as_list=as_list)

    def write(self, row: Row) -> None:
        value = dict(row.given or {})
        self._writer.write(value, json_text(value))

    def close(self) -> None:
        self._writer.close()
        _sync(self._target)


class _Shard:
    """A tar shard."""

    has_text_ids = True

    def __init__(self, target: Path, root: Path) -> None:
        self._target, self._root = target, root
        self._writer = TarWriter(target)

    def write(self, row: Row) -> None:
        content = None if row.image is None else read_image_file(self._root, row.image)
        suffix = "" if row.image is None else posixpath.splitext(row.image)[1]
        name = row.id if row.has_id else ""
        self._writer.write(dict(row.given or {}), name, as_caption(row).caption, content, suffix)

    def close(self) -> None:
        self._writer.close()
        _sync(self._target)


class _Table:
    """A Parquet file with the schema of the original; rows that were not changed are taken over column by column."""

    def __init__(self, target: Path, original: Path) -> None:
        import pyarrow.parquet as parquet

        self._target = target
        self._original = open_file(original)
        table = parquet.ParquetFile(self._original, pre_buffer=False)
        self._schema = table.schema_arrow
        self.has_text_ids = _is_text(self._schema, "id")
        self._batches: Iterator[pa.RecordBatch] = table.iter_batches(batch_size=_BATCH, use_threads=False)
        self._writer = parquet.ParquetWriter(target, self._schema, compression="zstd")
        self._batch: pa.RecordBatch | None = None
        self._first = self._end = 0
        self._taken: list[tuple[int, dict[str, Any]]] = []

    def write(self, row: Row) -> None:
        number = row.line - 1
        while number >= self._end:
            self._flush()
            self._batch = next(self._batches)
            self._first, self._end = self._end, self._end + self._batch.num_rows
        self._taken.append((number - self._first, dict(row.given or {})))

    def _flush(self) -> None:
        if self._batch is None or not self._taken:
            return
        import pyarrow as pa

        batch = self._batch.take(pa.array([place for place, _ in self._taken]))
        given = [values for _, values in self._taken]
        columns = [
            _changed(name, column, given) for name, column in zip(batch.schema.names, batch.columns, strict=True)
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._taken = []

    def close(self) -> None:
        with closing(self._original):
            self._flush()
            self._writer.close()
        _sync(self._target)


_BATCH = 1024


def _changed(name: str, column: pa.Array, given: list[dict[str, Any]]) -> pa.Array:
    """A column with the values of the rows; the very same one where none has changed."""
    import pyarrow as pa

    if not any(name in values for values in given) and name != EXTRA:
        return column
    old = column.to_pylist()
    if name == EXTRA:
        new = [_extra_like(was, values) for was, values in zip(old, given, strict=True)]
    else:
        new = [_like(was, values.get(name)) for was, values in zip(old, given, strict=True)]
    return column if new == old else pa.array(new, column.type)


def _like(was: Any, value: Any) -> Any:
    """The new value of a cell: texts are taken over, all else stays as it is stored (numbers, times, nulls)."""
    if isinstance(was, list) and isinstance(value, list) and len(was) == len(value):
        return [_like(one, other) for one, other in zip(was, value, strict=True)]
    if isinstance(was, dict) and isinstance(value, dict):
        return {key: _like(item, value.get(key)) for key, item in was.items()}
    return value if isinstance(was, str) and isinstance(value, str) else was


def _extra_like(was: Any, given: dict[str, Any]) -> Any:
    """The column of other keys, one JSON text, with what was changed among them."""
    try:
        extra = json.loads(was) if isinstance(was, str) else None
    except ValueError:
        return was
    if not isinstance(extra, dict):
        return was
    changed = {key: _like(item, given.get(key)) for key, item in extra.items()}
    return was if changed == extra else json.dumps(changed, ensure_ascii=True, allow_nan=False)


def _is_text(schema: pa.Schema, name: str) -> bool:
    import pyarrow as pa

    kinds = [schema.field(number).type for number in schema.get_all_field_indices(name)]
    return any(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
