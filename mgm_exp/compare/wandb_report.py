"""The comparison as a W&B Report: our verdict and statistics as text, W&B's own panels for the runs beside them.

W&B's panels know no intervals, no paired tests and no corrections: what decides stands in the text, which is the same
as in ``table.md``. The panels are for looking around: what differs between runs, curves, parallel coordinates,
importance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mgm_exp.compare.html.view import View
from mgm_exp.compare.runs import Run
from mgm_exp.compare.table import markdown
from mgm_exp.compare.wording import verdict_lines
from mgm_exp.errors import MissingDependencyError

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report

# W&B lays panels out on a grid of so many columns.
_COLUMNS = 24
_LONGEST_TITLE = 128
_STAGES = {"align": "Align stage", "instruct": "Instruct stage"}
_CURVES = (("loss", True), ("grad_norm", True), ("lr", False))


@dataclass(frozen=True)
class Place:
    """Where a report goes, and which of W&B's runs it shows.

    Args:
        project, entity: Of W&B; entity None: the key's own.
        run_ids: W&B's id of each run of the comparison.
        report_id: The report to write anew; empty for a new one.
    """

    project: str
    entity: str | None
    run_ids: Sequence[str]
    report_id: str = ""


def wandb_report(comparison: Mapping[str, Any], runs: Sequence[Run], title: str, place: Place) -> Report:
    """Builds the report; building it asks W&B for the project already.

    Args:
        comparison: What :func:`mgm_exp.compare.compare` returned.
        runs: The runs it was made of.
        title: The report's heading.
        place: Where it goes.

    Raises:
        MissingDependencyError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise MissingDependencyError(
            f"W&B Reports need the package wandb-workspaces, which cannot be imported ({error}).",
            advice="pip install 'mgm-exp[wandb]', or pip install wandb-workspaces.",
        ) from error
    report = wr.Report(project=place.project, **({} if place.entity is None else {"entity": place.entity}))
    report.title = title[:_LONGEST_TITLE]
    report.description = verdict_lines(comparison)[0]
    report.width = "fluid"
    report.id = place.report_id
    view = View(comparison, runs)
    report.blocks = [
        wr.H2(text="Verdict"),
        wr.MarkdownBlock(text=markdown(comparison)),
        wr.P(
            text="The panels below are W&B's: they show all runs, and know nothing of intervals and tests. Accuracies "
            "in them are between 0 and 1."
        ),
        wr.H2(text="Scores and costs"),
        _grid(wr, report, place, _score_panels(wr, view)),
        wr.H2(text="Curves"),
        _grid(wr, report, place, _curve_panels(wr)),
        wr.H2(text="What differs"),
        _grid(wr, report, place, [(wr.RunComparer(diff_only="split"), _COLUMNS, 12)]),
    ]
    return report


def save_report(report: Report) -> tuple[str, str]:
    """Saves it. Returns its address, and its id for the next time."""
    report.save()
    return str(report.url), str(report.id)


def _score_panels(wr: Any, view: View) -> list[tuple[Any, int, int]]:
    panels = []
    settings = view.settings()
    for benchmark in view.comparison["benchmarks"]:
        score = f"{benchmark}/accuracy"
        panels.append((wr.BarPlot(title=f"Accuracy, {benchmark}", metrics=[score]), 8, 8))
        cost = {"x": wr.SummaryMetric("peak_memory_gib"), "y": wr.SummaryMetric(score)}
        panels.append((wr.ScatterPlot(title=f"Accuracy against peak memory (GiB), {benchmark}", **cost), 8, 8))
        time = {"x": wr.SummaryMetric("wall_s"), "y": wr.SummaryMetric(score)}
        panels.append((wr.ScatterPlot(title=f"Accuracy against seconds, {benchmark}", **time), 8, 8))
        if settings:
            axes = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key)) for key in settings]
            axes.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(score)))
            panels.append((wr.ParallelCoordinatesPlot(title=f"All settings, {benchmark}", columns=axes), 14, 9))
            panels.append((wr.ParameterImportancePlot(with_respect_to=score), 10, 9))
    return panels


def _curve_panels(wr: Any) -> list[tuple[Any, int, int]]:
    """Stages apart: align is never compared with instruct."""
    return [
        (
            wr.LinePlot(title=f"{name}: {key}", x=f"{stage}/step", y=[f"{stage}/{key}"], log_y=is_log),
            _COLUMNS // len(_CURVES),
            8,
        )
        for stage, name in _STAGES.items()
        for key, is_log in _CURVES
    ]


def _grid(wr: Any, report: Report, place: Place, sized: Sequence[tuple[Any, int, int]]) -> Any:
    """Panels in rows, over the runs of the comparison alone."""
    from wandb_workspaces import expr

    x = y = tallest = 0
    panels = []
    for panel, width, height in sized:
        if x + width > _COLUMNS:
            x, y, tallest = 0, y + tallest, 0
        panel.layout = wr.Layout(x=x, y=y, w=width, h=height)
        x, tallest = x + width, max(tallest, height)
        panels.append(panel)
    own = expr.Metric("ID").isin(list(place.run_ids))
    runset = wr.Runset(entity=report.entity, project=report.project, name="Compared runs", filters=[own])
    return wr.PanelGrid(runsets=[runset], panels=panels)
