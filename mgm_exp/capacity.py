"""Refuses what cannot fit before anything is queued or computed, unless it is forced (``plan.refuse=false``).

A run on a GPU is held against that card. A sweep whose cells run elsewhere is held against ``plan.device``, where one
is named; a search takes it as a constraint of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mgm_exp.config import Card, Device, ExperimentConfig
from mgm_exp.errors import DoesNotFit, ModelError

if TYPE_CHECKING:
    from mgm_exp.plan import CellPlan


def refuse_what_does_not_fit(config: ExperimentConfig, device: str) -> str:
    """Checks a run on the device that it will have.

    Args:
        config: The run's.
        device: ``cpu`` or ``cuda``. On the CPU nothing is refused: memory is shared, and can be swapped.

    Returns:
        A note for the log; empty where there is nothing to say.

    Raises:
        DoesNotFit: the predicted peak is above the card's memory.
    """
    if device != "cuda" or not config.plan.refuse:
        return ""
    return _refuse(config, Card.auto)


def refuse_cell(config: ExperimentConfig) -> None:
    """Checks a cell of a sweep against the card that ``plan.device`` names; nothing where it names none.

    Raises:
        DoesNotFit: the predicted peak is above the card's memory.
    """
    if has_named_card(config):
        _refuse(config, config.plan.device)


def has_named_card(config: ExperimentConfig) -> bool:
    """Whether cells are held against a card that this machine need not have."""
    return config.plan.refuse and config.plan.device is not Card.auto and config.device is not Device.cpu


def memory_limit_gib(config: ExperimentConfig) -> float:
    """What the tensors of one process may take on the named card."""
    from mgm_exp.plan.cards import CARDS

    card = CARDS[config.plan.device]
    return card.room_gib


def _refuse(config: ExperimentConfig, card: Card) -> str:
    import copy

    from mgm_exp.curated import curated_rows
    from mgm_exp.plan import plan_cell

    config = copy.deepcopy(config)
    config.plan.device = card
    config.plan.prices = None  # nothing is bought here
    try:
        plan = plan_cell(config, curated=curated_rows(config))
    except ModelError as error:
        return f"memory is not predicted: {error.message}"
    if plan.verdict == "does not fit" and not config.train.auto_micro_batch:
        raise does_not_fit(plan)
    return f"memory: {plan.needed_gib:.1f} GiB predicted, {plan.verdict} in {plan.device}"


def none_fits(config: ExperimentConfig, count: int, constraint: str) -> DoesNotFit:
    """The error of a search whose points are all too large, with what would make the last one fit.

    Args:
        config: Of the last point.
        count: Of points in a row.
        constraint: The one that it misses.
    """
    from mgm_exp.curated import curated_rows
    from mgm_exp.plan import plan_cell, predicted_memory_gib

    plan = plan_cell(config, curated=curated_rows(config))
    gib = predicted_memory_gib(config)
    advice = f"Try {'; or '.join(plan.advice)}." if plan.advice else "Search smaller settings, or take a larger limit."
    return DoesNotFit(
        f"{count} points in a row were not run: the last one needs {gib:.1f} GiB and misses {constraint}.",
        advice=f"{advice} `mgm-exp plan` shows what each needs.",
    )


def does_not_fit(plan: CellPlan) -> DoesNotFit:
    """The error, with the cheapest changes that would make it fit."""
    return DoesNotFit(
        f"This run is too large: {'; '.join(plan.lacks)}.",
        advice=f"Try {'; or '.join(plan.advice)}. plan.refuse=false starts it nevertheless.",
    )
