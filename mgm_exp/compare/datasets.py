"""What the compared runs were trained on, side by side: read from the ``data.json`` that each run keeps.

Diversity is shown at equal sizes only: MATTR-50, and the type-token ratio at the largest number of tokens that all of
the compared data have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mgm_exp.compare.runs import Run
from mgm_exp.store import read_record

FILE = "data.json"

_SHOWN = ("words_mean", "words_median", "characters_mean", "too_short_share", "tokens", "vocabulary", "duplicate_share")


def datasets(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each kind of data that some run was trained on, in the order of the runs.

    Returns:
        For each ``name, fingerprint, captioner, runs[], align{}, instruct{}``; a stage has ``file, rows, kept,
        dropped{}, rejected, recaptioned, words_mean, ..., mattr_50{value, ci_low, ci_high}, ttr{size, value, ci_low,
        ci_high}`` (None where it was not recorded, or where no size is common to all).
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        content = _read(run)
        if content is None:
            continue
        key = (str(content.get("name")), str(content.get("fingerprint")))
        found.setdefault(key, {"content": content, "runs": []})["runs"].append(run.name)
    contents = [entry["content"] for entry in found.values()]
    return [
        {
            "name": name,
            "fingerprint": fingerprint,
            "captioner": (entry["content"].get("recaption") or {}).get("captioner"),
            "runs": entry["runs"],
            **{stage: _stage(stage, entry["content"], contents) for stage in ("align", "instruct")},
        }
        for (name, fingerprint), entry in found.items()
    ]


def _read(run: Run) -> dict[str, Any] | None:
    """A run's ``data.json``; None where it has none, or a damaged one."""
    try:
        content = read_record(run.path / FILE)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("align"), dict) else None


def _stage(stage: str, content: Mapping[str, Any], all_contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = content[stage]
    text = found["text"]
    sizes = [_sizes(other[stage]["text"]) for other in all_contents]
    common = set.intersection(*sizes) if sizes else set()
    size = max(common, default=None)
    return {
        "file": found["file"],
        "rows": found["rows"],
        "kept": found["kept"],
        "dropped": found["dropped"],
        "rejected": sum(found["rejected"].values()),
        "recaptioned": found["changed"].get("recaptioned", 0),
        **{name: text.get(name) for name in _SHOWN},
        "mattr_50": {"value": text["mattr_50"], **text["mattr_50_interval"]},
        "ttr": None if size is None else {"size": size, **text["ttr_at"][str(size)]},
    }


def _sizes(text: Mapping[str, Any]) -> set[int]:
    """Numbers of tokens at which a type-token ratio was measured."""
    return {int(size) for size, estimate in text["ttr_at"].items() if estimate.get("value") is not None}


# -- in words and tables -----------------------------------------------------------------------------------------------

COLUMNS = ("data", "rows", "kept", "words", "< 4 words", "vocabulary", "MATTR-50", "TTR")


def data_rows(found: Sequence[Mapping[str, Any]], stage: str = "align") -> list[dict[str, str]]:
    """One row for each kind of data, as texts; the columns are :data:`COLUMNS`."""
    rows = []
    for entry in found:
        part = entry[stage]
        ttr = part["ttr"]
        name = entry["name"] if entry["captioner"] is None else f"{entry['name']} (captions by {entry['captioner']})"
        cells = (
            name,
            f"{part['rows']:,}",
            f"{part['kept']:,}",
            _number(part["words_mean"], ".1f"),
            _number(part["too_short_share"], ".1%"),
            _number(part["vocabulary"], ",d"),
            _estimate(part["mattr_50"]),
            "-" if ttr is None else f"{_estimate(ttr)} at {ttr['size']:,}",
        )
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _estimate(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "-"
    if found.get("ci_low") is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} [{found['ci_low']:.3f}, {found['ci_high']:.3f}]"
