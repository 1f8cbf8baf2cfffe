"""A dataset with every kind of damage that a file, a row, a text or an image can have, and what should be found."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from .conftest import chat, pair, picture
from .test_images import encoded, png_of_size

MAX_MEGAPIXELS = 0.5

# Kinds that need a model to be seen.
OF_A_MODEL = {
    "no_label",
    "labels_truncated",
    "image_truncated",
    "special_token",
    "no_boundary",
    "unsupported_row",
}


@dataclass
class Damaged:
    """The rows of the dataset as they are written, and the kinds of fault that each of them has."""

    rows: list[bytes] = field(default_factory=list)
    kinds: list[set[str]] = field(default_factory=list)

    def add(self, row: Any, *kinds: str) -> None:
        """A row (JSON, or bytes that should have been) and what is wrong with it."""
        self.rows.append(row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode())
        self.kinds.append(set(kinds))

    def faults(self) -> set[tuple[int, str]]:
        """(row, kind) of everything that should be reported."""
        return {(number, kind) for number, kinds in enumerate(self.kinds) for kind in kinds}


def images(root: Path) -> None:
    """Fills an image root with good images (``0.png`` ... ``9.png``) and one of each fault."""
    root.mkdir()
    for number in range(10):
        picture(seed=number).save(root / f"{number}.png")
    (root / "folder.png").mkdir()
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.png").write_bytes(b"this is no image")
    (root / "cut.jpg").write_bytes(encoded(picture(200, 200), "JPEG")[:4000])
    (root / "large.png").write_bytes(png_of_size(2000, 2000))
    (root / "bomb.png").write_bytes(png_of_size(60_000, 60_000))
    (root / "long.png").write_bytes(encoded(picture(600, 4), "PNG"))
    (root / "moving.gif").write_bytes(encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=1)]))
    (root / "float.tiff").write_bytes(encoded(Image.new("F", (9, 9), 0.5), "TIFF"))
    (root / "grey.png").write_bytes(encoded(picture().convert("L"), "PNG"))
    picture().save(root / "unused.png")
    os.symlink("/etc", root / "link")


def rows() -> Damaged:
    """One row for each kind, rows with several faults, and good rows between them."""
    data = Damaged()
    add = data.add
    add(pair("good-1", "0.png"))
    add(chat("good-2", "1.png", "<image>\nWhat is it?", "a sign"))
    add(chat("good-3", None, "Two and two?", "Four."))
    # the file
    add(b'{"id": "not json", "text": }', "not_json")
    add([1, 2], "not_an_object")
    add(b'{"id": "latin", "text": "caf\xe9", "images": ["0.png"]}', "encoding")
    add({**pair("long", "0.png"), "note": "x" * (4 << 20)}, "row_too_large")
    add(b'{"id": "deep", "a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested_too_deep")
    add(b'{"id": "twice", "id": "twice"}', "duplicate_key")
    add(b'{"id": "number", "text": "a", "images": ["0.png"], "score": NaN}', "bad_number")
    add(b'{"id": "half", "text": "<__dj__image>\\ud800", "images": ["0.png"]}', "lone_surrogate")
    # the row
    add({"id": "nothing"}, "no_conversations")
    add({**pair("x", "0.png"), "id": [1]}, "bad_id")
    add(pair("good-1", "2.png"), "duplicate_id")
    add({"id": "turn", "conversations": [{"from": "human"}]}, "bad_turn")
    add({"id": "robot", "conversations": [{"from": "robot", "value": "beep"}]}, "unknown_speaker")
    add({"id": "order", "conversations": [{"from": "gpt", "value": "a"}]}, "turn_order")
    add(chat("open", None, "q", "a", "q"), "ends_with_human")
    add(chat("silent", "3.png", "<image>\nq", " "), "empty_answer")
    add(chat("blank", None, " ", "a"), "empty_question")
    add(pair("bare", "3.png", ""), "empty_caption")
    add({**pair("path", "x"), "images": [7]}, "bad_image_field")
    add({**pair("many", "x"), "images": ["4.png", "5.png"]}, "several_images")
    add(chat("double", "3.png", "<image><image>", "a"), "two_images_in_a_turn")
    add(chat("again", "3.png", "<image>\nq", "a", "<image>", "b"), "image_token_repeated")
    add(chat("mirror", "3.png", "q", "<image>"), "image_token_in_answer")
    add(chat("blind", None, "<image>\nq", "a"), "image_token_without_image")
    add({"id": "caption", "text": "a sign"}, "no_image")
    add({**pair("film", "3.png"), "videos": ["a.mp4"]}, "unsupported_media")
    # the text
    add(pair("bell", "6.png", "a sign\x07"), "control_characters")
    add(pair("misread", "6.png", "a cafÃ©"), "mojibake")
    add(pair("lost", "6.png", "a caf\ufffd"), "mojibake")
    add(chat("token", "6.png", "<image>\nq", "a <|__dj__eoc|>"), "foreign_token")
    add(chat("video", "6.png", "<image>\nq", "a <video>"), "foreign_token")
    # the image
    add(pair("missing", "nowhere.png"), "missing")
    add(pair("nul", "a\x00.png"), "bad_path")
    add(pair("up", "../0.png"), "outside_root")
    add(pair("absolute", "/etc/passwd"), "outside_root")
    add(pair("linked", "link/passwd"), "outside_root")
    add(pair("folder", "folder.png"), "not_a_file")
    add(pair("zero", "empty.jpg"), "zero_bytes")
    add(pair("words", "text.png"), "unreadable")
    add(pair("cut", "cut.jpg"), "truncated")
    add(pair("large", "large.png"), "too_large")
    add(pair("bomb", "bomb.png"), "too_large")
    add(pair("elongated", "long.png"), "too_elongated")
    add(pair("moving", "moving.gif"), "animated")
    add(pair("float", "float.tiff"), "wrong_mode")
    # several at once
    add(pair("good-2", "cut.jpg", "cafÃ©\x07"), "duplicate_id", "mojibake", "control_characters", "truncated")
    add({"id": "b", "image": "no.png", "conversations": [{"from": "x", "value": "a\x00"}]},
        "unknown_speaker", "control_characters", "missing")  # fmt: skip
    add({**pair("c", "x"), "images": ["text.png", "empty.jpg"]}, "several_images", "unreadable", "zero_bytes")
    add({"id": "d", "conversations": [{"from": "gpt", "value": "<image>"}, {"from": "human", "value": " "}]},
        "turn_order", "ends_with_human", "image_token_without_image", "empty_question")  # fmt: skip
    add({"id": "e", "text": ""}, "no_image", "empty_caption")
    add(pair("good-4", "grey.png", "the last one, in grey"))
    return data


def write_list(path: Path, data: Damaged, *, is_cut: bool) -> list[int]:
    """One JSON list after a byte-order mark; gives the line on which each row begins."""
    return _write(path, data, b"[\n", b",\n", b',\n{"id": "cut", "te' if is_cut else b"\n]\n")


def write_lines(path: Path, data: Damaged) -> list[int]:
    """JSON lines after a byte-order mark."""
    return _write(path, data, b"", b"\n", b"\n")


def _write(path: Path, data: Damaged, head: bytes, between: bytes, tail: bytes) -> list[int]:
    first = 1 + head.count(b"\n")
    path.write_bytes(b"\xef\xbb\xbf" + head + between.join(data.rows) + tail)
    return [first + number for number in range(len(data.rows))]
