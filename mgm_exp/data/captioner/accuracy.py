"""How right a captioner is about the demo's scenes, field by field: the generator knows what each image shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgm_exp.data.demo.captions import score_caption
from mgm_exp.data.demo.scenes import Item, Scene
from mgm_exp.data.formats import Row, read_rows

FIELDS = {"type": "kind", "colour": "colour", "shape": "shape", "text": "text", "order": "order", "whole": "whole"}
"""Name in the measure -> name in :func:`mgm_exp.data.demo.captions.score_caption`."""


def captioner_accuracy(captions: Mapping[str, str] | Path, specs: Path) -> dict[str, Any]:
    """Compare captions of generated images with what the images show.

    Args:
        captions: id -> caption; or a `captions.jsonl` of recaptioning, of which the rows are taken whose caption was
            replaced.
        specs: `specs.jsonl` of the demo data.

    Returns:
        `n` captions that were compared, and the shares of right ones: `type`, `colour`, `shape` (of objects that come
        in two shapes) and `text` (letter by letter) of objects; `order` (above and below) of captions that name both
        objects; `whole` captions in which all is right. None where nothing was asked.
    """
    said = _replaced(captions) if isinstance(captions, Path) else captions
    n, totals = 0, {name: [0, 0] for name in FIELDS}
    with open(specs, encoding="utf-8") as file:
        for line in file:
            spec = json.loads(line)
            caption = said.get(spec["id"])
            if caption is None:
                continue
            n += 1
            upper, lower = (Item(**item) for item in spec["items"])
            score = score_caption(caption, Scene(0, spec["split"], (upper, lower), 0))
            for name, field in FIELDS.items():
                totals[name][0] += score[field][0]
                totals[name][1] += score[field][1]
    return {"n": n} | {name: right / asked if asked else None for name, (right, asked) in totals.items()}


def in_words(accuracy: Mapping[str, Any], name: str) -> str:
    """The measure as a sentence."""
    if not accuracy["n"]:
        return f"captioner {name}: no row has a caption of its own making, so nothing is compared with the scenes"
    shares = ", ".join(f"{key} {accuracy[key]:.1%}" for key in FIELDS if accuracy[key] is not None)
    return f"captioner {name}: {accuracy['n']} captions compared with what the generated scenes show: {shares} right"


def _replaced(captions: Path) -> dict[str, str]:
    rows = (row for row in read_rows(captions) if isinstance(row, Row) and row.raw_caption is not None)
    return {row.id: row.caption for row in rows if row.caption is not None}
