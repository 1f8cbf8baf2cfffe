"""What a replay found: the first number that is not the recorded one, and what the two manifests say about why.

Reads and compares plain data; the steps themselves are computed by :mod:`mgm_exp.replay`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mgm_exp.store import parse_record

Row = Mapping[str, Any]

# What is compared of a step, in the order in which one follows from the other: the first that differs is the one to
# look into. Times, speeds and memory are not.
FIELDS = (
    "event",
    "batch_name",
    "tokens",
    "epoch",
    "lr",
    "lr_connector",
    "loss_scale",
    "loss",
    "grad_norm",
    "non_finite",
    "value",
)
# Packages that compute; a difference in one of them is told before one in the others.
COMPUTING = ("torch", "transformers", "peft", "deepspeed", "numpy", "safetensors", "tokenizers", "pillow", "mgm-exp")
_DEVICE = ("type", "name", "cpu", "cpu_capability", "driver", "cuda", "threads")


@dataclass(frozen=True)
class Difference:
    """The first number that is not the recorded one.

    Args:
        stage, step: Where; the step after which the row was written.
        field: A key of the row; ``stopped`` where the replay could not get so far; ``weights`` for a tensor file.
        recorded, replayed: The two values, as they stand in the files (floats also in hexadecimal).
        samples: Ids of that step's samples, as the replay has them.
    """

    stage: str
    step: int
    field: str
    recorded: str
    replayed: str
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Something that is not as it was when the run was recorded, which may be why.

    Args:
        kind: ``settings``, ``data``, ``model``, ``code``, ``packages``, ``python``, ``device`` or ``threads``.
        detail: What it was and what it is.
    """

    kind: str
    detail: str


@dataclass(frozen=True)
class Findings:
    """What a replay found.

    Args:
        run: The run's folder.
        steps: Stage -> steps that were compared.
        first: The first difference; None: all that was compared is equal, bit for bit.
        sources: What is not as it was, the likeliest first.
        weights: Files of weights, optimizer and generators that were compared and are equal.
        notes: What else a reader should know.
    """

    run: str
    steps: dict[str, int] = field(default_factory=dict)
    first: Difference | None = None
    sources: tuple[Source, ...] = ()
    weights: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"schema_version": 1, "equal": self.first is None, **asdict(self)}

    def in_words(self) -> str:
        """A few lines for the terminal."""
        total = sum(self.steps.values())
        places = ", ".join(f"{stage} {count}" for stage, count in self.steps.items())
        lines = [f"{self.run}: replayed {total} step(s) ({places})"]
        if self.first is None:
            lines.append("equal: every loss, gradient norm, learning rate, token count and batch is the recorded one")
            if self.weights:
                lines.append(f"equal: {len(self.weights)} file(s) of weights, optimizer and generators, byte for byte")
            lines += [f"although {source.kind} changed: {source.detail}" for source in self.sources]
        else:
            lines += _differs(self.first)
            lines += _why(self.sources)
        return "\n".join([*lines, *self.notes])


def _differs(first: Difference) -> list[str]:
    lines = [
        f"differs: first in {first.stage}, step {first.step}, {first.field}",
        f"  recorded {first.recorded}",
        f"  replayed {first.replayed}",
    ]
    if first.samples:
        shown = ", ".join(first.samples[:8])
        lines.append(f"  samples of that step: {shown}{', ...' if len(first.samples) > 8 else ''}")
    return lines


def _why(sources: Sequence[Source]) -> list[str]:
    if not sources:
        return [
            "likely source: none of data, model, settings, code, packages, device and threads changed; what is left is "
            "arithmetic that is not repeatable on this device (train.deterministic=true makes a GPU's so)"
        ]
    likeliest, *others = sources
    lines = [f"likely source: {likeliest.kind}: {likeliest.detail}"]
    return lines + [f"  also changed: {source.kind}: {source.detail}" for source in others]


# -- rows ---------------------------------------------------------------------------------------------------------


def steps_of(rows: Sequence[Row], stage: str) -> list[Row]:
    """The rows of a stage that are steps or validation points; the others (resumed, ...) tell of the process only."""
    return [row for row in rows if row.get("stage") == stage and ("loss" in row or row.get("event") == "validation")]


