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
from typing import TYPE_CHECKING, Any

from mgm_exp.campaign.constraints import Constraints
from mgm_exp.campaign.opening import enqueue, refuse_other_choices
from mgm_exp.campaign.roster import Roster, forget
from mgm_exp.campaign.rungs import Rungs
from mgm_exp.campaign.trial import Trial, overrides_of
from mgm_exp.capacity import none_fits
from mgm_exp.config import ExperimentConfig, PrunerName, plain
from mgm_exp.errors import ConfigError, Interrupted, MgmError, ProcessKilled, UserError
from mgm_exp.folders import read_record, wait_until_free
from mgm_exp.repeats import seeds_of
from mgm_exp.search.budget import FOLDER as SWEEPERS
from mgm_exp.search.budget import Clock
from mgm_exp.search.outcome import Ending, Outcome, Verdict, judge, mean_of
from mgm_exp.search.rungs import UNTIL
from mgm_exp.search.samplers import VIOLATIONS
from mgm_exp.search.space import Point, Space
from mgm_exp.search.study import trial_of
from mgm_exp.slots import Slots, Work
from mgm_exp.stages import config_hash
from mgm_exp.store import Lease
from mgm_exp.study_books import LOSSES, POINT, REASON, REFUSED, VALUES, VERDICT, Entry, StudyBooks
from mgm_exp.study_table import in_short
from mgm_exp.sweep_folder import record_failure, record_stop

if TYPE_CHECKING:
    from optuna import Study

_POLL_S = 0.5
# Points in a row that were not run, the last one for its memory: nothing that is searched makes it fit.
MOST_TOO_LARGE = 50


