"""What each run took of its machine, by minutes since it began: memory, processors, GPUs.

From ``system.jsonl`` of the run folders. A run that was interrupted has a gap in its curves.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mgm_exp import page
from mgm_exp.compare.html.curves import curve_plot, drawn_runs, legend, number
from mgm_exp.compare.html.plot import short
from mgm_exp.compare.html.view import Cells, View
from mgm_exp.compare.runs import Run
from mgm_exp.page import Column, Html
from mgm_exp.store import parse_record, read_text

Sample = Mapping[str, Any]
# Seconds since 1970, and what a sample says of each quantity.
Reading = tuple[float, tuple[float | None, ...]]
_POINTS = 3_000
"""Points of all curves together: about 35 kB of the page."""
_MOST_BYTES = 64 << 20


def _of_gpus(key: str, pick: Callable[[list[float]], float], scale: float = 1.0) -> Callable[[Sample], float | None]:
    def value(sample: Sample) -> float | None:
        gpus = sample.get("gpus")
        found = [number(gpu.get(key)) for gpu in gpus if isinstance(gpu, Mapping)] if isinstance(gpus, list) else []
        known = [one for one in found if one is not None]
        return scale * pick(known) if known else None

    return value


# Title, unit, value of a sample
_QUANTITIES: tuple[tuple[str, str, Callable[[Sample], float | None]], ...] = (
    ("Memory of a GPU", "GiB, the fullest of the run's", _of_gpus("memory_used_gib", max)),
    ("Use of the GPUs", "percent, mean of the run's", _of_gpus("utilization", statistics.fmean, 100.0)),
    ("Memory of the run's processes", "GiB", lambda sample: number(sample.get("process_memory_gib"))),
    ("Processors in use by the run", "processors", lambda sample: number(sample.get("process_cpu"))),
)


def machines(view: View) -> Html | None:
    """A section with a plot for each quantity; None where no run sampled its machine."""
    places = drawn_runs(view)
    runs = {place: view.run(view.entries[place]["run_dir"]) for place in places}
    samples = {place: found for place, run in runs.items() if run and (found := _read(run))}
    if not samples:
        return None
    most = max(12, _POINTS // (len(samples) * len(_QUANTITIES)))
    plots: list[Html] = []
    for kind, (title, unit, _) in enumerate(_QUANTITIES):
        known = [([place], _highest(_points(found, kind), most)) for place, found in samples.items()]
        plots += curve_plot(view, title, title, unit, "minutes since the run began", known, from_zero=True)
    if not plots:
        return None
    return page.section(
        "Machine",
        page.note("Samples of system.jsonl (monitor.every_s); of a stretch the highest is drawn."),
        legend(view, sorted(samples)),
        page.grid(*plots),
        _numbers(view, samples),
        anchor="machine",
    )


def _read(run: Run) -> list[Reading]:
    """All samples that have a time; a line cut off by a kill, or no record of ours, is left out.

    Of each only what is drawn is kept: many long runs have hundreds of thousands of them.
    """
    try:
        text = read_text(run.path / "system.jsonl", _MOST_BYTES, errors="replace")
    except (OSError, ValueError):
        return []
    found: list[Reading] = []
    for line in text.splitlines():
        try:
            row = parse_record(line)
        except ValueError:
            continue
        if isinstance(row, dict) and (at := number(row.get("t"))) is not None:
            found.append((at, tuple(value(row) for _, _, value in _QUANTITIES)))
    return found


def _points(samples: Sequence[Reading], kind: int) -> list[tuple[float, float]]:
    """Minutes since the first sample, and a quantity, where it is known."""
    first = min(at for at, _ in samples)
    return [((at - first) / 60, value) for at, values in samples if (value := values[kind]) is not None]


def _highest(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most ``most`` points: of each stretch the highest."""
    if len(points) <= most:
        return list(points)
    parts = (points[k * len(points) // most : (k + 1) * len(points) // most] for k in range(most))
    return [max(part, key=lambda point: point[1]) for part in parts]


def _numbers(view: View, samples: Mapping[int, Sequence[Reading]]) -> Html:
    """The highest and the mean of each quantity, for those who cannot see the plots or want the numbers."""
    shown = [(title, unit) for title, unit, _ in _QUANTITIES]
    columns = [Column("run"), Column("samples", is_number=True)]
    columns += [Column(f"{title} ({kind})", is_number=True) for title, _ in shown for kind in ("highest", "mean")]
    rows: list[Cells] = []
    for place, found in samples.items():
        cells: Cells = [view.entries[place]["label"], (f"{len(found):,}", float(len(found)))]
        for kind in range(len(_QUANTITIES)):
            known = [one for _, one in _points(found, kind)]
            for one in (max(known), statistics.fmean(known)) if known else (None, None):
                cells.append(("-" if one is None else short(one), one))
        rows.append(cells)
    return page.details("The same in numbers", page.table(columns, rows, name="Machine in numbers"))
