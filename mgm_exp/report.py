"""The comparison of runs and sweeps as files and on the screen: ``comparison.json``, the table, Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def report(
    paths: Sequence[Path], comparison: Path, markdown: Path | None = None, *, baseline: str | None = None
) -> dict[str, Any]:
    """Compares runs, prints the table and writes it.

    Args:
        paths: Run folders and sweep folders.
        comparison: Where ``comparison.json`` goes.
        markdown: Where the table goes as Markdown; None: nowhere.
        baseline: The run that the others are compared with: a folder, a label or a trial's number; None: the first
            completed one.

    Returns:
        What was found, as in ``comparison.json``.

    Raises:
        UserError: a path is no run or sweep, or runs cannot be compared.
    """
    from mgm_exp.compare import compare, print_comparison, write_comparison, write_markdown

    found = compare(list(paths), baseline)
    write_comparison(found, comparison)
    if markdown is not None:
        write_markdown(found, markdown)
    print_comparison(found)
    return found
