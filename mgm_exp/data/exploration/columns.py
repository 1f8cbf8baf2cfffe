"""The rows of a dataset as columns: what exploration keeps of a million rows without keeping the rows."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mgm_exp.data.formats.id_set import hash_text

if TYPE_CHECKING:
    import numpy as np


class TextColumn:
    """Texts in one buffer: their bytes and 8 each, where a list of str takes some 60 more."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._ends = array("q")

    def extend(self, texts: Iterable[str]) -> None:
        raw = [text.encode("utf-8", "surrogatepass") for text in texts]
        end = len(self._content)
        for part in raw:
            end += len(part)
            self._ends.append(end)
        self._content += b"".join(raw)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: int) -> str:
        start = self._ends[place - 1] if place else 0
        return self._content[start : self._ends[place]].decode("utf-8", "surrogatepass")


class Rows:
    """What was read of the rows.

    Attributes:
        total: All rows, with those that are none.
        bad: Rows that are none, by kind.
        ids: Of the rows that are.
        images: Image paths; empty where a row has none.
        recaptioned: Rows that bring the caption that theirs replaced.
    """

    def __init__(self) -> None:
        self.total = 0
        self.bad: Counter[str] = Counter()
        self.ids = TextColumn()
        self.images = TextColumn()
        self.recaptioned = 0
        self._image_hashes = array("Q")
        self._text_counts = array("q")

    def __len__(self) -> int:
        """Rows that are rows."""
        return len(self.ids)

    def extend(self, ids: Sequence[str], images: Sequence[str], text_counts: Sequence[int]) -> None:
        """More rows: their ids, image paths (empty: none) and how many texts each has."""
        self.ids.extend(ids)
        self.images.extend(images)
        self._image_hashes.extend(hash_text(image) if image else 0 for image in images)
        self._text_counts.extend(text_counts)

    @property
    def text_row(self) -> np.ndarray:
        """For each text the row that it belongs to: int64."""
        import numpy as np

        return np.repeat(np.arange(len(self)), np.asarray(self._text_counts, dtype=np.int64))

    def distinct_images(self) -> tuple[np.ndarray, np.ndarray]:
        """For each distinct image path the first row that names it, and for each row the place of its image in that.

        Rows without an image have the place -1. Both are int64; images stand in the order of their first rows.
        """
        import numpy as np

        if not len(self):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        hashes = np.asarray(self._image_hashes, dtype=np.uint64)
        _, first, place = np.unique(hashes, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        first, place = first[order], rank[place]
        empty = np.flatnonzero(hashes[first] == 0)
        if len(empty):
            place = np.where(place == empty[0], -1, place - (place > empty[0]))
            first = np.delete(first, empty[0])
        return first, place
