"""Numbers as people read them."""

from __future__ import annotations


def share(value: float | None) -> str:
    """A share in percent: 3.9 %, 0.02 %, 0 %."""
    if value is None:
        return "–"
    percent = 100 * value
    if percent == 0 or percent >= 99.95:
        return f"{percent:.0f} %"
    if percent < 0.01:
        return "< 0.01 %"
    return f"{percent:.2g} %" if percent < 1 else f"{percent:.1f} %"


def number(value: float | None, digits: int = 1) -> str:
    """A number with separators; whole ones without decimals."""
    if value is None:
        return "–"
    return f"{round(value, digits):,.0f}" if round(value, digits) % 1 == 0 else f"{value:,.{digits}f}"


def ratio(value: float | None) -> str:
    """A number between 0 and 1 with three decimals."""
    return "–" if value is None else f"{value:.3f}"


def interval(low: float | None, high: float | None) -> str:
    """A 95 % interval."""
    return "" if low is None or high is None else f"{low:.3f} – {high:.3f}"


def size(count: float) -> str:
    """Bytes: 43 KB, 1.2 GB."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """1 row, 2 rows, 1,000 rows."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
