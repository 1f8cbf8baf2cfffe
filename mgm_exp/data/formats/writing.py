"""Writes rows in any of the formats, whole or not at all."""

from __future__ import annotations

from typing import Any

from mgm_exp.data.formats.data_juicer_text import caption_text
from mgm_exp.data.records import Record


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
