"""``mgm-exp report DIR...``: compares runs and sweeps, on the screen and as files."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.errors import EXIT_DONE, Interrupted, UserError
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.arguments import count, seconds
from mgm_exp.verbs.progress_bar import progress_bar

FORMATS = (".md", ".tex", ".csv", ".html")


def run(arguments: list[str]) -> int:
    """Compares what the arguments name: 0."""
    options = _options(arguments)
    if options.wandb is not None and options.watch is not None:
        raise UserError("--wandb and --watch do not go together.", advice="Save the W&B report when the sweep is done.")
    files, comparison = _files(options.folders, options.out)
    settings = {
        "baseline": options.baseline,
        "all_pairs": options.all_pairs,
        "power": options.power,
        "workers": options.workers,
    }
    with stop_on_signals():
        if options.watch is not None:
            return _watch(options.folders, comparison, files, options.watch, settings)
        with progress_bar() as on_progress:
            found = _compared(options.folders, comparison, files, on_progress=on_progress, **settings)
    _show(found)
    print(f"written: {', '.join(str(path) for path in [*files, comparison])}")
    if options.wandb is not None:
        from mgm_exp.compare import load_runs
        from mgm_exp.verbs.wandb_report import save

        with stop_on_signals():
            url = save(found, load_runs(options.folders), comparison.parent, options.wandb)
        print(f"W&B report: {url}\n(it shows the runs that are in W&B; mgm-exp wandb-sync sends the others)")
    return EXIT_DONE


def report(
    paths: Sequence[Path],
    comparison: Path,
    markdown: Path | None = None,
    *,
    html: Path | None = None,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Compares runs, prints the table and writes it: what a sweep does when it ends.

    Args:
        paths: Run folders and sweep folders.
        comparison: Where ``comparison.json`` goes.
        markdown: Where the table goes as Markdown; None: nowhere.
        html: Where the page goes; None: nowhere.
        baseline: The run that the others are compared with: a folder, a label or a trial's number; None: the first
            completed one.

    Returns:
        What was found, as in ``comparison.json``.

    Raises:
        UserError: a path is no run or sweep, or runs cannot be compared.
    """
    files = [path for path in (markdown, html) if path is not None]
    found = _compared(paths, comparison, files, baseline=baseline)
    _show(found)
    return found


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp report",
        description="Compares runs and sweeps, question by question: a table on the screen, comparison.json, a page.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="run folders and sweep folders")
    parser.add_argument(
        "--baseline", metavar="RUN", help="folder, label or trial number (default: the first completed)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="FILE.md (Markdown), .tex (LaTeX), .csv or .html; comparison.json is written beside it "
        "(default: table.md and report.html, into the sweep or here)",
    )
    parser.add_argument("--all-pairs", action="store_true", help="test every pair, not only those with the baseline")
    parser.add_argument(
        "--power",
        type=float,
        metavar="D",
        help="how many questions or seeds would find a true difference of D (0.01: one point)?",
    )
    parser.add_argument(
        "--workers", type=count("processes"), metavar="N", help="processes that read (default: all cores)"
    )
    parser.add_argument(
        "--watch",
        type=seconds,
        nargs="?",
        const=10.0,
        metavar="S",
        help="write anew whenever something changed, looking every S seconds (default: 10); Ctrl-C ends it",
    )
    parser.add_argument(
        "--wandb",
        nargs="?",
        const="",
        metavar="[ENTITY/]PROJECT",
        help="also save a W&B report of it (default: tracker.project of the runs)",
    )
    return parser.parse_args(arguments)


def _files(folders: Sequence[Path], out: Path | None) -> tuple[list[Path], Path]:
    """Where the tables and the JSON go: what ``--out`` names, else into the sweep, else here."""
    if out is None:
        here = folders[0] if len(folders) == 1 and (folders[0] / "sweep.json").is_file() else Path()
        return [here / "table.md", here / "report.html"], here / "comparison.json"
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
    if out.is_dir() or not out.parent.is_dir():
        what = f"{out} is a folder" if out.is_dir() else f"{out.parent} is not a folder"
        raise UserError(f"--out {out}: {what}.", advice="Give a file in a folder that is there.")
    return [out], out.parent / "comparison.json"


def _compared(
    folders: Sequence[Path],
    comparison: Path,
    files: Sequence[Path],
    *,
    baseline: str | None,
    all_pairs: bool = False,
    power: float | None = None,
    workers: int | None = 1,
    on_progress: Callable[[str, int, int], None] | None = None,
    refresh_s: float | None = None,
) -> dict[str, Any]:
    """Compares and writes."""
    from mgm_exp.compare import compare_runs, load_runs, write_comparison
    from mgm_exp.compare.runs import is_sweep

    runs = load_runs(folders)
    found = compare_runs(
        runs,
        baseline,
        strict=not (len(folders) == 1 and is_sweep(folders[0])),
        all_pairs=all_pairs,
        power=power,
        workers=workers,
        on_progress=on_progress,
    )
    for path in files:
        _write(found, runs, path, refresh_s)
    write_comparison(found, comparison)
    return found


def _write(found: dict[str, Any], runs: Sequence[Any], path: Path, refresh_s: float | None) -> None:
    from mgm_exp.compare import write_csv, write_html, write_latex, write_markdown

    if path.suffix == ".html":
        write_html(found, runs, path, refresh_s=refresh_s)
    else:
        {".md": write_markdown, ".tex": write_latex, ".csv": write_csv}[path.suffix](found, path)


def _show(found: dict[str, Any]) -> None:
    from mgm_exp.compare import print_comparison

    print_comparison(found)


# -- while a sweep runs ------------------------------------------------------------------------------------------------


def _watch(
    folders: Sequence[Path], comparison: Path, files: Sequence[Path], every_s: float, settings: dict[str, Any]
) -> int:
    """Writes anew whenever a file of a run changed, until it is stopped."""
    from mgm_exp.compare import load_runs
    from mgm_exp.compare.wording import verdict_lines

    before: object = None
    print(f"Watching {', '.join(map(str, folders))} every {every_s:g} s; Ctrl-C ends it.", flush=True)
    try:
        while True:
            runs = load_runs(folders)
            now = _state([run.path for run in runs], folders)
            if runs and now != before:
                before = now
                found = _compared(folders, comparison, files, refresh_s=every_s, **settings)
                names = ", ".join(map(str, files))
                print(f"{time.strftime('%H:%M:%S')} {names}: {verdict_lines(found)[0]}", flush=True)
            time.sleep(every_s)
    except Interrupted:
        if before is not None:
            # What was written last still loads itself anew: the last word does not.
            _compared(folders, comparison, files, **settings)
        return EXIT_DONE


def _state(runs: Sequence[Path], folders: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the files that a comparison reads."""
    names = ("result.json", "manifest.json", "config.yaml", "metrics.jsonl", "data.json", ".lease")
    wanted = [run / name for run in runs for name in names] + [folder / "sweep.json" for folder in folders]
    found = []
    for path in wanted:
        try:
            stat = path.stat()
        except OSError:
            continue
        found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return tuple(found)
