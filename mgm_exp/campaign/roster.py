"""Which trials a search has, who works on them, and which one is next.

Who works on a trial holds its claim, a lease in the sweep's folder. A trial that the study calls running, that does not
wait at a rung and that nobody claims was left behind by a sweeper that was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from mgm_exp.campaign.rungs import Rungs
from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import ConfigError, UserError
from mgm_exp.search.budget import Budget, Clock
from mgm_exp.search.rungs import UNTIL, Climber, Ladder, Standing, is_paused
from mgm_exp.search.study import trial_of
from mgm_exp.store import Lease, LeaseHeld
from mgm_exp.study_books import AGAIN_FOR, CLAIMS, POINT, Entry, StudyBooks

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

# Points in a row that miss a constraint before the search gives up.
MOST_REFUSED = 200
_TAKE_UP_S = 2.0


class Roster:
    """Of one search, as one of its sweepers sees it.

    Args:
        study: The Optuna study.
        books: Of the sweep.
        base: The configuration of the fixed overrides.
        clock: How long the search has worked.
        mine: Numbers of the trials that this sweeper works on.
        say: Prints a line.
    """

    def __init__(
        self,
        study: Study,
        books: StudyBooks,
        base: ExperimentConfig,
        clock: Clock,
        mine: Collection[int],
        say: Callable[[str], None],
    ) -> None:
        self.study, self.books, self.settings = study, books, base.sweep
        self._clock, self._mine, self._say = clock, mine, say
        ladder = Ladder.of(base, books.directions[0])
        self.rungs = Rungs(study, books, ladder) if ladder else None
        self.budget = Budget.of(base.sweep)
        # Trials whose job somebody cancelled: left for the next command.
        self.set_aside: set[int] = set()
        self.stop_reason = ""
        self.refused_in_a_row = 0

    def desk(self) -> Lease:
        """Held for the moment in which a trial is drawn or the books are written."""
        return Lease(self.books.folder / ".desk")

    def next(self) -> tuple[int, Lease] | None:
        """A trial to run now, claimed for us: one that somebody left behind, one that is promoted, or a new one."""
        # What has begun is ended, also where nothing new is started any more.
        found = self._left_behind()
        if found or self.stop_reason:
            return found
        return self._promoted() or self._draw()

    def running(self, *, with_paused: bool = False) -> list[FrozenTrial]:
        """Trials that somebody works on, or was working on."""
        from optuna.trial import TrialState

        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        # Where no trial pauses (any more) one that has is like one that was left behind.
        return [t for t in running if with_paused or self.rungs is None or not is_paused(t.user_attrs)]

    def of_others(self) -> list[int]:
        """Numbers of the running trials that this sweeper neither works on nor has set aside."""
        return [trial.number for trial in self.running() if not self._is_ours(trial.number)]

    def has_more(self) -> bool:
        """Whether a new trial may be drawn, or one be promoted."""
        return not self._why_no_more() or self._next_up() is not None

    def clear_claims(self) -> None:
        """Claims of trials that were told by a sweeper which was killed before it could give them back."""
        running = {trial.number for trial in self.running()}
        for path in (self.books.folder / CLAIMS).glob("*"):
            if path.name.isdigit() and int(path.name) not in running:
                forget(Lease(path))

    def _is_ours(self, number: int) -> bool:
        return number in self._mine or number in self.set_aside

    def _left_behind(self) -> tuple[int, Lease] | None:
        for frozen in self.running():
            if self._is_ours(frozen.number):
                continue
            claim = self.books.claim(frozen.number)
            if claim.holder() is not None:
                continue
            try:
                claim.acquire(timeout_s=_TAKE_UP_S, on_wait=None)
            except LeaseHeld:
                continue
            if frozen.number not in {trial.number for trial in self.running()}:  # told between the two looks
                claim.release(forget=True)
                continue
            if POINT in frozen.user_attrs:
                self._say(f"trial {frozen.number}: was left behind by a sweeper that ended, and is taken up")
            return frozen.number, claim
        return None

    def _draw(self) -> tuple[int, Lease] | None:
        """A new trial, if the search is to have one more."""
        with self.desk():
            if self._why_no_more():
                return None
            number = self.study.ask().number
            claim = self.books.claim(number)
            try:
                claim.acquire(timeout_s=_TAKE_UP_S)
            except LeaseHeld:  # another sweeper saw it between the two lines, and has taken it up
                return self._left_behind()
            folder = self.books.folder / str(number)
            if folder.exists():
                claim.release(forget=True)
                raise UserError(
                    f"{folder} is there already, but the study knows nothing of a trial {number}.",
                    advice="The study was moved or deleted. Put it back, or give sweep.name=ANOTHER: what the trials "
                    "made is taken from the store.",
                )
        return number, claim

    def _promoted(self) -> tuple[int, Lease] | None:
        """A paused trial that may go on, claimed for us, with its next rung."""
        if self._next_up() is None:
            return None
        with self.desk():
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
        counted = self.books.counted()
        if self.rungs is None or self._why_stop(counted):
            return None
        return self.rungs.next_up(all_drawn=len(counted) >= self.budget.trials)

    def _why_no_more(self) -> str:
        """Why no new trial is drawn; empty where one may be. Said once."""
        counted = self.books.counted()
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
        reason = self.stop_reason or self.budget.is_spent(self._clock, values, self.books.directions[0])
        if self.refused_in_a_row >= MOST_REFUSED:
            raise ConfigError(
                f"{MOST_REFUSED} points in a row miss sweep.constraints={self.settings.constraints}.",
                advice="Loosen them, or search where they hold.",
            )
        if reason and not self.stop_reason:
            self.stop_reason = reason
            self._say(f"no further trial is started: {reason}")
        return reason


def forget(lease: Lease) -> None:
    """Removes a lease that nobody holds any more."""
    if lease.holder() is not None:
        return
    try:
        lease.acquire(wait=False)
    except LeaseHeld:
        return
    lease.release(forget=True)
