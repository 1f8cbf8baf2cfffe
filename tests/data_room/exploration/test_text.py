"""The core statistics, recomputed with the standard library."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.data.exploration import text_statistics

CAPTIONS = st.lists(
    st.one_of(st.lists(st.sampled_from(["a", "sign", "A", "24", "é"]), max_size=9).map(" ".join), st.text(max_size=30)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(CAPTIONS)
def test_numbers_agree_with_the_standard_library(captions: list[str]) -> None:
    found = text_statistics(captions)
    words = [len(caption.split()) for caption in captions]
    tokens = [word for caption in captions for word in caption.split()]
    assert found["captions"] == len(captions)
    assert found["words_mean"] == pytest.approx(statistics.fmean(words))
    assert found["words_median"] == pytest.approx(statistics.median(words))
    assert found["words_std"] == pytest.approx(statistics.pstdev(words))
    assert found["characters_mean"] == pytest.approx(statistics.fmean(map(len, captions)))
    assert found["too_short_share"] == pytest.approx(sum(count < 4 for count in words) / len(words))
    assert found["empty"] == sum(count == 0 for count in words)
    assert (found["tokens"], found["vocabulary"]) == (len(tokens), len(set(tokens)))
    assert found["duplicate_share"] == pytest.approx(1 - len(set(captions)) / len(captions))


def test_a_stream_is_read_once_and_gives_the_same_as_a_list() -> None:
    captions = [f"a sign that reads {number % 97} in colour {number % 13}" for number in range(40_000)]
    assert text_statistics(iter(captions)) == text_statistics(captions)


def test_sizes_beyond_the_data_are_left_out() -> None:
    found = text_statistics(["one two three four five"] * 1000)
    assert list(found["ttr_at"]) == ["1000", "5000"]
    for estimate in found["ttr_at"].values():
        assert estimate["ci_low"] <= estimate["value"] <= estimate["ci_high"]


def test_no_captions_have_no_mean() -> None:
    found = text_statistics([])
    assert found["captions"] == found["tokens"] == 0
    assert found["words_mean"] is found["mattr_50"] is found["duplicate_share"] is found["distinct_2"] is None
