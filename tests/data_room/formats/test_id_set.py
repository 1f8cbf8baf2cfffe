from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.data.formats.id_set import IdSet, hash_text


@settings(deadline=None)
@given(st.lists(st.text(max_size=3)))
def test_it_says_the_same_as_a_set(texts: list[str]) -> None:
    ids, plain = IdSet(), set()
    for text in texts:
        assert ids.add(text) == (text not in plain)
        plain.add(text)
    assert len(ids) == len(plain)
    assert all(text in ids for text in plain) and "never added" not in ids


def test_it_holds_what_it_held_after_growing_many_times() -> None:
    ids = IdSet()
    texts = [f"id {number}" for number in range(30_000)]  # four times the first table and more
    assert all(ids.add(text) for text in texts)
    assert not any(ids.add(text) for text in texts)
    assert len(ids) == len(texts) and "id 30000" not in ids


def test_texts_that_want_the_same_place_are_told_apart() -> None:
    ids = IdSet()
    same_place = [7 + (number << 40) for number in range(600)]
    assert all(ids.add_hash(value) for value in same_place)
    assert not any(ids.add_hash(value) for value in same_place)


def test_a_hash_is_the_same_everywhere() -> None:
    assert hash_text("id 7") == 12377549133336465102
    assert hash_text("\ud800") != hash_text("?")
