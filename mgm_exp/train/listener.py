"""Who hears of what a stage does, in the process that asked for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _ignore(*args: Any) -> None:
    return None


def _go_on(step: int, value: float) -> bool:
    return False


@dataclass(frozen=True)
class Listener:
    """Callbacks of one stage; those not given ignore what they hear.

    Args:
        on_start: ``(total steps, rows that a checkpoint had already)``, once, before the first step.
        on_row: Each line of ``metrics.jsonl`` as it is written; one with the key ``event`` is not an optimizer step.
        on_checkpoint: The folder of each finished checkpoint.
        say: One line for the reader.
        on_progress: ``(what, images done, images in all)`` before the first step.
        on_validation: ``(step, score)`` of each validation point; True stops the stage there.
    """

    on_start: Callable[[int, list[dict[str, Any]]], None] = _ignore
    on_row: Callable[[dict[str, Any]], None] = _ignore
    on_checkpoint: Callable[[Path], None] = _ignore
    say: Callable[[str], None] = _ignore
    on_progress: Callable[[str, int, int], None] = _ignore
    on_validation: Callable[[int, float], bool] = _go_on
