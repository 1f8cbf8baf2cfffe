"""What is known of a run besides its logs, as named facts with their places, and conditions on them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mgm_exp.doctor.robust import is_finite


@dataclass(frozen=True)
class Fact:
    """Something that a file says, or that was computed from one.

    Args:
        name: ``config.train.precision``, ``curves.not_finite``, ``events.vision_dead``, ...
        value: A number, a text, true or false, or a list of these.
        place: File (and line) it stands in.
        says: In words, for a reader; empty: the name and the value say it.
    """

    name: str
    value: Any
    place: str
    says: str = ""

    @property
    def in_words(self) -> str:
        """One short sentence."""
        return self.says or f"{self.name.partition('.')[2] or self.name}={_short(self.value)}"


Facts = Mapping[str, Fact]


def flat(prefix: str, values: Any, place: str, depth: int = 8) -> Iterator[Fact]:
    """The facts of a nested mapping, by dotted names."""
    if isinstance(values, Mapping) and depth:
        for key, value in values.items():
            yield from flat(f"{prefix}.{key}" if prefix else str(key), value, place, depth - 1)
    elif not isinstance(values, Mapping):
        yield Fact(prefix, values, place)


@dataclass(frozen=True)
class Condition:
    """``fact`` compared with a value.

    Args:
        fact: Its name.
        operator: ``is``, ``not``, ``above``, ``below``, ``among``, ``matches`` or ``known``.
        wanted: What it is compared with.
    """

    fact: str
    operator: str
    wanted: Any

    def holds(self, facts: Facts) -> bool:
        """Whether it is so; a fact that is not known fulfils nothing but ``known: false``."""
        fact = facts.get(self.fact)
        if self.operator == "known":
            return (fact is not None and fact.value is not None) is bool(self.wanted)
        if fact is None or fact.value is None:
            return False
        return _OPERATORS[self.operator](fact.value, self.wanted)


def _number(value: Any) -> float:
    return float(value) if is_finite(value) else math.nan


_OPERATORS = {
    "is": lambda value, wanted: value == wanted and isinstance(value, bool) is isinstance(wanted, bool),
    "not": lambda value, wanted: value != wanted,
    "above": lambda value, wanted: _number(value) > wanted,
    "below": lambda value, wanted: _number(value) < wanted,
    "among": lambda value, wanted: value in wanted,
    "matches": lambda value, wanted: re.search(wanted, str(value)[:2000], re.IGNORECASE) is not None,
}
OPERATORS = (*_OPERATORS, "known")


def conditions_of(given: Mapping[str, Any]) -> tuple[Condition, ...]:
    """``{name: value}`` or ``{name: {operator: value, ...}}`` as conditions that hold together.

    Raises:
        ValueError: an operator that there is not.
    """
    found = []
    for name, wanted in given.items():
        comparisons = wanted if isinstance(wanted, Mapping) else {"is": wanted}
        for operator, value in comparisons.items():
            if operator not in OPERATORS:
                raise ValueError(f"{name}: there is no operator {operator!r}; there are {', '.join(OPERATORS)}")
            found.append(Condition(str(name), operator, value))
    return tuple(found)


def all_hold(conditions: Sequence[Condition], facts: Facts) -> bool:
    """Whether all of them do; none at all do not."""
    return bool(conditions) and all(condition.holds(facts) for condition in conditions)


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
