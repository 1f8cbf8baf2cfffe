"""The verdicts on all images of a dataset, made once and looked up by everything that comes after.

    write_image_tables({"align": (rows, root), "instruct": (rows, root)}, folder, max_megapixels=50)
    table = ImageTable(folder, "align", root)
    table.verdict("a.jpg")

Images are the costly part of curation: they are decoded once for both stages, for raw and recaptioned captions and for
every recipe of a sweep. A table costs 40 bytes an image on disk and is mapped, not read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mgm_exp.data.formats import Row, read_rows
from mgm_exp.data.image_checks import ImageChecks, Verdict
from mgm_exp.data.records import json_line
from mgm_exp.errors import DataError
from mgm_exp.store import disk_full_named, read_json, write_atomic, write_json_atomic

TABLES = "tables.json"
_CHUNK = 512
_ENTRY = np.dtype([("path", "<u8"), ("sha256", "V32")])


class Verdicts(Protocol):
    """Whoever knows whether images can be used."""

    root: str

    def begin(self, images: Iterable[str]) -> None: ...

    def verdict(self, image: str) -> Verdict: ...


class ImageTable:
    """Verdicts that :func:`write_image_tables` wrote.

    Args:
        folder: Its folder.
        stage: Whose images.
        root: Folder that image paths are relative to, for messages and for absolute paths.
    """

    def __init__(self, folder: Path, stage: str, root: Path | str) -> None:
        name = read_json(folder / TABLES)[stage]
        self.root = os.path.realpath(root)
        self._entries: np.ndarray = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        with open(folder / f"{name}-bad.jsonl", encoding="utf-8") as file:
            bad = (json.loads(line) for line in file)
            self._bad = {row["image"]: Verdict(row["kind"], row["detail"], "") for row in bad}

    def __len__(self) -> int:
        """Images that can be used."""
        return len(self._entries)

    def begin(self, images: Iterable[str]) -> None:
        """Nothing has to be started."""

    def verdict(self, image: str) -> Verdict:
        """What is known of an image.

        Raises:
            DataError: the image was not among those that were checked.
        """
        if image in self._bad:
            return self._bad[image]
        wanted = _path_hash(image)
        place = int(np.searchsorted(self._entries["path"], np.uint64(wanted)))
        if place == len(self._entries) or int(self._entries["path"][place]) != wanted:
            raise DataError(
                f"The image {image} was not there when images were checked.", advice="Run the command again."
            )
        return Verdict(None, "", self._entries["sha256"][place].tobytes().hex())


def write_image_tables(
    sources: Mapping[str, tuple[Path, Path]],
    folder: Path,
    *,
    max_megapixels: float,
    max_samples: int | None = None,
    workers: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Checks every image that the rows name, and writes tables of verdicts.

    Args:
        sources: File of rows and image root of each stage; stages with one root share a table.
        folder: Existing folder.
        max_megapixels: Most pixels of one image, in millions.
        max_samples: Only the first so many rows of each file; None: all.
        workers: Processes; None: all usable cores.
        on_progress: Called with (what, images done, images expected).

    Returns:
        For each table its number of images and of unusable ones by kind.
    """
    tables: dict[str, str] = {}
    by_root: dict[str, str] = {}
    for stage, (_, root) in sources.items():
        tables[stage] = by_root.setdefault(os.path.realpath(root), stage)
    meta: dict[str, Any] = {}
    with disk_full_named(folder):
        for real_root, name in by_root.items():
            files = [sources[stage][0] for stage, table in tables.items() if table == name]
            names = _images_of(files, max_samples, on_progress)
            with ImageChecks(real_root, max_megapixels, workers) as checks:
                meta[name] = _write_table(folder, name, names, checks)
        write_json_atomic(folder / TABLES, tables)
    return meta


def _images_of(
    files: list[Path], max_samples: int | None, on_progress: Callable[[str, int, int], None] | None
) -> Iterator[str]:
    """Each image once, in order."""
    seen: set[int] = set()  # hashes: a tenth of the paths' memory
    for file in dict.fromkeys(files):
        reader = read_rows(file)
        for number, row in enumerate(islice(reader, max_samples), 1):
            if on_progress is not None and number % _CHUNK == 0:
                share = reader.bytes_read / max(1, reader.bytes_total)
                on_progress("check images", number, max(number + 1, round(number / max(share, 1e-9))))
            if not isinstance(row, Row) or row.image is None:
                continue
            key = _path_hash(row.image)
            if key not in seen:
                seen.add(key)
                yield row.image
        reader.close()


def _write_table(folder: Path, name: str, images: Iterator[str], checks: ImageChecks) -> dict[str, Any]:
    entries, bad = bytearray(), io.StringIO()
    kinds: dict[str, int] = {}
    ahead: list[list[str]] = []

    def finish(chunk: list[str]) -> None:
        for image in chunk:
            verdict = checks.verdict(image)
            if verdict.kind is None:
                entries.extend(_path_hash(image).to_bytes(8, "little") + bytes.fromhex(verdict.sha256))
            else:
                kinds[verdict.kind] = kinds.get(verdict.kind, 0) + 1
                bad.write(json_line({"image": image, "kind": verdict.kind, "detail": verdict.detail}))
        checks.forget(chunk)

    while chunk := list(islice(images, _CHUNK)):
        checks.begin(chunk)
        ahead.append(chunk)
        if len(ahead) > 1:
            finish(ahead.pop(0))
    for chunk in ahead:
        finish(chunk)
    table = np.frombuffer(bytes(entries), dtype=_ENTRY)
    table = table[np.argsort(table["path"], kind="stable")]
    content = io.BytesIO()
    np.save(content, table, allow_pickle=False)
    write_atomic(folder / f"{name}.npy", content.getvalue())
    write_atomic(folder / f"{name}-bad.jsonl", bad.getvalue())
    return {"images": len(table) + sum(kinds.values()), "usable": len(table), "unusable": dict(sorted(kinds.items()))}


def _path_hash(image: str) -> int:
    return int.from_bytes(hashlib.blake2b(image.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
