"""A guess at the language of each caption, from function words and scripts.

It is a guess: captions are short, and many ("lion king cartoon") hold no word that belongs to one language alone. Those
are called undecided, not English. A caption in a script that few languages share is called by that script.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import TYPE_CHECKING

from mgm_exp.data.exploration.caption_values import refined
from mgm_exp.data.exploration.tokens import TokenStream

if TYPE_CHECKING:
    import numpy as np

UNDECIDED = "undecided"

# Frequent short words; a word of several languages counts for each of them.
_FUNCTION_WORDS = {
    "English": """a an the of in on at with and or for from by to is are was this that these his her its their as it
        into over near under behind between through while who which has have be my your our out up not""",
    "German": """der die das ein eine einen einem einer und mit auf von im am zu zum zur für ist sind bei aus nach vor
        über unter nicht auch sich dem den des wird oder wie""",
    "French": """le la les un une des du de et est sont dans sur avec pour par au aux en ce cette qui que sa son ses
        plus chez sous entre""",
    "Spanish": """el la los las un una unos unas de del y en con para por es son al se su sus que como más sobre
        entre desde este esta""",
    "Italian": """il lo la gli le un uno una di del della dei delle e è in con per su da dal nel nella che al alla
        sono come più""",
    "Portuguese": """o os as um uma uns umas de do da dos das e em no na nos nas com para por é são ao à que seu sua
        mais como sobre""",
    "Dutch": """de het een en van in op met voor aan bij uit naar is zijn dit dat deze door over onder niet ook als
        tussen""",
    "Swedish": """en ett och i på med för av till är som den det de från vid om inte under mellan""",
    "Polish": """i w na z do się jest są nie to od dla przez po przy oraz który która pod nad""",
    "Turkish": """ve bir bu ile için da de olan olarak çok en gibi daha üzerinde""",
    "Indonesian": """yang dan di dengan untuk dari pada ini itu adalah ke dalam oleh sebuah seorang""",
}
_SCRIPTS = {
    "CJK": "Chinese characters",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "HANGUL": "Korean",
    "CYRILLIC": "Cyrillic script",
    "ARABIC": "Arabic script",
    "HEBREW": "Hebrew",
    "GREEK": "Greek",
    "THAI": "Thai",
    "DEVANAGARI": "Devanagari script",
}
_SCRIPT_WEIGHT = 3  # a word in another script says more than a function word


def guess_languages(stream: TokenStream) -> tuple[np.ndarray, list[str]]:
    """The language of each caption: places in a list of names, int64 (captions,), and that list.

    A caption has the language that most of its words speak for, and is undecided where none or several have most. A
    single function word is enough for the language of most captions only: "i" and "die" are words of too many.
    """
    import numpy as np

    names = [*_FUNCTION_WORDS, *dict.fromkeys(_SCRIPTS.values())]
    columns_of: dict[str, list[int]] = {}
    for column, text in enumerate(_FUNCTION_WORDS.values()):
        for word in text.split():
            columns_of.setdefault(word, []).append(column)
    votes = np.zeros((len(stream.vocabulary), len(names)), dtype=np.int8)
    for place, word in enumerate(stream.vocabulary):
        plain = refined(word.lower())
        votes[place, columns_of.get(plain, [])] = 1
        if not plain.isascii() and (script := _script(plain)) is not None:
            votes[place, names.index(script)] = _SCRIPT_WEIGHT
    totals = np.zeros((stream.captions, len(names)), dtype=np.int16)
    row_of = np.repeat(np.arange(stream.captions), stream.counts)
    speaking = np.any(votes, axis=1)[stream.ids]
    for column in range(len(names)):
        weights = votes[stream.ids[speaking], column]
        totals[:, column] = np.bincount(row_of[speaking], weights, minlength=stream.captions)
    best = totals.argmax(axis=1)
    most = totals.max(axis=1)
    is_clear = (most > 0) & ((totals == most[:, None]).sum(axis=1) == 1)
    main = np.bincount(best[is_clear], minlength=len(names)).argmax()
    is_clear &= (most > 1) | (best == main)
    return np.where(is_clear, best, len(names)), [*names, UNDECIDED]


@cache
def _all_function_words() -> frozenset[str]:
    return frozenset(word for text in _FUNCTION_WORDS.values() for word in text.split())


def says_something(word: str) -> bool:
    """Whether a word is more than a function word, a number or a mark."""
    plain = refined(word.lower())
    return bool(plain) and plain not in _all_function_words()


def _script(word: str) -> str | None:
    found = None
    for character in word:
        if character.isalpha() and not character.isascii():
            script = _SCRIPTS.get(unicodedata.name(character, "").partition(" ")[0])
            if script == "Japanese":  # which also writes Chinese characters
                return script
            found = found or script
    return found
