"""What a search does before its first trial: refuse what its study cannot hold, queue the points that are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mgm_exp.config import Rerun, SweepConfig
from mgm_exp.errors import ConfigError, UserError
from mgm_exp.search.outcome import Verdict
from mgm_exp.search.space import Space
from mgm_exp.study_books import AGAIN_FOR, StudyBooks

if TYPE_CHECKING:
    from optuna import Study


def refuse_other_choices(study: Study, space: Space) -> None:
    """Optuna can widen and narrow ranges of a study, but not change what a choice consists of.

    Raises:
        UserError: A choice consists of other values than in the trials so far.
    """
    from optuna.distributions import check_distribution_compatibility

    known: dict[str, Any] = {}
    for frozen in study.get_trials(deepcopy=False):
        known.update(frozen.distributions)
    for item in space.dimensions:
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


def enqueue(study: Study, space: Space, books: StudyBooks, settings: SweepConfig) -> None:
    """Queues the points of ``sweep.enqueue``; with ``sweep.rerun=failed`` also each failed trial's point again, under a
    new number that takes its place.

    Raises:
        ConfigError: ``sweep.rerun=all``.
    """
    for number, given in enumerate(settings.enqueue):
        point = space.fixed_point(given, f"sweep.enqueue[{number}]")
        study.enqueue_trial(point, skip_if_exists=True)
    if settings.rerun is Rerun.all:
        raise ConfigError(
            "sweep.rerun=all is for grids: a search goes on from what its trials have shown.",
            advice="Give sweep.name=ANOTHER for a search from the beginning (its stages are reused).",
        )
    if settings.rerun is not Rerun.failed:
        return
    repeated = books.repeated()
    for entry in books.entries():
        if entry.verdict == Verdict.failed.value and entry.number not in repeated:
            drawn = study.get_trials(deepcopy=False)[entry.number].params
            study.enqueue_trial(dict(drawn), user_attrs={AGAIN_FOR: entry.number})
