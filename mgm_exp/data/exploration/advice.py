"""Advice for a recipe: limits that fit this data, as keys of the configuration, and what each would drop.

A limit is a percentile of the data at hand, never a number from somewhere else: a limit that was right for other data
may drop everything here, or nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mgm_exp.data.exploration.exploration import Exploration

if TYPE_CHECKING:
    import numpy as np

_STEPS = 10_000  # limits have four decimals
_TOLERATED = 0.10  # the largest share of the captions that one limit of ours may drop


@dataclass(frozen=True)
class Advice:
    """One limit.

    Args:
        key: Of the configuration, e.g. ``data.recipe.words_num.min``.
        value: The limit as a number.
        percentile: The same as a percentile, e.g. ``p5``; None: it is not one.
        dropped: Share of the captions (or images) that it drops.
        why: In words.
    """

    key: str
    value: float
    percentile: str | None
    dropped: float
    why: str

    def override(self) -> str:
        """As it is typed on a command line."""
        return f"{self.key}={self.value:g}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recipe_advice(exploration: Exploration) -> list[Advice]:
    """Limits for the operators of a recipe, those that drop something."""
    table, found = exploration.values.table, []
    if len(table) < 20:  # percentiles of fewer captions are the captions themselves
        return []
    found.append(_lower("words_num", table.words, 5, 4, "captions with fewer words say little about an image"))
    found.append(_upper("words_num", table.words, 99, "the longest captions"))
    for operator, columns, n in (
        ("word_repetition", table.word_repetition, 2),
        ("character_repetition", table.character_repetition, 5),
    ):
        unit = "words" if operator.startswith("word") else "characters"
        found.append(_upper(operator, columns[n], 99, f"captions that repeat their own {unit} ({n} at a time)"))
    found += _shape(exploration)
    if exploration.values.similarity is not None:
        import numpy as np

        judged = exploration.values.similarity[np.isfinite(exploration.values.similarity)]
        if len(judged) >= 20:
            operator = exploration.content["similarity"]["operator"]
            found.append(_lower(operator, judged, 5, None, "captions that fit their images worst"))
    return [item for item in found if item is not None]


def _shape(exploration: Exploration) -> list[Advice | None]:
    facts = exploration.facts
    if facts is None or facts.is_usable.sum() < 20:
        return []
    usable = facts.is_usable
    why = "the smallest images: they are enlarged, and little can be read in them"
    return [
        _lower("image_shape", facts.width[usable], 1, None, why, side="min_width"),
        _lower("image_shape", facts.height[usable], 1, None, why, side="min_height"),
    ]


def _lower(
    operator: str, values: np.ndarray, percent: float, preferred: float | None, why: str, side: str = "min"
) -> Advice | None:
    """A limit from below: ``preferred`` where it drops little, else the percentile; None where it drops nothing."""
    import numpy as np

    limit = float(np.percentile(values, percent, method="lower"))
    percentile: str | None = f"p{percent:g}"
    if preferred is not None and 0 < (values < preferred).mean() <= _TOLERATED:
        percentile = percentile if limit == preferred else None
        limit = preferred
    limit = math.floor(limit * _STEPS) / _STEPS  # downwards, so that rounding drops nothing
    return _if_it_drops(Advice(f"data.recipe.{operator}.{side}", limit, percentile, 0.0, why), values, True)


def _upper(operator: str, values: np.ndarray, percent: float, why: str) -> Advice | None:
    """A limit from above at a percentile; None where it drops nothing."""
    import numpy as np

    limit = float(np.percentile(values, percent, method="higher"))
    limit = math.ceil(limit * _STEPS) / _STEPS
    return _if_it_drops(Advice(f"data.recipe.{operator}.max", limit, f"p{percent:g}", 0.0, why), values, False)


def _if_it_drops(advice: Advice, values: np.ndarray, is_lower: bool) -> Advice | None:
    dropped = float((values < advice.value).mean() if is_lower else (values > advice.value).mean())
    return Advice(advice.key, advice.value, advice.percentile, dropped, advice.why) if dropped > 0 else None