def first_difference(stage: str, recorded: Sequence[Row], replayed: Sequence[Row]) -> Difference | None:
    """The first value that is not the recorded one, bit for bit; fields that only one version wrote are passed over.

    Args:
        recorded, replayed: Rows as :func:`steps_of` gives them, of the same steps.
    """
    for old, new in zip_longest(recorded, replayed):
        if old is None or new is None:
            there = old if new is None else new
            says = f"{there.get('event') or 'a step'} after step {there['step']}"
            return Difference(stage, int(there["step"]), "row", *(("none", says) if old is None else (says, "none")))
        if old["step"] != new["step"]:
            return Difference(stage, int(new["step"]), "step", str(old["step"]), str(new["step"]))
        for key in FIELDS:
            if key in ("batch_name", "value") and (key not in old or key not in new):
                continue  # rows of a version that did not write it yet
            if exact(old.get(key)) != exact(new.get(key)):
                return Difference(stage, int(new["step"]), key, exact(old.get(key)), exact(new.get(key)))
    return None


def exact(value: Any) -> str:
    """A value so that two texts are equal only if all bits are: floats in decimal and hexadecimal."""
    if isinstance(value, float):
        return f"{value!r} ({value.hex()})"
    return json.dumps(value, sort_keys=True)


# -- why ----------------------------------------------------------------------------------------------------------


def changed_inputs(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, ``old -> new``) of what two stages' inputs differ in."""
    for key in sorted({*before, *after}, key=str):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changed_inputs(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", f"{_short(old)} -> {_short(new)}"


def changed_row(before: Path, after: Path) -> str | None:
    """The first row in which two curated files differ; None where they are alike or one is not there."""
    if not before.is_file() or not after.is_file():
        return None
    with before.open("rb") as old_file, after.open("rb") as new_file:
        for number, (old, new) in enumerate(zip_longest(old_file, new_file), 1):
            if old != new:
                return f"row {number} of {after.name} (id {_id_of(new or old)}) {_how(old, new)}"
    return None


def _how(old: bytes | None, new: bytes | None) -> str:
    if old is None:
        return "was not there"
    return "is gone" if new is None else "reads otherwise"


def _id_of(line: bytes) -> str:
    try:
        row = parse_record(line)
    except ValueError:
        return "unknown"
    return _short(row.get("id")) if isinstance(row, dict) else "unknown"


def changed_surroundings(
    before: Mapping[str, Any], now: Mapping[str, Any], files: Sequence[str] | None = None
) -> list[Source]:
    """What two manifests say about code, packages, Python and device: what is not as it was.

    Args:
        before, now: The manifests.
        files: Files of the package that differ from the commit in ``before``; None: not known.
    """
    found = [*_code(before, now, files), *_device(before, now), *_packages(before, now)]
    for key in ("python", "platform"):
        if before.get(key) and before.get(key) != now.get(key):
            found.append(Source(key, f"{before.get(key)} -> {now.get(key)}"))
    return found


def _code(before: Mapping[str, Any], now: Mapping[str, Any], files: Sequence[str] | None) -> Iterator[Source]:
    old, new = _section(before, "git"), _section(now, "git")
    if not old.get("commit"):
        return
    if files is not None and not old.get("diff"):
        if files:
            shown = ", ".join(files[:4]) + (", ..." if len(files) > 4 else "")
            many = f"{len(files)} file{'s' if len(files) > 1 else ''} of the package"
            yield Source("code", f"{many} since commit {_short(old['commit'])}: {shown}")
    elif old.get("commit") != new.get("commit"):
        yield Source("code", f"commit {_short(old.get('commit'))} -> {_short(new.get('commit'))}")
    elif (old.get("diff") or "") != (new.get("diff") or ""):
        yield Source("code", f"commit {_short(old['commit'])} with other changes that are not committed")


def _device(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Source]:
    old, new = _section(before, "device"), _section(now, "device")
    for key in _DEVICE:
        if key in old and old[key] != new.get(key):
            kind = "threads" if key == "threads" else "device"
            yield Source(kind, f"{key} {_short(old[key])} -> {_short(new.get(key))}")


def _packages(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Source]:
    old, new = ({k.lower(): v for k, v in _section(m, "packages").items()} for m in (before, now))
    if not old:
        return
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    ranked = [name for name in COMPUTING if name in changed] + [name for name in changed if name not in COMPUTING]
    if ranked:
        shown = ", ".join(f"{name} {old.get(name, 'none')} -> {new.get(name, 'none')}" for name in ranked[:6])
        yield Source("packages", f"{shown}{f', and {len(ranked) - 6} more' if len(ranked) > 6 else ''}")


def _section(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = manifest.get(name)
    return value if isinstance(value, Mapping) else {}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return f"{text[:12]}..."
    return text if len(text) <= 60 else f"{text[:57]}..."
