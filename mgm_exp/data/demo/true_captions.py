"""Captions that say exactly what the generated images show: what no captioner could beat.

    python -m mgm_exp.data.demo.true_captions DEMO_FOLDER FILE.jsonl
    python -m mgm_exp data=blip2 data.recaptioned_path=FILE.jsonl name=true-captions

They are written by the generator, which knows the scenes, not by a model: with them one sees how much of what
recaptioning does to the demo's score comes from the demo (its raw captions are made terse), and how much is left for a
better captioner. `DEMO_FOLDER` is `outputs/store/demo/<key>`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from mgm_exp.data.demo.captions import rich_caption
from mgm_exp.data.demo.scenes import Item, Scene
from mgm_exp.errors import DataError
from mgm_exp.store import write_atomic


def write_true_captions(demo: Path, file: Path) -> int:
    """Writes a caption of each training image, as Data-Juicer rows; returns their number.

    Args:
        demo: What `write_demo` wrote.
        file: The rows; which of the ways of saying it a row gets depends on its id.

    Raises:
        DataError: the folder is none.
    """
    try:
        raw = {row["id"]: row for row in map(json.loads, (demo / "captions_raw.jsonl").read_text().splitlines())}
        specs = [json.loads(line) for line in (demo / "specs.jsonl").read_text().splitlines()]
    except FileNotFoundError as error:
        raise DataError(
            f"{demo} holds no generated demo data ({error.filename} is missing).",
            advice="Give outputs/store/demo/<key>.",
        ) from error
    lines = []
    for spec in specs:
        if spec["id"] not in raw:
            continue
        upper, lower = (Item(**item) for item in spec["items"])
        caption = rich_caption(Scene(0, spec["split"], (upper, lower), 0), random.Random(spec["id"]))
        row = {**raw[spec["id"]], "text": f"<__dj__image>\n{caption} <|__dj__eoc|>"}
        lines.append(json.dumps(row) + "\n")
    write_atomic(file, "".join(lines))
    return len(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Captions that say exactly what the demo's images show.")
    parser.add_argument("demo", type=Path, metavar="DEMO_FOLDER")
    parser.add_argument("file", type=Path, metavar="FILE.jsonl")
    options = parser.parse_args(arguments)
    print(f"{write_true_captions(options.demo, options.file)} captions: {options.file}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
