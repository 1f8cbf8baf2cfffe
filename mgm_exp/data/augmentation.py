"""More rows out of those that a recipe kept: copies of pairs, and captions reworded by rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mgm_exp.data.records import Record


@dataclass(frozen=True)
class Augmentation:
    """What is made of a pair (an image with one answer); other rows pass as they are.

    Args:
        duplicate: How often each pair is read in an epoch; copies are called ``<id>#d2``, ...
        paraphrase: Share of captions that are reworded by rules.
        seed: Of the choices.
    """

    duplicate: int = 1
    paraphrase: float = 0.0
    seed: int = 0

    def rows(self, record: Record) -> Iterator[tuple[Record, list[str]]]:
        """The record and what is made of it, each with its changes."""
        yield record, []
        if record.image is None or len(record.conversations) != 2:
            return
        for number in range(2, self.duplicate + 1):
            yield replace(record, id=f"{record.id}#d{number}"), ["duplicated"]
