"""Rewording captions by rules: openings, plain synonyms, contractions. No model, and nothing is invented.

    paraphrase("a photo of a big sign that reads OPEN", seed=1)     # "an image of a large sign that reads OPEN"

Names, numbers and text that can be read in the image stay as they are, in their order: every word with a capital or a
digit, whatever stands in quotation marks, and all that follows "reads", "says", "named", "called" and the like. A
caption that no rule fits comes back unchanged.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

_PICTURES = ("a photo of", "a picture of", "an image of", "a photograph of")
_PAIRS = (
    ("a big", "a large"),
    ("a bike", "a bicycle"),
    ("couch", "sofa"),
    ("fridge", "refrigerator"),
    ("next to", "beside"),
    ("on top of", "atop"),
    ("underneath", "beneath"),
    ("a lot of", "lots of"),
    ("isn't", "is not"),
    ("aren't", "are not"),
    ("doesn't", "does not"),
    ("don't", "do not"),
)
_ONE_WAY = {
    "close to": "near",
    "airplane": "aeroplane",
    "television": "tv",
    "is shown": "can be seen",
    "are shown": "can be seen",
    "can't": "cannot",
}

RULES: dict[str, tuple[str, ...]] = {
    **{form: tuple(other for other in _PICTURES if other != form) for form in _PICTURES},
    **{a: (b,) for pair in _PAIRS for a, b in (pair, pair[::-1])},
    **{form: (other,) for form, other in _ONE_WAY.items()},
}
"""What may take the place of what, in lower case: a capital may be a name. Pairs that hold in every context only."""

_FORM = re.compile(
    rf"(?<!\S)(?:{'|'.join(re.escape(form) for form in sorted(RULES, key=len, reverse=True))})(?![\w'’-])"
)
_QUOTED = re.compile(r"""“[^”]*”?|„[^“”]*[“”]?|«[^»]*»?|‘[^’]*’?|"[^"]*"?|(?<!\w)'[^']*'?""")
_READ = re.compile(
    r"(?<!\w)(?:reads?|reading|says?|saying|spells?|spelling|writes?|written|writing|words?|letters?|lettering|texts?|"
    r"names?|named|called|titled?|labell?ed|brands?|numbers?)(?!\w)"
)
_WORD = re.compile(r"\S+")


def paraphrase(text: str, seed: int) -> str:
    """The text with every phrase that a rule fits replaced; unchanged where none does.

    Args:
        text: A caption.
        seed: Of the choice where a rule leaves one.
    """
    kept = sorted(kept_spans(text))
    draw = random.Random(seed)

    def other(match: re.Match[str]) -> str:
        if any(start < match.end() and match.start() < end for start, end in kept):
            return match[0]
        return draw.choice(RULES[match[0]])

    return _FORM.sub(other, text)


def kept_spans(text: str) -> Iterator[tuple[int, int]]:
    """The parts of a caption that no rule may touch: (start, end)."""
    for quoted in _QUOTED.finditer(text):
        yield quoted.span()
    for word in _WORD.finditer(text):
        if any(letter.isupper() or letter.istitle() or letter.isnumeric() for letter in word[0]):
            yield word.span()
    read = _READ.search(text)
    if read is not None:
        yield read.start(), len(text)
