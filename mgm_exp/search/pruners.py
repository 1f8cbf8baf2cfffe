"""Who stops hopeless trials, found by a name. Steps are optimizer steps of the instruct stage (wilcoxon: seeds)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from mgm_exp.config import PrunerConfig, PrunerName

if TYPE_CHECKING:
    from optuna.pruners import BasePruner


def make_pruner(config: PrunerConfig, first_step: int | None = None) -> BasePruner:
    """The pruner that ``sweep.pruner`` names.

    Args:
        config: ``sweep.pruner``.
        first_step: Step of the first validation point: the first rung, unless ``min_step`` says another.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls most of its options experimental
        return _make(config, config.min_step or first_step or 1)


def _make(config: PrunerConfig, least: int) -> BasePruner:
    from optuna import pruners

    name = config.name
    if name is PrunerName.asha:
        return pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=config.reduction_factor)
    if name is PrunerName.hyperband:
        return pruners.HyperbandPruner(min_resource=least, reduction_factor=config.reduction_factor)
    if name is PrunerName.wilcoxon:
        return pruners.WilcoxonPruner(p_threshold=config.p_threshold, n_startup_steps=config.startup)
    median = pruners.MedianPruner(n_startup_trials=config.startup, n_warmup_steps=(config.min_step or 1) - 1)
    if name is PrunerName.median:
        return median
    if name is PrunerName.patient:
        return pruners.PatientPruner(median, patience=config.patience, min_delta=config.min_delta)
    return pruners.NopPruner()
