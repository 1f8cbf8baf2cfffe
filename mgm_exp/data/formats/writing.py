"""Writes rows in any of the formats, so that they can be read back without loss, and whole or not at all.

    with RowWriter(Path("pairs.parquet"), "parquet", image_root=Path("pictures")) as writer:
        for row in read_rows("pairs.jsonl", keep_given=True):
            writer.write(row)

The file appears under its name when the ``with`` block ends; if it is left by an error or Ctrl-C, nothing does.
"""

from __future__ import annotations

import json
import os
import posixpath
import shutil
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from mgm_exp.data.formats.aside import as_caption, written
from mgm_exp.data.formats.files import SUFFIXES, Container
from mgm_exp.data.formats.parquet import ParquetWriter
from mgm_exp.data.formats.rows import Form, Row
from mgm_exp.data.formats.webdataset import TarWriter
from mgm_exp.data.images import ImageFault, locate, read_image_file
from mgm_exp.data.records import BadRow, json_line
from mgm_exp.data.strict_json import MAX_ROW_BYTES
from mgm_exp.data.tar_members import split_member
from mgm_exp.errors import DataError, UserError
from mgm_exp.store import disk_full_named, fsync_folder

Target = Literal["llava", "datajuicer", "sharegpt", "parquet", "webdataset"]
TARGETS: tuple[Target, ...] = ("llava", "datajuicer", "sharegpt", "parquet", "webdataset")
_SUFFIXES: dict[Target, tuple[str, ...]] = {
    "llava": (".json", ".jsonl"),
    "datajuicer": (".jsonl",),
    "sharegpt": (".json", ".jsonl"),
    "parquet": (".parquet",),
    "webdataset": (".tar", ""),
}

Packed = Literal["unpack", "keep", "original"]
PACKED: tuple[Packed, ...] = ("unpack", "keep", "original")

SHARD_ROWS = 5_000
SHARD_BYTES = 2 << 30
_TOO_LARGE = f"longer than {MAX_ROW_BYTES} bytes, with what is kept aside"


class _File(Protocol):
    def write(self, value: dict[str, Any], line: bytes) -> None: ...

    def close(self) -> None: ...


