"""Memory at 10,000, 100,000 and 1,000,000 rows: reading and validating them, and loading them with ``json``.

Every measurement is a process of its own, whose highest resident memory counts. The rows
name 1,000 images between them; the processes that decode them take the same memory at every size.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks.captions import captions, write_rows
from benchmarks.measurement import Row

SIZES, SIZES_QUICK = (10_000, 100_000, 1_000_000), (1_000, 3_000, 10_000)
IMAGES = 1_000
MOST_GROWTH_MIB = 64.0
"""From the smallest to the largest file: 64-bit hashes of a million ids take 16 to 32 MiB of it."""


def run(work: Path, quick: bool) -> list[Row]:
    """Measures each size in each way."""
    sizes = SIZES_QUICK if quick else SIZES
    texts = captions(sizes[0])
    (work / "images").mkdir()
    _write_images(work / "images")
    peaks: dict[str, list[float]] = {"read": [], "validate": [], "json": []}
    for size in sizes:
        rows = work / "rows.jsonl"
        with open(rows, "w", encoding="utf-8") as file:
            for first in range(0, size, len(texts)):
                part = write_rows(work / "part.jsonl", texts[: size - first], "images/{}.png")
                for number, line in enumerate(part.read_text(encoding="utf-8").splitlines(), first):
                    row = json.loads(line)
                    row |= {"id": f"{number:09d}", "images": [f"images/{number % IMAGES}.png"]}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for way, found in peaks.items():
            found.append(_peak_mib(way, rows))
    read, checked, loaded = peaks["read"], peaks["validate"], peaks["json"]
    return [
        _row("read_rows", sizes, read, loaded),
        _row("mgm-exp validate", sizes, checked, loaded),
    ]


def _row(what: str, sizes: tuple[int, ...], ours: list[float], peer: list[float]) -> Row:
    shown = ", ".join(f"{size:,}: {mib:.0f} MiB" for size, mib in zip(sizes, ours, strict=True))
    loaded = ", ".join(f"{mib:.0f}" for mib in peer)
    growth = ours[-1] - ours[0]
    flat = "flat" if growth <= MOST_GROWTH_MIB else "NOT FLAT"
    return Row(
        f"memory of {what} at {sizes[-1]:,} rows",
        "MiB",
        ours[-1],
        peer[-1],
        # Flat is what is wanted: as much less than loading everything as a growth of 64 MiB leaves.
        peer[-1] / (ours[0] + MOST_GROWTH_MIB),
        f"{flat}: {growth:+.0f} MiB from {sizes[0]:,} to {sizes[-1]:,} rows (at most +{MOST_GROWTH_MIB:.0f} is wanted)",
        f"highest resident memory of a process; {shown}; [json.loads(line) for line in file]: {loaded} MiB",
    )


def _peak_mib(way: str, rows: Path) -> float:
    """The highest resident memory of a process that does one thing."""
    command = [sys.executable, "-m", "benchmarks.data_memory", way, str(rows)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _do(way: str, path: Path) -> float:
    if way == "json":
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        assert rows
    elif way == "read":
        from mgm_exp.data import read_rows

        assert sum(1 for _ in read_rows(path))
    else:
        from mgm_exp.data import find_source, validate

        report = validate(find_source(path))
        assert report.ok == report.rows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _write_images(folder: Path) -> None:
    from PIL import Image

    for number in range(IMAGES):
        Image.new("RGB", (32, 32), (number % 256, number // 256, 0)).save(folder / f"{number}.png")


if __name__ == "__main__":
    print(_do(sys.argv[1], Path(sys.argv[2])))
