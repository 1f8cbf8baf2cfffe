"""Formulas of sweep files: what they compute, and that they compute nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgm_exp.errors import ConfigError
from mgm_exp.search.expression import Expression

VALUES: dict[str, Any] = {"adapter.rank": 8, "_ratio": 2, "adapter": "lora_r8", "memory": None, "train.lr": 1e-3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("_ratio * adapter.rank", 16),
        ("adapter.rank ** 2 // 3 - 1", 20),
        ("adapter != 'full' and adapter.rank >= 8", True),
        ("adapter in ['lora_r8', 'lora_r16']", True),
        ("not adapter == 'full'", True),
        ("1 < adapter.rank <= 8", True),
        ("min(adapter.rank, 4) if _ratio > 1 else 0", 4),
        ("round(log2(adapter.rank)) + abs(-1)", 4),
        ("memory == null", True),
        ("adapter == 'full' or false", False),
    ],
)
def test_a_formula_has_the_value_that_python_gives_it(text: str, value: Any) -> None:
    assert Expression(text).value(VALUES.__getitem__) == value


def test_the_names_are_keys_with_their_dots() -> None:
    assert Expression("_ratio * adapter.rank + min(train.lr, 1) if true else null").names == {
        "_ratio", "adapter.rank", "train.lr",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "adapter.rank.__class__()",
        "(1).__class__",
        "[x for x in adapter]",
        "lambda: 1",
        "open('file')",
        "adapter[0]",
        "f'{adapter}'",
        "x := 1",
        "1 +",
        "",
        "b'bytes'",
        "max(adapter.rank, key=abs)",
        "1 + " * 200 + "1",
    ],
)
def test_nothing_but_a_formula_is_taken(text: str) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.constraints"):
        Expression(text, "sweep.constraints")


@pytest.mark.parametrize("text", ["1 / 0", "adapter - 1", "adapter * 3", "2 ** 9999", "log2(0)", "max(1)"])
def test_what_cannot_be_computed_says_so(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be computed"):
        Expression(text).value(VALUES.__getitem__)


@pytest.mark.parametrize(
    ("text", "missed"),
    [
        ("adapter.rank <= 8", 0),
        ("adapter.rank <= 5", 3),
        ("adapter.rank >= 10", 2),
        ("adapter.rank < 8", 1e-9),
        ("adapter.rank < 9", -1),
        ("adapter == 'full'", 1),
        ("adapter == 'lora_r8' and _ratio == 2", 0),
        ("memory <= 20", None),
        ("memory * 2 <= 20", None),
    ],
)
def test_a_condition_is_missed_by_its_distance(text: str, missed: float | None) -> None:
    assert Expression(text).violation(VALUES.__getitem__) == missed


@given(st.integers(-1000, 1000), st.integers(-1000, 1000), st.floats(-1e6, 1e6), st.sampled_from("+-*"))
def test_arithmetic_is_pythons(a: int, b: int, c: float, sign: str) -> None:
    values = {"a": a, "b.c": b, "d": c}
    found = Expression(f"(a {sign} b.c) {sign} d").value(values.__getitem__)
    expected = {"+": (a + b) + c, "-": (a - b) - c, "*": (a * b) * c}[sign]
    assert math.isclose(found, expected, rel_tol=1e-12)


@given(st.text(max_size=40))
def test_no_text_is_evaluated_by_accident(text: str) -> None:
    """It is a formula of the grammar, or a ConfigError: no other exception, no side effect."""
    try:
        formula = Expression(text)
        formula.value(lambda name: 1)
    except ConfigError:
        pass
