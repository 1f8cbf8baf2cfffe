"""Validation of 10,000 images: ours, and the loop that everybody writes with Pillow.

The pictures have the size of web pictures (some 450 x 390, 40 to 60 KB as JPEG); one in a hundred is cut. The loop
opens each file and decodes it in one process. It hangs on a pipe, follows links out of the folder and decodes a bomb,
but it is what ours has to be compared with.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from benchmarks.measurement import Row, timed

N, N_QUICK = 10_000, 600
DISTINCT = 250
CUT_EVERY = 100


def run(work: Path, quick: bool) -> list[Row]:
    """Measures both, ours with one process and with all cores."""
    from mgm_exp.data import find_source, validate
    from mgm_exp.data.image_checks import usable_cores

    rows, cut = _make(work, N_QUICK if quick else N)
    source = find_source(rows)
    paths = [work / json.loads(line)["images"][0] for line in rows.read_text(encoding="utf-8").splitlines()]
    peer_s, failed = timed(lambda: _loop(paths))
    cores = usable_cores()
    alone_s, alone = timed(lambda: validate(source, workers=1))
    ours_s, report = timed(lambda: validate(source, workers=cores))
    found = sorted(fault.index for fault in report.broken)
    if not found == sorted(fault.index for fault in alone.broken) == cut:
        exactness = f"DIFFERENT: {len(cut)} images are cut, {len(found)} were found"
    else:
        same = "the same as the loop's" if failed == cut else f"the loop finds {len(failed)}"
        exactness = f"all {len(cut)} cut images are found and no other; {same}"
    size = sum(path.stat().st_size for path in paths) / 1e6
    what = f"{len(paths):,} JPEG files ({size:,.0f} MB) in the page cache, and their rows"
    return [
        Row(
            f"validation of images: {cores} cores",
            "s",
            ours_s,
            peer_s,
            0.8 * cores,
            exactness,
            f"{what}; mgm-exp validate with {cores} processes, Image.open(...).convert('RGB') in a loop",
        ),
        Row(
            f"validation of images: {cores} processes and one",
            "s",
            ours_s,
            alone_s,
            0.8 * cores,
            "the reports are equal" if list(report.broken) == list(alone.broken) else "the reports DIFFER",
            f"{what}; mgm-exp validate with {cores} processes and with 1",
        ),
    ]


def _loop(paths: list[Path]) -> list[int]:
    from PIL import Image

    failed = []
    for number, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                image.convert("RGB")
        except OSError:
            failed.append(number)
    return failed


def _make(work: Path, n: int) -> tuple[Path, list[int]]:
    """A file of rows with its images, and which of them are cut."""
    import numpy as np
    from PIL import Image

    rng, pixels = random.Random(0), np.random.default_rng(0)
    (work / "images").mkdir()
    pictures = []
    for number in range(DISTINCT):
        width, height = rng.choice([402, 300, 500, 640]), rng.choice([370, 300, 400, 480])
        coarse = Image.fromarray(pixels.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + pixels.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        path = work / f"picture-{number}.jpg"
        Image.fromarray(noisy).save(path, quality=85)
        pictures.append(path)
    cut = []
    with open(work / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(n):
            name, picture = f"images/{number:06d}.jpg", pictures[number % DISTINCT]
            if number % CUT_EVERY == CUT_EVERY // 2:
                content = picture.read_bytes()
                (work / name).write_bytes(content[: len(content) // 2])
                cut.append(number)
            else:
                shutil.copyfile(picture, work / name)
            row = {"id": str(number), "text": "<__dj__image>\na picture <|__dj__eoc|>", "images": [name]}
            file.write(json.dumps(row) + "\n")
    return work / "rows.jsonl", cut
