"""Copies and reworded captions: off by default, drawn by id, and nothing that matters is reworded."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgm_exp.data.augmentation import Augmentation
from mgm_exp.data.paraphrase import RULES, kept_spans, paraphrase
from mgm_exp.data.records import Record, Turn


def pair(row_id: str, caption: str = "a photo of a big dog", raw: str | None = None) -> Record:
    return Record(row_id, "1.png", (Turn("human", "<image>\ndescribe"), Turn("gpt", caption)), raw)


def captions(augmentation: Augmentation, n: int) -> list[str]:
    return [made.conversations[1].text for i in range(n) for made, _ in augmentation.rows(pair(f"r{i}"))]


def test_nothing_is_made_by_default() -> None:
    assert list(Augmentation().rows(pair("a"))) == [(pair("a"), [])]


def test_copies_have_ids_of_their_own_and_are_otherwise_equal() -> None:
    made = list(Augmentation(duplicate=3).rows(pair("a", raw="dog")))
    assert [(record.id, changes) for record, changes in made] == [
        ("a", []),
        ("a#d2", ["duplicated"]),
        ("a#d3", ["duplicated"]),
    ]
    assert {(record.image, record.conversations, record.raw_caption) for record, _ in made} == {
        ("1.png", pair("a").conversations, "dog")
    }


def test_conversations_and_text_rows_pass_as_they_are() -> None:
    turns = pair("a").conversations
    for record in (Record("chat", "1.png", turns + turns), Record("text", None, turns)):
        assert list(Augmentation(duplicate=3, paraphrase=1.0).rows(record)) == [(record, [])]


def test_the_share_is_drawn_by_id_and_seed() -> None:
    half = Augmentation(paraphrase=0.5)
    reworded = sum(text != "a photo of a big dog" for text in captions(half, 400))
    assert 160 <= reworded <= 240
    assert captions(half, 400) == captions(half, 400) != captions(Augmentation(paraphrase=0.5, seed=1), 400)
    # Who else is in the data does not matter.
    assert [next(half.rows(pair("r7")))[0]] == [next(half.rows(pair("r7")))[0]]
    assert all(text != "a photo of a big dog" for text in captions(Augmentation(paraphrase=1.0), 20))


def test_a_reworded_caption_keeps_the_raw_one_beside_it() -> None:
    record, changes = next(Augmentation(paraphrase=1.0).rows(pair("a", "a big dog")))
    assert record.conversations[1].text == "a large dog" and record.raw_caption == "a big dog"
    assert changes == ["paraphrased"]
    assert next(Augmentation(paraphrase=1.0).rows(pair("a", "a big dog", raw="dog")))[0].raw_caption == "dog"
    record, changes = next(Augmentation(paraphrase=1.0).rows(pair("a", "one dog")))
    assert record == pair("a", "one dog") and changes == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a big dog next to a sofa", "a large dog beside a couch"),
        ("it isn't a bike", "it is not a bicycle"),
        ("a Big dog, a big Dog", "a Big dog, a large Dog"),
        ('a big sign "a big sale" next to a big wall', 'a large sign "a big sale" beside a large wall'),
        ("a big sign that reads a big sale", "a large sign that reads a big sale"),
        ("next to-day", "next to-day"),
        ("couchant", "couchant"),
        ("the dog's bone beside a big 'a big one'", "the dog's bone next to a large 'a big one'"),
    ],
)
def test_rules(before: str, after: str) -> None:
    assert paraphrase(before, seed=0) == after


def test_a_rule_with_several_forms_uses_them_all() -> None:
    assert len({paraphrase("a photo of a dog", seed) for seed in range(30)}) == 3


WORDS = st.sampled_from([*RULES, "dog", "OPEN", "Anna", "7", "$3.50", '"a big dog"', "‘next to’", "reads", "it's", "'"])


@given(st.lists(WORDS, max_size=12).map(" ".join), st.integers(0, 2**64 - 1))
def test_names_numbers_and_quoted_text_stay_in_order(text: str, seed: int) -> None:
    reworded = paraphrase(text, seed)
    assert paraphrase(text, seed) == reworded

    def kept(caption: str) -> list[str]:
        return [word for word in caption.split() if re.search(r"[A-Z0-9]", word)]

    assert kept(reworded) == kept(text)
    assert re.findall(r'"[^"]*"|‘[^’]*’', reworded) == re.findall(r'"[^"]*"|‘[^’]*’', text)
    assert reworded.partition("reads")[2] == text.partition("reads")[2]


@given(st.text(max_size=60), st.integers(0, 9))
def test_any_text_passes(text: str, seed: int) -> None:
    for start, end in kept_spans(text):
        assert text[start:end] in paraphrase(text, seed)
