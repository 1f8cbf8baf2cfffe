"""Rows in WebDataset tar shards: the files of a sample have one name and lie one after the other.

    000000007.json      the row
    000000007.jpg       its image
    000000007.txt       its caption, if it is a caption row

A shard of others is read too: without a JSON file, or with one that is no row (metadata), the text is the caption and
the sample's name the id. Images stay in the shard: a row names its own as ``shard-000000.tar::000000007.jpg``.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mgm_exp.data.strict_json import MAX_ROW_BYTES, Element, Fault, fault_in
from mgm_exp.data.tar_members import forget, members
from mgm_exp.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "img")
_ROW_KEYS = ("conversations", "messages", "text", "caption")
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp", b"GIF8": "gif"}
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,80}")


@dataclass
class _Sample:
    key: str
    number: int
    json: bytes | None = None
    text: bytes | None = None
    image: str | None = None
    fault: Fault | None = None
    others: list[str] = field(default_factory=list)


def sample_key(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """The name of the sample that a file of a shard belongs to, and its suffix; None for folders and hidden files."""
    folder, name = posixpath.split(member.name)
    if member.isdir() or name.startswith("."):
        return None, ""
    stem, _, suffix = name.partition(".")
    return posixpath.join(folder, stem), suffix.lower()


class TarElements(Iterator[Element]):
    """The samples of a shard, as JSON objects with the path of their image beside them.

    Args:
        file: The shard, open for reading.
        path: Its path.

    Attributes:
        bytes_read: How far the shard has been read.
        ignored: Kinds of files (suffixes) in the samples that are not read, in the order in which they were met.

    Raises:
        DataError: it is no tar archive.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._name = file, path.name
        self._samples = self._grouped(members(file))
        self.bytes_read = 0
        self.ignored: list[str] = []
        try:
            self._next: _Sample | None = next(self._samples, None)
        except tarfile.TarError as error:
            raise DataError(f"{path} is no whole tar archive: {error}.", advice="Get it again.") from error
        if self._next is None:
            raise DataError(f"{path} holds no rows: the archive has no samples in it.", advice="Give another shard.")

    def __next__(self) -> Element:
        sample = self._next
        if sample is None:
            raise StopIteration
        self._next = next(self._samples, None)
        return self._element(sample)

    def _grouped(self, found: Iterator[tarfile.TarInfo]) -> Iterator[_Sample]:
        sample: _Sample | None = None
        number = 0
        while True:
            try:
                member = next(found, None)
            except tarfile.TarError as error:
                if sample is None:
                    raise
                # What came before is whole, but perhaps the sample that the damage is in or follows.
                sample.fault = Fault("file_ends_early", str(error))
                member = None
            if member is None:
                break
            self.bytes_read = member.offset
            key, suffix = sample_key(member)
            if key is None:
                continue
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key, number)
                number += 1
            self._take(sample, member, suffix)
        if sample is not None:
            yield sample

    def _take(self, sample: _Sample, member: tarfile.TarInfo, suffix: str) -> None:
        if suffix in IMAGE_SUFFIXES:
            if sample.image is not None:
                sample.fault = Fault("several_images", f"{sample.image} and {member.name}; one image is supported")
            sample.image = sample.image or member.name
        elif suffix in ("json", "txt"):
            content = self._content(sample, member)
            if suffix == "json":
                sample.json = content
            else:
                sample.text = content
        elif suffix not in self.ignored:
            self.ignored.append(suffix)

    def _content(self, sample: _Sample, member: tarfile.TarInfo) -> bytes | None:
        if not member.isreg():
            sample.fault = Fault("not_json", f"{member.name} is a link or a device")
            return None
        if member.size > MAX_ROW_BYTES:
            sample.fault = Fault("row_too_large", f"longer than {MAX_ROW_BYTES} bytes")
            return None
        self._file.seek(member.offset_data)
        return self._file.read(member.size)

    def _element(self, sample: _Sample) -> Element:
        line, index = sample.number + 1, sample.number
        fault, value = sample.fault, None
        if fault is None:
            value, fault = _value(sample)
        if fault is not None:
            return Element(line, index, {"id": sample.key}, fault)
        image = None if sample.image is None else f"{self._name}::{sample.image}"
        return Element(line, index, value, image=image)


def _value(sample: _Sample) -> tuple[Any, Fault | None]:
    """The JSON object that a sample says."""
    value: Any = {}
    try:
        if sample.json is not None:
            value, fault = fault_in(sample.json.decode("utf-8-sig"))
            if fault is not None or not isinstance(value, dict):
                return value, fault or Fault("not_an_object", "the JSON file of the sample holds no object")
        value = {"id": sample.key, **value}
        if value["id"] is None:  # said to have none
            del value["id"]
        if sample.text is not None and not any(isinstance(value.get(key), (str, list)) for key in _ROW_KEYS):
            value["caption"] = sample.text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return None, Fault("encoding", f"byte {error.start + 1} of a text of the sample is not UTF-8")
    return value, None


class TarWriter:
    """Writes rows, given as JSON objects, and their images to one tar archive.

    The same rows give the same bytes: members have neither an owner nor a time.

    Args:
        path: The archive, which is written in place: give a temporary one and rename it.
    """

    def __init__(self, path: Path) -> None:
        self._archive = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - close() closes it
        self._keys: set[str] = set()
        self.rows = 0
        self.bytes = 0

    def write(self, value: dict[str, Any], row_id: str, caption: str | None, image: bytes | None, suffix: str) -> None:
        """Adds a sample.

        Args:
            value: The row.
            row_id: Its id, which names the sample where it can.
            caption: Of a caption row, for readers that want a text file.
            image: Bytes of the image.
            suffix: Of the image's path, with its dot; decides how its file is called.
        """
        key = row_id if _KEY.fullmatch(row_id) and row_id not in self._keys else f"_{self.rows:09d}"
        self._keys.add(key)
        text = json.dumps({"id": None, **value}, ensure_ascii=True, allow_nan=False)
        self._add(f"{key}.json", text.encode())
        if caption is not None:
            self._add(f"{key}.txt", caption.encode())
        if image is not None:
            self._add(f"{key}.{_image_suffix(suffix, image)}", image)
        self.rows += 1

    def close(self) -> None:
        """Writes the archive's end."""
        self._archive.close()

    def _add(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._archive.addfile(member, io.BytesIO(content))
        forget(self._archive)
        self.bytes += len(content) + 2 * tarfile.BLOCKSIZE


def _image_suffix(suffix: str, image: bytes) -> str:
    wanted = suffix.lower().lstrip(".")
    if wanted in IMAGE_SUFFIXES:
        return wanted
    return next((name for magic, name in _MAGIC.items() if image.startswith(magic)), "img")
