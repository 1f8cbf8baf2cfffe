"""Captions as numbers: every word (what stands between white space, as it is written) by its place in a vocabulary.

    stream = token_stream(["a red sign", "a label"])
    stream.ids, stream.counts, stream.vocabulary       # [0 1 2 0 3], [3 2], ["a", "red", "sign", "label"]

Counting, pairs, windows and subsamples are then a few array operations for millions of words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_CHUNK = 16384


@dataclass(frozen=True)
class TokenStream:
    """The words of captions, one caption after the other.

    Args:
        ids: int32 (words,): places in ``vocabulary``, which is numbered by first occurrence.
        counts: int64 (captions,): words of each caption.
        vocabulary: The distinct words.
    """

    ids: np.ndarray
    counts: np.ndarray
    vocabulary: list[str]

    def __len__(self) -> int:
        """Words in all."""
        return len(self.ids)

    @property
    def captions(self) -> int:
        return len(self.counts)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each caption begins in ``ids``."""
        import numpy as np

        return np.cumsum(self.counts) - self.counts

    def frequencies(self) -> np.ndarray:
        """How often each word of the vocabulary occurs: int64."""
        import numpy as np

        return np.bincount(self.ids, minlength=len(self.vocabulary))

    def take(self, captions: np.ndarray) -> np.ndarray:
        """The words of these captions, in this order: int32."""
        import numpy as np

        counts = self.counts[captions]
        total = int(counts.sum())
        places = np.repeat(self.starts[captions] - (np.cumsum(counts) - counts), counts) + np.arange(total)
        return self.ids[places]

    def case_folded(self) -> TokenStream:
        """The same captions with words in lower case."""
        import numpy as np

        numbers: dict[str, int] = {}
        new = np.fromiter(
            (numbers.setdefault(word.lower(), len(numbers)) for word in self.vocabulary),
            dtype=np.int32,
            count=len(self.vocabulary),
        )
        return TokenStream(new[self.ids], self.counts, list(numbers))

    def trimmed(self) -> TokenStream:
        """The same captions with a vocabulary of the words that occur."""
        import numpy as np

        used, first, ids = np.unique(self.ids, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        return TokenStream(rank[ids], self.counts, [self.vocabulary[place] for place in used[order].tolist()])


class TokenStreamBuilder:
    """Takes captions, or streams of them, one after the other, and becomes one :class:`TokenStream`."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._ids: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def add(self, captions: list[str]) -> None:
        import numpy as np

        split = [caption.split() for caption in captions]
        flat = list(chain.from_iterable(split))
        numbers = self._numbers
        new = dict.fromkeys(flat).keys() - numbers.keys()
        if new:  # in the order of their first occurrence: a set has none
            numbers.update(
                zip((word for word in dict.fromkeys(flat) if word in new), count(len(numbers)), strict=False)
            )
        self._ids.append(np.fromiter(map(numbers.__getitem__, flat), dtype=np.int32, count=len(flat)))
        self._counts.append(np.fromiter(map(len, split), dtype=np.int64, count=len(split)))

    def add_stream(self, stream: TokenStream) -> None:
        """Captions that were counted already, with a vocabulary of their own."""
        import numpy as np

        numbers = self._numbers
        number_of = np.fromiter(
            (numbers.setdefault(word, len(numbers)) for word in stream.vocabulary),
            dtype=np.int32,
            count=len(stream.vocabulary),
        )
        self._ids.append(number_of[stream.ids])
        self._counts.append(stream.counts)

    def finish(self) -> TokenStream:
        import numpy as np

        none = [np.zeros(0, dtype=np.int64)]
        ids = np.concatenate(self._ids or none).astype(np.int32, copy=False)
        return TokenStream(ids, np.concatenate(self._counts or none), list(self._numbers))


def token_stream(captions: Iterable[str]) -> TokenStream:
    """The words of captions, without special tokens, as numbers."""
    builder = TokenStreamBuilder()
    for chunk in chunks(captions, _CHUNK):
        builder.add(chunk)
    return builder.finish()


def chunks(captions: Iterable[str], size: int) -> Iterator[list[str]]:
    """A stream in lists of ``size``; the last one may be shorter."""
    iterator = iter(captions)
    while chunk := list(islice(iterator, size)):
        yield chunk
