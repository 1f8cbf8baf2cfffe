"""The story of one training stage, top to bottom: read :func:`_train` first."""

from __future__ import annotations

import math
import shutil
import time
from typing import Any

from mgm_exp.config import AdapterKind, CheckpointConfig
from mgm_exp.errors import Interrupted, LossNotFinite, Pruned
from mgm_exp.store import write_json_atomic
from mgm_exp.train.assemble import Stage, assemble
from mgm_exp.train.checkpoint import Progress, load_newest, save_checkpoint
from mgm_exp.train.contract import MovementCheck
from mgm_exp.train.generators import own_generators
from mgm_exp.train.job import StageSummary, TrainJob, derived_seed
from mgm_exp.train.listener import Listener
from mgm_exp.train.memory import PeakMemory
from mgm_exp.train.metrics_file import MetricsFile, read_rows
from mgm_exp.train.ranks import Ranks
from mgm_exp.train.schedule import cosine_with_warmup, warmup_steps
from mgm_exp.train.step import Outcome, take_step
from mgm_exp.train.stop import StopRequest
from mgm_exp.train.validation import VALIDATION, EarlyStopping, Validation

# This many steps in a row without an update end the stage.
MAX_SKIPPED_IN_A_ROW = 3


def train_stage(job: TrainJob, ranks: Ranks, listener: Listener, stop: StopRequest) -> StageSummary:
    """Trains one stage from its newest checkpoint, or from its beginning; called by every process of the stage.

    Raises:
        Interrupted: ``stop`` was requested; the state is saved.
        Pruned: the listener said so at a validation point; the state is saved.
        TrainingFailed: The loss stays not finite, or the trainable set is not what was declared.
        UserError: The model, the data or the machine cannot do what the configuration asks for.
    """
    with own_generators(derived_seed(job.experiment().seed, job.stage), ranks.device):
        return _train(job, ranks, listener, stop)


def _train(job: TrainJob, ranks: Ranks, listener: Listener, stop: StopRequest) -> StageSummary:
    memory = PeakMemory(ranks.device)
    metrics = MetricsFile(job.metrics)
    stage = assemble(job, ranks, listener.say)
    progress = _resume(job, stage, ranks, metrics, listener)
    check = None if progress.verified else MovementCheck(stage.module, stage.engine, stage.trainable, ranks)
    clock = CheckpointClock(stage.checkpointing, progress.step)
    warmup = warmup_steps(stage.settings.warmup_ratio, stage.n_steps)
    steps = stage.steps_from(progress.step)
    validation = Validation.of(job, stage, ranks)
    early = EarlyStopping(stage.config.train.early_stopping, read_rows(job.metrics) if validation else ())
    is_pruned = False

    while progress.step < stage.n_steps and not (early.is_over or is_pruned or _agree_to_stop(ranks, stop)):
        started = time.perf_counter()
        lr_factor = cosine_with_warmup(progress.step, warmup, stage.n_steps)
        can_move = lr_factor > 0
        if check and can_move:
            check.before_update()
        ranks.marks.step = progress.step
        fingerprint = stage.fingerprint_of(progress.step) if ranks.world_size > 1 else 0
        outcome = take_step(stage.engine, stage.settings, ranks, next(steps), progress.step, lr_factor, fingerprint)
        if check and can_move and outcome.applied:
            check.after_update(has_images=outcome.images > 0)
            if check.is_done:
                progress.verified, check = _note_check(job, check, progress, listener), None

        seconds = time.perf_counter() - started
        _count(progress, outcome, seconds, memory, ranks)
        row = _row(job, stage, progress, outcome, seconds)
        if ranks.is_first:
            metrics.append(row)
            listener.on_row(row)
        _fail_if_stuck(job, progress, outcome)
        if validation and validation.is_due(progress.step):
            is_pruned = _validate(job, validation, early, progress, ranks, metrics, listener)
        if clock.is_due(progress.step, ranks):
            _save(job, stage, progress, ranks, listener)
            clock.saved(progress.step)

    if check and (progress.step == stage.n_steps or early.is_over):
        progress.verified = _note_check(job, check, progress, listener)
    if clock.last_step != progress.step:
        _save(job, stage, progress, ranks, listener)
    if is_pruned:
        raise Pruned(
            f"The {job.stage} stage was stopped after step {progress.step} of {stage.n_steps}: other trials do better."
        )
    if early.is_over:
        listener.say(f"{job.stage}: ends early after step {progress.step} of {stage.n_steps}: {early.reason}")
    elif progress.step < stage.n_steps:
        raise Interrupted(
            f"The {job.stage} stage was stopped by {stop.reason or 'a request'} after step {progress.step} of "
            f"{stage.n_steps}; its state is saved.",
            advice="The same command continues from there.",
        )
    return _finish(job, stage, progress, ranks)


