"""What finished runs of a machine say of the plan: how far its predictions were off, and how fast the machine is.

A finished run holds its configuration, its steps and what they took. Each of its trained stages is planned again from
the configuration and set beside the measurement. The speed found that way, operations of the plan's own count a second,
needs no data sheet and no guess of what share of a peak is reached: a wrong count cancels out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mgm_exp.config import from_plain
from mgm_exp.errors import MgmError
from mgm_exp.plan.cell import plan_cell
from mgm_exp.plan.lengths import Curated, Rows
from mgm_exp.plan.stage_plan import StagePlan
from mgm_exp.store import read_record, read_yaml

# Runs that are looked at, the newest first: the machine as it is now.
MOST_RUNS = 60
# Steps at the beginning of a stage that warm caches and allocators up.
_WARM_UP = 2
_EVALUATE = "evaluate["


@dataclass(frozen=True)
class Finished:
    """One trained stage of a finished run, or a benchmark that it answered.

    Args:
        run: Its folder.
        stage: ``align``, ``instruct`` or ``evaluate[NAME]``.
        model: ``model.name``.
        steps: That were measured; of a benchmark its questions.
        seconds: They took.
        flops: They cost, by the plan's count, over all processes.
        devices: Processes.
        predicted_gib: Peak memory of a process by the plan.
        measured_gib: As it was recorded; None on the CPU, where it is that of the whole process.
    """

    run: Path
    stage: str
    model: str
    steps: int
    seconds: float
    flops: float
    devices: int
    predicted_gib: float
    measured_gib: float | None

    @property
    def speed(self) -> float:
        """Operations a second of one device."""
        return self.flops / self.seconds / self.devices

    @property
    def is_training(self) -> bool:
        return not self.stage.startswith(_EVALUATE)

    @property
    def memory_error(self) -> float | None:
        """How far the prediction was off, as a share of the measurement."""
        return None if self.measured_gib is None else self.predicted_gib / self.measured_gib - 1


@dataclass(frozen=True)
class Calibration:
    """What is known of this machine.

    Args:
        finished: Stages that were measured on it.
    """

    finished: tuple[Finished, ...]

    @property
    def trained(self) -> tuple[Finished, ...]:
        """Those that trained."""
        return tuple(stage for stage in self.finished if stage.is_training)

    def speed(self, model: str) -> float | None:
        """Operations a second of one device, the median of stages of this model, else of all; None without any."""
        return _median_speed(self.trained, model)

    def answer_speed(self, model: str) -> float | None:
        """The same while questions were answered, loading the model and reading images included."""
        return _median_speed([stage for stage in self.finished if not stage.is_training], model)

    def memory_factor(self) -> float | None:
        """Measured over predicted peak, the median; None where fewer than three stages were measured on a GPU."""
        ratios = [s.measured_gib / s.predicted_gib for s in self.finished if s.measured_gib is not None]
        return median(ratios) if len(ratios) >= 3 else None

    def time_error(self, stage: Finished) -> float | None:
        """How far a stage's time would have been off, predicted from the others; None without others."""
        others = [o for o in self.finished if o is not stage and o.is_training == stage.is_training]
        speed = _median_speed(others, stage.model)
        return None if speed is None else stage.speed / speed - 1


def _median_speed(stages: Sequence[Finished], model: str) -> float | None:
    same = [stage.speed for stage in stages if stage.model == model]
    speeds = same or [stage.speed for stage in stages]
    return median(speeds) if speeds else None


def calibrate(root: Path, machine: str) -> Calibration:
    """Reads the finished runs below ``paths.root`` that ran on this machine.

    Args:
        root: ``paths.root``.
        machine: The device's name, as a manifest has it.
    """
    found: dict[str, Finished] = {}
    for folder in _finished_runs(root):
        manifest = _record(folder / "manifest.json")
        device = manifest.get("device")
        if not isinstance(device, dict) or device.get("name") != machine:
            continue
        made = [stage for stage in manifest.get("stages", ()) if isinstance(stage, dict)]
        keys = {stage.get("name"): stage.get("key") for stage in made}
        for name, stage in _stages_of(folder, made, is_gpu=device.get("type") == "cuda"):
            found.setdefault(str(keys.get(name, stage.run)), stage)  # a shared stage counts once
    return Calibration(tuple(found.values()))


