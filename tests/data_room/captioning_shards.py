"""Not a test: six pictures recaptioned in three shards."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from mgm_exp.data import read_rows, recaption

RESULTS = ("captions.jsonl", "rejected.jsonl", "fates.jsonl")


class Sizes:
    """A captioner that sees one thing: how wide a picture is."""

    def caption(self, images: list[Image.Image]) -> list[str]:
        return [f"a picture {image.width} wide" for image in images]


def pictures(folder: Path) -> None:
    """The rows and pictures that :func:`caption` reads."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(6):
        Image.new("RGB", (5 + i, 6), (40 * i, 0, 0)).save(folder / "images" / f"{i}.png")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"raw {i}"}]
        rows.append({"id": f"r{i}", "image": f"{i}.png", "conversations": turns})
    (folder / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def caption(folder: Path) -> None:
    work = folder / "work"
    (work / "out").mkdir(parents=True, exist_ok=True)
    source, root = folder / "raw.jsonl", folder / "images"
    recaption(read_rows(source), Sizes(), image_root=root, work=work, out=work / "out", batch_size=2)


def results(folder: Path) -> list[bytes]:
    return [(folder / "work" / "out" / name).read_bytes() for name in RESULTS]
