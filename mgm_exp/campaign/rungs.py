"""Trials that pause with their state kept, and who of them goes on: the study's side of :mod:`mgm_exp.search.rungs`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mgm_exp.campaign.trial import Trial
from mgm_exp.repeats import run_dirs
from mgm_exp.search.outcome import Verdict
from mgm_exp.search.reports import Report, read_reports
from mgm_exp.search.rungs import PAUSED, UNTIL, Climber, Ladder, Standing, is_paused
from mgm_exp.search.study import trial_of
from mgm_exp.study_books import REASON, REFUSED, VERDICT, StudyBooks, steps_of
from mgm_exp.sweep_folder import record_drop

if TYPE_CHECKING:
    from optuna import Study


class Rungs:
    """The rungs of one search.

    Args:
        study: The Optuna study: what a trial reported, how far it was allowed to go, whether it has paused.
        books: Of the sweep.
        ladder: Which steps they are.
    """

    def __init__(self, study: Study, books: StudyBooks, ladder: Ladder) -> None:
        self.study, self.books, self.ladder = study, books, ladder

    def next_up(self, *, all_drawn: bool) -> tuple[Climber, int] | None:
        """Who is to be promoted now, and to which step."""
        return self.ladder.next_up(self._climbers(), all_drawn=all_drawn)

    def has_arrived(self, trial: Trial) -> bool:
        """Whether it has reported the rung that it runs to: what it reports is the truth."""
        until = trial.pause_after
        return until is not None and any(report.step >= until for report in _reports(trial))

    def pause(self, trial: Trial) -> str:
        """The study is told that a trial waits at its rung, until it is promoted or the search is over.

        Returns:
            Where it paused, in words.
        """
        live, reports = trial_of(self.study, trial.number), _reports(trial)
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for report in reports:
            if report.step not in known:  # the study did not answer the run
                live.report(report.value, report.step)
        live.set_user_attr(PAUSED, trial.until)
        return f"paused at step {reports[-1].step} with {reports[-1].value:.4f}"

    def drop(self, seeds: int) -> str:
        """The search is over, and nobody works on it: trials that were never promoted are told as pruned.

        Args:
            seeds: Runs of each trial that comes to its end.

        Returns:
            What the rungs saved, in words; empty where no trial has come to one.
        """
        from optuna.trial import TrialState

        climbers = self._climbers()
        counts, done = self.ladder.counts(climbers), sum(c.standing is Standing.completed for c in climbers)
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            live = trial_of(self.study, frozen.number)
            reason = f"not among the best at step {live.user_attrs[PAUSED]}"
            live.set_user_attr(VERDICT, Verdict.pruned.value)
            live.set_user_attr(REASON, reason)
            self.study.tell(frozen.number, state=TrialState.PRUNED, skip_if_finished=True)
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)):
            if is_paused(frozen.user_attrs):  # also those that a sweeper told before it was killed
                for run_dir in run_dirs(self.books.folder / str(frozen.number)):
                    record_drop(run_dir, str(frozen.user_attrs.get(REASON, "")))
        numbers = [entry.number for entry in self.books.counted()]
        run, full = steps_of(self.books.folder, numbers, seeds)
        if not counts or not full:
            return ""
        self.books.plan["rungs"] = {"reached": [list(pair) for pair in counts], "steps": run, "full_steps": full}
        came = ", ".join(f"{count} trial(s) to step {step}" for step, count in counts)
        ran = f"{run} steps were run of {full} without pausing ({run / full:.2f})"
        return f"rungs: {came}, {done} to the end; {ran}"

    def _climbers(self) -> list[Climber]:
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


def _reports(trial: Trial) -> list[Report]:
    return read_reports(trial.run_dir / "reports.jsonl")
