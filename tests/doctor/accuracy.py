"""How often the doctor is right, over the excerpts of these tests; writes the tables of ``docs/doctor.md``.

python -m tests.doctor.accuracy      # rewrites the page between its marks
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mgm_exp.doctor import GROUPS, Diagnosis, case_of_run, case_of_text, diagnose, entries
from tests.doctor.runs import FAULTY, HEALTHY, build

HERE = Path(__file__).parent
EXCERPTS, HELD_OUT, NO_FAULT = HERE / "excerpts", HERE / "held_out", HERE / "healthy"
PAGE = HERE.parents[1] / "docs" / "doctor.md"
BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
BEGIN_LIST, END_LIST = "<!-- entries: begin -->", "<!-- entries: end -->"


@dataclass(frozen=True)
class Trial:
    """One excerpt: its fault (empty: none), and what was found."""

    kind: str
    name: str
    fault: str
    found: Diagnosis

    @property
    def first(self) -> str:
        return self.found.findings[0].entry.id if self.found.findings else ""

    @property
    def causes(self) -> list[str]:
        """What is said to be a cause, without what follows from another."""
        return [finding.entry.id for finding in self.found.findings if not finding.follows_from]


def texts(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(name, fault, text) of every excerpt in a folder."""
    for path in sorted(folder.glob("*.txt")):
        yield path.stem, path.name.split(".")[0], path.read_text(encoding="utf-8")


def trials(scratch: Path) -> list[Trial]:
    """Every excerpt, examined."""
    found = []
    for kind, folder in (("excerpts", EXCERPTS), ("other wordings", HELD_OUT), ("logs without a fault", NO_FAULT)):
        for name, fault, text in texts(folder):
            expected = "" if folder is NO_FAULT else fault
            found.append(Trial(kind, name, expected, diagnose(case_of_text(text))))
    ends_runs = {entry.id for entry in entries() if entry.severity == "fatal" and not entry.secondary}
    for name, fault, text in texts(EXCERPTS):
        if fault in ends_runs:
            examined = diagnose(case_of_text(amid_others(text)))
            found.append(Trial("fatal ones amid other lines", name, fault, examined))
    for kind, table in (("runs", FAULTY), ("runs without a fault", HEALTHY)):
        for name, made in table.items():
            examined = diagnose(case_of_run(build(scratch / kind / name, made())))
            found.append(Trial(kind, name, name if table is FAULTY else "", examined))
    return found


def amid_others(text: str) -> str:
    """An excerpt as it stands in a log of several processes: after what went well, before what others say of it."""
    before = "\n".join((NO_FAULT / f"{name}.txt").read_text() for name in ("deepspeed-start", "nccl-info", "own-run"))
    after = "\n".join((EXCERPTS / f"{name}.txt").read_text() for name in ("nccl-remote-gone", "worker-process-failed"))
    return f"{before}\n{text}\n{after}\nSending process 40122 closing signal SIGTERM\n"


def table(found: list[Trial]) -> str:
    """Markdown: for each kind how many, recall and precision."""
    lines = [
        "| what | how many | its own fault is named first | causes named | of them right |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind in dict.fromkeys(trial.kind for trial in found):
        mine = [trial for trial in found if trial.kind == kind]
        faulty = [trial for trial in mine if trial.fault]
        named = [(trial, cause) for trial in mine for cause in trial.causes]
        right = sum(trial.fault == cause for trial, cause in named)
        first = sum(trial.first == trial.fault for trial in faulty)
        recall = f"{first} ({first / len(faulty):.1%})" if faulty else "-"
        precision = f"{right} ({right / len(named):.1%})" if named else "-"
        lines.append(f"| {kind} | {len(mine)} | {recall} | {len(named)} | {precision} |")
    faulty = [trial for trial in found if trial.fault]
    named = [(trial, cause) for trial in found for cause in trial.causes]
    right, first = sum(t.fault == cause for t, cause in named), sum(t.first == t.fault for t in faulty)
    lines.append(
        f"| all | {len(found)} | {first} of {len(faulty)} ({first / len(faulty):.1%}) | {len(named)} | "
        f"{right} ({right / len(named):.1%}) |"
    )
    return "\n".join(lines)


def listing() -> str:
    """Markdown: the entries by group."""
    lines = [f"{len(entries())} entries.", "", "| group | entries |", "| --- | --- |"]
    for group, says in GROUPS.items():
        mine = [f"`{entry.id}`" for entry in entries() if entry.group == group]
        lines.append(f"| {says} | {', '.join(mine)} |")
    return "\n".join(lines)


def written(page: str, found: list[Trial]) -> str:
    """The page with both places rewritten."""
    page = _between(page, BEGIN, END, table(found))
    return _between(page, BEGIN_LIST, END_LIST, listing())


def _between(page: str, begin: str, end: str, content: str) -> str:
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    if not rest or end not in rest:
        raise SystemExit(f"docs/doctor.md has no {begin} ... {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), trials(Path(place))), encoding="utf-8")
