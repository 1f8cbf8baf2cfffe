"""A case: all that is read of what somebody asks about, be it a run's folder, a log or a text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgm_exp.doctor.curves import Row, curve_facts, row_of, stages_of
from mgm_exp.doctor.facts import Fact, flat
from mgm_exp.doctor.reading import HEAD_BYTES, TAIL_BYTES, Line, lines_of, read_log
from mgm_exp.doctor.robust import is_finite
from mgm_exp.doctor.standstill import SYSTEM, last_sign, standstill_facts
from mgm_exp.doctor.surroundings import machine_facts
from mgm_exp.errors import UserError
from mgm_exp.store import Lease, parse_record, read_record, read_text, read_yaml

# What of a run folder says in words what happened, the run's own log first.
LOGS = ("log.txt", "output.txt")
MORE_LOGS = ("*.err", "*.out", "logs/*.err")
MOST_LOGS = 8
# How much is read where a run has just failed and somebody waits for its end.
QUICK_HEAD, QUICK_TAIL = 32 << 10, 192 << 10
METRICS_BYTES, QUICK_METRICS_BYTES = 64 << 20, 1 << 20
MARKS = ("result.json", "manifest.json", "config.yaml", "metrics.jsonl", "log.txt", "output.txt")
# What the run itself says of its end is its error, of which nothing is a mere remark.
ERROR = "result.json"
TEXT = "the text"
# What train.profile leaves: where the time of a step goes.
PROFILE = "profile/profile.json"
PROFILE_WORDS = {"data": "waiting for data", "llm": "the LLM", "communication": "the exchange between processes"}


@dataclass(frozen=True)
class Case:
    """What is known.

    Args:
        name: What was asked about.
        folder: The run's; None: there is only a text.
        error: Lines of what the run gave as its error (or the whole text that was given).
        lines: Lines of its logs.
        facts: Of the run as a whole, by name.
        stages: Stage -> facts of its curves.
        status: As ``result.json`` has it; empty: not known.
        notes: What could not be read.
    """

    name: str
    folder: Path | None = None
    error: tuple[Line, ...] = ()
    lines: tuple[Line, ...] = ()
    facts: Mapping[str, Fact] = field(default_factory=dict)
    stages: Mapping[str, Mapping[str, Fact]] = field(default_factory=dict)
    status: str = ""
    notes: tuple[str, ...] = ()


def case_of_text(text: str, name: str = TEXT) -> Case:
    """A case that is nothing but words: an error message that somebody copied."""
    return Case(name, error=tuple(lines_of(text, TEXT)))


def case_of_log(path: Path) -> Case:
    """A case that is one log.

    Raises:
        UserError: it cannot be read.
    """
    try:
        lines = read_log(path, path.name)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    return Case(str(path), lines=tuple(lines))


def is_run(folder: Path) -> bool:
    """Whether a folder holds something that a run leaves."""
    return any((folder / name).is_file() for name in MARKS)


def case_of_run(folder: Path, *, quick: bool = False, error: Mapping[str, Any] | None = None) -> Case:
    """A case from a run's folder; files that are missing or damaged are noted, not fatal.

    Args:
        folder: The run's.
        quick: Reads the ends of files only: the run has just failed.
        error: The ``error`` that ``result.json`` is going to hold.
    """
    reader = _Reader(folder)
    result = reader.mapping("result.json")
    manifest = reader.mapping("manifest.json")
    config = reader.config()
    if error is None and result and _is_begun_anew(manifest):
        reader.notes.append(f"{ERROR} is of an earlier start and was passed over; the run has been begun again since")
        result = {}
    if error is not None:
        result = {**result, "status": "failed", "error": dict(error)}
    facts = {
        fact.name: fact
        for part in (
            flat("config", config, "config.yaml"),
            flat("result", {key: value for key, value in result.items() if key != "error"}, ERROR),
            flat(
                "manifest",
                {key: manifest.get(key) for key in ("packages", "device", "python", "model", "data")},
                "manifest.json",
            ),
            flat("trainable", manifest.get("trainable") or {}, "manifest.json"),
            _error_facts(result.get("error")),
            _data_facts(reader.mapping("data.json")),
            _quarantine_facts(reader.rows("quarantine.jsonl", QUICK_METRICS_BYTES)),
            machine_facts(folder),
            _ending_facts(folder, manifest, str(result.get("status") or "")),
        )
        for fact in part
    }
    rows = reader.rows("metrics.jsonl", QUICK_METRICS_BYTES if quick else METRICS_BYTES)
    profiles = _profile_facts(reader.mapping(PROFILE))
    held_at = last_sign(folder) if not quick and _is_held(folder) else None
    gaps = standstill_facts(reader.rows(SYSTEM, QUICK_METRICS_BYTES if quick else METRICS_BYTES), held_at)
    stages = {
        stage: {fact.name: fact for fact in (*curve_facts(rows, stage), *profiles.get(stage, ()), *gaps.get(stage, ()))}
        for stage in dict.fromkeys([*stages_of(rows), *profiles, *gaps])
    }
    sizes = (QUICK_HEAD, QUICK_TAIL) if quick else (HEAD_BYTES, TAIL_BYTES)
    return Case(
        name=str(folder),
        folder=folder,
        error=tuple(lines_of(_error_text(result.get("error")), ERROR)),
        lines=tuple(line for path in _logs(folder) for line in reader.log(path, *sizes)),
        facts=facts,
        stages=stages,
        status=str(result.get("status") or ""),
        notes=tuple(reader.notes),
    )


class _Reader:
    """Reads files of a folder that somebody else may have written; what cannot be read is noted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder, list[str]()

    def mapping(self, name: str) -> dict[str, Any]:
        found = self._value(name, read_record)
        return found if isinstance(found, dict) else {}

    def config(self) -> dict[str, Any]:
        found = self._value("config.yaml", read_yaml)
        return found if isinstance(found, dict) else {}

    def rows(self, name: str, most_bytes: int) -> list[Row]:
        """The whole rows in the last so many bytes of a file of JSON lines."""
        path = self.folder / name
        if not path.is_file():
            return []
        try:
            lines = read_log_bytes(path, most_bytes)
        except (OSError, ValueError) as error:
            self.notes.append(f"{name} cannot be read ({error})")
            return []
        found, damaged = [], 0
        for number, raw in lines:
            try:
                values = parse_record(raw)
            except ValueError:
                damaged += 1
                continue
            if isinstance(values, dict):
                found.append(row_of(number, values))
        if damaged:
            self.notes.append(f"{name}: {damaged} line(s) are damaged and were passed over")
        return found

    def log(self, path: Path, head: int, tail: int) -> list[Line]:
        name = str(path.relative_to(self.folder))
        try:
            return read_log(path, name, head, tail)
        except (OSError, ValueError) as error:
            self.notes.append(f"{name} cannot be read ({error})")
            return []

    def _value(self, name: str, read: Any) -> Any:
        try:
            return read(self.folder / name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.notes.append(f"{name} cannot be read ({str(error)[:200]})")
            return None


def read_log_bytes(path: Path, most_bytes: int) -> list[tuple[int, bytes]]:
    """The whole lines in the last ``most_bytes`` of a plain file, with their numbers."""
    size = path.stat().st_size
    if size <= most_bytes:
        raw, first = read_text(path, most_bytes, "surrogateescape").encode("utf-8", "surrogateescape"), 1
    else:
        with path.open("rb") as file:
            before = 0
            left = size - most_bytes
            while left > 0:
                block = file.read(min(left, 1 << 20))
                before, left = before + block.count(b"\n"), left - len(block)
            raw = file.read(most_bytes)
        cut = raw.find(b"\n") + 1
        raw, first = raw[cut:], before + 2
    *lines, _torn = raw.split(b"\n")
    return [(first + place, line) for place, line in enumerate(lines) if line.strip()]


def _logs(folder: Path) -> list[Path]:
    paths = [folder / name for name in LOGS] + [path for pattern in MORE_LOGS for path in sorted(folder.glob(pattern))]
    return [path for path in paths if path.is_file() and not path.is_symlink()][:MOST_LOGS]


def _error_text(error: Any) -> str:
    if not isinstance(error, Mapping):
        return ""
    # Cause and advice are our own reading of it, and hold words of faults that it is not.
    return f"{error.get('type') or ''}: {error.get('message') or ''}"


def _is_begun_anew(manifest: Mapping[str, Any]) -> bool:
    """Whether the run began and did not say how it ended: its manifest is closed before its result is written."""
    return bool(manifest.get("started_at")) and manifest.get("ended_at", "") is None


def _ending_facts(folder: Path, manifest: Mapping[str, Any], status: str) -> Iterator[Fact]:
    """Whether the run began, did not say how it ended, and nobody is at it."""
    if not status and _is_begun_anew(manifest) and _is_held(folder) is False:
        told = "it began and did not say how it ended, and no process is at it"
        yield Fact("run.is_gone", True, "manifest.json", told)


def _is_held(folder: Path) -> bool | None:
    """Whether a process is at the run; None: who may not ask does not know, nor is it known of a copy."""
    try:
        return Lease(folder / ".lease").holder() is not None if (folder / ".lease").is_dir() else None
    except OSError:
        return None


def _error_facts(error: Any) -> Iterator[Fact]:
    if isinstance(error, Mapping):
        yield Fact("error.type", str(error.get("type")), ERROR, f"the error is a {error.get('type')}")
        yield Fact("error.message", str(error.get("message"))[:2000], ERROR)


def _data_facts(data: Mapping[str, Any]) -> Iterator[Fact]:
    for stage in ("align", "instruct"):
        part = data.get(stage)
        if not isinstance(part, Mapping):
            continue
        rows, kept = part.get("rows"), part.get("kept")
        if is_finite(rows) and is_finite(kept) and rows > 0:
            told = f"{stage}: {kept} of {rows} rows are used"
            yield Fact(f"data.{stage}_kept_share", kept / rows, "data.json", told)
            yield Fact(f"data.{stage}_kept", kept, "data.json", told)
        text = part.get("text")
        words = text.get("words_mean") if isinstance(text, Mapping) else None
        if is_finite(words):
            told = f"{stage}: its texts have {words:.1f} words on average"
            yield Fact(f"data.{stage}_words_mean", float(words), "data.json", told)


def _profile_facts(profile: Mapping[str, Any]) -> dict[str, list[Fact]]:
    """``profile.<part>_share`` and ``profile.device_busy`` of each stage that was recorded."""
    stages = profile.get("stages")
    found: dict[str, list[Fact]] = {}
    for stage, part in stages.items() if isinstance(stages, Mapping) else ():
        if not isinstance(part, Mapping):
            continue
        shares, busy = part.get("shares"), part.get("device_busy")
        facts = [
            Fact(f"profile.{name}_share", float(share), PROFILE, f"{stage}: {share:.0%} of a step is {_in_step(name)}")
            for name, share in (shares.items() if isinstance(shares, Mapping) else ())
            if isinstance(share, (int, float)) and 0 <= share <= 1
        ]
        if isinstance(busy, (int, float)) and 0 <= busy <= 1:
            facts.append(Fact("profile.device_busy", float(busy), PROFILE, f"{stage}: the GPU is busy for {busy:.0%}"))
        found[str(stage)[:40]] = facts
    return found


def _in_step(name: str) -> str:
    return PROFILE_WORDS.get(name, str(name)[:40])


def _quarantine_facts(rows: list[Row]) -> Iterator[Fact]:
    if not rows:
        return
    yield Fact("quarantine.batches", len(rows), "quarantine.jsonl", f"{len(rows)} batches were in trouble")
    seen: Counter[str] = Counter()
    for row in rows:
        named = row.values.get("sample_ids")
        seen.update(
            {json.dumps(name) if not isinstance(name, str) else name for name in named}
            if isinstance(named, list)
            else ()
        )
    if seen:
        name, times = seen.most_common(1)[0]
        told = f"sample {name[:80]} is in {times} of {len(rows)} batches that were in trouble"
        yield Fact("quarantine.one_sample", times, f"quarantine.jsonl:{rows[0].line}", told)