class Campaign:
    """See the module.

    Args:
        study: The Optuna study.
        space: What is chosen for each trial.
        books: Of the sweep.
        base: The configuration of the fixed overrides.
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
        self.clock = Clock(self.folder)
        self.constraints = Constraints(base, config_value)
        self.mine: dict[int, Trial] = {}
        self.roster = Roster(study, books, base, self.clock, self.mine, say)
        self.rungs = self.roster.rungs
        self._again: list[Trial] = []
        self._waiting_said: set[str] = set()
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
            failed = [entry for entry in self.books.counted() if entry.status == "failed"]
            self.books.status = "failed" if failed else "interrupted" if self.roster.set_aside else "completed"
            if self._is_left:
                self._submitted()
            elif self.rungs and not self.roster.stop_reason and not self.roster.set_aside:
                self._drop_paused(self.rungs)
            self.books.stopped_because = self.roster.stop_reason
            with self.roster.desk():
                return self.books.write()
        finally:
            self.clock.tick(0, save=True)
            presence.release(forget=True)

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        """With ``sweep.budget.interrupt`` this process is asked to stop, as by a signal, when its hours are used up."""
        hours = self.roster.budget.hours
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
        hours = self.roster.budget.hours
        return self.settings.budget.interrupt and hours is not None and self.clock.hours >= hours

    def _end_of_time(self) -> None:
        self.roster.stop_reason = f"sweep.budget.hours={self.roster.budget.hours:g} are used up"
        left = len(self.roster.running(with_paused=True))
        kept = f": {left} trial(s) kept their state; more hours continue them" if left else ""
        self._say(f"{self.roster.stop_reason}{kept}")

    def _come(self) -> Lease:
        """Says that somebody works here, for ``mgm-exp status``; clears away who was killed."""
        folder = self.folder / SWEEPERS
        for path in folder.glob("at-work-*"):
            forget(Lease(path))
        presence = Lease(folder / f"at-work-{uuid.uuid4().hex[:12]}")
        presence.acquire()
        return presence

    def _begin(self) -> None:
        with self.roster.desk():
            refuse_other_choices(self.study, self.space)
            self.roster.clear_claims()
            enqueue(self.study, self.space, self.books, self.settings)
            done = self.books.counted()
            self.books.write()
        states = _counts(done)
        self._say(
            f"sweep {self.books.name}: {self.roster.budget.trials} trial(s) in {self.folder}"
            + (f"; {len(done)} so far ({states})" if done else "")
        )

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
            with self.roster.desk():
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
        alive = self.roster.of_others()
        if not alive:
            with self.roster.desk():
                return self.roster.has_more()
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
        with self.roster.desk():
            self.books.write()

    def _drop_paused(self, rungs: Rungs) -> None:
        """The search is over: trials that were never promoted are told as pruned."""
        with self.roster.desk():
            if self.roster.running():
                return  # of another sweeper, which does this when it is through
            saved = rungs.drop(self.settings.seeds)
        if saved:
            self._say(saved)

    # -- which trial next ---------------------------------------------------------------------------------------

    def _next(self) -> Trial | None:
        """A trial to run now: one of ours that was lost, or what the roster has."""
        if self._again:
            return self._again.pop(0)
        while True:
            found = self.roster.next()
            if found is None:
                return None
            trial = self._prepared(*found)
            if trial is not None:
                return trial

    def _prepared(self, number: int, claim: Lease) -> Trial | None:
        """Draws what is not drawn yet, and checks it; None where the trial is over already."""
        live = trial_of(self.study, number)
        attributes = live.user_attrs
        point: Point | None = None
        try:
            point = self.space.choose(live, self._config_value)
            first = None if self.settings.seeds == 1 else self.base.seed
            config = self._config_of(overrides_of(number, point, first, self.books.name))
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
        until = attributes.get(UNTIL, self.rungs.ladder.first) if self.rungs else None
        losses = int(attributes.get(LOSSES, 0))
        trial = Trial(
            number, self.folder / str(number), claim, point, config, self._seeds(config), losses=losses, until=until
        )
        overrides = [*point.overrides]
        live.set_user_attr(
            POINT, {"overrides": overrides, "params": _json(point.params), "config_hash": config_hash(config)}
        )
        missed = self.constraints.violations(trial, {})
        if any(violation is not None and violation > 0 for violation in missed):
            self._refuse(trial, missed)
            return None
        self.roster.refused_in_a_row = 0
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
            result = read_record(trial.run_dir / "result.json")
            if not result:
                return False
            outcome = judge(result, self.books.objectives)
            if outcome.verdict is Verdict.paused and self.rungs and self.rungs.has_arrived(trial):
                self._pause(trial, self.rungs)
                return True
            if not outcome.verdict.is_final:
                return False
            self._note(trial, outcome)
        return False

    def _refuse(self, trial: Trial, missed: list[float | None]) -> None:
        """A point that misses a constraint is not run; the sampler learns of it."""
        self.roster.refused_in_a_row += 1
        which = self.constraints.missed(missed)
        live = trial_of(self.study, trial.number)
        live.set_user_attr(VIOLATIONS, [0.0, *(violation or 0.0 for violation in missed)])
        live.set_user_attr(REASON, f"misses {which}")
        live.set_user_attr(VERDICT, REFUSED)
        self._tell(trial.number, "PRUNED")
        self._say(f"trial {trial.number} {in_short(trial.point.params)}: not run, misses {which}")
        trial.claim.release(forget=True)
        if self.roster.refused_in_a_row >= MOST_TOO_LARGE and str(which).startswith("predicted_memory_gib"):
            raise none_fits(trial.config, self.roster.refused_in_a_row, str(which))

    # -- running it ---------------------------------------------------------------------------------------------

    def _start(self, trial: Trial) -> None:
        seed = trial.seeds[0]
        run_dir = trial.run_dir
        of_seed = "" if seed is None else f" seed={seed}"
        to_rung = "" if trial.pause_after is None else f" to step {trial.pause_after}"
        self._say(f"\ntrial {trial.number}: {in_short(trial.point.params)}{of_seed}{to_rung}")
        self._write_books()
        if self.slots.are_here:
            wait_until_free(run_dir, self._say)
        overrides = overrides_of(trial.number, trial.point, seed, self.books.name)
        if trial.pause_after is not None:
            overrides.append(f"sweep.pause_after={trial.pause_after}")
        self.slots.start(Work(trial.number, run_dir, tuple(overrides)))

    def _ended(self, work: Work, ending: Ending, *, is_stopping: bool = False) -> None:
        trial = self.mine[work.number]
        outcome = judge(read_record(work.run_dir / "result.json"), self.books.objectives, ending)
        if outcome.verdict is Verdict.interrupted and is_stopping:
            self._leave(trial)
            return
        if outcome.verdict is Verdict.interrupted and ending.set_aside:
            record_stop(work.run_dir, outcome.reason, work.overrides)
            self._say(f"trial {trial.number} interrupted: {outcome.reason}")
            self.roster.set_aside.add(trial.number)
            self._leave(trial)
            return
        if outcome.verdict is Verdict.user_error:
            self._leave(trial)
            if is_stopping:
                return
            raise UserError(f"trial {trial.number} ({in_short(trial.point.params)}): {outcome.reason}")
        if outcome.verdict is Verdict.paused and self.rungs and self.rungs.has_arrived(trial):
            self._pause(trial, self.rungs)
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

    def _pause(self, trial: Trial, rungs: Rungs) -> None:
        """It waits at its rung, claimed by nobody, until it is promoted or the search is over."""
        where = rungs.pause(trial)
        del self.mine[trial.number]
        trial.claim.release(forget=True)
        self._write_books()
        self._say(f"trial {trial.number} {where}")

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
        missed = [violation or 0.0 for violation in self.constraints.violations(trial, result)]
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
        outside = self.constraints.missed(missed)
        if outside:
            why += f"; misses {outside}"
        self._say(
            f"trial {trial.number} {outcome.verdict.value.replace('_', ' ')}{' ' + shown if shown else ''}{why}{end}"
        )

    def _stop_if_everything_fails(self, outcome: Outcome) -> None:
        if outcome.verdict is not Verdict.failed:
            return
        failed = [entry for entry in self.books.counted() if entry.verdict == Verdict.failed.value]
        if len(failed) >= self.settings.max_failures:
            raise MgmError(
                f"{len(failed)} trials failed (sweep.max_failures={self.settings.max_failures}); the last one: "
                f"{outcome.reason}",
                advice="sweep.rerun=failed runs them again once the cause is gone.",
            )


def _counts(entries: Sequence[Entry]) -> str:
    states = [entry.verdict or entry.status or "running" for entry in entries]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _json(params: dict[str, Any]) -> dict[str, Any]:
    """As ``sweep.json`` holds it: what only formulas use is left out."""
    return {key: plain(value) for key, value in params.items() if not key.startswith("_")}
