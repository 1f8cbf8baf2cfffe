"""The comparison of runs and sweeps as files and on the screen: ``comparison.json``, a table, Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgm_exp.store import write_json_atomic


def report(
    paths: Sequence[Path], comparison: Path, markdown: Path | None = None, *, baseline: str | None = None
) -> dict[str, Any]:
    """Compares runs, prints the table and writes it.

    Args:
        paths: Run folders and sweep folders.
        comparison: Where ``comparison.json`` goes.
        markdown: Where the table goes as Markdown; None: nowhere.
        baseline: The run that the others are compared with; None: the first.

    Returns:
        The content of ``comparison.json``.
    """
    from mgm_exp.compare import compare

    content = compare(list(paths), baseline=baseline)
    write_json_atomic(comparison, content)
    return content
