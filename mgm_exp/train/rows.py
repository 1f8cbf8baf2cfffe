"""The lines of ``metrics.jsonl`` that tell of a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mgm_exp.train.checkpoint import Progress
from mgm_exp.train.guards import Guards, Trouble
from mgm_exp.train.recovery import ends

if TYPE_CHECKING:
    from mgm_exp.train.assemble import Stage
    from mgm_exp.train.job import TrainJob
    from mgm_exp.train.step import Outcome


def step_row(
    job: TrainJob, stage: Stage, progress: Progress, guards: Guards, outcome: Outcome, seconds: float, waited: float
) -> dict[str, Any]:
    """The line of ``metrics.jsonl``; numbers that are not finite are written as null."""
    row: dict[str, Any] = {
        "stage": job.stage,
        "step": progress.step,
        "epoch": round(stage.plan.epoch_at(progress.step + guards.batches_skipped), 6),
        "loss": _finite(outcome.loss),
        "lr": outcome.lr.get("llm", outcome.lr.get("connector")),
        "grad_norm": _finite(outcome.grad_norm),
        "batch_name": stage.batch_name(progress.step - 1 + guards.batches_skipped),
        "tokens": progress.tokens,
        "tokens_per_s": round(outcome.tokens / seconds, 3),
        "samples_per_s": round(outcome.samples / seconds, 3),
        "seconds": round(progress.seconds, 4),
        "data_wait_s": round(waited, 4),
        "peak_memory_gib": round(progress.peak_memory_gib, 4),
    }
    if "llm" in outcome.lr and "connector" in outcome.lr:
        row["lr_connector"] = outcome.lr["connector"]
    if outcome.loss_scale is not None:
        row["loss_scale"] = outcome.loss_scale
    if outcome.event:
        row = {"event": outcome.event, **row, "sample_ids": outcome.sample_ids}
    return row


def facts_of(trouble: Trouble, stage: Stage, guards: Guards, progress: Progress, outcome: Outcome) -> dict[str, Any]:
    """What names the step and its samples in an event row."""
    batch = progress.step - 1 + guards.batches_skipped
    return {
        "reason": trouble.reason,
        "action": "stop" if ends(trouble) else trouble.action.value,
        "detail": trouble.detail,
        "batch": batch,
        "loss": _finite(outcome.loss),
        "grad_norm": _finite(outcome.grad_norm),
        "sample_ids": stage.ids_of(batch),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
