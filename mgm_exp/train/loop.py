"""The story of one training stage, top to bottom: read :meth:`_Run.train` first."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from mgm_exp.config import GuardAction
from mgm_exp.errors import Interrupted, LossNotFinite, OutOfMemory, Pruned
from mgm_exp.train.assemble import Stage, assemble
from mgm_exp.train.checkpoint import CheckpointClock, Progress, Saver, load_newest
from mgm_exp.train.contract import MovementCheck
from mgm_exp.train.determinism import determinism
from mgm_exp.train.generators import own_generators
from mgm_exp.train.guards import Guards, Trouble
from mgm_exp.train.job import StageSummary, TrainJob, derived_seed
from mgm_exp.train.listener import Listener
from mgm_exp.train.memory import MemoryGrowth, PeakMemory, write_summary
from mgm_exp.train.metrics_file import MetricsFile, read_rows
from mgm_exp.train.micro_batch import summary_path
from mgm_exp.train.outputs import write_outputs
from mgm_exp.train.profile import StepProfiler, part
from mgm_exp.train.ranks import Ranks
from mgm_exp.train.recovery import ROLLBACK, ends, failure_of, roll_back
from mgm_exp.train.rows import facts_of, step_row
from mgm_exp.train.schedule import cosine_with_warmup, warmup_steps
from mgm_exp.train.step import Launched, Outcome, Passes, alone, take_step
from mgm_exp.train.stop import StopRequest
from mgm_exp.train.tf32 import tf32
from mgm_exp.train.time_shares import DATA
from mgm_exp.train.validation import VALIDATION, EarlyStopping, Validation
from mgm_exp.train.vitals import Vitals, gradient_statistics

# From here on (share of the time, and seconds) it is said at the end that steps waited for their data.
MUCH_WAITING = (0.1, 30.0)
Assemble = Callable[..., Stage]  # as assemble


def train_stage(job: TrainJob, ranks: Ranks, listener: Listener, stop: StopRequest) -> StageSummary:
    """Trains one stage from its newest checkpoint, or from its beginning; called by every process of the stage.

    Raises:
        Interrupted: ``stop`` was requested; the state is saved.
        Pruned: the listener said so at a validation point; the state is saved.
        TrainingFailed: The loss stays not finite, a guard's policy is to stop, or the trainable set is not what was
            declared.
        OutOfMemory: Memory ended in a step; where one process trains alone, the state before it is saved.
        UserError: The model, the data or the machine cannot do what the configuration asks for.
    """
    config = job.experiment()
    with (
        own_generators(derived_seed(config.seed, job.stage), ranks.device),
        determinism(config.train.deterministic),
        tf32(config.train.tf32),
    ):
        return alone(training(job, ranks, listener, stop))


def training(
    job: TrainJob, ranks: Ranks, listener: Listener, stop: StopRequest, make: Assemble | None = None
) -> Passes[StageSummary]:
    """The same, as the passes that it asks for; its global generators are its own while it runs.

    Args:
        make: Puts the stage together; None: as for one that trains alone.
    """
    run = _Run(job, ranks, listener, stop, make)
    try:
        return (yield from run.train())
    finally:
        run.profiler.discard()
        run.saver.close()


class _Run:
    """One stage while it runs, on one of its processes. All of them take every turn together.

    On a GPU a step is read after the next one was launched, so that the device always has something to do; it is read
    at once where something depends on it (a checkpoint, a validation point, a policy that changes the next step).
    """

    def __init__(
        self, job: TrainJob, ranks: Ranks, listener: Listener, stop: StopRequest, make: Assemble | None
    ) -> None:
        self.job, self.ranks, self.listener, self.stop = job, ranks, listener, stop
        self.memory = PeakMemory(ranks.device)
        self.metrics = MetricsFile(job.metrics)
        self.stage = stage = (make or assemble)(job, ranks, listener.say, listener.on_progress, stop.is_requested)
        self.progress = self._resumed()
        config = stage.config.train
        self.guards = Guards(config.guards, self.progress.guards)
        self.vitals = Vitals(stage.model, stage.engine, ranks, config.guards.dead_after)
        self.growth = MemoryGrowth.of(ranks.device)
        self.check = self._movement_check()
        self.clock = CheckpointClock(stage.checkpointing, self.progress.step)
        self.saver = Saver(
            job.checkpoints,
            stage.engine,
            stage.belongs_to,
            ranks,
            keep=stage.checkpointing.keep,
            in_background=stage.checkpointing.background,
            on_done=listener.on_checkpoint,
        )
        self.warmup = warmup_steps(stage.settings.warmup_ratio, stage.n_steps)
        self.validation = Validation.of(job, stage, ranks)
        self.early = self._early_stopping()
        self.is_pruned = False
        self.steps = stage.steps_from(self.progress.step, self.guards.batches_skipped)
        self.launched: deque[Launched] = deque()
        self.is_looked_at = self.can_move = False
        self.reads_late = stage.engine.reads_late and not self.guards.changes_later_steps
        self.read_at = 0.0
        to_go = stage.n_steps - self.progress.step
        self.profiler = StepProfiler(job, stage, ranks, steps_to_go=to_go, is_alone=make is None, say=listener.say)

    def train(self) -> Passes[StageSummary]:
        """Steps, and what lies between them: validation points, checkpoints, roll-backs."""
        n_steps = self.stage.n_steps
        if self.guards.may_roll_back and not self.progress.step:
            self._save()  # else a roll-back of the first steps would lead nowhere
        while self.progress.step < n_steps:
            self.saver.look()
            is_ending = self.early.is_over or self.is_pruned or self._agree_to_stop()
            if is_ending and not self.launched:
                break
            if not is_ending:
                yield from self._launch()
            at = self.progress.step + len(self.launched)
            is_point = not is_ending and self.validation is not None and self.validation.is_due(at)
            is_due = not is_ending and self.clock.is_due(at, self.ranks)
            reads_all = is_point or is_due or is_ending or at == n_steps or self.is_looked_at or self.check is not None
            if self._read(0 if reads_all or not self.reads_late else 1):
                continue  # rolled back
            if is_point:
                self._validate()
            if is_due and self.clock.last_step != at:
                self._save()
        return self._end()

    def _end(self) -> StageSummary:
        job, progress, n_steps = self.job, self.progress, self.stage.n_steps
        self.profiler.close()
        if self.check and (progress.step == n_steps or self.early.is_over):
            progress.verified = _note_check(job, self.check, progress, self.listener)
        if self.clock.last_step != progress.step:
            self._save()
        self.saver.finish()
        self.ranks.barrier()
        if self.is_pruned:
            raise Pruned(
                f"The {job.stage} stage was stopped after step {progress.step} of {n_steps}: other trials do better."
            )
        if self.early.is_over:
            self.listener.say(f"{job.stage}: ends early after step {progress.step} of {n_steps}: {self.early.reason}")
        elif progress.step < n_steps:
            raise Interrupted(
                f"The {job.stage} stage was stopped by {self.stop.reason or 'a request'} after step {progress.step} of "
                f"{n_steps}; its state is saved.",
                advice="The same command continues from there.",
            )
        share = progress.data_wait_share(is_hidden=self.stage.engine.reads_late)
        if self.ranks.is_first and share >= MUCH_WAITING[0] and progress.data_wait >= MUCH_WAITING[1]:
            self.listener.say(
                f"{job.stage}: {share:.0%} of the time went by waiting for data: train.workers (given: "
                f"{self.stage.config.train.workers}) reads ahead in processes of its own, train.feature_cache and "
                "train.resized_cache_gb read less"
            )
        return write_outputs(job, self.stage, progress, self.guards, self.ranks)

    # -- a step ------------------------------------------------------------------------------------------------

    def _launch(self) -> Passes[None]:
        """Hands the next step to the device."""
        stage, ranks, guards = self.stage, self.ranks, self.guards
        self.profiler.step()
        step = self.progress.step + len(self.launched)
        lr_factor = cosine_with_warmup(step, self.warmup, stage.n_steps) * guards.lr_factor
        self.can_move = lr_factor > 0
        if self.check and self.can_move:
            self.check.before_update()
        ranks.marks.step = step
        batch = step + guards.batches_skipped
        asked = time.perf_counter()
        with part(DATA):
            micro_batches = next(self.steps)
        waited = time.perf_counter() - asked
        self.is_looked_at = self.vitals.is_due(self.progress.updates + len(self.launched))
        try:
            with self.vitals.watching(micro_batches) if self.is_looked_at else nullcontext():
                launched = yield from take_step(
                    stage.engine,
                    stage.settings,
                    ranks,
                    micro_batches,
                    step,
                    lr_factor,
                    fingerprint=stage.fingerprint_of(batch) if ranks.world_size > 1 else 0,
                    limits=guards.limits(),
                    mining=self.vitals.mining,
                    before_update=self._gradient_statistics(step),
                )
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(error) from error
        self.launched.append(replace(launched, waited=waited))

    def _gradient_statistics(self, step: int) -> Callable[[], None] | None:
        every = self.stage.config.train.gradient_statistics_every
        if every is None or (step + 1) % every:
            return None

        def record() -> None:
            groups = gradient_statistics(self.stage.engine)
            if self.ranks.is_first:
                self._event("gradient_statistics", groups=groups, step=step + 1)

        return record

    def _read(self, keep: int) -> bool:
        """Reads the launched steps but for the newest ``keep``, and does what they ask for; whether one of them led
        back to a checkpoint."""
        while len(self.launched) > keep:
            launched = self.launched.popleft()
            outcome, now = launched.outcome(), time.perf_counter()
            if self.check and self.can_move and outcome.applied:
                self.check.after_update(has_images=outcome.images > 0)
                if self.check.is_done:
                    self.progress.verified = _note_check(self.job, self.check, self.progress, self.listener)
                    self.check = None
            seconds, self.read_at = now - max(launched.started, self.read_at), now
            waited, *in_use = self._count(outcome, seconds, launched.waited)
            trouble = None
            if outcome.event in (None, "not_finite", "spike"):
                trouble = self.guards.note(self.progress.step, outcome.loss, outcome.grad_norm, outcome.event)
            self._tell(outcome, seconds, waited, trouble)
            self._look(outcome, in_use)
            if trouble and self._react(trouble, outcome):
                return True
        return False

    def _count(self, outcome: Outcome, seconds: float, waited: float) -> list[float]:
        """Counts a step; returns the wait for data and the memory in use of the process that has most of each."""
        progress = self.progress
        progress.step += 1
        progress.seconds += seconds
        progress.samples += outcome.samples
        progress.tokens += outcome.tokens
        mine = [self.memory.gib(), waited, *self.growth.in_use(self.ranks.device)]
        peak, longest, *in_use = (max(column) for column in zip(*self.ranks.gather(mine), strict=True))
        progress.data_wait += longest
        progress.peak_memory_gib = max(progress.peak_memory_gib, peak)
        if outcome.applied:
            progress.updates += 1
            progress.last_loss = outcome.loss
        return [longest, *in_use]

    def _tell(self, outcome: Outcome, seconds: float, waited: float, trouble: Trouble | None) -> None:
        """The step's line in ``metrics.jsonl``, and that of the trouble it was."""
        facts: dict[str, Any] = {}
        if trouble and (self.guards.count(trouble.reason) or trouble.action is not GuardAction.warn):
            facts = facts_of(trouble, self.stage, self.guards, self.progress, outcome)
        if not self.ranks.is_first:
            return
        row = step_row(self.job, self.stage, self.progress, self.guards, outcome, seconds, waited)
        if any(outcome.mining):
            row["mining_not_finite"] = sum(outcome.mining)
        self._write(row | facts if outcome.event else row)
        if facts and not outcome.event and trouble and trouble.action is not GuardAction.rollback:
            self._event(trouble.reason, **facts)

    def _look(self, outcome: Outcome, in_use: list[float]) -> None:
        """Signs that something else is wrong: named, and nothing is done about them."""
        progress, guards = self.progress, self.guards
        found: list[tuple[str, dict[str, Any]]] = []
        if any(outcome.mining) and outcome.event != "not_finite":  # there the step's own row says so
            batch = progress.step - 1 + guards.batches_skipped
            facts: dict[str, Any] = {"nan": outcome.mining[0], "infinite": outcome.mining[1], "batch": batch}
            detail = "scores of patch info mining were replaced; the loss does not show it"
            facts |= {"reason": "mining_not_finite", "action": "warn", "detail": detail}
            found.append(("mining_not_finite", {**facts, "sample_ids": self.stage.ids_of(batch)}))
        if self.is_looked_at and outcome.applied and not self.launched:
            dead = self.vitals.faults(outcome.images > 0, outcome.connector_norm)
            found += [(event, {"detail": detail}) for event, detail in dead]
        leak = self.growth.note(in_use, self.stage.n_steps - progress.step)
        if leak is not None:
            found.append(("memory_growth", {"detail": str(leak), "mib_per_step": round(leak.mib_per_step, 3)}))
        for event, facts in found:
            if guards.count(event) and self.ranks.is_first:
                self.listener.say(f"{self.job.stage}: step {progress.step}: {event}: {facts['detail']}")
                self._event(event, **facts)

    # -- trouble -----------------------------------------------------------------------------------------------

    def _react(self, trouble: Trouble, outcome: Outcome) -> bool:
        """Does what the policy says; whether it led back to a checkpoint."""
        job, progress, guards = self.job, self.progress, self.guards
        facts = facts_of(trouble, self.stage, guards, progress, outcome)
        if ends(trouble):
            raise failure_of(trouble, progress, facts["sample_ids"], guards, job)
        if trouble.action is GuardAction.lower_lr:
            guards.lower_lr(progress.step)
            self.listener.say(
                f"{job.stage}: step {progress.step}: {trouble.reason}: {trouble.detail}; the learning rate is "
                f"{guards.lr_factor:g} of the schedule from here"
            )
        if trouble.action is not GuardAction.rollback:
            return False
        self._roll_back(trouble, facts)
        return True

    def _roll_back(self, trouble: Trouble, facts: dict[str, Any]) -> None:
        """Back to the last good checkpoint; its next batches are those after the trouble."""
        job, stage, before = self.job, self.stage, self.progress
        self.launched.clear()
        self.saver.finish()
        self.progress = roll_back(job.checkpoints, stage, self.guards, before, trouble, self.ranks)
        self.guards = Guards(self.guards.config, self.progress.guards)
        if self.ranks.is_first:
            number = self.guards.state["rollbacks"]
            rows = self.metrics.cut_back(self.progress.step, number - 1)
            self.listener.on_start(stage.n_steps, rows)
            self._event(ROLLBACK, rollback=number, from_step=before.step, **facts)
            self.listener.say(
                f"{job.stage}: step {before.step}: {trouble.reason}: {trouble.detail}; back to step "
                f"{self.progress.step}, and {before.step - self.progress.step} batches are left out"
            )
        self.ranks.barrier()
        self._save()
        self.check = self._movement_check()
        self.early = self._early_stopping()
        self.steps = stage.steps_from(self.progress.step, self.guards.batches_skipped)

    def _out_of_memory(self, error: BaseException) -> OutOfMemory:
        """Keeps what is known of the memory, and the state where nobody else is needed for it."""
        job, ranks = self.job, self.ranks
        path = summary_path(job.work, ranks.rank)
        write_summary(path, ranks.device, error)
        saved = ""
        if ranks.world_size == 1 and not self._read(0):
            if self.clock.last_step != self.progress.step and self.progress.step:
                self.stage.engine.discard()
                self._save()
            self.saver.finish()
            saved = f", and the state after step {self.progress.step} is saved"
        return OutOfMemory(
            f"CUDA out of memory in step {self.progress.step + 1} of the {job.stage} stage with micro-batches of "
            f"{self.stage.settings.micro_batch_size}: {error}. What it was used for stands in {path}{saved}.",
            advice="Lower train.micro_batch_size (train.auto_micro_batch=true does it by itself), or take "
            "model.gradient_checkpointing=true, zero=2 or 3, or a smaller train.max_length.",
        )

    # -- between the steps -------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """One validation point; the same answer on every process."""
        assert self.validation is not None
        started = time.perf_counter()
        value = self.validation.score()
        self.early.note(value)
        told_to_stop = False
        if self.ranks.is_first:
            seconds = round(time.perf_counter() - started, 3)
            self._event(VALIDATION, **self.validation.facts(value), seconds=seconds)
            told_to_stop = self.listener.on_validation(self.progress.step, value)
        self.is_pruned = bool(self.ranks.gather([told_to_stop])[0][0])
        keep_best = self.stage.checkpointing.keep_best
        if keep_best and self.progress.is_among_best(value, keep_best):
            self._save()

    def _save(self) -> None:
        """A checkpoint, unless the state is not worth keeping: it would take the place of a good one.

        Raises:
            LossNotFinite: A weight or an optimizer state is NaN or infinite.
        """
        job, stage, progress, ranks = self.job, self.stage, self.progress, self.ranks
        broken = sorted(set(ranks.gather_texts(stage.engine.not_finite()[:8])))
        if broken:
            raise LossNotFinite(
                f"Weights or optimizer state of the {job.stage} stage are not finite after step {progress.step} "
                f"({', '.join(broken[:5])}{', ...' if len(broken) > 5 else ''}), though no loss or gradient was; the "
                "state is not saved, and the last good checkpoint stays.",
                advice=f"Lower the learning rate; the last good checkpoint is in {job.checkpoints}.",
            )
        self.saver.save(progress)
        self.clock.saved(progress.step)

    def _agree_to_stop(self) -> bool:
        """Whether any process was asked to stop: all of them stop at the same step."""
        return any(row[0] for row in self.ranks.gather([self.stop.is_requested()]))

    def _movement_check(self) -> MovementCheck | None:
        stage = self.stage
        if self.progress.verified:
            return None
        return MovementCheck(stage.module, stage.engine, stage.trainable, self.ranks)

    def _early_stopping(self) -> EarlyStopping:
        rows = read_rows(self.job.metrics) if self.validation else ()
        return EarlyStopping(self.stage.config.train.early_stopping, rows)

    def _resumed(self) -> Progress:
        """The newest whole checkpoint, or the beginning; ``metrics.jsonl`` is cut back to it."""
        job, stage, ranks, say = self.job, self.stage, self.ranks, self.listener.say
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        found, passed_over = load_newest(job.checkpoints, stage.engine, stage.belongs_to, ranks)
        self.progress = progress = found or Progress()
        if found:
            progress.resumed_from.append(progress.step)
        if not ranks.is_first:
            return progress
        rows = self.metrics.cut_back(progress.step, progress.guards.get("rollbacks", 0))
        self.listener.on_start(stage.n_steps, rows)
        for why in passed_over:
            say(f"{job.stage}: passed over a damaged checkpoint: {why}")
            self._event("damaged_checkpoint", detail=why)
        if found:
            say(f"{job.stage}: continues after step {progress.step} of {stage.n_steps}")
            changed = progress.split_changed
            if changed:
                told = ", ".join(f"{key} {then} -> {now}" for key, (then, now) in changed.items())
                say(
                    f"{job.stage}: it was begun with another split ({told}): the steps are the same up to rounding, "
                    "not to the last bit"
                )
            self._event("resumed", **({"split_changed": changed} if changed else {}))
        return progress

    def _event(self, event: str, **facts: Any) -> None:
        self._write({"event": event, "stage": self.job.stage, "step": self.progress.step, **facts})

    def _write(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        self.listener.on_row(row)


def _note_check(job: TrainJob, check: MovementCheck, progress: Progress, listener: Listener) -> dict[str, Any]:
    report = {"step": progress.step + 1, **check.report()} if check.is_done else check.report()
    rest = "" if check.is_done else f"; not moved yet: {', '.join(report['not_moved'][:5])}"
    listener.say(
        f"{job.stage}: trainable set verified: {report['moved']} tensors moved, {report['frozen_tensors']} frozen ones "
        f"did not ({report['frozen_check']} compared){rest}"
    )
    return report
