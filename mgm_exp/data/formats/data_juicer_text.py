"""The ``text`` of a Data-Juicer row: one caption, or a conversation as Data-Juicer's own ``llava_to_dj`` writes it.

    <__dj__image>\\na green sign above a door <|__dj__eoc|>
    [[human]]: <__dj__image>\\nWhat does the sign say?\\n[[gpt]]: OPEN <|__dj__eoc|>

The second form has no escapes: a turn that holds a marker itself cannot be told from two turns. Whoever writes has to
read back and compare (:mod:`mgm_exp.data.formats.aside` does).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mgm_exp.data.records import IMAGE_TOKEN, Record, Turn

DJ_IMAGE = "<__dj__image>"
DJ_END = "<|__dj__eoc|>"
MEDIA_TOKENS = ("<__dj__video>", "<__dj__audio>")

_MARKER = re.compile(r"(?:\A|\n)\[\[(human|gpt)\]\]: ")


def caption_text(caption: str, has_image: bool) -> str:
    """The text of a caption row."""
    return f"{DJ_IMAGE}\n{caption} {DJ_END}" if has_image else f"{caption} {DJ_END}"


def without_tokens(text: str) -> str:
    """A text without any token that stands for a medium: what can be written where such a token would be wrong."""
    for token in (DJ_IMAGE, IMAGE_TOKEN, *MEDIA_TOKENS):
        text = text.replace(token, " ")
    return text


def caption_of(text: str) -> str:
    """The caption in a text, without the special tokens."""
    for token in (DJ_IMAGE, IMAGE_TOKEN, DJ_END):
        text = text.replace(token, " ")
    return text.strip()


def image_tokens(text: str) -> int:
    """How often a text holds the image token, in either spelling."""
    return text.count(DJ_IMAGE) + text.count(IMAGE_TOKEN)


def conversation_text(turns: Sequence[Turn], has_image: bool) -> str:
    """The text of a conversation. An image that no turn mentions is put before the first one: operators count them."""
    said = [turn.text.replace(IMAGE_TOKEN, DJ_IMAGE) for turn in turns]
    if has_image and not any(DJ_IMAGE in text for text in said):
        said[0] = f"{DJ_IMAGE}\n{said[0]}"
    lines = [f"[[{turn.speaker}]]: {text}" for turn, text in zip(turns, said, strict=True)]
    return "\n".join(lines) + f" {DJ_END}"


def is_conversation(text: str) -> bool:
    """Whether a text begins with the marker of a turn."""
    return text.startswith(("[[human]]: ", "[[gpt]]: "))


def turns_of(text: str) -> tuple[Turn, ...]:
    """The turns of a conversation's text."""
    parts = _MARKER.split(text)[1:]  # speaker, text, speaker, text, ...
    said = [part.removesuffix(f" {DJ_END}").replace(DJ_IMAGE, IMAGE_TOKEN) for part in parts[1::2]]
    return tuple(
        Turn("human" if speaker == "human" else "gpt", text) for speaker, text in zip(parts[::2], said, strict=True)
    )


def dj_row(record: Record) -> dict[str, Any]:
    """A record of one question about an image as a Data-Juicer row; the question is left out, as the format has none.

    Raises:
        ValueError: the record has no image or more than one answer.
    """
    if record.image is None or len(record.conversations) != 2:
        raise ValueError(f"record {record.id} is not an image with one answer, so it has no Data-Juicer form")
    row = {
        "id": record.id,
        "text": caption_text(record.conversations[1].text, has_image=True),
        "images": [record.image],
    }
    return row if record.raw_caption is None else {**row, "raw_caption": record.raw_caption}
