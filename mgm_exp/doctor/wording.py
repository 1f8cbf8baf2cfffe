"""A diagnosis in words, for a terminal or a log."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from mgm_exp.doctor.diagnosis import Diagnosis, Evidence, Finding
from mgm_exp.doctor.entries import GROUPS, Entry
from mgm_exp.doctor.reading import shown

WIDTH = 110
# Causes that are told in full; of others the title.
MOST_TOLD = 3
# In the commands of entries: the run that is asked about.
_RUN = re.compile(r"\bRUN\b")


def in_words(diagnosis: Diagnosis) -> str:
    """The most likely causes, the evidence for each, what to do, and what to run next."""
    steps = ", ".join(f"{stage} {count} steps" for stage, count in diagnosis.reached.items())
    known = "; ".join(part for part in (diagnosis.status, steps) if part)
    status = f" ({known})" if known else ""
    lines = [f"{diagnosis.name}{status}"]
    if diagnosis.is_well:
        lines.append("nothing that is known to be wrong was found")
    for number, finding in enumerate(diagnosis.findings[:MOST_TOLD], 1):
        lines += ["", *_finding(number, finding, diagnosis.name if diagnosis.is_run else "RUN")]
    rest = diagnosis.findings[MOST_TOLD:]
    if rest:
        lines += ["", f"also fits: {'; '.join(f'{finding.entry.title} ({finding.entry.id})' for finding in rest)}"]
    if diagnosis.unexplained:
        lines += ["", "no known fault fits this error:", *_evidence(diagnosis.unexplained)]
    lines += [f"note: {note}" for note in (*diagnosis.observed, *diagnosis.notes)]
    if not diagnosis.is_well:
        lines += ["", *_next_layer(diagnosis)]
    return shown("\n".join(lines))


def _finding(number: int, finding: Finding, run: str) -> Iterator[str]:
    entry = finding.entry
    of = f"; follows from {finding.follows_from}" if finding.follows_from else ""
    yield f"{number}. {entry.title}  [{finding.how_sure}, {finding.confidence:.0%}; {entry.id}{of}]"
    yield from _evidence(finding.evidence)
    yield from _wrapped("why:  ", entry.cause)
    if finding.follows_from:
        return
    for position, fix in enumerate(entry.fix):
        yield from _wrapped("do:   " if not position else "or:   ", fix)
    if entry.look:
        yield from _wrapped("look: ", "; ".join(entry.look))
    if entry.run:
        yield f"   run:  {_RUN.sub(lambda _: run, entry.run)}"
    yield f"   more: {entry.source}"


def _evidence(evidence: Sequence[Evidence]) -> Iterator[str]:
    for item in evidence:
        yield f"   | {item.place}: {item.quote}"


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"   {label}",
        subsequent_indent=" " * (3 + len(label)),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _next_layer(diagnosis: Diagnosis) -> Iterator[str]:
    """What a colleague would ask for next, where the causes above turn out not to be it."""
    groups = {finding.entry.group for finding in diagnosis.findings} or {"unknown"}
    run = diagnosis.name if diagnosis.is_run else "RUN"
    yield "if that is not it:"
    if groups & {"numbers", "adapters", "unknown"}:
        yield f"   curves    mgm-exp doctor {run} OTHER_RUN says where two runs part; mgm-exp replay {run}"
        yield "             computes steps again; train.gradient_statistics_every=1 records gradients of every layer"
    if groups & {"data", "unknown", "evaluation"}:
        yield "   data      mgm-exp validate PATH names every broken row, mgm-exp explore PATH describes the data"
    if groups & {"memory", "deepspeed", "processes", "versions", "unknown"}:
        yield "   profile   one process, no loaders (devices=1 train.workers=0) with CUDA_LAUNCH_BLOCKING=1, and"
        yield "             NCCL_DEBUG=INFO on several; mgm-exp plan RUN_OVERRIDES --explain says where memory goes"
    if groups & {"memory", "data", "model", "processes"}:
        yield f"   time      mgm-exp replay {run} --profile {run}/profile records where the time of a step goes"
    yield "   words     mgm-exp doctor --search WORD looks through everything that is known"


def entry_in_words(entry: Entry) -> str:
    """One entry in full, for ``--entry``."""
    lines = [
        f"{entry.id}: {entry.title}",
        f"   group: {entry.group} ({GROUPS[entry.group]}); {entry.severity}",
        *_wrapped("why:  ", entry.cause),
        *(line for fix in entry.fix for line in _wrapped("do:   ", fix)),
        *(line for look in entry.look for line in _wrapped("look: ", look)),
        *([f"   run:  {entry.run}"] if entry.run else []),
        *(f"   found by a line like: {pattern.text}" for pattern in entry.text),
        *(f"   found by: {', '.join(_condition(c) for c in sign)}" for sign in entry.signs),
        f"   more: {entry.source}",
    ]
    return "\n".join(lines)


def _condition(condition: object) -> str:
    fact, operator, wanted = (getattr(condition, key) for key in ("fact", "operator", "wanted"))
    return f"{fact} {operator} {wanted}"


def list_in_words(known: Sequence[Entry]) -> str:
    """Entries one a line, by group."""
    lines: list[str] = []
    width = max((len(entry.id) for entry in known), default=0)
    for group, says in GROUPS.items():
        mine = [entry for entry in known if entry.group == group]
        if mine:
            lines += [*([""] if lines else []), f"{group}: {says}"]
            lines += [f"  {entry.id:<{width}}  {entry.title}" for entry in mine]
    return "\n".join(lines)
