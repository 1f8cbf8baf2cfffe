"""Readers of the formats that data comes in: LLaVA/MGM JSON and Data-Juicer JSON lines.

    for row in read_rows(Path("pairs.jsonl")):
        ...                                     # a Row, or a BadRow that says why it is none

LLaVA/MGM: one JSON list (or JSON lines) of
``{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", ...}]}``.
Data-Juicer: JSON lines of ``{"id": ..., "text": "<__dj__image>\\na caption <|__dj__eoc|>", "images": ["a.jpg"]}``; the
image token may also be ``<image>``. Both are told apart row by row, and both are streamed.

A reader checks the form of a row. Whether it can be trained on (its image opens, an answer remains) is checked in
:mod:`mgm_exp.data.conversations` and :mod:`mgm_exp.data.curation`.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mgm_exp.data.records import IMAGE_TOKEN, SPEAKERS, BadRow, Record, Turn
from mgm_exp.data.strict_json import Element, LineElements, ListElements, fault_in
from mgm_exp.errors import DataError

DJ_IMAGE = "<__dj__image>"
DJ_END = "<|__dj__eoc|>"
_DJ_MEDIA = ("<__dj__video>", "<__dj__audio>")
_OTHER_FILES = {b"PAR1": "Parquet", b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz"}
_FORMS = "a JSON list of LLaVA/MGM rows, or JSON lines of Data-Juicer or LLaVA rows, in UTF-8"


@dataclass(frozen=True)
class Row:
    """One well-formed row: either a conversation or a caption.

    Args:
        file: Name of the file.
        line: Line on which the row begins, from 1.
        index: Number of the row, from 0.
        id: The row's id; ``row-<index>`` where it has none (then ``has_id`` is False).
        image: The image path as it is written; None where the row has none.
        conversations: The turns; None in a caption row.
        caption: The caption without Data-Juicer's special tokens; None in a conversation row.
        raw_caption: The caption that was replaced by a captioner, where the row brings one.
    """

    file: str
    line: int
    index: int
    id: str
    image: str | None
    conversations: tuple[Turn, ...] | None = None
    caption: str | None = None
    raw_caption: str | None = None
    has_id: bool = True

    def bad(self, kind: str, detail: str) -> BadRow:
        """This row as one that cannot be used."""
        return BadRow(self.file, self.line, self.id, kind, detail, self.index)


class _Malformed(Exception):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class RowReader(Iterator["Row | BadRow"]):
    """Iterates over the rows of a file, in order.

    Attributes:
        bytes_read, bytes_total: How far the file has been read, for progress bars.

    Raises:
        DataError: the file cannot be read at all (missing, empty, another format).
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file = _open(self.path)
        try:
            self.bytes_total = os.fstat(self._file.fileno()).st_size
            is_list = _holds_list(self._file, self.path)
        except BaseException:
            self._file.close()
            raise
        self._elements: LineElements | ListElements = ListElements(self._file) if is_list else LineElements(self._file)
        self._ids: set[str] = set()

    @property
    def bytes_read(self) -> int:
        return self._elements.bytes_read

    def __next__(self) -> Row | BadRow:
        if self._file.closed:  # an iterator that ended stays at its end
            raise StopIteration
        try:
            element = next(self._elements)
        except StopIteration:
            self._file.close()
            raise
        return self._row(element)

    def close(self) -> None:
        """Closes the file; reading to the end does it too."""
        self._file.close()

    def _row(self, element: Element) -> Row | BadRow:
        name, value = self.path.name, element.value
        row_id = _id_of(value)

        def bad(kind: str, detail: str) -> BadRow:
            return BadRow(name, element.line, row_id, kind, detail, element.index)

        if element.fault is not None:
            return bad(element.fault.kind, element.fault.detail)
        try:
            row = _parse_row(value, name, element)
        except _Malformed as error:
            return bad(error.kind, error.detail)
        if row.id in self._ids:
            return bad("duplicate_id", f"{row.id!r} was the id of an earlier row")
        self._ids.add(row.id)
        return row


def read_rows(path: Path | str) -> RowReader:
    """The rows of a file in one of the known formats, one after the other.

    Raises:
        DataError: the file is missing, empty, or in none of the formats.
    """
    return RowReader(path)


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError(f"{path} is not there.", advice=f"Give the path of a file with rows: {_FORMS}.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder.", advice=f"Give the file with the rows: {_FORMS}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", advice="Check its permissions.") from error


def _holds_list(file: BinaryIO, path: Path) -> bool:
    """Whether the file holds one JSON list (else JSON lines), found out from its first characters."""
    head = file.read(1 << 16)
    file.seek(0)
    for magic, what in _OTHER_FILES.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}.", advice=f"Unpack or convert it; what is read is {_FORMS}.")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in head[:4]:
        raise DataError(f"{path} is not UTF-8 (it looks like UTF-16).", advice="Save it as UTF-8.")
    start = head.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    if not start:
        raise DataError(f"{path} holds no rows.", advice=f"Give a file that holds {_FORMS}.")
    if start[:1] == b"[":
        return True
    first, newline, _ = start.partition(b"\n")
    if path.suffix == ".jsonl":
        return False
    if start[:1] != b"{" or (newline and fault_in(first.decode("utf-8", "replace"))[1] and first.rstrip() == b"{"):
        raise DataError(
            f"{path} begins with {first[:40].decode('utf-8', 'replace')!r}, which begins no known format.",
            advice=f"What is read is {_FORMS}. A single JSON object around the rows must be taken off.",
        )
    return False


