"""Recaptioning: a captioner writes a new answer for every image, and nothing of it is lost when the process is killed.

    recaption(read_rows(path), captioner, image_root=root, work=work, out=out)

Rows are taken in batches; each batch's captions are one file, written whole or not at all, so that a kill costs one
batch. What is written in the end equals that of an undisturbed run. The raw caption stays beside the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mgm_exp.data.formats import DJ_END, DJ_IMAGE, Row
from mgm_exp.data.images import ImageFault, open_image
from mgm_exp.data.records import IMAGE_TOKEN, BadRow, json_line
from mgm_exp.errors import MgmError
from mgm_exp.store import disk_full_named, write_atomic

if TYPE_CHECKING:
    from PIL import Image

CAPTIONS, REJECTED = "captions.jsonl", "rejected.jsonl"
_SHARDS_IN_A_FOLDER = 1000
_MOST_ROWS = 10_000  # of a batch, where most of them want no caption


class Captioner(Protocol):
    """Anything that describes images in words."""

    def caption(self, images: list[Image.Image]) -> list[str]: ...


@dataclass(frozen=True)
class RecaptionReport:
    """What became of the rows.

    Args:
        rows: Rows read.
        recaptioned: Rows with a new caption.
        unchanged: Rows that are no image with one answer (text only, several rounds); they are passed on as they are.
        rejected: Rows that cannot be read or whose image cannot; they stand in ``rejected.jsonl``.
        from_before: Rows whose captions an interrupted attempt had written.
    """

    rows: int
    recaptioned: int
    unchanged: int
    rejected: int
    from_before: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class _Batch:
    """Consecutive rows with the captions, or faults, of those that can have one."""

    number: int
    rows: list[Row | BadRow]
    wanted: list[Row]

    @property
    def name(self) -> str:
        """Its shard's name: equal only for the same rows in the same batch."""
        keys = json.dumps([[row.id, row.image] for row in self.wanted])
        digest = hashlib.sha256(keys.encode()).hexdigest()[:16]
        return f"{self.number // _SHARDS_IN_A_FOLDER:04d}/{self.number:07d}-{digest}.jsonl"


