"""A search as people see it: one table of its trials, how it stands, the best, and how long it will take.

Read from ``sweep.json`` and the trials' folders, so it shows a search that runs in another process, too.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.folders import LEASE, read_record
from mgm_exp.repeats import run_dirs
from mgm_exp.search.reports import read_reports
from mgm_exp.store import Lease, parse_record

if TYPE_CHECKING:
    from rich.table import Table

_COLOURS = {
    "completed": "green", "failed": "red", "running": "cyan", "interrupted": "yellow", "pruned": "dim",
    "paused": "blue", "infeasible": "magenta", "not finite": "magenta",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One trial.

    Args:
        state: completed, pruned, infeasible, not finite, failed, running, paused, interrupted or waiting.
        where: At which step it is, or was stopped.
        last: Its last validation score.
        reason: Why it is not completed, in a sentence; empty where the state says all.
    """

    number: int
    point: str
    state: str
    where: str
    last: float | None
    values: tuple[float, ...]
    seconds: float | None
    reason: str


def rows_of(folder: Path) -> list[Row]:
    """Every trial of a search, by number."""
    record = read_record(folder / "sweep.json")
    known = {int(trial["number"]): trial for key in ("trials", "pending") for trial in record.get(key, [])}
    return [_row(folder, trial) for _, trial in sorted(known.items())]


def _row(folder: Path, trial: Mapping[str, Any]) -> Row:
    number = int(trial["number"])
    runs = run_dirs(folder / str(number))
    reports = [report for run in runs for report in read_reports(run / "reports.jsonl")]
    state = str(trial.get("verdict") or trial.get("status") or "waiting").replace("_", " ")
    if state not in ("completed", "pruned", "failed", "infeasible", "not finite"):
        is_running = any((run / LEASE).is_dir() and Lease(run / LEASE).holder() is not None for run in runs)
        state = "running" if is_running else state
    step = _last_step(runs[-1]) if state in ("running", "interrupted") else None
    if state in ("paused", "pruned") and reports:
        step = max(report.step for report in reports)
    error = trial.get("error") or {}
    reason = str(error.get("message", "")) if state in ("failed", "infeasible", "not finite", "interrupted") else ""
    return Row(
        number=number,
        point=in_short(trial.get("params") or {}),
        state=state,
        where=f"step {step}" if step else "",
        last=reports[-1].value if reports else None,
        values=tuple(trial.get("values") or ()),
        seconds=trial.get("seconds"),
        reason=reason,
    )


def _last_step(run_dir: Path) -> int | None:
    """The last optimizer step of the instruct stage in ``metrics.jsonl``."""
    path = run_dir / "metrics.jsonl"
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = parse_record(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("stage") == "instruct":
            return int(row.get("step", 0))
    return None


def in_short(params: Mapping[str, Any]) -> str:
    """What was chosen, with short names and numbers: ``rank=8 lr=0.005``; what only formulas use is left out."""
    shown = {key: value for key, value in params.items() if not key.startswith("_")}
    names = {key: key.rpartition(".")[2] for key in shown}
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    words = {None: "null", True: "true", False: "false"}
    return " ".join(
        f"{key if names[key] in twice else names[key]}="
        + (
            words[value]
            if value is None or isinstance(value, bool)
            else f"{value:.4g}"
            if isinstance(value, float)
            else str(value)
        )
        for key, value in shown.items()
    )


def headline(folder: Path, *, is_running: bool = False, rows: list[Row] | None = None) -> str:
    """How the search stands, in a sentence or two; ``rows``: what :func:`rows_of` gave, if it was asked already."""
    record, rows = read_record(folder / "sweep.json"), rows_of(folder) if rows is None else rows
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    text = f"search {record.get('name')}: {len(rows)} trials" + (f" ({counts})" if rows else "")
    best = record.get("best")
    if best:
        chosen = next((row for row in rows if row.number == best["number"]), None)
        text += f"; best: trial {best['number']}{f' ({chosen.point})' if chosen else ''} with {best['value']:.4f}"
        first = next((row for row in rows if row.state == "completed"), None)
        if first and first.number != best["number"]:
            text += f", {best['value'] - first.values[0]:+.4f} against trial {first.number} ({first.point})"
    left = time_left(record, rows)
    if is_running and left:
        text += f"; {left} left"
    if not is_running and record.get("stopped_because"):
        text += f"; {record['stopped_because']}"
    return text + "."


def time_left(record: Mapping[str, Any], rows: list[Row]) -> str:
    """A guess from the time that trials took so far; empty before there is one."""
    ended = [row.seconds for row in rows if row.seconds and row.state in ("completed", "pruned")]
    more = int(record.get("n_trials") or 0) - sum(
        row.state not in ("running", "waiting", "paused", "interrupted") for row in rows
    )
    if not ended or more <= 0:
        return ""
    seconds = statistics.fmean(ended) * more / max(1, int(record.get("slots") or 1))
    return f"about {seconds / 3600:.1f} h" if seconds >= 5400 else f"about {max(1, round(seconds / 60))} min"


def table_of(folder: Path, rows: list[Row] | None = None) -> Table:
    """The trials as a table, the best one marked; ``rows`` as for :func:`headline`."""
    from rich.table import Table
    from rich.text import Text

    record, rows = read_record(folder / "sweep.json"), rows_of(folder) if rows is None else rows
    names = record.get("objectives") or [str(record.get("objective"))]
    best = (record.get("best") or {}).get("number")
    front = {entry["number"] for entry in record.get("pareto", [])}
    table = Table(box=None, pad_edge=False)
    table.add_column("trial", justify="right")
    table.add_column("point", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("validation", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("")
    for row in rows:
        mark = "best" if row.number == best and not front else "front" if row.number in front else ""
        values = [f"{value:.4f}" for value in row.values] or [""] * len(names)
        table.add_row(
            str(row.number),
            Text(row.point),
            Text(f"{row.state} {f'at {row.where}' if row.where else ''}".strip(), style=_COLOURS.get(row.state, "")),
            "" if row.last is None else f"{row.last:.4f}",
            *values,
            "" if row.seconds is None else f"{row.seconds:.0f}",
            mark,
            style="bold" if mark else "",
        )
    return table


def print_search(folder: Path, *, is_running: bool = False) -> None:
    """The headline, the table, and the reasons of what went wrong."""
    import os

    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=140)
    rows = rows_of(folder)
    console.print(Text(headline(folder, is_running=is_running, rows=rows)), style="bold", soft_wrap=True)
    console.print(table_of(folder, rows))
    for row in rows:
        if row.reason:
            console.print(Text(f"trial {row.number} {row.state}: {row.reason}"), soft_wrap=True)
