"""The values of Data-Juicer's operators without Data-Juicer, for those that need no model.

Equal to Data-Juicer 1.6.1 bit by bit (tested against the operators themselves), and for machines or moments in which
starting it is not worth it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mgm_exp.data.data_juicer.operators import Operator, value_keys
from mgm_exp.data.data_juicer.pairs import Pair, read_pairs
from mgm_exp.data.data_juicer.report import VALUES, MeasureReport, Progress
from mgm_exp.data.exploration import caption_values
from mgm_exp.data.images import FORMATS, ImageFault, read_image_file
from mgm_exp.data.records import json_line
from mgm_exp.errors import ConfigError, DataError
from mgm_exp.store import disk_full_named

BUILTIN = ("words_num", "text_length", "word_repetition", "character_repetition", "image_shape")
"""Operators that this engine has."""

_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)
_TELL_EVERY = 1000


def measure_builtin(
    rows: Path,
    image_root: Path,
    operators: Sequence[Operator],
    *,
    out: Path,
    on_progress: Progress | None = None,
    total: int = 0,
) -> MeasureReport:
    """Writes ``values.jsonl`` into ``out``: ``id`` and the operators' values of each row, in the order of the rows.

    Args:
        rows: JSON lines of ``id``, ``caption``, ``image``.
        image_root: Folder that the image paths are relative to.
        operators: Those of :data:`BUILTIN`.
        out: Existing folder.
        on_progress: Called with (what, rows done, rows in all).
        total: Number of rows, for progress; 0: unknown.

    Raises:
        ConfigError: an operator needs Data-Juicer.
        DataError: a row is malformed, or an image cannot be read; it is named.
    """
    value_keys(operators)
    functions = [_function(operator, image_root) for operator in operators]
    target = out / VALUES
    partial_at = target.with_name(f"{target.name}.partial")
    count = 0
    with disk_full_named(out), open(partial_at, "w", encoding="utf-8", newline="\n") as file:
        for pair in read_pairs(rows):
            values: dict[str, Any] = {"id": pair.id}
            for function in functions:
                values.update(function(pair))
            file.write(json_line(values))
            count += 1
            if on_progress is not None and count % _TELL_EVERY == 0:
                on_progress("measure", count, max(total, count))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial_at, target)
    if on_progress is not None:
        on_progress("measure", count, count)
    return MeasureReport("builtin", "default", count, 0, value_keys(operators))


def _function(operator: Operator, image_root: Path) -> Callable[[Pair], Mapping[str, Any]]:
    if operator.name == "image_shape":
        return partial(_shape, image_root=image_root)
    ngram = operator.parameters.get("ngram")
    functions: dict[str, Callable[[str], float]] = {
        "words_num": caption_values.words,
        "text_length": caption_values.text_length,
        "word_repetition": lambda text: caption_values.word_repetition(text, ngram or 1),
        "character_repetition": lambda text: caption_values.character_repetition(text, ngram or 1),
    }
    if operator.name not in functions:
        raise ConfigError(
            f"The builtin engine has no operator {operator.name}; it has: {', '.join(BUILTIN)}.",
            advice="Set data.recipe.engine=data_juicer, or leave the operator's limits open.",
        )
    function = functions[operator.name]
    return lambda pair: {operator.name: function(pair.caption)}


def _shape(pair: Pair, image_root: Path) -> dict[str, int | None]:
    if pair.image is None:
        return {"image_width": None, "image_height": None}
    try:
        width, height = image_shape(read_image_file(image_root, pair.image))
    except (ImageFault, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"The image of row {pair.id} ({pair.image}) cannot be read any more: {error}.",
            advice="Was it changed since it was checked? Repair it and give the same command again.",
        ) from error
    return {"image_width": width, "image_height": height}


def image_shape(content: bytes) -> tuple[int, int]:
    """Width and height as Data-Juicer sees them: it turns photos upright by their EXIF orientation."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        # Pillow's TIFF reader gives the upright size already.
        is_turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    return (height, width) if is_turned else (width, height)
