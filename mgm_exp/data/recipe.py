"""A recipe: which image-caption pairs are kept, by the values of operators and limits on them.

    limits = resolve(config.data.recipe, values)        # percentiles become numbers
    drop = limits.judge({"words_num": 3, ...})          # Drop("words_num", 3, "min 4"), or None: kept

The values come from Data-Juicer (or from our own equal operators, see :mod:`mgm_exp.data.data_juicer`); they do not
depend on the limits, so that recipes which differ in limits alone share them. Operators apply in the order of
:data:`mgm_exp.config.RECIPE_OPERATORS`; a row is dropped by the first whose limit it breaks.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mgm_exp.config import PERCENTILE, RECIPE_OPERATORS, RecipeConfig

if TYPE_CHECKING:
    import numpy as np

VALUES = "values.jsonl"


@dataclass(frozen=True)
class Bound:
    """One side of one operator's limits.

    Args:
        operator: Its name.
        value: Key of the value in ``values.jsonl``: the operator's name; ``image_width``, ``image_height`` for shapes.
        side: ``min`` or ``max``; the bound itself is allowed.
        given: As the configuration says it: a number, or a percentile such as ``p5``.
        number: What that is for the data at hand; NaN before it is known.
    """

    operator: str
    value: str
    side: str
    given: float | str
    number: float = math.nan

    def in_words(self) -> str:
        """``min 4``, or ``min p5 = 4``."""
        number = f"{self.number:g}"
        return f"{self.side} {number}" if not isinstance(self.given, str) else f"{self.side} {self.given} = {number}"

    def allows(self, value: float) -> bool:
        return value >= self.number if self.side == "min" else value <= self.number


@dataclass(frozen=True)
class Drop:
    """Why a row is not kept."""

    operator: str
    value: float
    limit: str


@dataclass(frozen=True)
class Limits:
    """All bounds of a recipe, as numbers, in the order in which they apply."""

    bounds: tuple[Bound, ...] = ()

    def judge(self, values: Mapping[str, float]) -> Drop | None:
        """The first bound that a row breaks; None: it is kept. A value that is missing or NaN breaks its bound."""
        for bound in self.bounds:
            value = values.get(bound.value)
            if value is None or not bound.allows(value):
                return Drop(bound.operator, math.nan if value is None else value, bound.in_words())
        return None

    def to_json(self) -> dict[str, dict[str, Any]]:
        """``{value key: {min: number, min_given: "p5", ...}}`` of the limits that are on."""
        found: dict[str, dict[str, Any]] = {}
        for bound in self.bounds:
            sides = found.setdefault(bound.value, {})
            sides[bound.side] = bound.number
            if isinstance(bound.given, str):
                sides[f"{bound.side}_given"] = bound.given
        return found


def bounds_of(recipe: RecipeConfig) -> tuple[Bound, ...]:
    """The limits that a recipe sets, percentiles not resolved."""
    found = []
    for operator in RECIPE_OPERATORS:
        section = getattr(recipe, operator)
        if operator == "image_shape":
            given = {
                (f"image_{kind}", side): getattr(section, f"{side}_{kind}")
                for kind in ("width", "height")
                for side in ("min", "max")
            }
        else:
            given = {(operator, side): getattr(section, side, None) for side in ("min", "max")}
        for (value, side), limit in given.items():
            if limit is not None:
                number = math.nan if isinstance(limit, str) else float(limit)
                found.append(Bound(operator, value, side, limit, number))
    return tuple(found)


def operators_of(recipe: RecipeConfig) -> tuple[str, ...]:
    """Names of the operators that are on, in the order in which they apply."""
    return tuple(dict.fromkeys(bound.operator for bound in bounds_of(recipe)))


def resolve(recipe: RecipeConfig, values: Path | None) -> Limits:
    """The limits of a recipe as numbers.

    A percentile is taken over the values of all rows that were measured, whatever other operators drop (NumPy's
    ``lower`` for a minimum and ``higher`` for a maximum: a limit is a value that occurs).

    Args:
        recipe: The configuration.
        values: ``values.jsonl``; needed where a limit is a percentile.
    """
    import numpy as np

    bounds = bounds_of(recipe)
    wanted = {bound.value for bound in bounds if isinstance(bound.given, str)}
    columns = _columns(values, wanted) if values is not None and wanted else {}
    resolved = []
    for bound in bounds:
        number = bound.number
        if isinstance(bound.given, str):
            assert PERCENTILE.fullmatch(bound.given)
            column = columns.get(bound.value, np.empty(0))
            method: Literal["lower", "higher"] = "lower" if bound.side == "min" else "higher"
            share = float(bound.given[1:])
            number = float(np.percentile(column, share, method=method)) if len(column) else math.nan
        resolved.append(Bound(bound.operator, bound.value, bound.side, bound.given, number))
    return Limits(tuple(resolved))


def read_values(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """(id, values) of each measured row, in order."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield row.pop("id"), row


def _columns(path: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    import numpy as np

    columns = {name: array("d") for name in wanted}
    for _, values in read_values(path):
        for name, column in columns.items():
            value = values.get(name)
            if value is not None and math.isfinite(value):
                column.append(value)
    return {name: np.frombuffer(column, dtype=np.float64) for name, column in columns.items()}
