"""``sweep.json`` of very many trials: the same file, in little time, not too often."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgm_exp import rows
from mgm_exp.rows import Allowance, encode_row, encode_rows
from mgm_exp.store import encode_json

TEXT = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=3), JSON)
def test_trials_that_were_encoded_before_make_the_same_file(trials: list[dict[str, Any]], other: Any) -> None:
    content = {"name": other, "trials": trials, "best": {"trials": []}}
    assert encode_rows({**content, "trials": []}, "x", [encode_row(trial) for trial in trials]) == encode_json(content)


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_books_take_a_twentieth_of_the_time_and_a_few_at_once_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(rows, "time", clock)
    allowance, written = Allowance(), 0
    for _ in range(10_000):  # trials of 0.1 s; the books take 0.5 s
        clock.now += 0.1
        if allowance.allows():
            allowance.spent(0.5)
            clock.now += 0.5
            written += 1
    assert 0.5 * written <= rows.AT_ONCE_S + rows.SHARE * clock.now + 0.5
    assert 0.5 * written >= 0.8 * rows.SHARE * clock.now


def test_long_trials_never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(rows, "time", clock)
    allowance = Allowance()
    for _ in range(50):
        clock.now += 600
        for _ in range(2):  # it ends, the next one begins
            assert allowance.allows()
            allowance.spent(0.9)
