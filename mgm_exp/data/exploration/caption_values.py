"""Values of one caption, with the definitions of Data-Juicer 1.6.1's filters: words, lengths, repetition, symbols.

    words("a sign that reads 24 h")          # 5: "24" has no character that is not special

All take the caption without special tokens (``<__dj__image>``, ``<|__dj__eoc|>``), which Data-Juicer's operators would
count as two words and 28 characters. Parity with the operators is tested. For many captions at once see
:mod:`mgm_exp.data.exploration.caption_table`.

=======================  ==========================================================================================
value                    operator and definition
=======================  ==========================================================================================
``words``                ``words_num_filter``: parts between blanks, tabs and line ends that are not special only
``text_length``          ``text_length_filter``: characters
``special_characters``   ``special_characters_filter``: share of characters that are special
``word_repetition``      ``word_repetition_filter``: share of word n-grams that occur more than once
``character_repetition`` ``character_repetition_filter``: share of the most frequent repeated character n-grams
=======================  ==========================================================================================
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

from mgm_exp.data.exploration.special_characters import SPECIAL_CHARACTERS, STRIPPED

_SEPARATORS = re.compile("[ \n\t]")
_ASCII = "".join(character for character in STRIPPED if character.isascii())


def text_length(text: str) -> int:
    """Characters of a caption."""
    return len(text)


def words(text: str) -> int:
    """Words of a caption: parts between blanks, tabs and line ends that hold more than special characters."""
    return sum(1 for part in parts(text) if refined(part))


def special_characters(text: str) -> float:
    """Share of a caption's characters that are punctuation, digits, white space, symbols or emoji; 0 for no text."""
    return sum(1 for character in text if character in SPECIAL_CHARACTERS) / len(text) if text else 0.0


def word_repetition(text: str, n: int) -> float:
    """Share of a caption's word n-grams that occur more than once in it (lower case, special ends stripped).

    0 where the caption has fewer than ``n`` words.
    """
    kept = [word for part in parts(text) if (word := refined(part.lower()))]
    return _repeated_share(Counter(zip(*(kept[start:] for start in range(checked_n(n))), strict=False)))


def character_repetition(text: str, n: int) -> float:
    """Share that a caption's most frequent repeated character n-grams have of all its n-grams.

    Of the distinct n-grams at most the square root of their number is taken. 0 where the caption has fewer than ``n``
    characters.
    """
    return _top_share(Counter(text[start : start + n] for start in range(len(text) - checked_n(n) + 1)))


def parts(text: str) -> list[str]:
    """What stands between blanks, tabs and line ends."""
    # Printable text has no white space but blanks, and str.split is much faster.
    return text.split() if text.isprintable() else [part for part in _SEPARATORS.split(text) if part]


def refined(part: str) -> str:
    """A part without special characters at its ends; empty: it is no word."""
    # Stripping the whole set costs ten times as much, and few words have anything but ASCII at their ends.
    part = part.strip(_ASCII)
    return part if part.isascii() else part.strip(STRIPPED)


def checked_n(n: int) -> int:
    """A length of n-grams. Raises ValueError for one below 1."""
    if n < 1:
        raise ValueError(f"n-grams of {n} words or characters were asked for; allowed is 1 or more")
    return n


def _repeated_share(counts: Mapping[object, int]) -> float:
    total = sum(counts.values())
    return sum(count for count in counts.values() if count > 1) / total if total else 0.0


def _top_share(counts: Mapping[object, int]) -> float:
    if not counts:
        return 0.0
    repeated = sorted((count for count in counts.values() if count > 1), reverse=True)
    return sum(repeated[: math.isqrt(len(counts))]) / sum(counts.values())
