"""The comparison for people: verdicts in words, a table for each benchmark, notes; as text, Markdown or SVG.

Where the table is too wide for the terminal, what a run cost moves into a second table, and on a very narrow one each
run becomes a few lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.compare.datasets import COLUMNS, data_rows
from mgm_exp.compare.wording import (
    count,
    has_groups,
    metric,
    notes,
    points_interval,
    rate_interval,
    short_folders,
    trained,
    verdict_lines,
    where,
)
from mgm_exp.store import write_atomic

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

Comparison = Mapping[str, Any]

_COLOURS = {
    "better": "green",
    "worse": "red",
    "tied": "yellow",
    "completed": "green",
    "failed": "bold red",
    "interrupted": "yellow",
    "pruned": "yellow",
    "paused": "cyan",
    "running": "cyan",
}
_NAME = ("run", "what differs")
_SCORE = ("accuracy [95 %]", "difference [95 %]")
_COST = ("trained", "tok/s", "GiB", "status")
_LETTERS = "group"
COLUMNS_ALL = (*_NAME, *_SCORE, _LETTERS, *_COST)
_RIGHT = {"trained", "tok/s", "GiB"}
_HEADERS = {_LETTERS: "", "tok/s": "tokens\n/s", "GiB": "peak\nGiB"}
_FILE_WIDTH = 110
_PADDINGS = (3, 2, 1)
"""Columns between two columns: narrower where that makes a table fit."""


@dataclass(frozen=True)
class Row:
    """One run, or one baseline without a folder, in the table of a benchmark.

    Args:
        cells: Column -> text.
        verdict: better, worse, tied, or empty.
        status: The run's; empty for a baseline.
    """

    cells: Mapping[str, str]
    verdict: str = ""
    status: str = ""


def rows_of(comparison: Comparison, benchmark: str | None) -> list[Row]:
    """The rows of one benchmark's table: arms in their order, then baselines. None: no run has a score."""
    pairs = {
        (pair["b"], pair["benchmark"]): pair for pair in comparison["pairs"] if pair["a"] == comparison["baseline"]
    }
    refused = {(pair["b"], pair["benchmark"]) for pair in comparison["refused"]}
    runs = {run["run_dir"]: run for run in comparison["runs"]}
    letters = (comparison["groups"].get(benchmark) or {}).get("letters", {})
    folders = short_folders([_folder(arm) for arm in comparison["arms"]])[1]
    rows = []
    for arm, folder in zip(comparison["arms"], folders, strict=True):
        key = (arm["id"], benchmark)
        pair = pairs.get(key)
        if arm["id"] == comparison["baseline"]:
            difference = "baseline"
        elif pair:
            difference = f"{points_interval(pair)} {pair['verdict']}"
        else:
            difference = "not comparable" if key in refused else "-"
        own = [runs[name] for name in arm["runs"]]
        memory = mean_of(own, "peak_memory_gib")
        done = sum(run["status"] == "completed" for run in own)
        cost = (
            trained(runs[arm["id"]]["trainable"]),
            count(mean_of(own, "train_tokens_per_s")),
            "-" if memory is None else f"{memory:.2f}",
            arm["status"] if len(own) == 1 or done in (0, len(own)) else f"{done} of {len(own)}",
        )
        label = f"{arm['label']} ({len(own)} seeds)" if len(own) > 1 else arm["label"]
        score = (rate_interval(metric(arm, benchmark)), difference, letters.get(arm["id"], ""))
        cells = dict(zip(COLUMNS_ALL, (folder, label, *score, *cost), strict=True))
        rows.append(Row(cells, pair["verdict"] if pair else "", arm["status"]))
    for baseline in comparison["baselines"]:
        if baseline["benchmark"] == benchmark:
            rows.append(Row({"run": "-", "what differs": baseline["label"], _SCORE[0]: rate_interval(baseline)}))
    return rows


