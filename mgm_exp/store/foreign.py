"""Small files that others may have written: run folders that were sent, model folders, books of a sweep.

They are read as text of a bounded size, from plain files only (a pipe would wait for ever), and parsed within a bounded
depth. Whatever is wrong with one is a ValueError, never a crash, so that one bad folder costs that folder.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from typing import Any

from .files import PathLike

MAX_BYTES = 1 << 30
MAX_YAML_BYTES = 4 << 20
MAX_DEPTH = 64
# References that one YAML file may have, and values that all of them together may stand for: thirty lines of three
# references each would stand for billions.
MAX_ALIASES = 100
MAX_REPEATED = 100_000


def read_text(path: PathLike, most_bytes: int = MAX_BYTES, errors: str = "strict") -> str:
    """The text of a plain file, UTF-8.

    Raises:
        OSError: it is not there, or may not be read.
        ValueError: it is no plain file, too large, or not UTF-8.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        if stat.S_ISDIR(facts.st_mode):
            raise IsADirectoryError(f"{path} is a folder")
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{path} is a pipe or a device, not a file")
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise ValueError(f"{path} has more than the {most_bytes:,} bytes that are read")
    return raw.decode("utf-8", errors)


def read_record(path: PathLike, most_bytes: int = MAX_BYTES) -> Any:
    """The JSON value in a file.

    Raises:
        OSError, ValueError: as :func:`read_text`; or it is no JSON, or nested too deeply.
    """
    return parse_record(read_text(path, most_bytes))


def parse_record(text: str | bytes) -> Any:
    """The JSON value of a text, such as one line of a file.

    Raises:
        ValueError: it is no JSON, has a number of thousands of digits, or is nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    # Counted only where there are brackets enough: most lines have a few.
    opening = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if opening > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, list):
                inner += part
        if not inner:
            return False
        level = inner
    return True


def read_yaml(path: PathLike) -> Any:
    """The value in a YAML file, of plain types: no tag makes an object of another kind.

    Raises:
        OSError, ValueError: as :func:`read_text`; or it is no YAML, nested too deeply, or repeats itself by reference.
    """
    return parse_yaml(read_text(path, MAX_YAML_BYTES))


def parse_yaml(text: str) -> Any:
    """:func:`read_yaml` of a text."""
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, Loader=loader))
        return yaml.load(text, Loader=loader)  # noqa: S506 - a safe loader, see above
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"no YAML of plain values: {str(error).splitlines()[0]}") from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        # What PyYAML makes of a scalar that is not of the kind that its tag says, such as "!!timestamp x".
        raise ValueError(f"no YAML of plain values: a tag that does not fit its value ({error})") from error


def _check_events(events: Iterable[Any]) -> None:
    """Bounds a document before it is built: building recurses in C, where too many levels end the process.

    Raises:
        ValueError: nested too deeply, or with too many, too large or circular references.
    """
    import yaml

    # Of each collection that is open: its anchor, the values in it, the levels below it.
    around: list[tuple[str | None, int, int]] = [(None, 0, 0)]
    known: dict[str, tuple[int, int]] = {}
    aliases = repeated = 0
    for event in events:
        size, height = 1, 0
        if isinstance(event, yaml.CollectionStartEvent):
            around.append((event.anchor, 1, 1))
            if len(around) - 1 > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
            continue
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, *_ in around):
                raise ValueError("a part that refers to itself")
            size, height = known.get(event.anchor, (1, 0))
            aliases, repeated = aliases + 1, repeated + size
            if aliases > MAX_ALIASES or repeated > MAX_REPEATED:
                raise ValueError(f"more than {MAX_ALIASES} references to its own parts, or to {MAX_REPEATED:,} values")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size, height = around.pop()
            if anchor is not None:
                known[anchor] = size, height
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor is not None:
                known[event.anchor] = size, height
        else:
            continue
        if len(around) - 1 + height > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        anchor, inner, levels = around[-1]
        around[-1] = anchor, inner + size, max(levels, height + 1)
