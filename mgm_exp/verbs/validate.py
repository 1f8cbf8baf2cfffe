"""``mgm-exp validate PATH``: every broken row and image, with its place; with ``--fix`` a clean copy."""

from __future__ import annotations

import argparse
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.errors import EXIT_BAD_INPUT, EXIT_DONE
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.arguments import check_json, count, megapixels
from mgm_exp.verbs.progress_bar import progress_bar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mgm_exp.data.records import BadRow
    from mgm_exp.data.repair import RepairReport
    from mgm_exp.data.validation_report import ImageSummary, ValidationReport

_WIDEST_DETAIL = 160


def run(arguments: list[str]) -> int:
    """Validates what the arguments name: exit code 2 if anything is broken, else 0."""
    options = _options(arguments)
    from mgm_exp.data.formats import find_source
    from mgm_exp.data.repair import check_target, repair
    from mgm_exp.data.validation import validate

    source = find_source(options.path, options.images)
    check_json(options.json)
    if options.fix is not None:
        check_target(options.fix)
    fixes: RepairReport | None = None
    settings = {"max_megapixels": options.max_megapixels, "workers": options.workers}
    with stop_on_signals():
        with progress_bar() as on_progress:
            if options.fix is None:
                report = validate(source, **settings, on_progress=on_progress)
            else:
                report, fixes = repair(source, options.fix, **settings, on_progress=on_progress)
        if options.json is not None:
            report.write_json(options.json)
    _show(report, fixes)
    return EXIT_BAD_INPUT if report.counts else EXIT_DONE


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp validate",
        description="Every broken row and image of a dataset, with its place. Exit code 2 if there is any, else 0.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="file of rows, folder of shards, or folder with one")
    parser.add_argument("--images", type=Path, metavar="ROOT", help="folder of the images (default: that of the rows)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report as JSON")
    parser.add_argument(
        "--workers", type=count("processes"), metavar="N", help="processes that decode images (default: all cores)"
    )
    parser.add_argument(
        "--max-megapixels", type=megapixels, default=50.0, metavar="M", help="larger images are broken (default: 50)"
    )
    parser.add_argument(
        "--fix", type=Path, metavar="DIR", help="write a clean copy into a new folder; the original stays as it is"
    )
    return parser.parse_args(arguments)


# -- on the screen ---------------------------------------------------------------------------------------------------


def _show(report: ValidationReport, fixes: RepairReport | None) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    images = _images_in_words(report.images)
    console.print(f"{printable(str(report.path))}: {_many(report.rows, 'row')}, {images}; {report.seconds:.1f} s")
    if report.counts:
        console.print(_table(report))
    if report.images.unused:
        examples = ", ".join(printable(path) for path in report.images.unused_examples[:3])
        more = ", ..." if report.images.unused > 3 else ""
        console.print(f"note: {_many(report.images.unused, 'image file')} named by no row: {examples}{more}")
    n_broken = report.rows - report.ok
    if report.counts:
        verb = "has a fault" if n_broken == 1 else "have a fault"
        console.print(f"{n_broken:,} of {_many(report.rows, 'row')} {verb}.", style="bold red")
    else:
        console.print(f"All {_many(report.rows, 'row')} can be used.", style="bold green")
    if fixes is not None:
        _show_fixes(console, fixes)


def _table(report: ValidationReport) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from mgm_exp.data.kinds import ADVICE, KINDS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind", style="bold", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("what it means; where it was found first", ratio=3)
    table.add_column("what to do", ratio=2)
    for kind, n in report.counts.items():
        first = report.first[kind]
        found = Text(KINDS[kind])
        found.append(f"\n{_place(first[0])}: {printable(first[0].detail)[:_WIDEST_DETAIL]}", style="dim")
        if len(first) > 1:
            also = "; ".join(_place(fault) for fault in first[1:3])
            found.append(f"\nalso {also}{'; ...' if len(first) > 3 else ''}", style="dim")
        table.add_row(kind, f"{n:,}", found, ADVICE[kind])
    return table


def _show_fixes(console: Console, fixes: RepairReport) -> None:
    out = printable(str(fixes.folder))
    console.print(
        f"clean copy: {out}: {_many(fixes.written, 'row')} ({fixes.repaired:,} repaired), "
        f"{_many(fixes.images, 'image')}; {_many(fixes.left_out, 'row')} left out. "
        f"What was done to each: {out}/{fixes.log}"
    )


def _images_in_words(images: ImageSummary) -> str:
    formats = ", ".join(f"{name} {count:,}" for name, count in images.formats.items())
    size = f" ({images.bytes / 1e6:,.1f} MB: {formats})" if formats else ""
    broken = f", {images.broken:,} of them unusable" if images.broken else ""
    return f"{_many(images.checked, 'image')}{size}{broken}"


def _place(fault: BadRow) -> str:
    name = f" (id {printable(fault.id)[:40]})" if fault.id is not None else ""
    return f"{printable(fault.file)}:{fault.line}{name}"


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Text from data as a terminal may get it: controls, which could steer it, and marks of direction as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if unicodedata.category(character)[0] != "C" else ascii(character)[1:-1] for character in text
    )
