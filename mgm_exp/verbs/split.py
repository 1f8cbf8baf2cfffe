"""``mgm-exp split PATH --out DIR``: training, validation and test rows; no image is in two of them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.errors import EXIT_DONE
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.progress_bar import progress_bar

if TYPE_CHECKING:
    from mgm_exp.data.formats import Location
    from mgm_exp.data.splits import SplitReport


def run(arguments: list[str]) -> int:
    """Splits what the arguments name."""
    options = _options(arguments)
    from mgm_exp.data.formats import find_source
    from mgm_exp.data.splits import split_rows

    source = find_source(options.path, options.images)
    with stop_on_signals(), progress_bar() as on_progress:
        report = split_rows(
            source,
            options.out,
            shares=options.shares,
            seed=options.seed,
            by=options.by,
            reads_images=not options.by_path,
            on_progress=on_progress,
        )
    _show(report, options.out, source)
    return EXIT_DONE


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp split",
        description="Divides rows into training, validation and test rows, in their own format. Rows whose images have "
        "the same bytes stay together; every stratum is divided in the same shares; the order of the rows does not "
        "matter. DIR appears whole or not at all.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="file of rows, folder of shards, or folder with one")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder for the parts")
    parser.add_argument("--images", type=Path, metavar="ROOT", help="folder of the images (default: that of the rows)")
    parser.add_argument(
        "--shares", type=_shares, default=(80.0, 10.0, 10.0), metavar="A,B[,C]", help="of the parts (default: 80,10,10)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one, another division (default: 0)")
    parser.add_argument(
        "--by", metavar="KEY", help="key of the rows whose values are the strata (default: the length of the answer)"
    )
    parser.add_argument(
        "--by-path", action="store_true", help="rows share an image if they name the same path; no image is read"
    )
    return parser.parse_args(arguments)


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers with commas between them (80,10,10)") from None


def _show(report: SplitReport, out: Path, source: Location) -> None:
    kept = sum(part.rows for part in report.parts.values())
    for name, part in report.parts.items():
        share = 100 * part.rows / kept
        print(f"{name:<10} {part.rows:>9,} rows  {share:5.1f} %  {part.groups:>9,} groups  {out / part.file}")
    print(
        f"{kept:,} of {report.rows:,} rows, {report.groups:,} groups (different images); account: {out / 'split.json'}"
    )
    root = os.path.abspath(source.image_root)
    if next(iter(report.parts.values())).file.endswith((".jsonl", ".json", ".parquet")):
        print(f"image paths are still relative to {root}: give it as data.image_root, or with --images")
    if report.unread_images:
        print(
            f"warning: {report.unread_images:,} images could not be read; their rows were grouped by the path. "
            "mgm-exp validate names them",
            file=sys.stderr,
        )
    if report.rejected:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.rejected.items())
        print(f"warning: {sum(report.rejected.values()):,} rows are in no part ({kinds})", file=sys.stderr)
        print(f"each is named in {out / 'rejected.jsonl'}", file=sys.stderr)
