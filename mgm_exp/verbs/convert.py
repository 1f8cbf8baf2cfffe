"""``mgm-exp convert IN OUT --to FORMAT``: the same rows in another format, none of them lost on the way."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.arguments import count
from mgm_exp.verbs.progress_bar import progress_bar

if TYPE_CHECKING:
    from mgm_exp.data.formats import Location, RowWriter, WriteReport


def run(arguments: list[str]) -> int:
    """Converts what the arguments name: exit code 0; 2 with ``--strict`` if a row could not be converted."""
    options = _options(arguments)
    from mgm_exp.data.formats import RowWriter, find_source, read_rows, write_rows

    if options.answers_only and options.to != "datajuicer":
        raise UserError("--answers-only is of use with --to datajuicer only.")
    source = find_source(options.source, options.images)
    if options.out.exists() and os.path.samefile(options.out, source.path):
        raise UserError(f"{options.out} is what is converted.", advice="Give another name; the original is kept.")
    reader = read_rows(source.path, keep_given=True)
    with stop_on_signals(), progress_bar() as on_progress:

        def on_row(done: int) -> None:
            if done % 256 == 0:
                share = reader.bytes_read / max(1, reader.bytes_total)
                on_progress("convert", done, max(done, round(done / max(share, 1e-9))))

        writer = RowWriter(
            options.out,
            options.to,
            image_root=source.image_root,
            packed=options.packed_images,
            unpack_to=options.unpack_to,
            answers_only=options.answers_only,
            overwrite=options.overwrite,
            shard_rows=options.shard_rows,
        )
        try:
            report = write_rows(reader, writer, on_row=on_row)
        finally:
            reader.close()
    _show(report, writer, source, reader.container == "tar", reader.ignored)
    return EXIT_BAD_INPUT if report.rejected and options.strict else EXIT_DONE


def _options(arguments: list[str]) -> argparse.Namespace:
    from mgm_exp.data.formats import PACKED, TARGETS

    parser = argparse.ArgumentParser(
        prog="mgm-exp convert",
        description="Writes the same rows in another format. What a format has no place for is kept aside in it, so "
        "that converting back gives the rows as they stood. OUT appears whole or not at all.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="file of rows, folder of shards, or folder with one")
    parser.add_argument("out", type=Path, metavar="OUT", help="file, or folder of shards (webdataset)")
    parser.add_argument("--to", required=True, choices=TARGETS, help="the format of OUT")
    parser.add_argument("--images", type=Path, metavar="ROOT", help="folder of the images (default: that of the rows)")
    parser.add_argument("--strict", action="store_true", help="exit code 2 if a row cannot be converted")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument(
        "--answers-only",
        action="store_true",
        help="datajuicer: of one question and answer about an image write the answer alone, as a caption that "
        "operators see by itself; the question comes back with the conversion back",
    )
    parser.add_argument(
        "--shard-rows", type=count("rows"), default=5_000, metavar="N", help="most rows of a tar shard (default: 5000)"
    )
    parser.add_argument(
        "--packed-images",
        choices=PACKED,
        default="unpack",
        help="images in tar shards, in another format: written to files (default); kept where they are; or named as "
        "before they were packed, without writing any",
    )
    parser.add_argument(
        "--unpack-to", type=Path, metavar="DIR", help="folder for unpacked images (default: that of OUT)"
    )
    return parser.parse_args(arguments)


def _show(report: WriteReport, writer: RowWriter, source: Location, is_tar: bool, ignored: tuple[str, ...]) -> None:
    print(f"{report.written:,} of {report.rows:,} rows written to {writer.out}")
    if writer.container == "tar":
        print(f"{report.images:,} images are in the shards")
    elif is_tar and writer.packed == "unpack":
        print(f"{report.images:,} images unpacked below {writer.unpack_to}")
    elif is_tar and writer.packed == "original":
        print("images are named as before they were packed: their root is what it was then")
    else:
        root = os.path.abspath(source.image_root)
        if os.path.abspath(writer.out.parent) != root:
            print(f"image paths are still relative to {root}: give it as data.image_root, or with --images")
    if ignored:
        print(f"not converted, as JSON rows have no place for them: {', '.join(ignored)}", file=sys.stderr)
    if report.rejected:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.rejected.items())
        print(f"warning: {sum(report.rejected.values()):,} rows are left out ({kinds})", file=sys.stderr)
        print(f"each is named in {report.rejected_file}", file=sys.stderr)
