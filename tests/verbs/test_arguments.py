"""Numbers on a command line: what is taken, and what is said where they are none."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from mgm_exp.verbs.arguments import count, megapixels, seconds


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [(count("rows"), "1", 1), (count("rows"), "5000", 5000), (count("tokens", 10), "10", 10), (megapixels, "0.5", 0.5)],
)
def test_numbers_are_read(read: Callable[[str], float], text: str, value: float) -> None:
    assert read(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "x", "²", "٣", "9" * 5000])
def test_what_is_no_count_is_said_with_what_is_allowed(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a number of rows \(1, 2, \.\.\.\)"):
        count("rows")(text)


def test_bounds_are_told() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"tokens \(1 to 10\)"):
        count("tokens", 10)("11")
    for text in ("nan", "inf", "0", "-2", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="megapixels above 0"):
            megapixels(text)
        with pytest.raises(argparse.ArgumentTypeError, match="seconds"):
            seconds(text)
