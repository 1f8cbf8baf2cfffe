from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgm_exp.config import LimitsConfig, RecipeConfig, RepetitionConfig, ShapeConfig
from mgm_exp.data.recipe import Limits, bounds_of, operators_of, resolve

from .conftest import write_lines


def recipe(**operators: Any) -> RecipeConfig:
    return replace(RecipeConfig(), **operators)


def test_operators_without_limits_are_off() -> None:
    assert operators_of(recipe()) == ()
    on = recipe(text_length=LimitsConfig(max=9), words_num=LimitsConfig(min=1), image_shape=ShapeConfig(max_height=5))
    assert operators_of(on) == ("words_num", "text_length", "image_shape")
    assert [(b.value, b.side, b.given) for b in bounds_of(on)] == [
        ("words_num", "min", 1),
        ("text_length", "max", 9),
        ("image_height", "max", 5),
    ]


def test_a_limit_of_zero_is_a_limit() -> None:
    assert operators_of(recipe(word_repetition=RepetitionConfig(ngram=2, max=0))) == ("word_repetition",)


def test_bounds_are_allowed_and_what_lies_beyond_is_not() -> None:
    limits = resolve(recipe(words_num=LimitsConfig(min=4, max=6)), None)
    assert [limits.judge({"words_num": n}) is None for n in (3, 4, 6, 7)] == [False, True, True, False]
    drop = limits.judge({"words_num": 7})
    assert drop is not None and (drop.operator, drop.value, drop.limit) == ("words_num", 7, "max 6")


@pytest.mark.parametrize("values", [{}, {"words_num": None}, {"words_num": math.nan}])
def test_a_value_that_is_missing_breaks_the_limit(values: dict[str, Any]) -> None:
    assert resolve(recipe(words_num=LimitsConfig(min=0)), None).judge(values) is not None


@given(
    st.lists(st.floats(-1e6, 1e6, allow_nan=False, width=32), min_size=1, max_size=60),
    st.integers(1, 99),
    st.integers(1, 99),
)
def test_percentiles_keep_the_share_they_say(tmp_path_factory: Any, numbers: list[float], low: int, high: int) -> None:
    values = write_lines(
        tmp_path_factory.mktemp("values") / "values.jsonl",
        [{"id": str(n), "words_num": x} for n, x in enumerate(numbers)],
    )
    limits = resolve(recipe(words_num=LimitsConfig(min=f"p{low}", max=f"p{high}")), values)
    lower, upper = (bound.number for bound in limits.bounds)
    assert lower in numbers and upper in numbers
    below = np.mean([x < lower for x in numbers])
    above = np.mean([x > upper for x in numbers])
    assert below <= low / 100 and above <= 1 - high / 100


def test_rows_without_a_value_do_not_count_for_a_percentile(tmp_path: Path) -> None:
    rows = [{"id": str(n), "words_num": n} for n in range(1, 12)] + [{"id": "x", "words_num": None}]
    limits = resolve(recipe(words_num=LimitsConfig(min="p50")), write_lines(tmp_path / "values.jsonl", rows))
    assert limits.bounds[0].number == 6
    assert limits.to_json() == {"words_num": {"min": 6.0, "min_given": "p50"}}


def test_no_limits_keep_everything() -> None:
    assert Limits().judge({}) is None
