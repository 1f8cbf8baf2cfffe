"""What is known of the machine that a plan is made on: finished runs first, then a probe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.verbs.progress_bar import progress_bar

if TYPE_CHECKING:
    from mgm_exp.config import ExperimentConfig
    from mgm_exp.plan import Calibration, Measured
    from mgm_exp.plan.calibration import Finished


class ThisMachine:
    """Looked at once, when the first cell asks.

    Args:
        measures: Measure it for 20 seconds, and keep what was found.
    """

    def __init__(self, *, measures: bool = False) -> None:
        self._measures = measures
        self._device: dict[str, Any] | None = None
        self._calibration: Calibration | None = None

    def measured(self, config: ExperimentConfig) -> Measured | None:
        """What is known of it for this configuration; None where another card was named (``plan.device``)."""
        from mgm_exp.config import Card
        from mgm_exp.plan import Measured, calibrate
        from mgm_exp.plan.cell import WITHOUT_IMAGES

        if config.plan.device is not Card.auto:
            return None
        if self._device is None:
            from mgm_exp.record.environment import this_device

            self._device = this_device()
        if self._calibration is None:
            self._calibration = calibrate(Path(config.paths.root), str(self._device["name"]))
        probed = self._probe(config)
        n = len(self._calibration.trained)
        speed = self._calibration.speed(config.model.name)
        source = f"at the speed of {n} finished stage{'s'[: n != 1]} on this machine"
        if speed is None and probed is not None:
            speed = probed
            source = f"at the speed of this machine's matrix products alone (--probe); {WITHOUT_IMAGES}"
        answers = self._calibration.answer_speed(config.model.name)
        return Measured(speed, source, self._calibration.memory_factor(), answers)

    def _probe(self, config: ExperimentConfig) -> float | None:
        from mgm_exp.config import Precision
        from mgm_exp.plan import architecture_of
        from mgm_exp.plan.lengths import ASSUMED
        from mgm_exp.plan.probe import measure, read_probe

        assert self._device is not None
        name, is_gpu = str(self._device["name"]), self._device["type"] == "cuda"
        precision = "fp32" if config.train.precision is Precision.fp32 else "bf16"
        root = Path(config.paths.root)
        if self._measures:
            self._measures = False
            sizes = architecture_of(config.model)
            tokens = config.train.micro_batch_size * (sizes.visual_tokens + (config.plan.text_tokens or ASSUMED))
            with progress_bar() as on_progress:
                measure(sizes, name, precision, tokens=tokens, on_progress=on_progress).save(root)
        found = read_probe(root, name, precision, 0 if is_gpu else int(self._device["threads"]))
        return None if found is None else found.flops_per_s

    def show(self) -> None:
        """Prints every finished stage with what was predicted of it."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        if not console.is_terminal:
            console = Console(width=200)
        found = self._calibration.finished if self._calibration else ()
        if not found:
            console.print("no finished run of this machine below paths.root to compare the plan with")
            return
        table = Table(box=None, pad_edge=False)
        for column in ("finished on this machine", "stage", "steps", "GFLOP/s", "seconds", "predicted from the others",
                       "error", "peak GiB", "predicted", "error"):  # fmt: skip
            table.add_column(column, justify="left" if column in ("finished on this machine", "stage") else "right")
        for row in map(self._row, found):
            seconds, error = row["predicted_s"], row["time_error"]
            table.add_row(
                Text(row["run"]), Text(row["stage"]), f"{row['steps']:,}", f"{row['flops_per_s'] / 1e9:,.1f}",
                f"{row['seconds']:.1f}", *(("", "") if error is None else (f"{seconds:.1f}", f"{error:+.0%}")),
                *(
                    ("", f"{row['predicted_gib']:.2f}", "")
                    if row["peak_gib"] is None
                    else (f"{row['peak_gib']:.2f}", f"{row['predicted_gib']:.2f}", f"{row['memory_error']:+.1%}")
                ),
            )  # fmt: skip
        console.print(table)

    def _row(self, stage: Finished) -> dict[str, Any]:
        assert self._calibration is not None
        error = self._calibration.time_error(stage)
        return {
            "run": f"{stage.run.parent.name}/{stage.run.name}",
            "stage": stage.stage,
            "model": stage.model,
            "steps": stage.steps,
            "seconds": round(stage.seconds, 3),
            "predicted_s": None if error is None else round(stage.seconds * (1 + error), 3),
            "time_error": None if error is None else round(error, 4),
            "flops_per_s": stage.speed,
            "predicted_gib": round(stage.predicted_gib, 4),
            "peak_gib": stage.measured_gib,
            "memory_error": None if stage.memory_error is None else round(stage.memory_error, 4),
        }

    def to_json(self) -> dict[str, Any]:
        """``calibration[{run, stage, ...}]``: predicted and measured, a row for each finished stage."""
        return {"calibration": [self._row(stage) for stage in self._calibration.finished] if self._calibration else []}
