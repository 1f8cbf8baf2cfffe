"""The rows that operators see: JSON lines of an id, a caption without special tokens, and an image or none.

{"id": "7", "caption": "a green sign above a door", "image": "shop/7.jpg"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mgm_exp.data.formats import DJ_END, DJ_IMAGE
from mgm_exp.data.records import IMAGE_TOKEN
from mgm_exp.errors import DataError


@dataclass(frozen=True)
class Pair:
    """An image with its caption.

    Args:
        id: The row's id.
        caption: Without special tokens.
        image: Path relative to the image root; None: there is no image.
    """

    id: str
    caption: str
    image: str | None

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "caption": self.caption, "image": self.image}


def read_pairs(path: Path) -> Iterator[Pair]:
    """The rows of a file, in order.

    Special tokens inside a caption are taken out: Data-Juicer would count them as words, and tell by them where an
    image belongs.

    Raises:
        DataError: the file is not there, or a line is no such row.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                pair = Pair(row["id"], without_tokens(row["caption"]), row["image"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"Line {number} of {path} is no row of id, caption and image: {error.__class__.__name__}: {error}."
                ) from error
            yield pair


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def without_tokens(caption: str) -> str:
    """A caption without Data-Juicer's special tokens."""
    for token in (DJ_IMAGE, DJ_END, IMAGE_TOKEN):
        if token in caption:
            caption = caption.replace(token, " ").strip()
    return caption


@dataclass(frozen=True)
class ShardPlan:
    """Consecutive rows that are worked on together.

    Args:
        number: From 0.
        first: Number of its first row, from 0.
        rows: How many rows it has.
        digest: SHA-256 of the rows and of whatever else determines the result.
    """

    number: int
    first: int
    rows: int
    digest: str

    @property
    def name(self) -> str:
        """Its file's name: equal only for the same rows at the same place under the same circumstances."""
        return f"{self.number:06d}-{self.digest[:16]}.jsonl"


def plan_shards(path: Path, shard_rows: int, circumstances: dict[str, Any]) -> list[ShardPlan]:
    """Divides a file into shards. Costs one pass over its lines.

    Raises:
        DataError: the file is not there.
    """
    head = json.dumps(circumstances, sort_keys=True).encode()
    shards: list[ShardPlan] = []
    count = 0
    digest = hashlib.sha256(head)
    with _opened(path) as file:
        for line in file:
            digest.update(line)
            count += 1
            if count == shard_rows:
                shards.append(ShardPlan(len(shards), len(shards) * shard_rows, count, digest.hexdigest()))
                digest, count = hashlib.sha256(head), 0
    if count:
        shards.append(ShardPlan(len(shards), len(shards) * shard_rows, count, digest.hexdigest()))
    return shards
