"""Charts."""
from __future__ import annotations
from pathlib import Path
from typing import Any
def draw_study(study: Any, folder: Path, objectives: list[str], directions: Any) -> list[Path]:
    return []
