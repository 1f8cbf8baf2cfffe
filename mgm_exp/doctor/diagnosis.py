"""From a case to its most likely causes: what fits is found, weighed, and ordered by what follows from what.

Looked at in the order in which a colleague would: what the run said of its end, its logs and what the machine has left;
then curves and data; then the profile, where there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mgm_exp.doctor.case import ERROR, TEXT, Case
from mgm_exp.doctor.entries import Entry, entries
from mgm_exp.doctor.facts import Fact, Facts, all_hold
from mgm_exp.doctor.patterns import Pattern
from mgm_exp.doctor.reading import Line, plain_line
from mgm_exp.record import redact_text

# Lines that are quoted for one entry, and how much of one.
MOST_QUOTED, QUOTED = 3, 220
# What makes a finding surer or less sure than its entry alone.
IN_THE_ERROR, SUPPORTED, NOT_IN_THE_ERROR = 0.08, 0.04, -0.2
SUREST = 0.99
# Below this nothing is said.
LEAST = 0.3
# What follows from something stands behind it only if that is so sure.
LEAST_CAUSE = 0.5
LIKELY, CERTAIN = 0.7, 0.88
# A run that waits at its rung has not ended; nothing is wrong with it.
_GOOD_ENDS = ("completed", "pruned", "paused")


@dataclass(frozen=True)
class Evidence:
    """Something that speaks for a cause.

    Args:
        place: ``log.txt:120``, ``config.yaml``, ...
        quote: The line, short and without secrets; or the fact in words.
    """

    place: str
    quote: str


@dataclass(frozen=True)
class Finding:
    """A cause that fits.

    Args:
        entry: What is known of it.
        confidence: 0 to 1.
        evidence: What was found, the strongest first.
        follows_from: Id of the finding whose consequence it is; empty: of none.
    """

    entry: Entry
    confidence: float
    evidence: tuple[Evidence, ...]
    follows_from: str = ""

    @property
    def how_sure(self) -> str:
        """``almost certain``, ``likely`` or ``possible``."""
        if self.confidence >= CERTAIN:
            return "almost certain"
        return "likely" if self.confidence >= LIKELY else "possible"

    def as_json(self) -> dict[str, Any]:
        return {
            **self.entry.as_json(),
            "confidence": round(self.confidence, 3),
            "how_sure": self.how_sure,
            "evidence": [{"place": item.place, "quote": item.quote} for item in self.evidence],
            "follows_from": self.follows_from or None,
        }


@dataclass(frozen=True)
class Diagnosis:
    """What was found of a case.

    Args:
        name: What was asked about.
        status: As the run recorded it; empty: not known.
        findings: The most likely cause first; what follows from another stands after it.
        unexplained: The last words of an error that nothing fits.
        notes: What could not be read.
        observed: Facts that a reader wants to see, such as what is left on the disk.
        is_run: Whether ``name`` is a run's folder.
        reached: Stage -> steps that were recorded.
    """

    name: str
    status: str = ""
    findings: tuple[Finding, ...] = ()
    unexplained: tuple[Evidence, ...] = ()
    notes: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    is_run: bool = False
    reached: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_well(self) -> bool:
        """Whether there is nothing to say."""
        return not self.findings and not self.unexplained

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "name": self.name,
            "status": self.status or None,
            "reached": dict(self.reached),
            "causes": [finding.as_json() for finding in self.findings],
            "unexplained": [{"place": item.place, "quote": item.quote} for item in self.unexplained],
            "observed": list(self.observed),
            "notes": list(self.notes),
        }


def diagnose(case: Case, known: Sequence[Entry] | None = None) -> Diagnosis:
    """The causes that fit a case.

    Args:
        case: What was read.
        known: The knowledge base; None: the package's.
    """
    texts = _Texts(case)
    found = [finding for entry in (entries() if known is None else known) if (finding := _look(entry, case, texts))]
    ordered = _order(found)
    fatal = [finding for finding in ordered if finding.entry.severity == "fatal"]
    return Diagnosis(
        name=case.name,
        status=case.status,
        findings=tuple(ordered),
        unexplained=() if fatal or case.status in _GOOD_ENDS else tuple(_last_words(case)),
        notes=case.notes,
        observed=tuple(_observed(case.facts)),
        is_run=case.folder is not None,
        reached={
            stage: int(facts["curves.steps"].value) for stage, facts in case.stages.items() if "curves.steps" in facts
        },
    )


class _Texts:
    """The lines of a case, and all of them in lower case, to be searched for words."""

    def __init__(self, case: Case) -> None:
        self.error = [(line, line.text.lower()) for line in case.error]
        self.logs = [(line, line.text.lower()) for line in case.lines]
        self.lower = "\n".join(lower for _, lower in (*self.error, *self.logs))

    def matches(self, patterns: Iterable[Pattern]) -> list[Line]:
        """Lines that fit one of them, those of the error first, of logs the last ones first."""
        hopeful = [pattern for pattern in patterns if pattern.may_be_in(self.lower)]
        if not hopeful:
            return []
        found: list[Line] = []
        for line, lower in (*self.error, *reversed(self.logs)):
            if any(pattern.may_be_in(lower) and pattern.fits(line.text) for pattern in hopeful):
                found.append(line)
                if len(found) >= MOST_QUOTED:
                    break
        return found


def _look(entry: Entry, case: Case, texts: _Texts) -> Finding | None:
    """Whether an entry fits, and how well."""
    lines = texts.matches(entry.text) if entry.text else []
    if case.status in _GOOD_ENDS and entry.severity == "fatal":
        lines = []  # it got over it
    signs = list(_signs(entry, case))
    if not lines and not signs:
        return None
    facts = {**case.facts, **{name: fact for stage in case.stages.values() for name, fact in stage.items()}}
    if any(all_hold(conditions, facts) for conditions in entry.excludes) or texts.matches(entry.unless):
        return None
    confidence = entry.strength / 100
    in_error = any(line.source in (ERROR, TEXT) for line in lines)
    if in_error:
        confidence += IN_THE_ERROR
    elif lines and case.error and not signs:
        confidence += NOT_IN_THE_ERROR  # a remark, unless the error is only what it led to
    if lines and signs:
        confidence += SUPPORTED
    supports = [conditions for conditions in entry.supports if all_hold(conditions, facts)]
    confidence += SUPPORTED * min(2, len(supports))
    told = [facts[condition.fact] for conditions in supports for condition in conditions if condition.fact in facts]
    evidence = [
        *(Evidence(line.place, quoted(line.text)) for line in lines),
        *(Evidence(fact.place, quoted(fact.in_words)) for fact in dict.fromkeys([*signs, *told])),
    ]
    return Finding(entry, max(0.0, min(SUREST, confidence)), tuple(evidence[: MOST_QUOTED + 3]))


def _signs(entry: Entry, case: Case) -> Iterator[Fact]:
    """The facts of the first sign that holds, of the run as a whole or of one of its stages."""
    for facts in [{**case.facts, **stage} for stage in case.stages.values()] or [dict(case.facts)]:
        for conditions in entry.signs:
            if all_hold(conditions, facts):
                yield from (facts[condition.fact] for condition in conditions if condition.fact in facts)
                return


def _order(found: list[Finding]) -> list[Finding]:
    """What ends runs before what they survive, the surest first; then what only says that something failed, and what
    follows from another."""
    causes = {finding.entry.id: finding for finding in found if finding.confidence >= LEAST}
    ranked = sorted(causes.values(), key=_rank)
    first, later = [], []
    for finding in ranked:
        of = next((other for other in ranked if _is_cause_of(other, finding)), None)
        if of is None:
            first.append(finding)
        else:
            later.append(Finding(finding.entry, finding.confidence, finding.evidence, of.entry.id))
    return first + later


def _rank(finding: Finding) -> tuple[int, float, str]:
    entry = finding.entry
    tier = 2 if entry.secondary else 0 if entry.severity == "fatal" else 1
    return tier, -finding.confidence, entry.id


def _is_cause_of(cause: Finding, finding: Finding) -> bool:
    """Whether the one explains the other: an entry says so, or the other says no more than that something failed."""
    if cause.confidence < LEAST_CAUSE:
        return False
    explains = finding.entry.secondary and not cause.entry.secondary and cause.entry.severity == "fatal"
    return explains or finding.entry.id in cause.entry.leads_to


def _last_words(case: Case) -> Iterator[Evidence]:
    """What an unknown error said: the error itself, or the last line of a log that names one."""
    if case.error and case.status:
        yield from (Evidence(line.place, quoted(line.text)) for line in case.error[:MOST_QUOTED])
        return
    lines = [line for line in (*case.error, *case.lines) if _NAMING.fits(line.text)]
    yield from (Evidence(line.place, quoted(line.text)) for line in lines[-MOST_QUOTED:])


# "ValueError: ...", "torch.AcceleratorError: ...", "error: ..." at the beginning of a line, as tracebacks end.
_NAMING = Pattern(
    r"^(?:\[rank\d+\]:? ?)?(?:error: |(?:[A-Za-z_]\w{0,60}\.){0,6}[A-Za-z_]\w{0,60}(?:Error|Exception)(?::|$))"
)


def _observed(facts: Facts) -> Iterator[str]:
    for name, limit in (("machine.disk_free_gib", 5.0), ("machine.memory_free_gib", 1.0)):
        fact = facts.get(name)
        if fact is not None and fact.value < limit:
            yield fact.in_words


def quoted(text: str) -> str:
    """A line as it is shown: short, without secrets."""
    clean = redact_text(plain_line(text.strip()))
    return clean if len(clean) <= QUOTED else f"{clean[: QUOTED - 4]} ..."


def summary_of(finding: Finding) -> Mapping[str, Any]:
    """What stands in ``result.json`` beside the error's own cause and advice."""
    return {
        "id": finding.entry.id,
        "title": finding.entry.title,
        "confidence": round(finding.confidence, 3),
        "cause": finding.entry.cause,
        "fix": list(finding.entry.fix),
        "evidence": [{"place": item.place, "quote": item.quote} for item in finding.evidence[:MOST_QUOTED]],
    }
