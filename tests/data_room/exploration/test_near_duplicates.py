"""Near-duplicates against a comparison of every pair."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.data.exploration.grouping import groups_of, pairs_with_equal_keys
from mgm_exp.data.exploration.near_duplicates import THRESHOLD, near_duplicate_groups
from mgm_exp.data.exploration.tokens import token_stream


def features(caption: str) -> set[object]:
    words = caption.split()
    return {*words, *pairwise(words)}


def jaccard(a: str, b: str) -> float:
    x, y = features(a), features(b)
    return len(x & y) / len(x | y)


def varied_captions(number: int) -> list[str]:
    """Captions of 12 words; some are an earlier one with a word changed or left out."""
    rng = random.Random(5)
    words = [f"w{place}" for place in range(400)]
    captions: list[str] = []
    while len(captions) < number:
        if captions and rng.random() < 0.4:
            parts = rng.choice(captions).split()
            place = rng.randrange(len(parts))
            parts[place : place + 1] = [rng.choice(words)] if rng.random() < 0.7 else []
        else:
            parts = rng.sample(words, 12)
        if (caption := " ".join(parts)) not in captions:
            captions.append(caption)
    return captions


def test_every_group_is_found_and_nothing_else() -> None:
    captions = varied_captions(300)
    pairs = [(i, j) for i, j in combinations(range(300), 2) if jaccard(captions[i], captions[j]) >= THRESHOLD]
    expected = groups_of(pairs)
    found = near_duplicate_groups(token_stream(captions), np.arange(300))
    assert len(expected) > 20
    # A pair is missed with a chance of 2 % at the threshold, and most groups hold several pairs well above it.
    joined = {place for group in found for place in group}
    wanted = {place for group in expected for place in group}
    assert joined <= wanted
    assert len(wanted - joined) <= 2
    for group in found:
        assert any(set(group) <= set(other) for other in expected)


def test_only_the_given_captions_are_looked_at() -> None:
    stream = token_stream(["a b c d", "a b c d", "x", "a b c d"])
    assert near_duplicate_groups(stream, np.array([1, 2, 3])) == [[1, 3]]
    assert near_duplicate_groups(stream, np.array([2])) == []


def test_empty_captions_are_no_near_duplicates() -> None:
    assert near_duplicate_groups(token_stream(["", " ", "a"]), np.arange(3)) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=30))
def test_places_with_equal_keys_are_connected(keys: list[int]) -> None:
    pairs = [
        (int(a), int(b))
        for first, second in pairs_with_equal_keys(np.array(keys, dtype=np.uint64), most=2)
        for a, b in zip(first, second, strict=True)
    ]
    assert all(keys[a] == keys[b] for a, b in pairs)
    found = {frozenset(group) for group in groups_of(pairs)}
    expected = {frozenset(i for i, key in enumerate(keys) if key == wanted) for wanted in set(keys)}
    assert found == {group for group in expected if len(group) > 1}
