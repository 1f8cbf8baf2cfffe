"""A configuration, or a part of it, as plain values, and back."""

from __future__ import annotations

import functools
import types
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


class NotPlain(ValueError):
    """Values that :func:`plain` would not have given: keys or types are others, or a text has a meaning (``${..}``)."""


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


def restored(kind: type[Config], values: Any) -> Config:
    """The dataclass of which :func:`plain` gave the values.

    Raises:
        NotPlain: it did not.
    """
    hints: dict[str, Any] = _hints(kind)  # type: ignore[arg-type]
    if not isinstance(values, dict) or values.keys() != hints.keys():
        raise NotPlain(kind.__name__)
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}  # type: ignore[arg-type]


def _value(kind: Any, value: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(value, str) and ("${" in value or value == "???"):
        raise NotPlain(value)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        fitting = [one for one in inner if type(value) is one] or [one for one in inner if one is not type(None)]
        return _value(fitting[0], value)
    if origin is list and isinstance(value, list):
        return [_value(inner[0], item) for item in value]
    if origin is dict and isinstance(value, dict):
        return {key: _value(inner[1], item) for key, item in value.items()}
    if kind is Any and (value is None or isinstance(value, (str, int, float))):
        return value
    if kind is Any and isinstance(value, dict):
        return {key: _value(Any, item) for key, item in value.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        return restored(kind, value)
    if isinstance(kind, type) and issubclass(kind, Enum) and value in {choice.value for choice in kind}:
        return kind(value)
    if type(value) is not kind:
        raise NotPlain(f"{value!r} is no {kind}")
    return value
