"""What a point must satisfy to be run, and a trial to win: ``sweep.constraints``, and the card that is planned for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mgm_exp.campaign.trial import Trial
from mgm_exp.capacity import has_named_card, memory_limit_gib
from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import ConfigError
from mgm_exp.search.expression import Expression
from mgm_exp.search.outcome import FIELDS, field_of

# What a constraint may name that is known of a point before it runs; see mgm_exp.plan.
PREDICTED = ("predicted_memory_gib", "predicted_hours")


def constraints_of(config: ExperimentConfig) -> list[str]:
    """Those of the search, and that a point fits on the card that ``plan.device`` names."""
    texts = list(config.sweep.constraints)
    if has_named_card(config):
        texts.append(f"predicted_memory_gib <= {memory_limit_gib(config):g}")
    return texts


class Constraints:
    """Those of one search.

    Args:
        config: Of the fixed overrides.
        config_value: Reads a key of the configuration that some overrides compose to.
    """

    def __init__(self, config: ExperimentConfig, config_value: Callable[[str, Sequence[str]], Any]) -> None:
        self._all = [Expression(text, "sweep.constraints") for text in constraints_of(config)]
        self._config_value = config_value

    def violations(self, trial: Trial, result: Mapping[str, Any]) -> list[float | None]:
        """By how much each constraint is missed; None where that is not known (yet)."""

        def lookup(name: str) -> Any:
            if name in FIELDS:
                return field_of(result, name)
            if name in PREDICTED:
                return _predicted(name, trial.config)
            if name in trial.point.params:
                return trial.point.params[name]
            return self._config_value(name, trial.point.overrides)

        return [constraint.violation(lookup) for constraint in self._all]

    def missed(self, violations: Sequence[float | None]) -> str | None:
        """The first constraint that is missed, as it was given; None where all hold, as far as is known."""
        pairs = zip(self._all, violations, strict=True)
        return next((constraint.text for constraint, by in pairs if by is not None and by > 0), None)


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
