"""``sweep.json`` of a sweep with very many trials: written in little time, and not more often than it is worth.

The file is derived from what is on the disk already (the study, the trials' folders), so it may be a little behind.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mgm_exp.store import encode_json

# The part of its time that a sweeper may spend on rewriting the file, and what it may spend at once.
SHARE = 0.05
AT_ONCE_S = 2.0


class Allowance:
    """How often something that can wait may be done: for a twentieth of the time, in the long run.

    A sweep of some hundred trials, or one of long trials, never has to wait.
    """

    def __init__(self) -> None:
        self._left_s, self._seen, self._last_s = AT_ONCE_S, time.monotonic(), 0.0

    def allows(self) -> bool:
        """Whether it may be done now, if it takes as long as the last time."""
        now = time.monotonic()
        most = max(AT_ONCE_S, 2 * self._last_s)
        self._left_s, self._seen = min(most, self._left_s + SHARE * (now - self._seen)), now
        return self._left_s >= self._last_s

    def spent(self, seconds: float) -> None:
        """It took so long."""
        self._left_s, self._last_s = self._left_s - seconds, seconds


def encode_row(row: dict[str, Any]) -> str:
    """One trial as :func:`encode_rows` takes it; raises as ``encode_json``."""
    text = encode_json(row, "trial").decode("utf-8").rstrip("\n")
    return "    " + text.replace("\n", "\n    ")


def encode_rows(content: dict[str, Any], name: str, rows: Sequence[str]) -> bytes:
    """``encode_json`` of ``content`` with these trials, which have been encoded before.

    Args:
        content: The whole, without its ``trials``.
        name: How an error calls it.
        rows: Of :func:`encode_row`.
    """
    text = encode_json({**content, "trials": []}, name).decode("utf-8")
    head, mark, tail = text.partition('\n  "trials": []')
    assert mark
    shown = "[\n" + ",\n".join(rows) + "\n  ]" if rows else "[]"
    return f'{head}\n  "trials": {shown}{tail}'.encode()
