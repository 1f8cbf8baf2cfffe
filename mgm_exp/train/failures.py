"""What became of the processes of a stage: its summary, or the error that happened first, with rank and machine."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgm_exp import errors
from mgm_exp.errors import Interrupted, MgmError, ProcessKilled, Pruned, TrainingFailed
from mgm_exp.train.job import StageSummary
from mgm_exp.train.launch_folder import LaunchFacts, LaunchFolder
from mgm_exp.train.pulse import Hang

# A process that loses another one in an exchange of numbers says so: that is what happened to it, not what went wrong.
_SECONDARY = re.compile(
    r"gloo/|Connection (closed|reset|refused) by peer|Connection reset|Broken pipe|NCCL|TCPStore|"
    r"Timed out waiting \d+ ?ms|DistNetworkError|DistStoreError",
    re.IGNORECASE,
)


def is_secondary(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or (isinstance(error, RuntimeError) and bool(_SECONDARY.search(str(error))))


@dataclass(frozen=True)
class Failure:
    """Why a start of a stage's processes came to nothing.

    Args:
        error: For the user.
        may_restart: Whether the same may go well the next time: a process was killed, lost or hung.
        tracebacks: ``(which process, its traceback)`` of every process that raised, but for those that only lost
            another one (theirs are in the logs).
    """

    error: MgmError
    may_restart: bool
    tracebacks: tuple[tuple[str, str], ...] = ()


def result_of(stage: str, launch: LaunchFolder, facts: LaunchFacts) -> StageSummary | None:
    """The summary of a stage that went well; None if it did not.

    Raises:
        Interrupted, Pruned: All processes stopped together, with their state saved.
    """
    endings = [launch.read_agent(machine) for machine in range(len(facts.names))]
    first = launch.read_outcome(0)
    if first is None or any(endings) or any(ending is None for ending in endings):
        return None
    if first["kind"] == "done":
        return StageSummary(**first["summary"])
    if first["kind"] == "interrupted":
        raise Interrupted(first["message"], advice=first["advice"])
    if first["kind"] == "pruned":
        raise Pruned(first["message"])
    return None


def failure_of(
    stage: str, launch: LaunchFolder, facts: LaunchFacts, hang: Hang | None, lost: dict[int, str]
) -> Failure:
    """Which process failed first: one that hangs or was killed could not say so itself; else the earliest error.

    Args:
        hang: Who was found to hang, if that is why the processes were ended.
        lost: Machine -> how its agent ended without a word.
    """
    raised = _errors(launch, facts)
    tracebacks = tuple(
        (facts.place_of(rank), outcome["traceback"]) for rank, outcome in raised if not outcome["secondary"]
    )
    codes = _exit_codes(launch, facts)
    if hang is not None:
        return Failure(_hangs(stage, launch, facts, hang), True, tracebacks)
    primary = [(rank, outcome) for rank, outcome in raised if not outcome["secondary"]]
    killed = {
        rank: -code
        for rank, code in codes.items()
        if isinstance(code, int) and code < 0 and -code != signal.SIGTERM and rank not in dict(raised)
    }
    if killed and not primary:
        return Failure(_killed(stage, facts, *min(killed.items())), True, tracebacks)
    if primary:
        rank, outcome = primary[0]
        return Failure(_rebuilt(outcome, facts.place_of(rank), launch), False, tracebacks)
    if lost:
        names = ", ".join(f"{facts.names[machine]} ({how})" for machine, how in sorted(lost.items()))
        return Failure(
            ProcessKilled(
                f"The processes of the {stage} stage ended without a word on {names}{_last_words(launch.logs)}.",
                advice=f"What their agents printed is in {launch.logs / 'agents.txt'}.",
            ),
            True,
            tracebacks,
        )
    launchers = [ending["launcher"] for ending in _agents(launch, facts) if "launcher" in ending]
    if launchers:
        return Failure(
            TrainingFailed(
                f"The {stage} stage's processes could not be started: {launchers[0]}.",
                advice=f"Their logs are in {launch.logs}.",
            ),
            len(facts.names) > 1,  # the port may have been taken meanwhile, a machine may have come too late
            tracebacks,
        )
    if raised:  # nothing but lost connections
        rank, outcome = raised[0]
        return Failure(_rebuilt(outcome, facts.place_of(rank), launch), True, tracebacks)
    shown = ", ".join(f"{facts.place_of(rank)}: exit code {code}" for rank, code in sorted(codes.items()))
    return Failure(
        TrainingFailed(
            f"The {stage} stage's processes ended without a result ({shown or 'no exit code'})"
            f"{_last_words(launch.logs)}.",
            advice=f"Their logs are in {launch.logs}.",
        ),
        True,
        tracebacks,
    )


def _agents(launch: LaunchFolder, facts: LaunchFacts) -> list[dict[str, Any]]:
    return [launch.read_agent(machine) or {} for machine in range(len(facts.names))]


def _exit_codes(launch: LaunchFolder, facts: LaunchFacts) -> dict[int, Any]:
    return {int(rank): code for ending in _agents(launch, facts) for rank, code in ending.items() if rank.isdigit()}


def _errors(launch: LaunchFolder, facts: LaunchFacts) -> list[tuple[int, dict[str, Any]]]:
    """``(rank, outcome)`` of those that raised, the earliest first."""
    outcomes = [(rank, launch.read_outcome(rank)) for rank in range(facts.devices)]
    found = [(rank, outcome) for rank, outcome in outcomes if outcome is not None and outcome["kind"] == "error"]
    return sorted(found, key=lambda item: (item[1]["time"], item[0]))


def _killed(stage: str, facts: LaunchFacts, rank: int, number: int) -> MgmError:
    hint = (
        " SIGKILL usually comes from the kernel when memory ends (see dmesg): use a smaller "
        "train.micro_batch_size, model.gradient_checkpointing=true or zero=3."
        if number == signal.SIGKILL
        else ""
    )
    who = facts.place_of(rank)
    return ProcessKilled(
        f"{who[0].upper()}{who[1:]} of the {stage} stage was killed by {signal.Signals(number).name}; the others were "
        "stopped.",
        advice=f"The same command continues from the last checkpoint.{hint}",
    )


def _hangs(stage: str, launch: LaunchFolder, facts: LaunchFacts, hang: Hang) -> MgmError:
    shown = ", ".join(facts.place_of(rank) for rank in hang.ranks[:4])
    more = f" and {len(hang.ranks) - 4} more" if len(hang.ranks) > 4 else ""
    where = "before its first step" if hang.step is None else f"in step {hang.step}"
    return ProcessKilled(
        f"No process of the {stage} stage made progress for {facts.timeout_s:g} s (launch.timeout_s) {where}: "
        f"{shown}{more} {hang.reason}. All were ended.",
        advice=f"The same command continues from the last checkpoint; where each process was stands in {launch.logs}.",
    )


def _rebuilt(outcome: dict[str, Any], where: str, launch: LaunchFolder) -> MgmError:
    """A process's error as one of ours: the same class where it was one of ours."""
    kind = getattr(errors, outcome["type"], None)
    if isinstance(kind, type) and issubclass(kind, MgmError):
        return kind(f"{outcome['message']} ({where})", advice=outcome["advice"])
    return TrainingFailed(
        f"{outcome['type']} in {where}: {outcome['message']}",
        advice=f"The traceback is in log.txt, what each process printed in {launch.logs}.",
    )


def _last_words(logs: Path) -> str:
    """The last lines on stderr of any process that wrote some."""
    for path in [*sorted(logs.glob("*.err")), logs / "agents.txt"]:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
        if lines:
            return f": {' | '.join(lines[-3:])}"
    return ""
