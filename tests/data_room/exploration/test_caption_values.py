"""Our values are those of Data-Juicer's operators, for one caption and for many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.data.exploration.caption_table import measure_captions
from mgm_exp.data.exploration.caption_values import (
    character_repetition,
    special_characters,
    text_length,
    word_repetition,
    words,
)
from mgm_exp.data.exploration.special_characters import SPECIAL_CHARACTERS

# What captions are made of, and what makes definitions differ: odd white space, symbols, emoji, letters that change
# their length in lower case, half of a surrogate pair.
PIECES = [
    " ",
    "\n",
    "\t",
    "\r",
    "\x0b",
    "\u00a0",
    "\u3000",
    ".",
    ",",
    "-",
    "24",
    "a",
    "A",
    "sign",
    "é",
    "İ",
    "Ⓜ",
    "ⓜ",
    "ß",
]
PIECES += ["上", "日", "😀", "👨‍👩‍👧", "🇩🇪", "\ufeff", "\u200d", "the the", "red sign "]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
    st.text(max_size=80),
    st.text(alphabet="ab ", max_size=80),
)
LENGTHS = st.integers(1, 12)


def with_operator(name: str, key: str, **arguments: Any) -> Callable[[str], float]:
    """The value that a real Data-Juicer operator writes for a text."""
    module = pytest.importorskip(f"data_juicer.ops.filter.{name}_filter")
    constants = pytest.importorskip("data_juicer.utils.constant")
    kind = "".join(part.title() for part in name.split("_")) + "Filter"
    operator = getattr(module, kind)(**arguments)

    def value(text: str) -> float:
        samples = {"text": [text], constants.Fields.stats: [{}]}
        return operator.compute_stats_batched(samples)[constants.Fields.stats][0][key]

    return value


@pytest.mark.parametrize(
    ("name", "key", "ours"),
    [
        ("words_num", "num_words", words),
        ("text_length", "text_len", text_length),
        ("special_characters", "special_char_ratio", special_characters),
    ],
)
def test_values_without_parameters_are_those_of_the_operator(name: str, key: str, ours: Callable[[str], float]) -> None:
    theirs = with_operator(name, key)

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        assert ours(text) == theirs(text)

    check()


@pytest.mark.parametrize(
    ("name", "key", "ours"),
    [
        ("word_repetition", "word_rep_ratio", word_repetition),
        ("character_repetition", "char_rep_ratio", character_repetition),
    ],
)
@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_repetition_is_that_of_the_operator(name: str, key: str, ours: Callable[[str, int], float], n: int) -> None:
    theirs = with_operator(name, key, rep_len=n)

    @settings(max_examples=80, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        assert ours(text, n) == theirs(text)

    check()


def test_special_characters_are_those_of_data_juicer() -> None:
    theirs = pytest.importorskip("data_juicer.ops.common.special_characters").SPECIAL_CHARACTERS
    assert {character for character in theirs if len(character) == 1} == SPECIAL_CHARACTERS


@settings(max_examples=120, deadline=None)
@given(st.lists(TEXTS, max_size=12), LENGTHS, LENGTHS)
def test_the_table_holds_the_values_of_each_caption(captions: list[str], word_n: int, character_n: int) -> None:
    table = measure_captions(captions, word_n=(word_n,), character_n=(character_n,))
    assert len(table) == len(captions)
    assert table.words.tolist() == [words(caption) for caption in captions]
    assert table.text_length.tolist() == [len(caption) for caption in captions]
    assert table.special_characters.tolist() == [special_characters(caption) for caption in captions]
    assert table.word_repetition[word_n].tolist() == [word_repetition(caption, word_n) for caption in captions]
    assert table.character_repetition[character_n].tolist() == [
        character_repetition(caption, character_n) for caption in captions
    ]


def test_many_chunks_are_one_table() -> None:
    captions = [f"sign {number} sign a{number % 7}a{number % 7} banana banana" for number in range(20_000)]
    table = measure_captions(iter(captions), word_n=(1, 2), character_n=(5, 10))
    for place in (0, 8191, 8192, 16384, 19_999):
        assert table.word_repetition[1][place] == word_repetition(captions[place], 1)
        assert table.character_repetition[5][place] == character_repetition(captions[place], 5)


def test_numbers_and_symbols_are_no_words() -> None:
    assert words("a sign that reads 24 h - &") == 5
    assert words("") == words("2013 -- !") == 0
    assert special_characters("") == 0


def test_lengths_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="n-grams of 0"):
        word_repetition("a b", 0)
    with pytest.raises(ValueError, match="n-grams of 0"):
        measure_captions(["a"], character_n=(0,))
