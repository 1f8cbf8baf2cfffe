"""``mgm-exp status``: how runs and sweeps stand, read from their files and leases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import UserError
from mgm_exp.folders import LEASE, read_record
from mgm_exp.ledger import in_words
from mgm_exp.repeats import run_dirs
from mgm_exp.search.budget import FOLDER as SWEEPERS
from mgm_exp.slurm import living_jobs
from mgm_exp.store import Lease
from mgm_exp.study_table import headline, print_search, table_of

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Line:
    """One run or trial as the table shows it."""

    what: str
    status: str
    score: float | None
    seconds: float | None
    reason: str
    folder: Path
    job: str = ""


def show_status(sweep: str | None, root: Path) -> None:
    """Prints the state of one sweep or run, or of all below ``root``.

    Raises:
        UserError: there is no such sweep.
    """
    if sweep is not None:
        folder = find(sweep, root)
        if is_search(folder):
            _print_search(folder)
        elif (folder / "sweep.json").is_file():
            _print(_title(folder), sweep_lines(folder))
        else:
            _print("run", [run_line(folder)])
        return
    sweeps = sorted((root / "sweeps").glob("*/sweep.json"), key=lambda path: path.stat().st_mtime)
    for path in sweeps:
        if is_search(path.parent):
            _print_search(path.parent)
        else:
            _print(_title(path.parent), sweep_lines(path.parent))
    runs = sorted(path for path in (root / "runs").glob("*/*/") if (path / ".hydra").is_dir())
    if runs:
        _print("runs", [run_line(folder) for folder in runs])
    if not sweeps and not runs:
        print(f"There is no run and no sweep below {root}.")


def _print_search(folder: Path) -> None:
    print_search(folder, is_running=sweep_state(folder) == "running")
    for run_dir, job in sorted(living_jobs(folder).items()):
        print(f"{run_dir.relative_to(folder.resolve())}: job {job}")


def watch_status(sweep: str, root: Path, every_s: float = 2.0) -> None:
    """Shows one sweep and keeps the table up to date until the sweep has ended, or Ctrl-C.

    Raises:
        UserError: there is no such sweep.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    folder = find(sweep, root)

    def shown() -> Group:
        if is_search(folder):
            return Group(Text(headline(folder, is_running=True), style="bold"), table_of(folder))
        return Group(_table(_title(folder), sweep_lines(folder)))

    console, pause_s = Console(), 0.0
    with Live(shown(), console=console, refresh_per_second=4) as live:
        while sweep_state(folder) == "running" or living_jobs(folder):
            time.sleep(max(every_s, pause_s))
            began = time.monotonic()
            live.update(shown())
            pause_s = 4 * (time.monotonic() - began)  # of thousands of trials: not most of a processor for a table
        live.update(shown())
    show_status(sweep, root)


def is_search(folder: Path) -> bool:
    """Whether a sweep is a search (mgm_optuna) rather than a grid."""
    return read_record(folder / "sweep.json").get("sweeper") == "mgm_optuna"


def find(sweep: str, root: Path) -> Path:
    """The folder of a sweep (or run) given by name or path.

    Raises:
        UserError: there is none; says which there are.
    """
    for folder in (root / "sweeps" / sweep, Path(sweep)):
        if any((folder / name).is_file() for name in ("sweep.json", "manifest.json", "result.json")):
            return folder
    names = sorted(path.parent.name for path in (root / "sweeps").glob("*/sweep.json"))
    there = f"There are: {', '.join(names)}." if names else f"There is no sweep below {root / 'sweeps'}."
    raise UserError(f"{sweep!r} is neither a sweep nor the folder of one. {there}")


def sweep_lines(folder: Path) -> list[Line]:
    """Every trial of a sweep, those that have not begun included."""
    record = read_record(folder / "sweep.json")
    objective = str(record.get("objective"))
    trials = [*record.get("trials", []), *record.get("pending", [])]
    jobs = living_jobs(folder)
    lines = []
    for trial in sorted(trials, key=lambda trial: int(trial["number"])):
        what = f"{trial['number']}  {in_words(trial['params'])}"
        for run_dir in run_dirs(folder / str(trial["number"])):
            of_seed = f" seed={run_dir.name.removeprefix('seed_')}" if run_dir.name.startswith("seed_") else ""
            lines.append(run_line(run_dir, what + of_seed, objective, jobs.get(run_dir.resolve(), "")))
    return lines


def sweep_state(folder: Path) -> str:
    """``running``, or how the last command on it ended."""
    status = str(read_record(folder / "sweep.json").get("status"))
    at_work = [folder / LEASE, *(folder / SWEEPERS).glob("at-work-*")]
    if any(Lease(path).holder() is not None for path in at_work if path.is_dir()):
        return "running"
    return "interrupted" if status == "running" else status


def run_line(folder: Path, what: str = "", objective: str | None = None, job: str = "") -> Line:
    """One run folder: a living lease or job says that it runs, else ``result.json`` says how it ended."""
    result = read_record(folder / "result.json")
    if not folder.is_dir():
        status = "not started"
    elif Lease(folder / LEASE).holder() is not None or "RUNNING" in job:
        status = "running"
    elif job:
        status = "queued"
    else:
        status = str(result.get("status", "interrupted"))
    score = (result.get("metrics") or {}).get(objective) if objective else result.get("objective")
    error = (result.get("error") or {}) if status not in ("running", "queued") else {}
    reason = f"{error.get('message', '')} {error.get('advice', '')}".strip() + _known(error)
    name = what or f"{folder.parent.name}/{folder.name}"
    return Line(name, status, score, result.get("wall_s"), reason, folder, job)


def _known(error: dict[str, Any]) -> str:
    """What the doctor made of it when the run ended, if anything."""
    found = error.get("doctor")
    return (
        f" [doctor: {found['title']}; mgm-exp doctor shows why]" if isinstance(found, dict) and "title" in found else ""
    )


def _title(folder: Path) -> str:
    best = read_record(folder / "sweep.json").get("best")
    score = f"; best: trial {best['number']} with {best['value']:.4f}" if best else ""
    return f"sweep {folder}: {sweep_state(folder)}{score}"


def _print(title: str, lines: list[Line]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    console.print(_table(title, lines))
    for line in lines:
        if line.reason:
            console.print(Text(f"{line.what}: {line.status}: {line.reason} ({line.folder})"))


def _table(title: str, lines: list[Line]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    has_jobs = any(line.job for line in lines)
    if has_jobs:
        table.add_column("job", no_wrap=True)
    colours = {"completed": "green", "failed": "red", "running": "cyan", "interrupted": "yellow", "paused": "blue"}
    for line in lines:
        table.add_row(
            Text(line.what),
            Text(line.status, style=colours.get(line.status, "")),
            *_numbers(line),
            *([line.job] if has_jobs else []),
        )
    return table


def _numbers(line: Line) -> Iterator[str]:
    yield "" if line.score is None else f"{line.score:.4f}"
    yield "" if line.seconds is None else f"{line.seconds:.0f}"