def _finished_runs(root: Path) -> list[Path]:
    patterns = ("runs/*/*", "sweeps/*/*", "sweeps/*/*/seed_*")
    folders = [path for pattern in patterns for path in root.glob(f"{pattern}/result.json")]
    newest = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)[:MOST_RUNS]
    return [path.parent for path in newest if _record(path).get("status") == "completed"]


def _stages_of(folder: Path, made: Sequence[dict[str, Any]], *, is_gpu: bool) -> Iterator[tuple[str, Finished]]:
    """Each with its name in the manifest."""
    try:
        config = from_plain(read_yaml(folder / "config.yaml"))
        data = _record(folder / "data.json")
        config.plan.align_rows = _kept(data, "align")
        config.plan.rows = _kept(data, "instruct")
        config.plan.prices = None  # a table of then, which may be gone
        cell = plan_cell(config, with_advice=False, curated=_curated(data))
        plans = {plan.name: plan for plan in cell.stages}
    except (OSError, ValueError, TypeError, MgmError):
        return  # of another version, or damaged: it says nothing
    rows = _rows(folder / "metrics.jsonl")
    for name, plan in plans.items():
        steps = [row for row in rows if row.get("stage") == name and "event" not in row]
        found = _measured(plan, steps)
        if found is not None:
            flops, seconds, peak = found
            yield name, Finished(
                folder, name, config.model.name, len(steps) - _WARM_UP, seconds, flops, config.devices,
                plan.peak.total / 1024**3, peak if is_gpu else None,
            )  # fmt: skip
    for phase in cell.phases:
        for stage in made:
            name, seconds = str(stage.get("name")), _number(stage, "seconds")
            # "evaluate[demo] the trained model"; its variants and baselines are asked otherwise
            if name == f"{phase.name} the trained model" and phase.flops and phase.count and seconds > 0:
                yield name, Finished(
                    folder, phase.name, config.model.name, phase.count, seconds, phase.flops, config.devices,
                    phase.peak.total / 1024**3, None,
                )  # fmt: skip


def _measured(plan: StagePlan, steps: Sequence[dict[str, Any]]) -> tuple[float, float, float] | None:
    """Operations, seconds and peak GiB of the steps after the first ones; the plan's count is scaled by how long their
    samples were. A row's ``seconds`` and ``tokens`` are those of all steps so far."""
    if len(steps) <= _WARM_UP or not plan.flops or not plan.steps:
        return None
    before, last = steps[_WARM_UP - 1], steps[-1]
    seconds = _number(last, "seconds") - _number(before, "seconds")
    if seconds <= 0:
        return None
    share = (len(steps) - _WARM_UP) / plan.steps
    tokens = _number(last, "tokens") - _number(before, "tokens")
    length = tokens / (plan.tokens * share) if plan.tokens and tokens > 0 else 1.0
    return plan.flops * share * length, seconds, max(_number(row, "peak_memory_gib") for row in steps)


def _number(row: dict[str, Any], key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if isinstance(row, dict)]
    except (OSError, ValueError):
        return []


def _record(path: Path) -> dict[str, Any]:
    try:
        found = read_record(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _curated(data: dict[str, Any]) -> Rows:
    """The rows that the run learnt from: a plan of now knows its own in the same way."""
    try:
        return {stage: Curated.of_report(data[stage]) for stage in ("align", "instruct")}
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return {}


def _kept(data: dict[str, Any], stage: str) -> int | None:
    part = data.get(stage)
    kept = part.get("kept") if isinstance(part, dict) else None
    return kept if isinstance(kept, int) and kept > 0 else None
