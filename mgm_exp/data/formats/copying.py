"""Copies chosen rows of a file into several files of the same format, as they stand.

A JSON row is written again with the same keys and values, a row of Parquet with all columns of its table, a sample of a
tar shard with all its files: also with those that no reader here knows.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mgm_exp.data.formats.files import container_of, open_file
from mgm_exp.data.formats.reading import read_rows
from mgm_exp.data.formats.rows import Row
from mgm_exp.data.formats.webdataset import sample_key
from mgm_exp.data.formats.writing import SHARD_ROWS, JsonWriter, json_text
from mgm_exp.data.tar_members import forget, members
from mgm_exp.errors import DataError

Progress = Callable[[str, int, int], None]
_SUFFIXES = {"lines": ".jsonl", "list": ".json", "parquet": ".parquet"}


def copy_rows(
    path: Path, out: Path, names: Sequence[str], parts: npt.NDArray[np.int8], on_progress: Progress | None = None
) -> dict[str, str]:
    """Writes each row of a file, or of the shards of a folder, to the file of its part.

    Args:
        path: The file or folder.
        out: Folder of the new files, which are written in place.
        names: Of the parts. A part that gets no row has no file.
        parts: For each row, by its index, the number of its part; a negative one leaves it out.

    Returns:
        The name of the file, or of the folder of shards, of each part.

    Raises:
        DataError: the file is not what it was when ``parts`` was made; or Parquet shards have different columns.
    """
    reader = read_rows(path, keep_given=True)
    used = {number: name for number, name in enumerate(names) if np.any(parts == number)}
    try:
        if reader.container == "parquet":
            return _copy_parquet(reader.files, out, used, parts)
        if reader.container == "tar":
            return _copy_tar(reader.files, out, used, parts, in_folders=path.is_dir())
        suffix = _SUFFIXES[reader.container]
        writers = {
            number: JsonWriter(out / f"{name}{suffix}", as_list=reader.container == "list")
            for number, name in used.items()
        }
        for row in reader:
            part = _part(parts, row.index, path)
            if part >= 0 and isinstance(row, Row) and row.given is not None:
                writers[part].write({}, json_text(dict(row.given)))
            if on_progress is not None and row.index % 1024 == 0:
                on_progress("write", row.index + 1, len(parts))
        for writer in writers.values():
            writer.close()
        return {name: f"{name}{suffix}" for name in used.values()}
    finally:
        reader.close()


def _part(parts: npt.NDArray[np.int8], index: int, path: Path) -> int:
    if index >= len(parts):
        raise DataError(f"{path} grew while it was read.", advice="Give the command again.")
    return int(parts[index])


def _copy_parquet(
    files: Sequence[Path], out: Path, used: dict[int, str], parts: npt.NDArray[np.int8]
) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    schema = parquet.read_schema(files[0])
    writers: dict[int, Any] = {
        number: parquet.ParquetWriter(out / f"{name}.parquet", schema, compression="zstd")
        for number, name in used.items()
    }
    index = 0
    for file in files:
        table = parquet.ParquetFile(file, pre_buffer=False)
        if not table.schema_arrow.equals(schema):
            raise DataError(f"{file} has other columns than {files[0]}.", advice="Split each of them by itself.")
        for batch in table.iter_batches(batch_size=4096, use_threads=False):
            mine = parts[index : index + batch.num_rows]
            index += batch.num_rows
            for number, writer in writers.items():
                chosen = batch.filter(pa.array(mine == number))
                if chosen.num_rows:
                    writer.write_batch(chosen)
    for writer in writers.values():
        writer.close()
    return {name: f"{name}.parquet" for name in used.values()}


def _copy_tar(
    files: Sequence[Path], out: Path, used: dict[int, str], parts: npt.NDArray[np.int8], *, in_folders: bool
) -> dict[str, str]:
    shards = {
        number: _Shards(out / (name if in_folders else f"{name}.tar"), in_folders) for number, name in used.items()
    }
    index = -1
    for file in files:
        with open_file(file) as opened:
            if container_of(opened, file) != "tar":
                raise DataError(f"{file} is no tar shard, and {files[0]} is.", advice="Split them by themselves.")
            last = None
            for member in members(opened):
                key, _ = sample_key(member)
                if key is None:
                    continue
                is_new = key != last
                index += is_new
                last = key
                part = _part(parts, index, file)
                if part >= 0 and member.isreg():
                    shards[part].add(member, opened, is_new)
    for shard in shards.values():
        shard.close()
    return {name: shards[number].path.name for number, name in used.items()}


class _Shards:
    """The shards of one part, or its one file."""

    def __init__(self, path: Path, is_folder: bool) -> None:
        self.path, self._is_folder = path, is_folder
        if is_folder:
            path.mkdir()
        self._n_shards = self._n_samples = 0
        self._archive: tarfile.TarFile | None = None

    def add(self, member: tarfile.TarInfo, file: BinaryIO, is_new: bool) -> None:
        """Copies a file; ``is_new`` with the first one of a sample."""
        if self._archive is None or (is_new and self._is_folder and self._n_samples >= SHARD_ROWS):
            self._begin()
        self._n_samples += is_new
        assert self._archive is not None
        file.seek(member.offset_data)
        plain = tarfile.TarInfo(member.name)
        plain.size = member.size
        self._archive.addfile(plain, io.BytesIO(file.read(member.size)))
        forget(self._archive)

    def _begin(self) -> None:
        self.close()
        path = self.path / f"shard-{self._n_shards:06d}.tar" if self._is_folder else self.path
        self._archive = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - close() closes it
        self._n_shards += 1
        self._n_samples = 0

    def close(self) -> None:
        """Writes the archive's end."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None
