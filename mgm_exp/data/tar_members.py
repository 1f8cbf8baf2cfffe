"""Files inside tar shards, read where they lie: nothing is unpacked.

    content = read_member(Path("shard-000000.tar"), "000000007.jpg")

A shard's index is made on first use by passing over its headers, and kept as long as the shard does not change: 24
bytes a member, so that the shards of a million images fit into every process that reads them.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

SEPARATOR = ".tar::"
"""Ends the name of a shard in a path: ``shard-000000.tar::000000007.jpg``."""

_MOST_SHARDS = 4096
_ZEROS = bytes(tarfile.BLOCKSIZE)


class MemberMissing(Exception):
    """The shard has no regular file of that name."""


def split_member(path: str) -> tuple[str, str] | None:
    """The shard and the member that a path names; None for the path of an ordinary file."""
    shard, separator, member = path.partition(SEPARATOR)
    return (f"{shard}.tar", member) if separator else None


def read_member(shard: Path, member: str, most_bytes: int) -> bytes:
    """The bytes of a file in a shard; no more than ``most_bytes`` + 1 of them.

    Raises:
        MemberMissing: there is none of that name.
        OSError: the shard cannot be read, or is no tar archive.
    """
    with open(shard, "rb") as file:
        facts = os.fstat(file.fileno())
        index = _index(file, (str(shard), facts.st_size, facts.st_mtime_ns))
        place = index.find(member)
        if place is None:
            raise MemberMissing(member)
        offset, size = place
        file.seek(offset)
        content = file.read(min(size, most_bytes + 1))
        if len(content) < min(size, most_bytes + 1):
            raise EOFError(f"the shard ends inside {member}")
        return content


def members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar archive, in memory that does not grow with their number.

    Raises:
        tarfile.TarError: the archive is damaged or cut; tarfile itself would end there as if nothing were missing.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while member := archive.next():
            forget(archive)
            yield member
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != _ZEROS:
            raise tarfile.ReadError(f"the archive has no end after byte {archive.offset}: it was cut or is damaged")
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"something follows the end of the archive at byte {archive.offset}")


def forget(archive: tarfile.TarFile) -> None:
    """Drops what an archive remembers of the members that were read or written: a list that would grow with them."""
    archive.members.clear()  # type: ignore[attr-defined]  # documented nowhere, and there since Python 2


class _Index:
    """Where the files of a shard begin and how long they are, found by a hash of their names."""

    def __init__(self, file: BinaryIO) -> None:
        hashes, places = [], []
        try:
            for member in members(file):
                if member.isreg():
                    hashes.append(_hash(member.name))
                    places.append((member.offset_data, member.size))
        except tarfile.TarError:
            if not places:  # of a cut shard what is there can be read
                raise
        keys = np.array(hashes, np.uint64)
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._places = np.array(places, np.int64).reshape(-1, 2)[order]

    def find(self, name: str) -> tuple[int, int] | None:
        key = np.uint64(_hash(name))
        # Of several members of one name the last one counts, as for every program that unpacks.
        place = int(np.searchsorted(self._keys, key, side="right")) - 1
        if place < 0 or self._keys[place] != key:
            return None
        offset, size = self._places[place]
        return int(offset), int(size)


_indexes: OrderedDict[tuple[str, int, int], _Index] = OrderedDict()


def _index(file: BinaryIO, key: tuple[str, int, int]) -> _Index:
    found = _indexes.get(key)
    if found is None:
        try:
            found = _Index(file)
        except tarfile.TarError as error:
            raise OSError(f"not a tar archive, or damaged: {error}") from error
        _indexes[key] = found
        while len(_indexes) > _MOST_SHARDS:
            _indexes.popitem(last=False)
    return found


def _hash(name: str) -> int:
    raw = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