def _folder(arm: Mapping[str, Any]) -> str:
    """Where an arm lies: its run folder; the trial's folder where that holds its seeds."""
    folder = Path(arm["id"])
    return str(folder.parent if len(arm["runs"]) > 1 and folder.name.startswith("seed_") else folder)


def mean_of(runs: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Mean over the runs that recorded it."""
    values = [run[key] for run in runs if run[key] is not None]
    return sum(values) / len(values) if values else None


def columns_of(comparison: Comparison, benchmark: str | None) -> tuple[str, ...]:
    """Columns of a benchmark's table: letters only where there are enough arms for them."""
    return COLUMNS_ALL if has_groups(comparison, benchmark) else tuple(c for c in COLUMNS_ALL if c != _LETTERS)


# -- on the screen -----------------------------------------------------------------------------------------------------


def comparison_table(comparison: Comparison, width: int = 110) -> RenderableType:
    """Verdicts, one table for each benchmark, and notes, laid out for a terminal of ``width`` columns."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(line, style="bold") for line in verdict_lines(comparison)]
    benchmarks = comparison["benchmarks"] or [None]
    for place, benchmark in enumerate(benchmarks):
        rows = rows_of(comparison, benchmark)
        title = [Text(f"\n{benchmark}", style="bold")] if len(benchmarks) > 1 else []
        # What a run cost does not depend on the benchmark and is shown once.
        columns = columns_of(comparison, benchmark)
        parts += [*title, Text(""), *_laid_out(rows, columns, width, with_cost=place == 0)]
    if len(comparison["data"]) > 1:
        parts += [Text("\ncaptions of the align stage", style="bold"), Text(""), _data_table(comparison, width)]
    parts += [Text(""), *(Text(note, style="dim") for note in notes(comparison))]
    return Group(*parts)


def _data_table(comparison: Comparison, width: int) -> RenderableType:
    """A row for each kind of data; where that is too wide, a column for each."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lines = [list(COLUMNS), *([row[column] for column in COLUMNS] for row in data_rows(comparison["data"]))]
    across = sum(max(len(line[k]) for line in lines) + 2 for k in range(len(COLUMNS)))
    if across > width:
        lines = [list(column) for column in zip(*lines, strict=True)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for place, title in enumerate(lines[0]):
        table.add_column(title, justify="right" if place else "left", overflow="fold")
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    return table


def _laid_out(rows: Sequence[Row], columns: Sequence[str], width: int, *, with_cost: bool) -> list[RenderableType]:
    """One table; two where it would be too wide; a block of lines for each run where even that is."""
    from rich.text import Text

    main = [column for column in columns if column not in _COST]
    for padding in _PADDINGS:
        if with_cost and _width(rows, columns, padding) <= width:
            return [_grid(rows, columns, padding)]
    for padding in _PADDINGS:
        if _width(rows, main, padding) <= width:
            cost = [Text(""), _grid([row for row in rows if row.status], [*_NAME, *_COST], padding)]
            return [_grid(rows, main, padding), *(cost if with_cost else [])]
    return [_block(row, with_cost) for row in rows]


def _width(rows: Sequence[Row], columns: Sequence[str], padding: int) -> int:
    def needed(column: str) -> int:
        heading = _HEADERS.get(column, column).split("\n")
        return max(len(text) for text in [*heading, *(row.cells.get(column, "") for row in rows)])

    return sum(needed(column) + padding for column in columns)


def _grid(rows: Sequence[Row], columns: Sequence[str], padding: int) -> RenderableType:
    from rich import box
    from rich.table import Table

    # The box itself puts one column between two columns.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, padding - 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(_HEADERS.get(column, column), justify="right" if column in _RIGHT else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_styled(row, column) for column in columns))
    return table


def _block(row: Row, with_cost: bool) -> RenderableType:
    from rich.text import Text

    cells = row.cells
    text = Text.assemble((f"{cells['run']}  ", "dim"), (cells["what differs"], "bold"))
    for column in _SCORE:
        if cells.get(column):
            text.append("\n  ").append_text(_styled(row, column))
    if cells.get(_LETTERS):
        text.append(f"\n  tied group {cells[_LETTERS]}")
    if with_cost and row.status:
        cost = f"{cells['trained']} trained · {cells['tok/s']} tok/s · {cells['GiB']} GiB · "
        text.append(f"\n  {cost}", "dim").append_text(_styled(row, "status"))
    return text


def _styled(row: Row, column: str) -> Text:
    from rich.text import Text

    text = Text(row.cells.get(column, ""))
    if column == "difference [95 %]" and row.verdict:
        text.stylize(_COLOURS[row.verdict], len(text) - len(row.verdict))
    if column == "status":
        text.stylize(_COLOURS.get(row.status, ""))
    if not row.status:
        text.stylize("italic dim")
    return text


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints the comparison, as wide as the terminal is; into a file or a pipe so that a run fits on a line."""
    from rich.console import Console as RichConsole

    target = console or RichConsole()
    if console is None and not target.is_terminal and "COLUMNS" not in os.environ:
        target = RichConsole(width=_FILE_WIDTH)
    target.print(comparison_table(comparison, target.width))
    if where(comparison):
        target.print(where(comparison), style="dim", markup=False, highlight=False)


# -- as files ----------------------------------------------------------------------------------------------------------


def markdown(comparison: Comparison) -> str:
    """The same content as Markdown: verdicts, a table for each benchmark, notes."""
    parts = ["\n".join(f"**{_escaped(line)}**  " for line in verdict_lines(comparison))]
    benchmarks = comparison["benchmarks"] or [None]
    for benchmark in benchmarks:
        rows, columns = rows_of(comparison, benchmark), columns_of(comparison, benchmark)
        table = [
            "| " + " | ".join((c if c == _LETTERS else _HEADERS.get(c, c).replace("\n", " ")) for c in columns) + " |",
            "| " + " | ".join("---:" if c in _RIGHT else "---" for c in columns) + " |",
            *("| " + " | ".join(_escaped(row.cells.get(c, "")) for c in columns) + " |" for row in rows),
        ]
        parts.append("\n".join([f"### {benchmark}\n" if len(benchmarks) > 1 else "", *table]).strip("\n"))
    if len(comparison["data"]) > 1:
        parts.append("\n".join(["Captions of the align stage:\n", *_markdown_data(comparison)]))
    parts.append("\n".join(f"- {_escaped(note)}" for note in notes(comparison)))
    return "\n\n".join(parts) + "\n"


def _markdown_data(comparison: Comparison) -> list[str]:
    rows = data_rows(comparison["data"])
    return [
        "| " + " | ".join(_escaped(column) for column in COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) - 1),
        *("| " + " | ".join(_escaped(row[column]) for column in COLUMNS) + " |" for row in rows),
    ]


def _escaped(text: str) -> str:
    return re.sub(r"([\\|*_`<])", r"\\\1", text)


def write_markdown(comparison: Comparison, path: Path | str) -> Path:
    """Writes the table as Markdown (``table.md`` where a folder is given)."""
    target = Path(path) / "table.md" if Path(path).is_dir() else Path(path)
    write_atomic(target, markdown(comparison))
    return target


def write_svg(comparison: Comparison, path: Path | str, *, width: int = 104, title: str = "mgm-exp report") -> Path:
    """Writes the table as a picture (for a README); it refers to nothing on the network."""
    import io

    from rich.console import Console as RichConsole
    from rich.terminal_theme import MONOKAI

    console = RichConsole(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(comparison_table(comparison, width))
    picture = console.export_svg(title=title, theme=MONOKAI)
    # rich would load its font from a CDN; a reader's own monospace font does.
    picture = re.sub(r"@font-face\s*\{[^}]*\}", "", picture).replace("Fira Code", "ui-monospace, Menlo, Consolas")
    write_atomic(Path(path), picture)
    return Path(path)
