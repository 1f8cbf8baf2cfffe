"""A captioner's accuracy on generated scenes: counted against what the generator says each image shows."""

from __future__ import annotations

import json
from pathlib import Path

from mgm_exp.data.captioner.accuracy import captioner_accuracy, in_words

ITEMS = {
    "both": [
        {"kind": "sign", "colour": "green", "shape": "round", "text": "GYM"},
        {"kind": "tag", "colour": "black", "shape": "square", "text": "$25"},
    ],
    "flat": [
        {"kind": "jersey", "colour": "red", "shape": "square", "text": "7"},
        {"kind": "tag", "colour": "blue", "shape": "square", "text": "$3"},
    ],
}


def specs(folder: Path) -> Path:
    path = folder / "specs.jsonl"
    rows = [{"id": k, "image": f"images/{k}.png", "split": "train", "items": v} for k, v in ITEMS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_shares_are_of_what_the_scenes_show(tmp_path: Path) -> None:
    said = {
        "both": "a black tag with price $25 below a green square sign that reads GYN",
        "flat": "a red jersey with number 7",
        "unknown": "a red jersey with number 7",
    }
    assert captioner_accuracy(said, specs(tmp_path)) == {
        "n": 2, "type": 3 / 4, "colour": 3 / 4, "shape": 0.0, "text": 2 / 4, "order": 1.0, "whole": 0.0,
    }  # fmt: skip


def test_only_captions_that_were_written_now_are_compared(tmp_path: Path) -> None:
    right = "a red jersey with number 7 above a blue tag with price $3"
    rows = [
        {"id": "both", "text": "<__dj__image>\ngreen sign GYM <|__dj__eoc|>", "images": ["both.png"]},
        {"id": "flat", "text": f"<__dj__image>\n{right} <|__dj__eoc|>", "images": ["f.png"], "raw_caption": "tag"},
        {"id": "flat#c2", "text": "<__dj__image>\nno <|__dj__eoc|>", "images": ["f.png"], "raw_caption": "tag"},
    ]
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracy = captioner_accuracy(path, specs(tmp_path))
    assert accuracy == {
        "n": 1, "type": 1.0, "colour": 1.0, "shape": None, "text": 1.0, "order": 1.0, "whole": 1.0,
    }  # fmt: skip
    words = in_words(accuracy, "demo-blip2 (synthetic)")
    assert words.startswith("captioner demo-blip2 (synthetic): 1 captions") and "shape" not in words
    nothing = captioner_accuracy({}, specs(tmp_path))
    assert nothing["n"] == 0 and nothing["text"] is None and "nothing is compared" in in_words(nothing, "x")