def recaption(
    rows: Iterable[Row | BadRow],
    captioner: Captioner,
    *,
    image_root: Path,
    work: Path,
    out: Path,
    batch_size: int = 32,
    max_megapixels: float = 50.0,
    max_samples: int | None = None,
    total: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> RecaptionReport:
    """Writes ``captions.jsonl`` (rows with new captions, in order) and ``rejected.jsonl`` into ``out``.

    Args:
        rows: As :func:`mgm_exp.data.formats.read_rows` gives them.
        captioner: Writes one caption for each image, the same each time.
        image_root: Folder that image paths are relative to.
        work: Folder that survives an interruption; it belongs to these rows and this captioner alone.
        out: Folder of the results.
        batch_size: Rows of one call of the captioner.
        max_megapixels: Images with more pixels are refused.
        max_samples: Only the first so many rows; None: all.
        total: Number of rows, for progress; 0: unknown.
        on_progress: Called with (what, rows done, rows in all).

    Raises:
        MgmError: the captioner gave another number of captions than images.
    """
    counts = dict.fromkeys(("rows", "recaptioned", "unchanged", "rejected", "from_before"), 0)
    captions_at, rejected_at = out / f"{CAPTIONS}.partial", out / f"{REJECTED}.partial"
    with (
        disk_full_named(out),
        open(captions_at, "w", encoding="utf-8", newline="\n") as captions,
        open(rejected_at, "w", encoding="utf-8", newline="\n") as rejected,
    ):
        for batch in _batches(islice(rows, max_samples), batch_size):
            shard, is_from_before = _shard_of(batch, captioner, image_root, work, max_megapixels)
            counts["from_before"] += len(shard) * is_from_before
            for row in batch.rows:
                fate, line = _fate(row, shard)
                counts["rows"] += 1
                counts[fate] += 1
                (rejected if fate == "rejected" else captions).write(json_line(line))
            if on_progress is not None:
                on_progress("recaption", counts["rows"], max(total, counts["rows"]))
        for file in (captions, rejected):
            file.flush()
            os.fsync(file.fileno())
    os.replace(captions_at, out / CAPTIONS)
    os.replace(rejected_at, out / REJECTED)
    return RecaptionReport(**counts)


def can_be_recaptioned(row: Row) -> bool:
    """Whether a row is an image with one answer."""
    if row.image is None:
        return False
    turns = row.conversations
    return turns is None or [turn.speaker for turn in turns] == ["human", "gpt"]


def _batches(rows: Iterable[Row | BadRow], batch_size: int) -> Iterator[_Batch]:
    gathered: list[Row | BadRow] = []
    wanted: list[Row] = []
    number = 0
    for row in rows:
        gathered.append(row)
        if isinstance(row, Row) and can_be_recaptioned(row):
            wanted.append(row)
        if len(wanted) == batch_size or len(gathered) == _MOST_ROWS:
            yield _Batch(number, gathered, wanted)
            gathered, wanted, number = [], [], number + 1
    if gathered:
        yield _Batch(number, gathered, wanted)


Shard = dict[int, dict[str, Any]]


def _shard_of(
    batch: _Batch, captioner: Captioner, image_root: Path, work: Path, max_megapixels: float
) -> tuple[Shard, bool]:
    """What became of a batch, and whether an interrupted attempt had found it out."""
    path = work / "shards" / batch.name
    shard = _read_shard(path, batch)
    if shard is not None:
        return shard, True
    shard = _captions_of(batch, captioner, image_root, max_megapixels)
    _write_shard(path, shard)
    return shard, False


def _fate(row: Row | BadRow, shard: Shard) -> tuple[str, dict[str, Any]]:
    """The count that a row belongs to, and what is written about it."""
    if isinstance(row, BadRow):
        return "rejected", row.to_json()
    said = shard.get(row.index)
    if said is None:
        return "unchanged", _unchanged(row)
    if "kind" in said:
        return "rejected", row.bad(said["kind"], said["detail"]).to_json()
    return "recaptioned", _with_caption(row, said["caption"])


def _captions_of(batch: _Batch, captioner: Captioner, image_root: Path, max_megapixels: float) -> Shard:
    """Captions of a batch's images, or the faults of those that cannot be opened."""
    opened: list[tuple[Row, Image.Image]] = []
    shard: Shard = {}
    for row in batch.wanted:
        try:
            opened.append((row, open_image(image_root, row.image or "", max_megapixels)))
        except ImageFault as fault:
            shard[row.index] = {"id": row.id, "kind": fault.kind, "detail": fault.detail}
    texts = captioner.caption([image for _, image in opened]) if opened else []
    if len(texts) != len(opened):
        raise MgmError(f"The captioner gave {len(texts)} captions for {len(opened)} images.")
    shard.update((row.index, _judged(row, text)) for (row, _), text in zip(opened, texts, strict=True))
    return shard


def _judged(row: Row, text: str) -> dict[str, Any]:
    """A new caption on one line, or why it cannot be one."""
    caption = " ".join(text.split())
    if not caption:
        return {"id": row.id, "kind": "empty_caption", "detail": "the captioner wrote nothing"}
    if any(token in caption for token in (IMAGE_TOKEN, DJ_IMAGE, DJ_END)):
        return {"id": row.id, "kind": "image_token_in_answer", "detail": f"the captioner wrote {caption!r:.80}"}
    return {"id": row.id, "caption": caption}


def _write_shard(path: Path, shard: Shard) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json_line({"index": index, **shard[index]}) for index in sorted(shard)]
    write_atomic(path, "".join(lines))


def _read_shard(path: Path, batch: _Batch) -> Shard | None:
    """A finished batch's captions; None where there is no file, or not a whole one of exactly these rows."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        shard = {line.pop("index"): line for line in lines}
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return None
    expected = {row.index: row.id for row in batch.wanted}
    return shard if {index: said.get("id") for index, said in shard.items()} == expected else None


def _unchanged(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {"id": row.id}
    if row.conversations is None:
        images = [] if row.image is None else [row.image]
        values |= {"text": f"{DJ_IMAGE if images else ''}\n{row.caption} {DJ_END}", "images": images}
    else:
        turns = [{"from": turn.speaker, "value": turn.text} for turn in row.conversations]
        values |= ({} if row.image is None else {"image": row.image}) | {"conversations": turns}
    return values if row.raw_caption is None else {**values, "raw_caption": row.raw_caption}


def _with_caption(row: Row, caption: str) -> dict[str, Any]:
    """The row with another answer, in the form that it came in."""
    values: dict[str, Any] = {"id": row.id}
    if row.conversations is None:
        raw = row.caption
        values |= {"text": f"{DJ_IMAGE}\n{caption} {DJ_END}", "images": [row.image]}
    else:
        question, answer = row.conversations
        raw = answer.text
        turns = [{"from": "human", "value": question.text}, {"from": "gpt", "value": caption}]
        values |= {"image": row.image, "conversations": turns}
    # A caption that replaces a replaced one keeps the first.
    return {**values, "raw_caption": raw if row.raw_caption is None else row.raw_caption}
