"""``mgm-exp explore PATH``: what a dataset is like, as numbers, plots and a report; ``explore A B`` compares two."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.errors import EXIT_DONE, Interrupted, UserError
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.arguments import count, megapixels
from mgm_exp.verbs.progress_bar import progress_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mgm_exp.data.exploration import Exploration, Finding, Options
    from mgm_exp.data.exploration.reading import OnProgress
    from mgm_exp.data.formats import Location


def run(arguments: list[str]) -> int:
    """Explores what the arguments name."""
    options = _options(arguments)
    if len(options.paths) > 2:
        raise UserError(f"mgm-exp explore takes one dataset, or two to compare; {len(options.paths)} paths were given.")
    from mgm_exp.data.exploration import check_folder, default_folder
    from mgm_exp.data.formats import find_source

    roots = options.images or []
    if len(roots) not in (0, 1, len(options.paths)):
        raise UserError(f"--images was given {len(roots)} times for {len(options.paths)} dataset(s).")
    locations = [
        find_source(path, roots[min(place, len(roots) - 1)] if roots else None)
        for place, path in enumerate(options.paths)
    ]
    out = options.out or default_folder(options.paths)
    check_folder(out)
    settings = _settings(options)
    try:
        with stop_on_signals():
            if len(locations) == 2:
                _compare(locations, settings, out)
            else:
                _explore(locations[0], settings, out)
    except Interrupted as stop:
        raise Interrupted(
            f"Stopped before {out / 'explore.json'} was written; the same command begins again."
        ) from stop
    return EXIT_DONE


def _explore(location: Location, settings: Options, out: Path) -> None:
    from mgm_exp.data.exploration import explore, write_exploration

    with progress_bar() as on_progress:
        exploration = explore(location, settings, on_progress)
        findings = write_exploration(exploration, out, on_progress)
    _show(exploration.name, exploration, findings)
    print(f"\nreport: {out / 'report.html'}   also: explore.json, summary.md, plots/")


def _compare(locations: Sequence[Location], settings: Options, out: Path) -> None:
    from mgm_exp.data.exploration import compare_explorations, explore, write_comparison

    with progress_bar() as on_progress:
        explorations = [
            explore(location, settings, partial(_labelled, on_progress, name))
            for name, location in zip("AB", locations, strict=True)
        ]
        comparison = compare_explorations(*explorations)
        findings = write_comparison(comparison, out)
    _show(f"{explorations[0].name} (A) and {explorations[1].name} (B)", None, findings)
    print(f"\nreport: {out / 'report.html'}   also: explore.json, summary.md, plots/")


def _labelled(on_progress: OnProgress, name: str, what: str, done: int, total: int) -> None:
    on_progress(f"{name}: {what}", done, total)


def _show(title: str, exploration: Exploration | None, findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    console.print(Text(title, style="bold"))
    if exploration is not None and exploration.content["sample"] is not None:
        console.print(Text("a random sample", style="yellow"))
    marks = {"problem": ("×", "red"), "warning": ("!", "yellow"), "note": ("·", "cyan"), "good": ("✓", "green")}
    for finding in findings:
        mark, colour = marks[finding.level]
        console.print(Text.assemble((f"{mark} ", colour), finding.sentence))


def _settings(options: argparse.Namespace) -> Options:
    from mgm_exp.data.exploration import Options, model_max_length, tokenizer_file

    folder = options.tokenizer or _shipped_base()
    scorer = None
    if options.clip is not None:
        from mgm_exp.data.scoring import open_scorer

        scorer = open_scorer(options.clip, options.device)
    return Options(
        tokenizer=tokenizer_file(folder),
        max_length=options.max_length or model_max_length(folder if folder.is_dir() else folder.parent),
        with_images=not options.no_images,
        max_megapixels=options.max_megapixels,
        scorer=scorer,
        sample=options.sample,
        seed=options.seed,
        workers=options.workers,
    )


def _shipped_base() -> Path:
    """The folder of the small model that the demo trains."""
    import mgm_exp

    return Path(mgm_exp.__file__).parent / "model" / "tiny"


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp explore",
        description="What a dataset is like: a report as one HTML file, and the same as JSON, Markdown and PNG files. "
        "With two paths: how the second differs from the first.",
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="file of rows, folder of shards, or folder with one"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the result (default: explore-<name>)")
    parser.add_argument(
        "--images",
        action="append",
        type=Path,
        metavar="ROOT",
        help="folder of the images (default: that of the rows); with two paths once for both, or twice",
    )
    parser.add_argument("--no-images", action="store_true", help="do not look at images")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="model folder whose tokenizer counts tokens (default: the small model of the demo)",
    )
    parser.add_argument(
        "--max-length", type=count("tokens"), metavar="N", help="longest sequence, in tokens (default: the model's)"
    )
    parser.add_argument(
        "--clip", type=Path, metavar="DIR", help="CLIP or BLIP-ITM folder that judges captions by their images"
    )
    parser.add_argument("--device", default="cpu", help="where --clip runs: cpu (default), cuda")
    parser.add_argument(
        "--sample", type=count("rows"), metavar="N", help="look at N rows, drawn at random (default: at all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of samples and subsamples (default: 0)")
    parser.add_argument("--workers", type=count("processes"), metavar="N", help="processes (default: all cores)")
    parser.add_argument(
        "--max-megapixels", type=megapixels, default=50.0, metavar="M", help="larger images are broken (default: 50)"
    )
    return parser.parse_args(arguments)
