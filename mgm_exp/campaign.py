"""One sweeper at work on a search: take a trial, run it, tell the study what came of it, until nothing is left to do.

Who works on a trial holds its claim, a lease in the sweep's folder. A trial that the study calls running and that
nobody claims was left behind by a sweeper that was killed: it is taken up under its own number, in its own folder, from
its own checkpoint. So several sweepers can work on one study, and a kill at any instant loses nothing:

    asked, not claimed          taken up: what was drawn stays, the rest is drawn as it would have been
    claimed, not yet finished   taken up: the run continues from its checkpoint
    finished, not yet told      its result.json is read and told

With ``sweep.pruner.name=rungs`` a trial runs to its next rung and pauses there: it stays running for the study, its
attributes say so, nobody claims it, and whoever has a free slot promotes the best one (:mod:`mgm_exp.search.rungs`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.capacity import has_named_card, memory_limit_gib
from mgm_exp.config import ExperimentConfig, PrunerName, Rerun, plain
from mgm_exp.errors import ConfigError, Interrupted, MgmError, ProcessKilled, UserError
from mgm_exp.folders import read_record, wait_until_free
from mgm_exp.repeats import run_dirs, seeds_of, subfolder
from mgm_exp.search.budget import FOLDER as SWEEPERS
from mgm_exp.search.budget import Budget, Clock
from mgm_exp.search.expression import Expression
from mgm_exp.search.outcome import FIELDS, Ending, Outcome, Verdict, field_of, judge, mean_of
from mgm_exp.search.reports import read_reports
from mgm_exp.search.rungs import PAUSED, UNTIL, Climber, Ladder, Standing, is_paused
from mgm_exp.search.samplers import VIOLATIONS
from mgm_exp.search.space import Point, Space
from mgm_exp.search.study import trial_of
from mgm_exp.slots import Slots, Work, in_sweep
from mgm_exp.stages import config_hash
from mgm_exp.store import Lease, LeaseHeld
from mgm_exp.study_books import (
    AGAIN_FOR,
    CLAIMS,
    LOSSES,
    POINT,
    REASON,
    REFUSED,
    VALUES,
    VERDICT,
    Entry,
    StudyBooks,
    steps_of,
)
from mgm_exp.study_table import in_short
from mgm_exp.sweep_folder import record_drop, record_failure, record_stop

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

# Points in a row that miss a constraint before the search gives up.
MOST_REFUSED = 200
# What a constraint may name that is known of a point before it runs; see mgm_exp.plan.
PREDICTED = ("predicted_memory_gib", "predicted_hours")
_POLL_S = 0.5
_TAKE_UP_S = 2.0


@dataclass
class Trial:
    """A trial that this sweeper works on.

    Args:
        claim: Held until the trial is over, or left to another sweeper.
        seeds: Those that are still to run.
        outcomes: Of those that have.
        until: Step at which its first seed pauses; None: it runs to its end.
    """

    number: int
    claim: Lease
    point: Point
    config: ExperimentConfig
    seeds: list[int | None]
    outcomes: list[Outcome] = field(default_factory=list)
    losses: int = 0
    until: int | None = None

    @property
    def pause_after(self) -> int | None:
        """Where the run that is next pauses: the first seed climbs, the others follow when it has come to its end."""
        return None if self.outcomes else self.until


class Campaign:
    """See the module.

    Args:
        study: The Optuna study.
        space: What is chosen for each trial.
        books: Of the sweep.
        sweep: The configuration of the fixed overrides.
        slots: Where trials run.
        config_value: Reads a key of the configuration that some overrides compose to.
        config_of: The checked configuration that some overrides compose to.
        say: Prints a line.
    """

    def __init__(
        self,
        study: Study,
        space: Space,
        books: StudyBooks,
        base: ExperimentConfig,
        slots: Slots,
        config_value: Callable[[str, Sequence[str]], Any],
        config_of: Callable[[Sequence[str]], ExperimentConfig],
        say: Callable[[str], None] = print,
    ) -> None:
        self.study, self.space, self.books, self.slots = study, space, books, slots
        self.settings, self.base = base.sweep, base
        self._config_value, self._config_of, self._say = config_value, config_of, say
        self.folder = books.folder
        books.plan = {"n_trials": base.sweep.n_trials, "slots": slots.size}
        self.budget = Budget.of(base.sweep)
        self.clock = Clock(self.folder)
        self.ladder = Ladder.of(base, books.directions[0])
        self.constraints = [Expression(text, "sweep.constraints") for text in constraints_of(base)]
        self.mine: dict[int, Trial] = {}
        self._again: list[Trial] = []
        self._refused_in_a_row = 0
        self._waiting_said: set[str] = set()
        self._stop_reason = ""
        # Trials whose job somebody cancelled: left for the next command.
        self._set_aside: set[int] = set()
        self._is_left = False

    # -- one call of the command --------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Works until the search is over.

        Returns:
            The content of ``sweep.json``.

        Raises:
            Interrupted: a signal; running trials have saved their state, the same command continues.
            UserError: a trial met something that every other one would meet, too.
        """
        presence = self._come()
        try:
            self._begin()
            try:
                with self._deadline():
                    self._work()
            except (KeyboardInterrupt, Interrupted):
                if not self._is_time_up():
                    self._break_off("interrupted", "a signal asked it to stop")
                    raise
                self._break_off("running", "")
                self._end_of_time()
            except MgmError as error:
                self._break_off("failed", error.message)
                raise
            failed = [entry for entry in self._counted() if entry.status == "failed"]
            self.books.status = "failed" if failed else "interrupted" if self._set_aside else "completed"
            if self._is_left:
                self._submitted()
            elif self.ladder and not self._stop_reason and not self._set_aside:
                self._drop_paused()
            self.books.stopped_because = self._stop_reason
            with self._desk():
                return self.books.write()
        finally:
            self.clock.tick(0, save=True)
            presence.release(forget=True)

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        """With ``sweep.budget.interrupt`` this process is asked to stop, as by a signal, when its hours are used up."""
        hours = self.budget.hours
        if hours is None or not self.settings.budget.interrupt or self._is_time_up():
            yield
            return
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                "sweep.budget.interrupt stops trials by a signal, which Python delivers to the main thread only.",
                advice="Call sweep() from the main thread, or leave sweep.budget.interrupt=false.",
            )
        alarm = threading.Timer((hours - self.clock.hours) * 3600, os.kill, (os.getpid(), signal.SIGTERM))
        alarm.daemon = True
        alarm.start()
        try:
            yield
        finally:
            alarm.cancel()

    def _is_time_up(self) -> bool:
        """Whether nothing runs any more, not even what has begun."""
        self.clock.tick(self._devices())
        hours = self.budget.hours
        return self.settings.budget.interrupt and hours is not None and self.clock.hours >= hours

    def _end_of_time(self) -> None:
        self._stop_reason = f"sweep.budget.hours={self.budget.hours:g} are used up"
        left = len(self._running(with_paused=True))
        kept = f": {left} trial(s) kept their state; more hours continue them" if left else ""
        self._say(f"{self._stop_reason}{kept}")

    def _come(self) -> Lease:
        """Says that somebody works here, for ``mgm-exp status``; clears away who was killed."""
        folder = self.folder / SWEEPERS
        for path in folder.glob("at-work-*"):
            _forget(Lease(path))
        presence = Lease(folder / f"at-work-{uuid.uuid4().hex[:12]}")
        presence.acquire()
        return presence

    def _desk(self) -> Lease:
        """Held for the moment in which a trial is drawn or the books are written."""
        return Lease(self.folder / ".desk")

    def _begin(self) -> None:
        with self._desk():
            self._refuse_other_choices()
            self._clear_claims()
            self._enqueue()
            self._enqueue_failed()
            done = self._counted()
            self.books.write()
        states = _counts(done)
        self._say(
            f"sweep {self.books.name}: {self.budget.trials} trial(s) in {self.folder}"
            + (f"; {len(done)} so far ({states})" if done else "")
        )

    def _clear_claims(self) -> None:
        """Claims of trials that were told by a sweeper which was killed before it could give them back."""
        running = {trial.number for trial in self._running()}
        for path in (self.folder / CLAIMS).glob("*"):
            if path.name.isdigit() and int(path.name) not in running:
                _forget(Lease(path))

    def _refuse_other_choices(self) -> None:
        """Optuna can widen and narrow ranges of a study, but not change what a choice consists of."""
        from optuna.distributions import check_distribution_compatibility

        known: dict[str, Any] = {}
        for frozen in self.study.get_trials(deepcopy=False):
            known.update(frozen.distributions)
        for item in self.space.dimensions:
            if item.name not in known:
                continue
            try:
                check_distribution_compatibility(known[item.name], item.domain.distribution())
            except ValueError as error:
                raise UserError(
                    f"{item.key} was chosen from {getattr(known[item.name], 'choices', known[item.name])} in the "
                    f"trials so far, and now from {item.domain}: a study keeps its choices (ranges and intervals may "
                    "change).",
                    advice="Give sweep.name=ANOTHER; what its trials have in common is taken from the store.",
                ) from error

    def _enqueue(self) -> None:
        for number, given in enumerate(self.settings.enqueue):
            point = self.space.fixed_point(given, f"sweep.enqueue[{number}]")
            self.study.enqueue_trial(point, skip_if_exists=True)

    def _enqueue_failed(self) -> None:
        """``sweep.rerun=failed``: a failed trial's point again, under a new number that takes its place."""
        if self.settings.rerun is Rerun.all:
            raise ConfigError(
                "sweep.rerun=all is for grids: a search goes on from what its trials have shown.",
                advice="Give sweep.name=ANOTHER for a search from the beginning (its stages are reused).",
            )
        if self.settings.rerun is not Rerun.failed:
            return
        repeated = self.books.repeated()
        for entry in self.books.entries():
            if entry.verdict == Verdict.failed.value and entry.number not in repeated:
                drawn = self.study.get_trials(deepcopy=False)[entry.number].params
                self.study.enqueue_trial(dict(drawn), user_attrs={AGAIN_FOR: entry.number})

    def _work(self) -> None:
        if self._is_time_up():
            self._end_of_time()
            return
        while True:
            while self.slots.busy < self.slots.size:
                trial = self._next()
                if trial is None:
                    break
                self._start(trial)
                if self.slots.size == 1:
                    break
            busy = self.slots.busy
            self.clock.tick(self._devices())
            ended = self.slots.ended(_POLL_S if busy else 0.0)
            for work, ending in ended:
                self._ended(work, ending)
            self.clock.tick(self._devices())
            if self.books.is_behind:
                self._write_books()
            if self.slots.busy and not ended and self.slots.may_leave():
                self._is_left = True
                return
            if not busy and not self._again and not self._others_or_more():
                return

    def _write_books(self) -> None:
        """``sweep.json``, or a little later where that would be most of what this process does."""
        if self.books.may_write():
            with self._desk():
                self.books.write()

    def _submitted(self) -> None:
        """The trials are with somebody else, and this command ends (``launch.wait=false``)."""
        name, count = self.books.name, len(self.mine)
        for trial in [*self.mine.values()]:
            self._leave(trial)
        self.books.status = "submitted"
        self._say(
            f"sweep {name}: {count} trial(s) submitted. `mgm-exp status {name}` shows them; the same command goes on."
        )

    def _devices(self) -> int:
        return sum(trial.config.devices for trial in self.mine.values() if self.slots.has_begun(trial.number))

    def _others_or_more(self) -> bool:
        """Whether there is something to wait for: trials of other sweepers, which may be left behind."""
        alive = [trial.number for trial in self._running() if not self._is_ours(trial.number)]
        if not alive:
            with self._desk():
                return not self._why_no_more() or self._next_up() is not None
        for number in alive:
            holder = self.books.claim(number).holder()
            who = f"trial {number} is worked on by {holder.holder}" if holder and holder.holder else ""
            if who and who not in self._waiting_said:
                self._waiting_said.add(who)
                self._say(f"waiting: {who}")
        time.sleep(_POLL_S)
        return True

    def _break_off(self, status: str, why: str) -> None:
        """Running trials save their state and end; what ended meanwhile is told."""
        for work, ending in self.slots.stop():
            self._ended(work, ending, is_stopping=True)
        for trial in [*self.mine.values()]:
            trial.claim.release()
        self.mine.clear()
        self.books.status, self.books.stopped_because = status, why
        with self._desk():
            self.books.write()

    # -- which trial next ---------------------------------------------------------------------------------------

    def _next(self) -> Trial | None:
        """A trial to run now: one of ours that was lost, one that somebody left behind, or a new one."""
        if self._again:
            return self._again.pop(0)
        while True:
            # What has begun is ended, also where nothing new is started any more.
            found = self._left_behind()
            if not found and not self._stop_reason:
                found = self._promoted() or self._draw()
            number, claim = found or (None, None)
            if number is None or claim is None:
                return None
            trial = self._prepared(number, claim)
            if trial is not None:
                return trial

    def _running(self, *, with_paused: bool = False) -> list[FrozenTrial]:
        """Trials that somebody works on, or was working on."""
        from optuna.trial import TrialState

        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        # Where no trial pauses (any more) one that has is like one that was left behind.
        return [t for t in running if with_paused or self.ladder is None or not is_paused(t.user_attrs)]

    def _is_ours(self, number: int) -> bool:
        """Whether this sweeper works on it, or has set it aside."""
        return number in self.mine or number in self._set_aside

    def _left_behind(self) -> tuple[int, Lease] | None:
        """A trial that the study calls running and nobody works on, claimed for us."""
        for frozen in self._running():
            if self._is_ours(frozen.number):
                continue
            claim = self.books.claim(frozen.number)
            if claim.holder() is not None:
                continue
            try:
                claim.acquire(timeout_s=_TAKE_UP_S, on_wait=None)
            except LeaseHeld:
                continue
            if frozen.number not in {trial.number for trial in self._running()}:  # told between the two looks
                claim.release(forget=True)
                continue
            if POINT in frozen.user_attrs:
                self._say(f"trial {frozen.number}: was left behind by a sweeper that ended, and is taken up")
            return frozen.number, claim
        return None

    def _draw(self) -> tuple[int, Lease] | None:
        """A new trial, if the search is to have one more."""
        with self._desk():
            why = self._why_no_more()
            if why:
                return None
            number = self.study.ask().number
            claim = self.books.claim(number)
            try:
                claim.acquire(timeout_s=_TAKE_UP_S)
            except LeaseHeld:  # another sweeper saw it between the two lines, and has taken it up
                return self._left_behind()
            if (self.folder / str(number)).exists():
                claim.release(forget=True)
                raise UserError(
                    f"{self.folder / str(number)} is there already, but the study knows nothing of a trial {number}.",
                    advice="The study was moved or deleted. Put it back, or give sweep.name=ANOTHER: what the trials "
                    "made is taken from the store.",
                )
        return number, claim

    # -- rungs --------------------------------------------------------------------------------------------------

    def _promoted(self) -> tuple[int, Lease] | None:
        """A paused trial that may go on, claimed for us, with its next rung."""
        if self._next_up() is None:
            return None
        with self._desk():
            found = self._next_up()
            if found is None:
                return None
            climber, until = found
            frozen = self.study.get_trials(deepcopy=False)[climber.number]
            if climber.standing is Standing.dropped:  # the search was shorter then: its point goes on where it was
                self.study.enqueue_trial(dict(frozen.params), user_attrs={AGAIN_FOR: climber.number})
                return None
            claim = self.books.claim(climber.number)
            try:
                claim.acquire(timeout_s=_TAKE_UP_S)
            except LeaseHeld:  # the one that paused it has not yet given it back
                return None
            trial_of(self.study, climber.number).set_user_attr(UNTIL, until)
        return climber.number, claim

    def _next_up(self) -> tuple[Climber, int] | None:
        """Who is to be promoted now, and to which step; nobody once the search starts nothing more."""
        counted = self._counted()
        if self.ladder is None or self._why_stop(counted):
            return None
        return self.ladder.next_up(self._climbers(), all_drawn=len(counted) >= self.budget.trials)

    def _climbers(self) -> list[Climber]:
        assert self.ladder is not None
        repeated, found = self.books.repeated(), []
        for frozen in self.study.get_trials(deepcopy=False):
            attributes, state = frozen.user_attrs, frozen.state.name
            if state == "WAITING" or attributes.get(VERDICT) == REFUSED or frozen.number in repeated:
                continue
            standing = Standing.completed if state == "COMPLETE" else Standing.ended
            if state == "RUNNING":
                standing = Standing.paused if is_paused(attributes) else Standing.at_work
            elif attributes.get(VERDICT) == Verdict.pruned.value and is_paused(attributes):
                standing = Standing.dropped
            until = int(attributes.get(UNTIL, self.ladder.first))
            found.append(Climber(frozen.number, standing, until, frozen.intermediate_values))
        return found

    def _has_arrived(self, trial: Trial) -> bool:
        """Whether it has reported the rung that it runs to: what it reports is the truth."""
        until = trial.pause_after
        if until is None:
            return False
        reports = read_reports(self._run_dir(trial, trial.seeds[0]) / "reports.jsonl")
        return any(report.step >= until for report in reports)

    def _pause(self, trial: Trial) -> None:
        """It waits at its rung, claimed by nobody, until it is promoted or the search is over."""
        live = trial_of(self.study, trial.number)
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        reports = read_reports(self._run_dir(trial, trial.seeds[0]) / "reports.jsonl")
        for report in reports:
            if report.step not in known:  # the study did not answer the run
                live.report(report.value, report.step)
        live.set_user_attr(PAUSED, trial.until)
        del self.mine[trial.number]
        trial.claim.release(forget=True)
        self._write_books()
        last = reports[-1]
        self._say(f"trial {trial.number} paused at step {last.step} with {last.value:.4f}")

    def _drop_paused(self) -> None:
        """The search is over: trials that were never promoted are told as pruned."""
        assert self.ladder is not None
        with self._desk():
            if self._running():
                return  # of another sweeper, which does this when it is through
            paused = [trial.number for trial in self._running(with_paused=True)]
            climbers = self._climbers()
            counts, done = self.ladder.counts(climbers), sum(c.standing is Standing.completed for c in climbers)
            for number in paused:
                live = trial_of(self.study, number)
                reason = f"not among the best at step {live.user_attrs[PAUSED]}"
                live.set_user_attr(VERDICT, Verdict.pruned.value)
                live.set_user_attr(REASON, reason)
                self._tell(number, "PRUNED")
                for run_dir in run_dirs(self.folder / str(number)):
                    record_drop(run_dir, reason)
            run, full = steps_of(self.folder, [entry.number for entry in self._counted()], self.settings.seeds)
        if counts and full:
            came = ", ".join(f"{count} trial(s) to step {step}" for step, count in counts)
            self.books.plan["rungs"] = {"reached": [list(pair) for pair in counts], "steps": run, "full_steps": full}
            ran = f"{run} steps were run of {full} without pausing ({run / full:.2f})"
            self._say(f"rungs: {came}, {done} to the end; {ran}")

    def _why_no_more(self) -> str:
        """Why no new trial is drawn; empty where one may be. Said once."""
        counted = self._counted()
        if len(counted) >= self.budget.trials:
            return f"all {self.budget.trials} trials have begun"
        return self._why_stop(counted)

    def _why_stop(self, counted: Sequence[Entry]) -> str:
        """Why nothing is begun any more, although there would be more to do; empty where nothing speaks against it."""
        ended = sorted(
            (entry for entry in counted if entry.values and entry.status == "completed"),
            key=lambda entry: (entry.dates[1] or 0.0, entry.number),
        )
        values = [(entry.values or [0.0])[0] for entry in ended]
        reason = self._stop_reason or self.budget.is_spent(self.clock, values, self.books.directions[0])
        if self._refused_in_a_row >= MOST_REFUSED:
            raise ConfigError(
                f"{MOST_REFUSED} points in a row miss sweep.constraints={self.settings.constraints}.",
                advice="Loosen them, or search where they hold.",
            )
        if reason and not self._stop_reason:
            self._stop_reason = reason
            self._say(f"no further trial is started: {reason}")
        return reason

    def _counted(self) -> list[Entry]:
        """The trials that the sweep has: without those that were refused, or that another one repeats."""
        repeated = self.books.repeated()
        return [entry for entry in self.books.entries() if entry.is_counted and entry.number not in repeated]

    def _prepared(self, number: int, claim: Lease) -> Trial | None:
        """Draws what is not drawn yet, and checks it; None where the trial is over already."""
        live = trial_of(self.study, number)
        attributes = live.user_attrs
        point: Point | None = None
        try:
            point = self.space.choose(live, self._config_value)
            first = None if self.settings.seeds == 1 else self.base.seed
            config = self._config_of(self._overrides(number, point, first))
        except Interrupted:  # a signal says nothing about the point: the next command takes it up
            claim.release()
            raise
        except MgmError as error:
            params = point.params if point else {}
            live.set_user_attr(REASON, error.message)
            live.set_user_attr(VERDICT, REFUSED)
            self._tell(number, "FAIL")
            claim.release(forget=True)
            advice = f"{error.advice} A value that suits some trials only is given with when: see docs/sweeps.md."
            raise ConfigError(f"trial {number} ({in_short(params)}): {error.message}", advice=advice.strip()) from error
        until = attributes.get(UNTIL, self.ladder.first) if self.ladder else None
        losses = int(attributes.get(LOSSES, 0))
        trial = Trial(number, claim, point, config, self._seeds(config), losses=losses, until=until)
        overrides = [*point.overrides]
        live.set_user_attr(
            POINT, {"overrides": overrides, "params": _json(point.params), "config_hash": config_hash(config)}
        )
        missed = self._violations(trial, {})
        if any(violation is not None and violation > 0 for violation in missed):
            self._refuse(trial, missed)
            return None
        self._refused_in_a_row = 0
        self.mine[number] = trial
        if self._skip_what_is_done(trial):
            return None
        if trial.seeds:
            return trial
        self._settle(trial)
        return None

    def _seeds(self, config: ExperimentConfig) -> list[int | None]:
        return [*seeds_of(config.seed, self.settings.seeds)] or [None]

    def _skip_what_is_done(self, trial: Trial) -> bool:
        """Reads the results that a sweeper before us did not come to tell; whether the trial has paused."""
        while trial.seeds:
            result = read_record(self._run_dir(trial, trial.seeds[0]) / "result.json")
            if not result:
                return False
            outcome = judge(result, self.books.objectives)
            if outcome.verdict is Verdict.paused and self._has_arrived(trial):
                self._pause(trial)
                return True
            if not outcome.verdict.is_final:
                return False
            self._note(trial, outcome)
        return False

    def _refuse(self, trial: Trial, missed: list[float | None]) -> None:
        """A point that misses a constraint is not run; the sampler learns of it."""
        self._refused_in_a_row += 1
        which = next(c.text for c, v in zip(self.constraints, missed, strict=True) if v is not None and v > 0)
        live = trial_of(self.study, trial.number)
        live.set_user_attr(VIOLATIONS, [0.0, *(violation or 0.0 for violation in missed)])
        live.set_user_attr(REASON, f"misses {which}")
        live.set_user_attr(VERDICT, REFUSED)
        self._tell(trial.number, "PRUNED")
        self._say(f"trial {trial.number} {in_short(trial.point.params)}: not run, misses {which}")
        trial.claim.release(forget=True)

    def _violations(self, trial: Trial, result: dict[str, Any]) -> list[float | None]:
        """By how much each constraint is missed; None where that is not known (yet)."""

        def lookup(name: str) -> Any:
            if name in FIELDS:
                return field_of(result, name)
            if name in PREDICTED:
                return _predicted(name, trial.config)
            if name in trial.point.params:
                return trial.point.params[name]
            return self._config_value(name, trial.point.overrides)

        return [constraint.violation(lookup) for constraint in self.constraints]

    # -- running it ---------------------------------------------------------------------------------------------

    def _run_dir(self, trial: Trial, seed: int | None) -> Path:
        folder = self.folder / str(trial.number)
        return folder if seed is None else folder / subfolder(seed)

    def _start(self, trial: Trial) -> None:
        seed = trial.seeds[0]
        run_dir = self._run_dir(trial, seed)
        of_seed = "" if seed is None else f" seed={seed}"
        to_rung = "" if trial.pause_after is None else f" to step {trial.pause_after}"
        self._say(f"\ntrial {trial.number}: {in_short(trial.point.params)}{of_seed}{to_rung}")
        self._write_books()
        if self.slots.are_here:
            wait_until_free(run_dir, self._say)
        overrides = self._overrides(trial.number, trial.point, seed)
        if trial.pause_after is not None:
            overrides.append(f"sweep.pause_after={trial.pause_after}")
        self.slots.start(Work(trial.number, run_dir, tuple(overrides)))

    def _overrides(self, number: int, point: Point, seed: int | None) -> list[str]:
        """All that one run of a trial is given."""
        subdir = str(number) if seed is None else f"{number}/{subfolder(seed)}"
        of_seed = [] if seed is None else [f"seed={seed}"]
        return [*point.overrides, *of_seed, *in_sweep(number, self.books.name, subdir)]

    def _ended(self, work: Work, ending: Ending, *, is_stopping: bool = False) -> None:
        trial = self.mine[work.number]
        outcome = judge(read_record(work.run_dir / "result.json"), self.books.objectives, ending)
        if outcome.verdict is Verdict.interrupted and is_stopping:
            self._leave(trial)
            return
        if outcome.verdict is Verdict.interrupted and ending.set_aside:
            record_stop(work.run_dir, outcome.reason, work.overrides)
            self._say(f"trial {trial.number} interrupted: {outcome.reason}")
            self._set_aside.add(trial.number)
            self._leave(trial)
            return
        if outcome.verdict is Verdict.user_error:
            self._leave(trial)
            if is_stopping:
                return
            raise UserError(f"trial {trial.number} ({in_short(trial.point.params)}): {outcome.reason}")
        if outcome.verdict is Verdict.paused and self._has_arrived(trial):
            self._pause(trial)
            return
        if not outcome.verdict.is_final:  # lost, or asked to stop by somebody else
            self._lost(trial, outcome, work, is_stopping)
            return
        if not outcome.result or outcome.result.get("status") == "interrupted":
            kind = MemoryError if outcome.verdict is Verdict.infeasible else ProcessKilled
            record_failure(work.run_dir, kind(outcome.reason), work.overrides)
        self._note(trial, outcome)
        if trial.seeds:
            self._again.append(trial)
        else:
            self._settle(trial)

    def _lost(self, trial: Trial, outcome: Outcome, work: Work, is_stopping: bool) -> None:
        """Goes on from its checkpoint under the same number, as often as ``sweep.retries`` allows."""
        if is_stopping:
            self._leave(trial)
            return
        trial.losses += 1
        trial_of(self.study, trial.number).set_user_attr(LOSSES, trial.losses)
        if trial.losses <= self.settings.retries:
            self._say(f"trial {trial.number}: {outcome.reason}; it goes on from its checkpoint")
            self._again.append(trial)
            return
        reason = f"{outcome.reason}, {trial.losses} times (sweep.retries={self.settings.retries})"
        record_failure(work.run_dir, ProcessKilled(reason), work.overrides)
        trial.seeds.clear()
        trial.outcomes.append(Outcome(Verdict.failed, (), reason))
        self._settle(trial)

    def _leave(self, trial: Trial) -> None:
        """It stays running for the study; the next command takes it up."""
        trial.claim.release()
        self.mine.pop(trial.number, None)

    # -- what came of it ----------------------------------------------------------------------------------------

    def _note(self, trial: Trial, outcome: Outcome) -> None:
        """One seed is over. A trial whose seed did not complete, or that is beaten already, runs no further one."""
        trial.seeds.pop(0)
        trial.outcomes.append(outcome)
        if outcome.verdict is not Verdict.completed:
            trial.seeds.clear()
        elif self.settings.pruner.name is PrunerName.wilcoxon and not self.settings.objectives:
            live, place = trial_of(self.study, trial.number), len(trial.outcomes) - 1
            if place not in self.study.get_trials(deepcopy=False)[trial.number].intermediate_values:
                live.report(outcome.values[0], place)
            if trial.seeds and live.should_prune():
                trial.seeds.clear()
                trial.outcomes.append(Outcome(Verdict.pruned, (), "beaten by the best trial on the same seeds"))

    def _settle(self, trial: Trial) -> None:
        """The trial is over: the study is told, the books are written."""
        outcome = mean_of(trial.outcomes)
        verdict, values = outcome.verdict, list(outcome.values)
        live = trial_of(self.study, trial.number)
        result = dict(trial.outcomes[-1].result)
        missed = [violation or 0.0 for violation in self._violations(trial, result)]
        live.set_user_attr(VIOLATIONS, [1.0 if verdict is Verdict.infeasible else 0.0, *missed])
        live.set_user_attr(VERDICT, verdict.value)
        live.set_user_attr(REASON, outcome.reason)
        live.set_user_attr(VALUES, values or None)
        if verdict is Verdict.completed:
            self._tell(trial.number, "COMPLETE", values)
        else:
            self._tell(trial.number, "FAIL" if verdict is Verdict.failed else "PRUNED")
        self._write_books()
        trial.claim.release(forget=True)
        del self.mine[trial.number]
        self._report(trial, outcome, missed)
        self._stop_if_everything_fails(outcome)

    def _tell(self, number: int, state: str, values: Sequence[float] | None = None) -> None:
        from optuna.trial import TrialState

        self.study.tell(number, values, state=TrialState[state], skip_if_finished=True)

    def _report(self, trial: Trial, outcome: Outcome, missed: Sequence[float]) -> None:
        names = self.books.objectives
        shown = ", ".join(f"{n} {v:.4f}" for n, v in zip(names, outcome.values, strict=False))
        best = self.books.best(self.books.entries())
        end = f" (best: trial {best.number}, {(best.values or [0.0])[0]:.4f})" if best else ""
        why = f": {outcome.reason}" if outcome.reason else ""
        outside = [c.text for c, violation in zip(self.constraints, missed, strict=True) if violation > 0]
        if outside:
            why += f"; misses {outside[0]}"
        self._say(
            f"trial {trial.number} {outcome.verdict.value.replace('_', ' ')}{' ' + shown if shown else ''}{why}{end}"
        )

    def _stop_if_everything_fails(self, outcome: Outcome) -> None:
        if outcome.verdict is not Verdict.failed:
            return
        failed = [entry for entry in self._counted() if entry.verdict == Verdict.failed.value]
        if len(failed) >= self.settings.max_failures:
            raise MgmError(
                f"{len(failed)} trials failed (sweep.max_failures={self.settings.max_failures}); the last one: "
                f"{outcome.reason}",
                advice="sweep.rerun=failed runs them again once the cause is gone.",
            )


