"""What the guards of training found in each run, and what was done about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mgm_exp import page
from mgm_exp.compare.html.view import Cells, View
from mgm_exp.compare.runs import Run
from mgm_exp.page import Column, Html
from mgm_exp.store import parse_record, read_text

# Events that are no trouble.
_CALM = ("validation", "resumed", "gradient_statistics")
_NAMED = 3
_LONGEST = 200


def trouble(view: View) -> Html | None:
    """One row for each run and kind of event; None where nothing happened anywhere."""
    rows: list[Cells] = []
    for entry in view.entries:
        run = view.run(entry["run_dir"])
        for (stage, event), found in _events(run).items() if run else ():
            first = found[0]
            done = sorted({str(row["action"]) for row in found if row.get("action")})
            rows.append(
                [
                    entry["label"],
                    stage,
                    event.replace("_", " "),
                    (f"{len(found)}", float(len(found))),
                    _steps(found),
                    ", ".join(done) or "-",
                    _cut(str(first.get("detail") or "-")),
                    _samples(first),
                ]
            )
    if not rows:
        return None
    titles = ("run", "stage", "what", "times", "steps", "done", "the first time", "samples")
    return page.section(
        "Trouble in training",
        page.note(
            "What the guards found, and what was done by policy (train.guards). The samples of every batch that was "
            "named stand in quarantine.jsonl of the run."
        ),
        page.table([Column(title, is_number=title == "times") for title in titles], rows, name="Trouble in training"),
        anchor="trouble",
    )


def _events(run: Run) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Event rows by stage and kind; a line cut off by a kill is left out."""
    try:
        text = read_text(run.path / "metrics.jsonl", errors="replace")
    except (OSError, ValueError):
        return {}
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in text.splitlines():
        if '"event"' not in line:
            continue
        try:
            row = parse_record(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "event" in row and row["event"] not in _CALM:
            found.setdefault((str(row.get("stage")), str(row["event"])), []).append(row)
    return found


def _steps(rows: list[Mapping[str, Any]]) -> str:
    steps = [f"{row.get('from_step', row.get('step', '?'))}" for row in rows]
    return ", ".join(steps[:_NAMED]) + (f" and {len(steps) - _NAMED} more" if len(steps) > _NAMED else "")


def _samples(row: Mapping[str, Any]) -> str:
    ids = row.get("sample_ids")
    if not isinstance(ids, list) or not ids:
        return "-"
    return _cut(", ".join(map(str, ids[:_NAMED])) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