class RowWriter:
    """Writes rows to a file, or to a folder of tar shards.

    Args:
        out: The file; for ``webdataset`` a file that ends in ``.tar``, or a folder of shards.
        target: The format. None keeps each row in the form that it has, in the container that ``container`` names.
        container: With ``target=None``: how the file keeps its rows.
        image_root: Folder of the images; needed for tar shards, and for unpacking them.
        packed: What becomes of images that lie in tar shards when another format is written. ``unpack`` writes each to
            its own path below ``unpack_to``; ``keep`` leaves it where it is (``shard.tar::member``); ``original``
            names the path that it had before it was packed, and writes no image.
        unpack_to: Folder for unpacked images (default: the folder of ``out``).
        answers_only: For ``datajuicer``: see :func:`mgm_exp.data.formats.aside.written`.
        overwrite: Replace ``out`` if it is there.
        shard_rows: Most rows of a tar shard.

    Attributes:
        rows: Rows written.
        images: Images written, into shards or out of them.

    Raises:
        UserError: ``out`` is there already, its folder is not, or its name does not fit the format.
    """

    def __init__(
        self,
        out: Path,
        target: Target | None,
        *,
        container: Container | None = None,
        image_root: Path | None = None,
        packed: Packed = "unpack",
        unpack_to: Path | None = None,
        answers_only: bool = False,
        overwrite: bool = False,
        shard_rows: int = SHARD_ROWS,
    ) -> None:
        self.out, self.target = out, target
        self.container = container if target is None else check_out(out, target)
        if self.container is None:
            raise ValueError("without a target format the container has to be given")
        self._is_folder = self.container == "tar" and out.suffix != ".tar"
        _check_free(out, overwrite, self._is_folder)
        self.image_root, self.packed, self.unpack_to = image_root, packed, unpack_to or out.parent
        self.shard_rows, self.answers_only = shard_rows, answers_only
        self.rows = self.images = 0
        self._partial = out.with_name(f".{out.name}.partial")
        self._shards: list[Path] = []
        self._tar: TarWriter | None = None
        self._file: _File | None = None

    def __enter__(self) -> RowWriter:
        self._remove(self._partial)  # of an attempt that was killed
        try:
            with disk_full_named(self.out):
                if self._is_folder:
                    self._partial.mkdir()
                self._file = self._opened()
        except BaseException:  # a signal, too
            self._remove(self._partial)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.publish()
        else:
            self.discard()

    def write(self, row: Row) -> BadRow | None:
        """Adds a row; or says why it cannot be written (its image cannot be read, its line would be too long).

        Raises:
            DataError: two different images would have to be unpacked to one path.
            DiskFullError: no space is left.
        """
        with disk_full_named(self.out):
            try:
                bad = self._write_sample(row) if self.container == "tar" else self._write_row(row)
            except ImageFault as fault:
                return row.bad(fault.kind, fault.detail)
        self.rows += bad is None
        return bad

    def publish(self) -> None:
        """Ends the file and gives it its name."""
        with disk_full_named(self.out):
            self._close()
            old = self.out.with_name(f".{self.out.name}.replaced")
            if self._is_folder:
                for shard in self._shards:
                    _sync(shard)
                self._remove(old)
                if self.out.exists():
                    os.rename(self.out, old)
            else:
                _sync(self._partial)
            os.replace(self._partial, self.out)
            self._remove(old)
            fsync_folder(self.out.absolute().parent)

    def discard(self) -> None:
        """Leaves nothing behind."""
        self._close()
        self._remove(self._partial)

    def _opened(self) -> _File | None:
        if self.container == "tar":
            return None
        if self.container == "parquet":
            return ParquetWriter(self._partial)
        return JsonWriter(self._partial, as_list=self.container == "list")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.container == "tar" and not self._shards:
            self._new_shard()  # an archive without samples is an archive
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def _remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    # -- rows into a file ----------------------------------------------------------------------------------------------

    def _write_row(self, row: Row) -> BadRow | None:
        packed = None if row.image is None else split_member(row.image)
        if packed is not None:
            row = _with_image(row, self._image_out_of(row, *packed))
        value = written(row, self._form(row), answers_only=self.answers_only)
        line = json_text(value)
        if len(line) > MAX_ROW_BYTES:
            return row.bad("row_too_large", _TOO_LARGE)
        assert self._file is not None
        self._file.write(value, line)
        return None

    def _form(self, row: Row) -> Form:
        if self.target is None:
            return row.form
        if self.target in ("parquet", "webdataset"):
            return "pairs" if row.conversations is None else "llava"
        return self.target  # type: ignore[return-value]  # the three that are left are forms

    def _image_out_of(self, row: Row, shard: str, member: str) -> str:
        """The path by which a row in another format names an image that lies in a shard."""
        if self.packed == "keep":
            return row.image or ""
        if self.packed == "original":
            return row.stored_image or member
        if self.image_root is None or row.image is None:
            raise ValueError("unpacking images needs their root")
        content = read_image_file(self.image_root, row.image)
        return self._unpack(content, row.stored_image, f"{Path(shard).stem}/{member}")

    def _unpack(self, content: bytes, stored: str | None, otherwise: str) -> str:
        """Writes an image to the path it had, or to one made of shard and member where that is taken or leads away."""
        for name in (stored, otherwise):
            if name is None or posixpath.isabs(name) or split_member(name) is not None:
                continue
            try:
                path = locate(self.unpack_to, name)
            except ImageFault:
                continue
            if path.is_file() and path.read_bytes() == content:
                return name
            if not path.exists() and path != Path(os.path.realpath(self.unpack_to)):
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(".unpacking.partial")
                partial.write_bytes(content)
                os.replace(partial, path)
                self.images += 1
                return name
        raise DataError(
            f"The image {otherwise} cannot be unpacked into {self.unpack_to}: another file is there.",
            advice="Give an empty folder, or leave the images in their shards.",
        )

    # -- rows into shards ----------------------------------------------------------------------------------------------

    def _write_sample(self, row: Row) -> BadRow | None:
        image = None
        name = row.image
        if name is not None:
            if self.image_root is None:
                raise ValueError("tar shards need the root of the images")
            image = read_image_file(self.image_root, name)
            if split_member(name) is not None:
                row = replace(row, image=row.stored_image)
        value = written(row, self._form(row))
        line = json_text(value)
        if len(line) > MAX_ROW_BYTES:
            return row.bad("row_too_large", _TOO_LARGE)
        tar = self._tar
        if tar is None or tar.rows >= self.shard_rows or tar.bytes >= SHARD_BYTES:
            tar = self._new_shard()
        suffix = posixpath.splitext(name or "")[1]
        tar.write(value, row.id if row.has_id else "", as_caption(row).caption, image, suffix)
        self.images += image is not None
        return None

    def _new_shard(self) -> TarWriter:
        if self._tar is not None and not self._is_folder:
            return self._tar  # one file is what was asked for
        if self._tar is not None:
            self._tar.close()
        path = self._partial / f"shard-{len(self._shards):06d}.tar" if self._is_folder else self._partial
        self._shards.append(path)
        self._tar = TarWriter(path)
        return self._tar


