"""Makes the picture of a report for the README: the top of the page of a sweep, as headless Chromium shows it.

    python scripts/report_picture.py outputs/sweeps/NAME docs/images/report.png --baseline LABEL

Run it in the folder that holds ``outputs/``, so that the page says where the runs lie without naming the machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1200, 1765
COLOURS = 128
MOST_BYTES = 150_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--baseline")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is not installed.")
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as work:
        page, shot = Path(work) / "report.html", Path(work) / "shot.png"
        report = [sys.executable, "-m", "mgm_exp.cli", "report", str(options.sweep), "--out", str(page)]
        baseline = ["--baseline", options.baseline] if options.baseline else []
        subprocess.run([*report, *baseline], check=True, env=environment, stdout=subprocess.DEVNULL)
        browser = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        place = [f"--user-data-dir={work}/profile", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}"]
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        subprocess.run([*browser, *quiet, *place, page.as_uri()], check=True, timeout=120, stderr=subprocess.DEVNULL)
        with Image.open(shot, formats=("PNG",)) as taken:
            few = taken.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(options.picture, optimize=True)
    size = options.picture.stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{options.picture} has {size:,} bytes; at most {MOST_BYTES:,} belong into the repository.")
    print(f"{options.picture}: {WIDTH} x {HEIGHT}, {size:,} bytes")


if __name__ == "__main__":
    main()
