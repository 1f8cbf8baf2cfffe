"""Looking through the knowledge base by words."""

from __future__ import annotations

from collections.abc import Sequence

from mgm_exp.doctor.entries import Entry, entries


def search(words: str, known: Sequence[Entry] | None = None) -> list[Entry]:
    """The entries that hold every word, those that hold them in id or title first.

    Args:
        words: Separated by blanks; each may be a part of a word.
        known: Where to look; None: in the package's entries.
    """
    wanted = words.lower().split()
    found = []
    for entry in entries() if known is None else known:
        head = f"{entry.id} {entry.title} {entry.group}".lower()
        patterns = " ".join(pattern.text for pattern in entry.text)
        body = f"{head} {entry.cause} {' '.join((*entry.fix, *entry.look))} {entry.run} {patterns}".lower()
        if wanted and all(word in body for word in wanted):
            found.append((-sum(word in head for word in wanted), entry.id, entry))
    return [entry for _, _, entry in sorted(found, key=lambda item: item[:2])]
