"""The comparison as one HTML file that loads nothing: verdict first, then runs, plots, answers, provenance.

    comparison = compare(paths)
    write_html(comparison, load_runs(paths), "report.html")

Plots are drawn here as SVG, without a plotting library; a few lines of script sort tables and zoom into curves, and
without script nothing is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mgm_exp.compare.html import answers, curves, overview, provenance, trade
from mgm_exp.compare.html.machine import machines
from mgm_exp.compare.html.trouble import trouble
from mgm_exp.compare.html.view import View
from mgm_exp.compare.runs import Run
from mgm_exp.page import Html, Page, element
from mgm_exp.store import write_atomic

__all__ = ["html_page", "write_html"]

_MOST_NAMED = 3


def write_html(
    comparison: Mapping[str, Any], runs: Sequence[Run], path: Path | str, *, refresh_s: float | None = None
) -> Path:
    """Writes the page.

    Args:
        comparison: What :func:`mgm_exp.compare.compare` returned.
        runs: The runs it was made of (:func:`mgm_exp.compare.load_runs` of the same paths).
        path: The file.
        refresh_s: A page that is open in a browser loads itself anew after so many seconds; None: it never does.

    Returns:
        The file.
    """
    target = Path(path)
    write_atomic(target, html_page(comparison, runs, refresh_s=refresh_s, folder=target.parent))
    return target


def html_page(
    comparison: Mapping[str, Any],
    runs: Sequence[Run],
    *,
    refresh_s: float | None = None,
    folder: Path | None = None,
) -> str:
    """The page as text; see :func:`write_html`. With the folder that it will lie in, it links to the runs' pages."""
    view = View(comparison, runs, folder)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    document = Page(_title(view), f"{len(view.entries)} runs, compared {now}", kicker="mgm_exp report")
    document.add(element("style", Html(_own("report.css"))))
    read = answers.read_answers(view)
    for name, block in (
        ("Verdict", overview.verdict(view)),
        ("Configurations", overview.arm_table(view)),
        ("Runs", overview.run_table(view)),
        ("Without a result", overview.ended(view)),
        ("Differences", overview.forest(view)),
        ("How sure", overview.remarks(view)),
        ("Curves", curves.learning_curves(view)),
        ("Trouble", trouble(view)),
        ("Machine", machines(view)),
        ("Costs", trade.costs(view)),
        ("Settings", trade.coordinates(view)),
        ("What matters", trade.effects(view)),
        ("Question types", answers.question_types(view)),
        ("Answers", answers.answer_statistics(view, read)),
        ("Disagreements", answers.disagreements(view, read)),
        ("Data", provenance.data(view)),
        ("To have it again", provenance.reproducibility(view)),
    ):
        if block is not None:
            document.add(block, contents=(_anchor(block), name))
    document.foot(
        "One file that loads nothing. comparison.json beside it holds the numbers, and how each was computed."
    )
    live = element("div", id="live", data_refresh=refresh_s, hidden=True) if refresh_s is not None else Html("")
    document.add(live)
    document.add(element("script", Html(_own("report.js"))))
    return document.html()


def _title(view: View) -> str:
    """What is compared: the sweep's folder, or the labels of a few runs."""
    folders = {run.path.resolve().parent for run in view.runs}
    if len(folders) == 1 and (next(iter(folders)) / "sweep.json").is_file():
        return next(iter(folders)).name
    names = [entry["label"] for entry in view.entries]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _anchor(block: Html) -> str:
    """The id that a section begins with."""
    return block.split('id="', 1)[1].split('"', 1)[0]


def _own(name: str) -> str:
    """A file of this package."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
