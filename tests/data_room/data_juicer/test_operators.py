"""The operators of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mgm_exp.config import RECIPE_OPERATORS
from mgm_exp.data.data_juicer import Operator, operators_of
from mgm_exp.data.data_juicer.builtin import BUILTIN
from mgm_exp.data.data_juicer.operators import KINDS, value_keys
from mgm_exp.errors import ConfigError


def test_every_operator_of_the_configuration_is_known() -> None:
    assert set(RECIPE_OPERATORS) == set(KINDS)
    assert {name for name, kind in KINDS.items() if not kind.needs_model} == set(BUILTIN)


def test_operators_are_those_with_a_limit_in_their_order(compose: Callable[..., Any], tmp_path: Any) -> None:
    recipe = compose(
        "data=blip2",
        *(f"data.recipe.{name}.{side}=null" for name in RECIPE_OPERATORS[:4] for side in ("min", "max")),
        *(f"data.recipe.image_shape.{side}_{what}=null" for side in ("min", "max") for what in ("width", "height")),
        "data.recipe.character_repetition.max=p95",
        "data.recipe.character_repetition.ngram=7",
        "data.recipe.image_shape.min_width=10",
        f"data.recipe.image_text_similarity.path={tmp_path}",
        "data.recipe.image_text_similarity.min=0.2",
        "data.recipe.words_num.min=4",
    ).data.recipe
    found = operators_of(recipe)
    assert [(operator.name, dict(operator.parameters)) for operator in found] == [
        ("words_num", {}),
        ("character_repetition", {"ngram": 7}),
        ("image_shape", {}),
        ("image_text_similarity", {"path": str(tmp_path)}),
    ]
    assert value_keys(found)[2:4] == ("image_width", "image_height")


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("words", {}, "There is no operator 'words'; there are: words_num"),
        ("words_num", {"ngram": 2}, "takes no parameters"),
        ("word_repetition", {}, "takes ngram"),
        ("watermark", {"path": None}, "data.recipe.watermark.path"),
    ],
)
def test_an_operator_that_cannot_be_is_refused(name: str, parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Operator(name, parameters)
    assert says in str(error.value)


def test_an_operator_survives_a_file() -> None:
    operator = Operator("word_repetition", {"ngram": 3})
    assert Operator.from_json(operator.to_json()) == operator


def test_one_value_cannot_be_measured_twice() -> None:
    with pytest.raises(ConfigError, match="asked for twice: word_repetition"):
        value_keys([Operator("word_repetition", {"ngram": 1}), Operator("word_repetition", {"ngram": 2})])
