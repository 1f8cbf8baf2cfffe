"""``mgm-exp gallery RUN``: what a run answered wrong, as pages with pictures, from the files it left."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import EXIT_DONE, UserError
from mgm_exp.folders import GALLERIES
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.arguments import count

if TYPE_CHECKING:
    from mgm_exp.compare.runs import Run

_MOST = 200


def run(arguments: list[str]) -> int:
    """Writes the pages and says where they are."""
    options = _options(arguments)
    from mgm_exp.compare.runs import load_run
    from mgm_exp.evaluate.gallery import write_gallery

    found = sorted((options.run / "predictions").glob("*.jsonl"))
    names = [file.stem for file in found]
    if not names:
        raise UserError(
            f"{options.run} holds no predictions/<benchmark>.jsonl.",
            advice="Give the folder of a run that was evaluated, or score it with mgm-exp evaluate.",
        )
    if options.benchmark is not None and options.benchmark not in names:
        raise UserError(f"{options.run} has no answers to {options.benchmark!r}; there are {', '.join(names)}.")
    if options.type is not None and options.benchmark is None and len(names) > 1:
        raise UserError(f"--type needs --benchmark, as there are {', '.join(names)}.")
    if options.images is not None and not options.images.is_dir():
        raise UserError(f"--images {options.images} is not a folder.")
    shown = load_run(options.run)
    with stop_on_signals():
        for file in found:
            if options.benchmark not in (None, file.stem):
                continue
            out = options.run / GALLERIES / f"{_file_name(file.stem, options.type)}.html"
            roots = [options.images] if options.images else _roots(shown, file.stem)
            n_lost = write_gallery(
                file,
                out,
                _pictures(roots),
                benchmark=file.stem,
                label=f"{options.run.resolve().parent.name}, {options.run.resolve().name}",
                per_type=options.max,
                only=options.type,
                remark=_remark(file.stem, roots),
            )
            if out.is_file():
                print(f"{file.stem}: {n_lost:,} questions lost points: {out}")
            else:
                print(f"{file.stem}: its answers are scored by a server, so there is nothing to show")
    return EXIT_DONE


def _pictures(roots: list[Path]) -> Callable[[dict[str, Any]], bytes | None]:
    from mgm_exp.compare.html.answers import thumbnail

    return lambda row: thumbnail(str(row.get("image") or ""), roots)


def _roots(run: Run, benchmark: str) -> list[Path]:
    """Folders that hold a benchmark's images: those that the configuration names, and that of images out of tables."""
    from mgm_exp.compare.html.answers import image_roots

    kept = run.config.get("paths.root")
    roots = image_roots(run, benchmark.partition(".")[0])
    if isinstance(kept, str):
        roots.append(Path(kept) / "benchmarks" / "images")
    return [root for root in roots if root.is_dir()]


def _remark(benchmark: str, roots: list[Path]) -> str:
    if not roots:
        return "No folder of images was found: give it with --images."
    return "Pictures are as they were before they were changed." if "." in benchmark else ""


def _file_name(benchmark: str, kind: str | None) -> str:
    """Of the page; a type of question may hold anything."""
    return benchmark if kind is None else f"{benchmark}-{re.sub(r'[^A-Za-z0-9]+', '-', kind).strip('-')[:60] or 'type'}"


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp gallery",
        description="Wrong answers by type of question, the worst first, each with its image, what was said and what "
        "is right: RUN/galleries/<benchmark>.html. Runs write these pages themselves; this makes them anew, larger, or "
        "of one type.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of an evaluated run")
    parser.add_argument("--benchmark", metavar="B", help="only this one (default: all that were answered)")
    parser.add_argument("--type", metavar="T", help="only questions of this type, on a page of their own")
    parser.add_argument(
        "--max",
        type=count("questions", _MOST),
        default=12,
        metavar="N",
        help="most questions shown of one type (default: 12)",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="where the images are now, if they moved")
    return parser.parse_args(arguments)