def constraints_of(config: ExperimentConfig) -> list[str]:
    """Those of the search, and that a point fits on the card that ``plan.device`` names."""
    texts = list(config.sweep.constraints)
    if has_named_card(config):
        texts.append(f"predicted_memory_gib <= {memory_limit_gib(config):g}")
    return texts


def _predicted(name: str, config: ExperimentConfig) -> float:
    """Raises ConfigError where time cannot be predicted."""
    from mgm_exp.plan import predicted_hours, predicted_memory_gib

    value = predicted_memory_gib(config) if name == "predicted_memory_gib" else predicted_hours(config)
    if value is None:
        raise ConfigError(
            "sweep.constraints names predicted_hours, and the hours of a trial are not known.",
            advice="Give plan.device=CARD, and plan.rows and plan.align_rows (or max_steps): `mgm-exp plan` says more.",
        )
    return value


def _forget(lease: Lease) -> None:
    """Removes a lease that nobody holds any more."""
    if lease.holder() is not None:
        return
    try:
        lease.acquire(wait=False)
    except LeaseHeld:
        return
    lease.release(forget=True)


def _counts(entries: Sequence[Entry]) -> str:
    states = [entry.verdict or entry.status or "running" for entry in entries]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _json(params: dict[str, Any]) -> dict[str, Any]:
    """As ``sweep.json`` holds it: what only formulas use is left out."""
    return {key: plain(value) for key, value in params.items() if not key.startswith("_")}