def _validate(
    job: TrainJob,
    validation: Validation,
    early: EarlyStopping,
    progress: Progress,
    ranks: Ranks,
    metrics: MetricsFile,
    listener: Listener,
) -> bool:
    """One validation point; whether the run is to be pruned. The same answer on every process."""
    started = time.perf_counter()
    value = validation.score()
    early.note(value)
    told_to_stop = False
    if ranks.is_first:
        seconds = round(time.perf_counter() - started, 3)
        _event(job, progress, VALIDATION, metrics, listener, **validation.facts(value), seconds=seconds)
        told_to_stop = listener.on_validation(progress.step, value)
    return bool(ranks.gather([told_to_stop])[0][0])


class CheckpointClock:
    """When the next checkpoint is due: by steps and by time, whichever comes first."""

    def __init__(self, config: CheckpointConfig, step: int) -> None:
        self._config = config
        self.last_step = step
        self._last_time = time.monotonic()

    def is_due(self, step: int, ranks: Ranks) -> bool:
        """The same answer on every process: the first one's clock decides."""
        config = self._config
        if config.every_steps is not None and step % config.every_steps == 0:
            return True
        if config.every_minutes is None:
            return False
        is_late = time.monotonic() - self._last_time >= config.every_minutes * 60
        return bool(ranks.gather([is_late])[0][0])

    def saved(self, step: int) -> None:
        self.last_step, self._last_time = step, time.monotonic()


def _resume(job: TrainJob, stage: Stage, ranks: Ranks, metrics: MetricsFile, listener: Listener) -> Progress:
    """The newest whole checkpoint, or the beginning; ``metrics.jsonl`` is cut back to it."""
    job.checkpoints.mkdir(parents=True, exist_ok=True)
    found, passed_over = load_newest(job.checkpoints, stage.engine, stage.belongs_to, ranks)
    progress = found or Progress()
    if found:
        progress.resumed_from.append(progress.step)
    if not ranks.is_first:
        return progress
    rows = metrics.cut_back(progress.step)
    listener.on_start(stage.n_steps, rows)
    for why in passed_over:
        listener.say(f"{job.stage}: passed over a damaged checkpoint: {why}")
        _event(job, progress, "damaged_checkpoint", metrics, listener, detail=why)
    if found:
        listener.say(f"{job.stage}: continues after step {progress.step} of {stage.n_steps}")
        _event(job, progress, "resumed", metrics, listener)
    return progress


def _event(
    job: TrainJob, progress: Progress, event: str, metrics: MetricsFile, listener: Listener, **facts: Any
) -> None:
    row = {"event": event, "stage": job.stage, "step": progress.step, **facts}
    metrics.append(row)
    listener.on_row(row)


def _agree_to_stop(ranks: Ranks, stop: StopRequest) -> bool:
    """Whether any process was asked to stop: all of them stop at the same step."""
    return any(row[0] for row in ranks.gather([stop.is_requested()]))


def _count(progress: Progress, outcome: Outcome, seconds: float, memory: PeakMemory, ranks: Ranks) -> None:
    progress.step += 1
    progress.seconds += seconds
    progress.samples += outcome.samples
    progress.tokens += outcome.tokens
    peaks = [row[0] for row in ranks.gather([memory.gib()])]
    progress.peak_memory_gib = max(progress.peak_memory_gib, *peaks)
    if outcome.applied:
        progress.updates += 1
        progress.last_loss = outcome.loss
        progress.skipped_in_a_row = 0
    elif outcome.event == "not_finite":
        progress.skipped_in_a_row += 1


