"""A configuration, or a part of it, as plain values."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any


def plain(config: Any) -> Any:
    """A (nested) dataclass as JSON-ready dicts, enums by value; the inverse of ``from_plain``."""
    if isinstance(config, Enum):
        return config.value
    if is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, (list, tuple)):
        return [plain(item) for item in config]
    if isinstance(config, dict):
        return {str(key): plain(value) for key, value in config.items()}
    return config
