"""The knowledge base: one YAML file a fault in ``knowledge/``, its name the entry's id.

An entry says how the fault shows (lines of a log, facts of a run), why it happens, what to look at, what to do, and
where that is written. ``docs/doctor.md`` describes the keys; :func:`entry_of` checks them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mgm_exp.doctor.facts import Condition, conditions_of
from mgm_exp.doctor.patterns import Pattern
from mgm_exp.errors import UserError
from mgm_exp.store import read_yaml

KNOWLEDGE = Path(__file__).parent / "knowledge"
GROUPS = {
    "memory": "memory of GPUs, machines and jobs",
    "processes": "several processes: NCCL, gloo, launchers, hangs",
    "numbers": "losses and gradients: NaN, spikes, plateaus",
    "adapters": "what is trained: LoRA, towers, quantised bases",
    "model": "model folders, towers, tokenizers, templates",
    "checkpoints": "checkpoints, resuming, leases",
    "deepspeed": "DeepSpeed and ZeRO",
    "disk": "disks, quotas, permissions, files",
    "data": "rows, images, curation",
    "cluster": "Slurm and Kubernetes",
    "tracking": "Weights & Biases and the network",
    "settings": "command lines, overrides, Hydra",
    "search": "sweeps and Optuna studies",
    "versions": "packages, CUDA, drivers",
    "evaluation": "benchmarks and scores",
}
# fatal: it ends a run. warning: a run goes on or completes with it, and its result is doubtful or slow.
SEVERITIES = ("fatal", "warning")
_KEYS = {
    "title", "group", "severity", "strength", "text", "unless", "signs", "supports", "excludes", "leads_to",
    "secondary", "cause", "look", "fix", "run", "source",
}  # fmt: skip
_ID = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


@dataclass(frozen=True)
class Entry:
    """A fault that is known.

    Args:
        id: Name of its file.
        title: One line: what is the matter.
        group, severity: See :data:`GROUPS` and :data:`SEVERITIES`.
        strength: How sure a match alone makes one, 1 to 99.
        text: Patterns; a line that fits one of them is a symptom.
        unless: Patterns; a line that fits one of them rules the entry out.
        signs: Each a set of conditions on facts; one that holds as a whole is a symptom.
        supports: Sets of conditions that make it likelier.
        excludes: Sets of conditions that rule it out.
        leads_to: Ids of entries that are its consequences: found together, this is the cause.
        secondary: It only says that something else failed: whatever else is found is the cause.
        cause: Why it happens.
        look: What else to look at to be sure.
        fix: What to do, the first one first.
        run: The command to give next; empty: there is none.
        source: Where more about it is written.
    """

    id: str
    title: str
    group: str
    severity: str
    strength: int
    cause: str
    fix: tuple[str, ...]
    source: str
    text: tuple[Pattern, ...] = ()
    unless: tuple[Pattern, ...] = ()
    signs: tuple[tuple[Condition, ...], ...] = ()
    supports: tuple[tuple[Condition, ...], ...] = ()
    excludes: tuple[tuple[Condition, ...], ...] = ()
    leads_to: tuple[str, ...] = ()
    secondary: bool = False
    look: tuple[str, ...] = ()
    run: str = ""

    def as_json(self) -> dict[str, Any]:
        """What a program wants to know of it."""
        return {
            "id": self.id,
            "title": self.title,
            "group": self.group,
            "severity": self.severity,
            "cause": self.cause,
            "look": list(self.look),
            "fix": list(self.fix),
            "run": self.run,
            "source": self.source,
        }


@cache
def entries() -> tuple[Entry, ...]:
    """All entries, by id.

    Raises:
        ValueError: a file of the package is damaged.
    """
    return tuple(entry_of(path.stem, read_yaml(path)) for path in sorted(KNOWLEDGE.glob("*.yaml")))


def entry(identifier: str) -> Entry:
    """The entry of that id.

    Raises:
        UserError: there is none.
    """
    import difflib

    for known in entries():
        if known.id == identifier:
            return known
    near = difflib.get_close_matches(identifier, [known.id for known in entries()], n=3, cutoff=0.4)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise UserError(f"There is no entry {identifier!r}.{hint}", advice="`mgm-exp doctor --list` shows all.")


def entry_of(identifier: str, given: Any) -> Entry:
    """An entry from the content of its file.

    Raises:
        ValueError: naming the key that is wrong.
    """
    if not isinstance(given, Mapping) or not _ID.fullmatch(identifier):
        raise ValueError(f"{identifier}: an entry is a mapping in a file named with small letters, digits and dashes")
    unknown = sorted(set(given) - _KEYS)
    if unknown:
        raise ValueError(f"{identifier}: no such key: {', '.join(unknown)}; there are {', '.join(sorted(_KEYS))}")
    try:
        found = Entry(
            id=identifier,
            title=_words(given, "title"),
            group=_words(given, "group"),
            severity=_words(given, "severity"),
            strength=int(given.get("strength", 80)),
            cause=_words(given, "cause"),
            fix=_texts(given, "fix"),
            source=_words(given, "source"),
            text=tuple(map(Pattern, _texts(given, "text"))),
            unless=tuple(map(Pattern, _texts(given, "unless"))),
            signs=_conditions(given, "signs"),
            supports=_conditions(given, "supports"),
            excludes=_conditions(given, "excludes"),
            leads_to=_texts(given, "leads_to"),
            secondary=given.get("secondary") is True,
            look=_texts(given, "look"),
            run=str(given.get("run", "")).strip(),
        )
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(f"{identifier}: {error}") from error
    if found.group not in GROUPS or found.severity not in SEVERITIES or not 1 <= found.strength <= 99:
        raise ValueError(f"{identifier}: group, severity or strength is not one of those there are")
    if not (found.text or found.signs) or not found.fix:
        raise ValueError(f"{identifier}: it needs text or signs to be found by, and a fix")
    if not found.source.startswith("https://"):
        raise ValueError(f"{identifier}: source must be an https address")
    return found


def _words(given: Mapping[str, Any], key: str) -> str:
    value = given.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a text")
    return " ".join(value.split())


def _texts(given: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = given.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{key} must be a list of texts")
    return tuple(item.strip() for item in value)


def _conditions(given: Mapping[str, Any], key: str) -> tuple[tuple[Condition, ...], ...]:
    value = given.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"{key} must be a list of mappings")
    return tuple(conditions_of(item) for item in value)