def _id_of(value: Any) -> str | None:
    """The id of whatever was read, for naming it."""
    given = value.get("id") if isinstance(value, dict) else None
    if isinstance(given, str) and given and _is_writable(given):
        return given
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else None


def _is_writable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parse_row(value: Any, file: str, element: Element) -> Row:
    if not isinstance(value, dict):
        raise _Malformed("not_an_object", f"a {_json_type(value)} stands where a row should")
    row_id = _id_of(value)
    if row_id is None and value.get("id") is not None:
        raise _Malformed("bad_id", f"the id is {_shown(value['id'])}")
    raw_caption = value.get("raw_caption")
    fields: dict[str, Any] = {"raw_caption": raw_caption if isinstance(raw_caption, str) else None}
    if value.get("conversations") is not None:
        fields["image"] = _llava_image(value.get("image"))
        fields["conversations"] = _turns(value["conversations"])
    elif isinstance(value.get("text"), str):
        fields["image"], fields["caption"] = _dj_pair(value)
    else:
        keys = ", ".join(sorted(value)[:8]) or "none"
        raise _Malformed("no_conversations", f"neither 'conversations' nor a 'text'; its keys are: {keys}"[:200])
    texts = [row_id or "", fields["image"] or "", fields.get("caption") or "", fields["raw_caption"] or ""]
    texts += [turn.text for turn in fields.get("conversations") or ()]
    if not all(text.isascii() or _is_writable(text) for text in texts):
        raise _Malformed("lone_surrogate", "a text holds half of a surrogate pair (\\ud800-\\udfff)")
    name = f"row-{element.index:06d}" if row_id is None else row_id
    return Row(file, element.line, element.index, name, has_id=row_id is not None, **fields)


def _llava_image(given: Any) -> str | None:
    """LLaVA's ``image``: a path, a list of one, or nothing."""
    if given is None or given == []:
        return None
    if isinstance(given, list):
        if len(given) > 1:
            raise _Malformed("several_images", f"the row names {len(given)} images; one is supported")
        given = given[0]
    if not isinstance(given, str) or not given:
        raise _Malformed("bad_image_field", f"the image is {_shown(given)}")
    return given


def _turns(given: Any) -> tuple[Turn, ...]:
    if not isinstance(given, list) or not given:
        raise _Malformed("no_conversations", f"'conversations' is {_shown(given)}; a list of turns is needed")
    turns = []
    for number, turn in enumerate(given):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise _Malformed("bad_turn", f"turn {number} is {_shown(turn)}; the texts 'from' and 'value' are needed")
        if speaker not in SPEAKERS:
            raise _Malformed("unknown_speaker", f"turn {number} is from {_shown(speaker)}, not 'human' or 'gpt'")
        turns.append(Turn(speaker, text))
    return tuple(turns)


def _dj_pair(value: dict[str, Any]) -> tuple[str | None, str]:
    """Image path and clean caption of a Data-Juicer row."""
    text = value["text"]
    for key, token in (("videos", _DJ_MEDIA[0]), ("audios", _DJ_MEDIA[1])):
        if value.get(key) or token in text:
            raise _Malformed("unsupported_media", f"the row holds {key}; images and text are supported")
    images = value.get("images")
    if images is not None and not isinstance(images, list):
        raise _Malformed("bad_image_field", f"'images' is {_shown(images)}; a list of one path is needed")
    image = _llava_image(images)
    tokens = text.count(DJ_IMAGE) + text.count(IMAGE_TOKEN)
    if tokens > 1:
        raise _Malformed("two_images_in_a_turn", f"the text holds the image token {tokens} times; one is supported")
    if tokens and image is None:
        raise _Malformed("image_token_without_image", "the text holds an image token, and 'images' names no image")
    for token in (DJ_IMAGE, IMAGE_TOKEN, DJ_END):
        text = text.replace(token, " ")
    return image, text.strip()


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + "..."


# -- writing ---------------------------------------------------------------------------------------------------------


def dj_row(record: Record) -> dict[str, Any]:
    """A record of one question about an image as a Data-Juicer row; the question is left out, as the format has none.

    Raises:
        ValueError: the record has no image or more than one answer.
    """
    if record.image is None or len(record.conversations) != 2:
        raise ValueError(f"record {record.id} is not an image with one answer, so it has no Data-Juicer form")
    row = {
        "id": record.id,
        "text": f"{DJ_IMAGE}\n{record.conversations[1].text} {DJ_END}",
        "images": [record.image],
    }
    return row if record.raw_caption is None else {**row, "raw_caption": record.raw_caption}


def source_fingerprint(path: Path | str, image_root: Path | str) -> str:
    """SHA-256 over the bytes of a file of rows and, for each image it names, its path, size and time of change.

    It changes whenever the data may have changed, without reading the images; damaged rows are no obstacle.

    Raises:
        DataError: the file cannot be read at all.
    """
    path, root = Path(path), os.fspath(image_root)
    digest = hashlib.sha256()
    with _open(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    seen: set[str] = set()
    for row in read_rows(path):
        if isinstance(row, BadRow) or row.image is None or row.image in seen:
            continue
        seen.add(row.image)
        try:
            facts = os.stat(os.path.join(root, row.image))
            state = f"{facts.st_size} {facts.st_mtime_ns}"
        except (OSError, ValueError) as error:
            state = type(error).__name__
        digest.update(f"\n{row.image}\0{state}".encode())
    return digest.hexdigest()
