"""Writes an exploration into a folder: explore.json, report.html, summary.md, plots/*.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mgm_exp.data.exploration.advice import recipe_advice
from mgm_exp.data.exploration.exploration import Exploration
from mgm_exp.data.exploration.findings import Finding, findings_of
from mgm_exp.data.exploration.plots import plots_of
from mgm_exp.data.exploration.reading import OnProgress
from mgm_exp.data.exploration.report import command, report
from mgm_exp.data.exploration.summary import summary
from mgm_exp.errors import UserError
from mgm_exp.store import disk_full_named, write_atomic, write_json_atomic

RESULT = "explore.json"


def check_folder(folder: Path, result: str = RESULT) -> None:
    """Whether a folder can take an exploration: a new one, an empty one, or one that holds an earlier exploration.

    Raises:
        UserError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"--out {folder} is a file.", advice="Give a folder that is new, empty, or an earlier exploration."
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / result).is_file():
        raise UserError(
            f"--out {folder} holds files that are no exploration.",
            advice="Give a folder that is new, empty, or an earlier exploration.",
        )


def default_folder(paths: Sequence[Path]) -> Path:
    """Where the result goes if nobody said: ``explore-<name>`` here."""
    names = []
    for path in paths:
        whole = path.resolve()
        names.append(whole.name if whole.is_dir() else whole.stem)
    return Path("explore-" + "-vs-".join(names))


def write_exploration(exploration: Exploration, folder: Path, on_progress: OnProgress | None = None) -> list[Finding]:
    """Writes everything; each file whole or not at all, ``explore.json`` last.

    Returns:
        The findings, for the screen.
    """
    progress = on_progress or (lambda what, done, total: None)
    progress("write the report", 0, 1)
    findings = findings_of(exploration.content)
    advice = recipe_advice(exploration)
    plots = plots_of(exploration)
    page = report(exploration, findings, advice, plots)
    text = summary(exploration.content, findings, advice, command(advice))
    result = {
        **exploration.content,
        "findings": [finding.to_json() for finding in findings],
        "advice": [item.to_json() for item in advice],
    }
    with disk_full_named(folder):
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        for plot in plots.values():
            write_atomic(folder / "plots" / f"{plot.name}.png", plot.png)
        write_atomic(folder / "report.html", page.encode("utf-8"))
        write_atomic(folder / "summary.md", text.encode("utf-8", "replace"))
        write_json_atomic(folder / RESULT, result)
    progress("write the report", 1, 1)
    return findings
