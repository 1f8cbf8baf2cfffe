"""Token ids of curated rows that stay in memory: what a worker has tokenised for one run it does not tokenise again.

    keep()                                       # once, in a worker; anywhere else every dataset has rows of its own
    rows = rows_of(key)                          # {number of a row: (ids, labels)}, filled by whoever reads them

Arrays are read-only: no run can change what the next one reads.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeAlias

import numpy as np

Rows: TypeAlias = dict[int, tuple[np.ndarray, np.ndarray]]

# Files of rows that stay: two arms of an ablation, both stages.
_KEPT = 4

_ROWS: dict[Hashable, Rows] = {}
_KEEPS = [False]


def keep() -> None:
    """From now on, rows stay in this process."""
    _KEEPS[0] = True


def stop_keeping() -> None:
    """Rows go with their datasets; those that stayed are let go of."""
    _KEEPS[0] = False
    _ROWS.clear()


def keeps() -> bool:
    """Whether rows stay."""
    return _KEEPS[0]


def rows_of(key: Hashable) -> Rows:
    """The rows of a file as one processor encodes them.

    Args:
        key: All that ids and labels depend on: the file's bytes, the tokenizer, the template, the longest row.
    """
    if not _KEEPS[0]:
        return {}
    rows = _ROWS.pop(key, {})
    _ROWS[key] = rows  # the last one used is the last one to go
    while len(_ROWS) > _KEPT:
        del _ROWS[next(iter(_ROWS))]
    return rows


def kept_gib() -> float:
    """GiB of the host's memory that stay."""
    return sum(ids.nbytes + labels.nbytes for rows in _ROWS.values() for ids, labels in rows.values()) / 2**30