def _row(job: TrainJob, stage: Stage, progress: Progress, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """The line of ``metrics.jsonl``; numbers that are not finite are written as null."""
    row: dict[str, Any] = {
        "stage": job.stage,
        "step": progress.step,
        "epoch": round(stage.plan.epoch_at(progress.step), 6),
        "loss": _finite(outcome.loss),
        "lr": outcome.lr.get("llm", outcome.lr.get("connector")),
        "grad_norm": _finite(outcome.grad_norm),
        "tokens": progress.tokens,
        "tokens_per_s": round(outcome.tokens / seconds, 3),
        "samples_per_s": round(outcome.samples / seconds, 3),
        "seconds": round(progress.seconds, 4),
        "peak_memory_gib": round(progress.peak_memory_gib, 4),
    }
    if "llm" in outcome.lr and "connector" in outcome.lr:
        row["lr_connector"] = outcome.lr["connector"]
    if outcome.loss_scale is not None:
        row["loss_scale"] = outcome.loss_scale
    if outcome.event:
        row = {"event": outcome.event, **row, "sample_ids": outcome.sample_ids}
    return row


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _fail_if_stuck(job: TrainJob, progress: Progress, outcome: Outcome) -> None:
    if progress.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    shown = ", ".join(outcome.sample_ids[:8])
    raise LossNotFinite(
        f"Loss or gradient of the {job.stage} stage was not finite in {progress.skipped_in_a_row} steps in a row, the "
        f"last at step {progress.step} (loss {outcome.loss}, gradient norm {outcome.grad_norm}; samples {shown}"
        f"{', ...' if len(outcome.sample_ids) > 8 else ''}); no weight was changed by them.",
        advice="Lower the learning rate, lengthen the warm-up, use bf16 or fp32 in place of fp16, or remove the "
        f"samples that metrics.jsonl names; the last good checkpoint is in {job.checkpoints}.",
    )


def _note_check(job: TrainJob, check: MovementCheck, progress: Progress, listener: Listener) -> dict[str, Any]:
    report = {"step": progress.step + 1, **check.report()} if check.is_done else check.report()
    rest = "" if check.is_done else f"; not moved yet: {', '.join(report['not_moved'][:5])}"
    listener.say(
        f"{job.stage}: trainable set verified: {report['moved']} tensors moved, {report['frozen_tensors']} frozen ones "
        f"did not ({report['frozen_check']} compared){rest}"
    )
    return report


def _save(job: TrainJob, stage: Stage, progress: Progress, ranks: Ranks, listener: Listener) -> None:
    folder = save_checkpoint(
        job.checkpoints, stage.engine, progress, stage.belongs_to, ranks, keep=stage.checkpointing.keep
    )
    if ranks.is_first:
        listener.on_checkpoint(folder)


def _finish(job: TrainJob, stage: Stage, progress: Progress, ranks: Ranks) -> StageSummary:
    """Writes what the stage leaves to the ones after it."""
    from mgm_exp.model import family_of

    family = family_of(stage.config.model)
    summary = StageSummary(
        stage=job.stage,
        steps=progress.step,
        skipped_steps=progress.step - progress.updates,
        tokens=progress.tokens,
        seconds=round(progress.seconds, 4),
        train_tokens_per_s=round(progress.tokens / progress.seconds, 3) if progress.seconds else 0.0,
        samples_per_s=round(progress.samples / progress.seconds, 3) if progress.seconds else 0.0,
        peak_memory_gib=round(progress.peak_memory_gib, 4),
        final_loss=progress.last_loss,
        trainable={**stage.trainable.record(), "verified": progress.verified},
        engine=stage.engine.describe(),
        n_parameters=stage.n_parameters,
        n_train=stage.n_train,
        resumed_from=progress.resumed_from,
        load_report=stage.load_report,
        ended_early=progress.step < stage.n_steps,
    )
    is_full = job.stage == "instruct" and stage.config.adapter.kind is AdapterKind.full
    with stage.engine.gathered(family.to_be_written(stage.model, is_full)):
        if ranks.is_first:
            job.out.mkdir(parents=True, exist_ok=True)
            family.save(stage.model, job.stage, is_full, job.out)
            shutil.copyfile(job.metrics, job.out / "metrics.jsonl")
            write_json_atomic(job.out / "summary.json", summary.to_dict())
    ranks.barrier()
    return summary
