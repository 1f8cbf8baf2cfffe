"""Diversity, recomputed the slow way."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.data.exploration.diversity import (
    distinct,
    moving_average_ttr,
    ttr_at,
    ttr_at_sizes,
    vocabulary_growth,
    window_types,
)
from mgm_exp.data.exploration.tokens import token_stream

CAPTIONS = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=9).map(" ".join), max_size=30)


def zipf_captions(number: int, seed: int = 0) -> list[str]:
    """Captions with few frequent and many rare words, as language has them."""
    rng = random.Random(seed)
    words = [f"w{place}" for place in range(5000)]
    weights = list(accumulate(1 / (place + 3) for place in range(5000)))
    return [" ".join(rng.choices(words, cum_weights=weights, k=rng.randint(3, 14))) for _ in range(number)]


@settings(max_examples=100, deadline=None)
@given(CAPTIONS, st.integers(1, 40))
def test_windows_hold_as_many_types_as_a_set_of_their_words(captions: list[str], window: int) -> None:
    tokens = [word for caption in captions for word in caption.split()]
    if len(tokens) < window:
        return
    expected = [len(set(tokens[start : start + window])) for start in range(len(tokens) - window + 1)]
    assert window_types(token_stream(captions).ids, window).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(CAPTIONS)
def test_distinct_n_grams_are_counted_inside_captions(captions: list[str]) -> None:
    stream = token_stream(captions)
    words = [caption.split() for caption in captions]
    tokens = [word for caption in words for word in caption]
    pairs = [pair for caption in words for pair in pairwise(caption)]
    assert distinct(stream, 1) == (len(set(tokens)) / len(tokens) if tokens else None)
    assert distinct(stream, 2) == (len(set(pairs)) / len(pairs) if pairs else None)


def test_moving_average_is_the_mean_over_all_windows_with_an_interval_around_it() -> None:
    captions = zipf_captions(1500)
    tokens = " ".join(captions).split()
    expected = mean(len(set(tokens[start : start + 50])) / 50 for start in range(len(tokens) - 49))
    estimate = moving_average_ttr(token_stream(captions))
    assert estimate.value == pytest.approx(expected, abs=1e-12)
    assert estimate.ci_low is not None and estimate.ci_high is not None
    assert estimate.ci_low < expected < estimate.ci_high
    assert estimate.ci_high - estimate.ci_low < 0.03


def test_text_shorter_than_a_window_has_its_plain_ratio_and_nothing_has_none() -> None:
    assert moving_average_ttr(token_stream(["a b a"])).value == pytest.approx(2 / 3)
    assert moving_average_ttr(token_stream([])).value is None


def test_ttr_at_a_size_does_not_depend_on_how_much_there_is() -> None:
    """The point of it: ten times the data has the same value, while the plain ratio falls by half."""
    captions = zipf_captions(20_000)
    few, many = token_stream(captions[:2000]), token_stream(captions)
    small, large = ttr_at(few, 5000), ttr_at(many, 5000)
    assert small.ci_low <= large.value <= small.ci_high
    assert abs(small.value - large.value) < 0.02
    assert len(many.vocabulary) / len(many) < 0.6 * len(few.vocabulary) / len(few)


def test_ttr_at_a_size_is_that_of_captions_drawn_without_replacement() -> None:
    captions = zipf_captions(3000)
    rng = random.Random(1)
    plain = []
    for _ in range(60):
        tokens = " ".join(rng.sample(captions, len(captions))).split()[:2000]
        plain.append(len(set(tokens)) / 2000)
    estimate = ttr_at(token_stream(captions), 2000)
    assert estimate.value == pytest.approx(mean(plain), abs=0.004)
    assert estimate.ci_low <= estimate.value <= estimate.ci_high


def test_the_interval_holds_the_value_of_other_captions_from_the_same_source() -> None:
    held = 0
    reference = ttr_at(token_stream(zipf_captions(10_000, seed=99)), 2000).value
    for seed in range(20):
        captions = zipf_captions(400, seed=seed)
        estimate = ttr_at(token_stream(captions), 2000)
        held += estimate.ci_low <= reference <= estimate.ci_high
    assert held >= 16


def test_all_words_are_the_plain_ratio_and_more_are_refused() -> None:
    stream = token_stream(["a b", "b c d"])
    assert ttr_at(stream, 5).value == pytest.approx(4 / 5)
    with pytest.raises(ValueError, match="have 5"):
        ttr_at(stream, 6)
    assert ttr_at_sizes(stream, (2, 5, 6)).keys() == {2, 5}


def test_growth_ends_at_the_whole_and_never_falls() -> None:
    stream = token_stream(zipf_captions(500))
    growth = vocabulary_growth(stream)
    assert growth[-1] == (len(stream), len(stream.vocabulary))
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(growth))
    assert vocabulary_growth(token_stream([])) == []


def test_taking_captions_keeps_their_order_and_words() -> None:
    stream = token_stream(["a b", "", "c", "d a"])
    assert [stream.vocabulary[place] for place in stream.take(np.array([3, 1, 2]))] == ["d", "a", "c"]
