"""More rows out of those that a recipe kept: copies of pairs, and captions reworded by rules.

    Augmentation(duplicate=2, paraphrase=0.5).rows(record)

Both are off by default. What happens to a pair depends on its id and the seed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mgm_exp.data.paraphrase import paraphrase
from mgm_exp.data.records import Record, Turn

DUPLICATED, PARAPHRASED = "duplicated", "paraphrased"
"""Changes, as :mod:`mgm_exp.data.conversations` names others."""


@dataclass(frozen=True)
class Augmentation:
    """What is made of a pair (an image with one answer); other rows pass as they are.

    Args:
        duplicate: How often each pair is read in an epoch; copies are called ``<id>#d2``, ...
        paraphrase: Share of the captions that are reworded by rules, 0..1; each copy is drawn for itself. A caption
            that no rule fits stays as it is.
        seed: Of the choices.
    """

    duplicate: int = 1
    paraphrase: float = 0.0
    seed: int = 0

    def rows(self, record: Record) -> Iterator[tuple[Record, list[str]]]:
        """The record and what is made of it, each with its changes."""
        if record.image is None or len(record.conversations) != 2:
            yield record, []
            return
        yield self._reworded(record, [])
        for number in range(2, self.duplicate + 1):
            yield self._reworded(replace(record, id=f"{record.id}#d{number}"), [DUPLICATED])

    def _reworded(self, record: Record, changes: list[str]) -> tuple[Record, list[str]]:
        draw = hashlib.sha256(f"{self.seed}\0paraphrase\0{record.id}".encode()).digest()
        if int.from_bytes(draw[:8], "big") / 2**64 >= self.paraphrase:
            return record, changes
        question, answer = record.conversations
        text = paraphrase(answer.text, seed=int.from_bytes(draw[8:16], "big"))
        if text == answer.text:
            return record, changes
        raw = answer.text if record.raw_caption is None else record.raw_caption
        turns = (question, Turn(answer.speaker, text))
        return replace(record, conversations=turns, raw_caption=raw), [*changes, PARAPHRASED]