class JsonWriter:
    """Writes JSON objects as lines, or as one list with an object on each line."""

    def __init__(self, path: Path, *, as_list: bool) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - close() closes it
        self._is_list, self._is_first = as_list, True

    def write(self, value: dict[str, Any], line: bytes) -> None:
        """Adds an object, given as its line."""
        if self._is_list:
            self._file.write(b"[\n" if self._is_first else b",\n")
            self._is_first = False
        self._file.write(line if not self._is_list else line[:-1])

    def close(self) -> None:
        """Writes the list's end."""
        if self._is_list:
            self._file.write(b"[]\n" if self._is_first else b"\n]\n")
        self._file.close()


def json_text(value: dict[str, Any]) -> bytes:
    """A JSON object as one line, with its end."""
    try:
        return json_line(value).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair in a key that nobody reads: the same value, in escapes
        return (json.dumps(value, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _with_image(row: Row, name: str) -> Row:
    """A row whose image lies elsewhere now, as does the one of what stood in its file."""
    given = row.given
    if given is not None and name != row.stored_image:
        given = {**given, **({"image": name} if row.form in ("llava", "pairs") else {"images": [name]})}
    return replace(row, image=name, stored_image=None, given=given)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_out(out: Path, target: Target) -> Container:
    """How a file of this name keeps rows of a format.

    Raises:
        UserError: the name does not fit the format.
    """
    allowed = _SUFFIXES[target]
    suffix = out.suffix if out.suffix in SUFFIXES or target != "webdataset" else ""
    if suffix not in allowed:
        names = " or ".join(suffix or "the name of a folder" for suffix in allowed)
        raise UserError(
            f"{out.name!r} is no name for {target}: it has to end in {names}.".replace("end in the", "be the")
        )
    if target == "webdataset":
        return "tar"
    return "parquet" if target == "parquet" else ("lines" if suffix == ".jsonl" else "list")


def _check_free(out: Path, overwrite: bool, is_folder: bool) -> None:
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.parent} is not a folder.", advice="Make it first.")
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} is there already.", advice="Give another name, or --overwrite.")
    if out.is_dir():
        if not is_folder:
            raise UserError(f"{out} is a folder, and a file is to be written.", advice="Give another name.")
        others = sorted(item.name for item in out.iterdir() if not item.name.endswith(".tar"))
        if others:
            raise UserError(f"{out} holds more than tar shards ({others[0]}), so it is not overwritten.")
