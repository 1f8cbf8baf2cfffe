"""The operators of a recipe: what each is called in Data-Juicer, what it reads, and which values it gives.

    operators_of(config.data.recipe)      # (Operator("words_num", {}), Operator("word_repetition", {"ngram": 2}), ...)

An operator carries no limits: its values do not depend on them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mgm_exp.config import RecipeConfig
from mgm_exp.data import recipe as recipes
from mgm_exp.errors import ConfigError

_OPEN = (
    1e9  # an open limit of a real number: Data-Juicer's defaults are real limits, and cosines may exceed 1 by rounding
)


@dataclass(frozen=True)
class Limits:
    """How Data-Juicer calls the two limits of a value, and which of them let everything through.

    Args:
        stat: Key of the value in Data-Juicer's ``__dj__stats__``.
        min, max: Names of the parameters; None: Data-Juicer has no such limit.
        open_min, open_max: Limits that no value breaks.
    """

    stat: str
    min: str | None
    max: str | None
    open_min: float = -_OPEN
    open_max: float = _OPEN


@dataclass(frozen=True)
class Kind:
    """One of Data-Juicer's filters.

    Args:
        filter: Its name there.
        values: Its values: our key (a key of ``values.jsonl``) -> Data-Juicer's names.
        parameters: Our parameter -> Data-Juicer's name for it.
        fixed: Parameters that a recipe cannot change.
        reads: Columns that it reads: ``caption``, ``image``.
        is_whole: Whether its values and limits are whole numbers.
    """

    filter: str
    values: Mapping[str, Limits]
    parameters: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    reads: frozenset[str] = frozenset({"caption"})
    is_whole: bool = False

    @property
    def needs_model(self) -> bool:
        """Whether it runs a model from a local folder (parameter ``path``)."""
        return "path" in self.parameters


_ENGLISH = {"lang": "en", "tokenization": False}
_ANY = {"any_or_all": "any"}
_BOTH = frozenset({"caption", "image"})
_IMAGE = frozenset({"image"})
_WHOLE = {"open_min": 0, "open_max": sys.maxsize}

KINDS: Mapping[str, Kind] = {
    "words_num": Kind(
        "words_num_filter",
        {"words_num": Limits("num_words", "min_num", "max_num", **_WHOLE)},
        fixed=_ENGLISH,
        is_whole=True,
    ),
    "text_length": Kind(
        "text_length_filter", {"text_length": Limits("text_len", "min_len", "max_len", **_WHOLE)}, is_whole=True
    ),
    "word_repetition": Kind(
        "word_repetition_filter",
        {"word_repetition": Limits("word_rep_ratio", "min_ratio", "max_ratio")},
        {"ngram": "rep_len"},
        _ENGLISH,
    ),
    "character_repetition": Kind(
        "character_repetition_filter",
        {"character_repetition": Limits("char_rep_ratio", "min_ratio", "max_ratio")},
        {"ngram": "rep_len"},
    ),
    "image_shape": Kind(
        "image_shape_filter",
        {
            "image_width": Limits("image_width", "min_width", "max_width", **_WHOLE),
            "image_height": Limits("image_height", "min_height", "max_height", **_WHOLE),
        },
        fixed=_ANY,
        reads=_IMAGE,
        is_whole=True,
    ),
    "image_text_similarity": Kind(
        "image_text_similarity_filter",
        {"image_text_similarity": Limits("image_text_similarity", "min_score", "max_score")},
        {"path": "hf_clip"},
        _ANY,
        _BOTH,
    ),
    "image_text_matching": Kind(
        "image_text_matching_filter",
        {"image_text_matching": Limits("image_text_matching_score", "min_score", "max_score")},
        {"path": "hf_blip"},
        _ANY,
        _BOTH,
    ),
    "watermark": Kind(
        "image_watermark_filter",
        {"watermark": Limits("image_watermark_prob", None, "prob_threshold")},
        {"path": "hf_watermark_model"},
        _ANY,
        _IMAGE,
    ),
}
"""Our name -> Data-Juicer's filter; the names are those of ``data.recipe``."""


@dataclass(frozen=True)
class Operator:
    """An operator whose values are wanted.

    Args:
        name: A key of :data:`KINDS`.
        parameters: ``ngram`` of the repetitions, ``path`` of a model folder.

    Raises:
        ConfigError: no such operator, or a parameter is missing or unknown.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise ConfigError(f"There is no operator {self.name!r}; there are: {', '.join(KINDS)}.")
        wanted, given = set(self.kind.parameters), set(self.parameters)
        if wanted != given or any(value is None for value in self.parameters.values()):
            raise ConfigError(
                f"The operator {self.name} takes {', '.join(sorted(wanted)) or 'no parameters'}; "
                f"it was given {dict(self.parameters)}.",
                advice=f"Set data.recipe.{self.name}.path to a local model folder." if self.kind.needs_model else "",
            )

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def values(self) -> tuple[str, ...]:
        """Keys of its values in ``values.jsonl``."""
        return tuple(self.kind.values)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "parameters": dict(self.parameters)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Operator:
        """The inverse of ``to_json``."""
        return cls(content["name"], content["parameters"])


def operators_of(recipe: RecipeConfig) -> tuple[Operator, ...]:
    """The operators that a recipe sets limits for, in the order in which they apply.

    Raises:
        ConfigError: an operator needs a model folder and has none.
    """
    return tuple(
        Operator(name, {key: getattr(getattr(recipe, name), key) for key in KINDS[name].parameters})
        for name in recipes.operators_of(recipe)
    )


def value_keys(operators: Iterable[Operator]) -> tuple[str, ...]:
    """Keys of all values, in order.

    Raises:
        ConfigError: one operator stands twice; Data-Juicer keeps one value for each.
    """
    keys = [key for operator in operators for key in operator.values]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(f"These values are asked for twice: {', '.join(twice)}.", advice="Name each operator once.")
    return tuple(keys)
