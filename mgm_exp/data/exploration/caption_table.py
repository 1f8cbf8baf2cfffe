"""The values of :mod:`mgm_exp.data.exploration.caption_values` for many captions at once: equal numbers, much faster.

    table = measure_captions(captions)
    table.words, table.character_repetition[5]          # arrays, one value a caption

A chunk of captions becomes arrays of symbols (characters, or words by number). An n-gram together with the row it
stands in is packed into 64 bits, so that one sort brings repeated n-grams of a row together. Where the bits do not
suffice, hashes find the few rows that may hold a repeated n-gram, and those are counted one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from mgm_exp.data.exploration.caption_values import (
    character_repetition,
    checked_n,
    parts,
    refined,
    word_repetition,
)
from mgm_exp.data.exploration.special_characters import special_table

if TYPE_CHECKING:
    import numpy as np

_ROW_BITS = 13
_CHUNK = 1 << _ROW_BITS  # captions that are measured at once: their arrays stay in the caches of a core
_BASE = 0x9E3779B97F4A7C15  # of a polynomial hash modulo 2**64; any odd number with well-mixed bits would do


@dataclass(frozen=True)
class CaptionTable:
    """Values of many captions, in their order.

    Args:
        words: int32 (captions,)
        text_length: int32 (captions,)
        special_characters: float64 (captions,)
        word_repetition: n -> float64 (captions,)
        character_repetition: n -> float64 (captions,)
    """

    words: np.ndarray
    text_length: np.ndarray
    special_characters: np.ndarray
    word_repetition: Mapping[int, np.ndarray]
    character_repetition: Mapping[int, np.ndarray]

    def __len__(self) -> int:
        return len(self.words)


def measure_captions(
    captions: Iterable[str], *, word_n: Sequence[int] = (1, 10), character_n: Sequence[int] = (5, 10)
) -> CaptionTable:
    """The values of many captions, a chunk of the stream at a time; the table takes some 50 bytes a caption.

    Args:
        captions: Without special tokens.
        word_n, character_n: Lengths of the n-grams whose repetition is measured.

    Raises:
        ValueError: a length below 1.
    """
    for n in (*word_n, *character_n):
        checked_n(n)
    chunks = _chunks(captions)
    first = measure_chunk(next(chunks, []), word_n, character_n)
    return joined_tables([first, *(measure_chunk(chunk, word_n, character_n) for chunk in chunks)])


def _chunks(captions: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(captions)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def measure_chunk(captions: list[str], word_n: Sequence[int], character_n: Sequence[int]) -> CaptionTable:
    """The values of a few thousand captions (8,192 at most)."""
    import numpy as np

    lengths = np.fromiter(map(len, captions), dtype=np.int64, count=len(captions))
    points = np.frombuffer("".join(captions).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    split = [parts(caption) for caption in captions]
    counts = np.fromiter(map(len, split), dtype=np.int64, count=len(captions))
    flat = list(chain.from_iterable(split))

    forms: dict[str, int] = {"": 0}  # lower-case forms by number
    codes: dict[str, int] = {}
    words = set()
    for part in set(flat):
        codes[part] = forms.setdefault(refined(part.lower()), len(forms))
        if refined(part):  # not the same: the lower-case form of a special character may be none
            words.add(part)
    is_word = np.fromiter(map(words.__contains__, flat), dtype=bool, count=len(flat))
    symbols = np.fromiter(map(codes.__getitem__, flat), dtype=np.int64, count=len(flat))
    is_left = symbols != 0

    word_grams = _Symbols(captions, symbols[is_left], _sums(is_left, counts))
    character_grams = _Symbols(captions, _numbered(points), lengths)
    return CaptionTable(
        words=_sums(is_word, counts).astype(np.int32),
        text_length=lengths.astype(np.int32),
        special_characters=_sums(special_table()[points], lengths) / np.maximum(lengths, 1),
        word_repetition={n: word_grams.word_repetition(n) for n in word_n},
        character_repetition={n: character_grams.character_repetition(n) for n in character_n},
    )


def joined_tables(tables: Sequence[CaptionTable]) -> CaptionTable:
    """Tables one below the other."""
    import numpy as np

    first = tables[0]
    return CaptionTable(
        words=np.concatenate([table.words for table in tables]),
        text_length=np.concatenate([table.text_length for table in tables]),
        special_characters=np.concatenate([table.special_characters for table in tables]),
        word_repetition={
            n: np.concatenate([table.word_repetition[n] for table in tables]) for n in first.word_repetition
        },
        character_repetition={
            n: np.concatenate([table.character_repetition[n] for table in tables]) for n in first.character_repetition
        },
    )


class _Symbols:
    """The symbols of some captions, one after the other.

    Args:
        captions: What they are of.
        symbols: int64, small numbers.
        counts: Symbols of each caption.
    """

    def __init__(self, captions: list[str], symbols: np.ndarray, counts: np.ndarray) -> None:
        import numpy as np

        self.captions = captions
        self.symbols = symbols.astype(np.uint64)
        self.counts = counts
        self.row_of = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
        self.bits = int(symbols.max(initial=0)).bit_length()

    def word_repetition(self, n: int) -> np.ndarray:
        import numpy as np

        if n * self.bits + _ROW_BITS > 64:
            return self._one_by_one(n, word_repetition)
        repeated = _Repeated(self._packed(n), 64 - _ROW_BITS)
        shares = np.bincount(repeated.rows, repeated.counts, minlength=len(self.counts))
        return shares / np.maximum(self.counts - n + 1, 1)

    def character_repetition(self, n: int) -> np.ndarray:
        import numpy as np

        if n * self.bits + _ROW_BITS > 64:
            return self._one_by_one(n, character_repetition)
        repeated = _Repeated(self._packed(n), 64 - _ROW_BITS)
        totals = np.maximum(self.counts - n + 1, 0)
        # Each repeated n-gram stands for `counts` places and is one distinct n-gram.
        surplus = np.bincount(repeated.rows, repeated.counts - 1, minlength=len(totals))
        most = np.sqrt(totals - surplus).astype(np.int64)  # exact: distinct n-grams are far below 2**52
        order = np.lexsort((-repeated.counts, repeated.rows))
        rows, counts = repeated.rows[order], repeated.counts[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        is_taken = rank < most[rows]
        return np.bincount(rows[is_taken], counts[is_taken], minlength=len(totals)) / np.maximum(totals, 1)

    def _packed(self, n: int) -> np.ndarray:
        """Each n-gram, its row in the highest bits."""
        import numpy as np

        keys, rows = self._grams(n, lambda keys: np.left_shift(keys, np.uint64(self.bits), out=keys))
        return keys | rows << np.uint64(64 - _ROW_BITS)

    def _one_by_one(self, n: int, exact: Callable[[str, int], float]) -> np.ndarray:
        """Hashes tell which rows may hold an n-gram twice; only those are counted, all others are 0."""
        import numpy as np

        hashes, rows = self._grams(n, lambda hashes: np.multiply(hashes, np.uint64(_BASE), out=hashes))
        hashes ^= hashes >> np.uint64(32)
        hashes *= np.uint64(_BASE)
        found = _Repeated(hashes >> np.uint64(_ROW_BITS) | rows << np.uint64(64 - _ROW_BITS), 64 - _ROW_BITS)
        values = np.zeros(len(self.counts))
        for row in np.unique(found.rows).tolist():
            values[row] = exact(self.captions[row], n)
        return values

    def _grams(self, n: int, shift: Callable[[np.ndarray], object]) -> tuple[np.ndarray, np.ndarray]:
        """A number for each n-gram that lies inside one row, and that row."""
        import numpy as np

        places = max(len(self.symbols) - n + 1, 0)
        keys = np.zeros(places, dtype=np.uint64)
        for offset in range(n):
            shift(keys)
            keys += self.symbols[offset : places + offset]
        rows = self.row_of[:places]
        is_inside = rows == self.row_of[n - 1 :][:places]
        return keys[is_inside], rows[is_inside]


class _Repeated:
    """The keys that occur more than once: the row that each belongs to, and how often.

    Args:
        keys: uint64, the row above ``shift``; sorted in place.
    """

    def __init__(self, keys: np.ndarray, shift: int) -> None:
        import numpy as np

        keys.sort()
        is_first = np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]
        starts = np.flatnonzero(is_first)
        counts = np.diff(starts, append=len(keys))
        starts, counts = starts[counts > 1], counts[counts > 1]
        self.rows = (keys[starts] >> np.uint64(shift)).astype(np.int64)
        self.counts = counts


def _numbered(points: np.ndarray) -> np.ndarray:
    """Code points, numbered without gaps, so that they need few bits."""
    import numpy as np

    is_present = np.zeros(int(points.max(initial=0)) + 1, dtype=bool)
    is_present[points] = True
    return (np.cumsum(is_present, dtype=np.int32) - 1)[points]


def _sums(flags: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Number of true flags of each row; row i has ``counts[i]`` of them."""
    import numpy as np

    ends = np.cumsum(counts)
    running = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    return running[ends] - running[ends - counts]
