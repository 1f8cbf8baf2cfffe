"""Numbers and files as they stand on a command line: what they may be, and what is said where they are not."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from mgm_exp.errors import UserError


def count(what: str, most: int | None = None) -> Callable[[str], int]:
    """A whole number from 1, for argparse's ``type``.

    Args:
        what: What is counted, for the message: "rows".
        most: The largest one that is taken; None: there is none.
    """

    def read(text: str) -> int:
        # More digits than any count has are refused before they are turned into a number.
        if not (text.isascii() and text.isdecimal() and len(text) <= 18) or not 1 <= int(text) <= (most or 10**18):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number of {what} ({f'1 to {most}' if most else '1, 2, ...'})"
            )
        return int(text)

    return read


def add_base(parser: argparse.ArgumentParser, when: str) -> None:
    """``--base DIR``: the base model, where what is given does not lead to it."""
    parser.add_argument("--base", type=Path, metavar="DIR", help=f"base model, {when}")


def check_json(path: Path | None) -> None:
    """``--json FILE``, looked at before the work, not after it; None: it was not given.

    Raises:
        UserError: it is a folder, or is to be in one that is not there.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"--json {path} is a folder.", advice="Give the path of a file.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--json {path}: {path.parent} is not a folder.", advice="Make it first.")


def megapixels(text: str) -> float:
    """A number of megapixels above 0."""
    value = _number(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of megapixels above 0")
    return value


def seconds(text: str) -> float:
    """A number of seconds, at most a day."""
    value = _number(text)
    if not 0.1 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds (0.1 to 86400)")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
