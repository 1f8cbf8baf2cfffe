"""What the end of a trial means for the search: a value, a lesson, a reason to try again, or one to stop.

``result.json`` is the truth. Where there is none (the process was killed), how the process ended says what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from mgm_exp.record.failure import OUT_OF_MEMORY

# A field of result.json that may be an objective, beside the metrics.
FIELDS = ("peak_memory_gib", "train_tokens_per_s", "trainable_parameters", "wall_s", "steps")
_USERS = ("UserError", "ConfigError", "DataError", "ModelError", "MissingDependencyError", "DiskFullError")
_OTHERS_WROTE = ("LeaseLost", "LeaseHeld")


class Verdict(Enum):
    """How a trial ended, as the search sees it.

    ``completed``: it has a value. ``pruned``: stopped at a validation point. ``infeasible``: out of memory, or a
    constraint is missed; the sampler learns to avoid it. ``not_finite``: the loss became NaN; counts as pruned with its
    last value. ``lost``: killed from outside; goes on from its checkpoint. ``interrupted``: asked to stop; goes on with
    the next command. ``paused``: waits at a rung with its state kept. ``failed``: for a reason that is not known.
    ``user_error``: every other trial would fail too.
    """

    completed = "completed"
    pruned = "pruned"
    infeasible = "infeasible"
    not_finite = "not_finite"
    lost = "lost"
    interrupted = "interrupted"
    paused = "paused"
    failed = "failed"
    user_error = "user_error"

    @property
    def is_final(self) -> bool:
        """Whether the trial is over for the study."""
        return self not in (Verdict.lost, Verdict.interrupted, Verdict.paused, Verdict.user_error)

    @property
    def status(self) -> str:
        """As ``sweep.json`` calls it: completed, pruned, failed, paused or interrupted."""
        if self in (Verdict.infeasible, Verdict.not_finite):
            return "pruned"
        if self in (Verdict.lost, Verdict.interrupted):
            return "interrupted"
        return "failed" if self is Verdict.user_error else self.value


@dataclass(frozen=True)
class Ending:
    """How a trial's process ended.

    Args:
        exit_code: Negative: the number of the signal that killed it. None: it ran in this process, or nobody saw it.
        out_of_memory: Whether the kernel killed a process for memory meanwhile.
        output: The last lines that it printed.
        how: In words, where nobody saw an exit code: a job that a cluster lost.
        over_limit: Why it was ended for the memory that it used; empty if it was not.
        set_aside: Why somebody else (a cancelled job) stopped it, so that this command does not continue it.
    """

    exit_code: int | None = None
    out_of_memory: bool = False
    output: str = ""
    how: str = ""
    over_limit: str = ""
    set_aside: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Args:
        values: Of the objectives, where it completed.
        reason: One sentence; empty where it completed.
        result: The content of ``result.json``; empty where there is none.
    """

    verdict: Verdict
    values: tuple[float, ...] = ()
    reason: str = ""
    result: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """Its finite metrics."""
        found = self.result.get("metrics") or {}
        return {str(name): float(value) for name, value in found.items() if _is_number(value)}


def judge(result: Mapping[str, Any], objectives: Sequence[str], ending: Ending | None = None) -> Outcome:
    """What a run's record, and the end of its process, mean.

    Args:
        result: The content of ``result.json``; empty where the run did not come to write it.
        objectives: Metrics of the result, or :data:`FIELDS`.
        ending: How its process ended; None: nobody saw it.
    """
    ending = ending or Ending()
    status = result.get("status")
    if status == "completed":
        return _completed(result, objectives)
    if status == "pruned":
        return Outcome(Verdict.pruned, (), _message(result) or "stopped at a validation point", result)
    if status == "failed":
        return _failed(result, ending)
    if ending.over_limit:
        return Outcome(Verdict.infeasible, (), f"out of memory: {ending.over_limit}", result)
    if ending.out_of_memory and ending.exit_code not in (None, 0):
        where = f" ({ending.how})" if ending.how else ""
        return Outcome(Verdict.infeasible, (), f"the machine's memory is full: the kernel killed it{where}", result)
    if ending.set_aside:
        return Outcome(Verdict.interrupted, (), ending.set_aside, result)
    if ending.how or (ending.exit_code or 0) < 0:  # what it may have said of itself is of an earlier stretch
        return Outcome(Verdict.lost, (), ending.how or _lost(ending), result)
    if status == "paused" and not ending.exit_code:
        return Outcome(Verdict.paused, (), _message(result), result)
    if status == "interrupted" or ending.exit_code == 130:
        return Outcome(Verdict.interrupted, (), _message(result) or "interrupted", result)
    if ending.exit_code == 2:
        return Outcome(Verdict.user_error, (), ending.output or "it was refused", result)
    return Outcome(Verdict.lost, (), _lost(ending), result)


def _lost(ending: Ending) -> str:
    how = "was killed" if ending.exit_code is None else _how(ending.exit_code)
    return f"its process {how} before it could leave a result"


def _completed(result: Mapping[str, Any], objectives: Sequence[str]) -> Outcome:
    metrics = result.get("metrics") or {}
    found = {name: metrics.get(name, result.get(name) if name in FIELDS else None) for name in objectives}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        there = ", ".join(sorted(str(name) for name in metrics))
        return Outcome(
            Verdict.user_error,
            (),
            f"The objective {missing[0]} is no metric of this run; there are {there}, and {', '.join(FIELDS)}.",
            result,
        )
    broken = [name for name, value in found.items() if not _is_number(value)]
    if broken:
        return Outcome(Verdict.not_finite, (), f"{broken[0]} is {found[broken[0]]}", result)
    return Outcome(Verdict.completed, tuple(float(value or 0.0) for value in found.values()), "", result)


def _failed(result: Mapping[str, Any], ending: Ending) -> Outcome:
    error = result.get("error") or {}
    kind, reason = str(error.get("type", "")), _message(result)
    if error.get("cause") in OUT_OF_MEMORY:
        return Outcome(Verdict.infeasible, (), f"{error['cause']}: {reason}", result)
    if kind == "ProcessKilled":
        if ending.out_of_memory:
            return Outcome(Verdict.infeasible, (), f"the machine's memory is full: {reason}", result)
        return Outcome(Verdict.lost, (), reason, result)
    if kind == "LossNotFinite":
        return Outcome(Verdict.not_finite, (), reason, result)
    if kind in _USERS:
        return Outcome(Verdict.user_error, (), f"{reason} {error.get('advice', '')}".strip(), result)
    if kind in _OTHERS_WROTE:
        return Outcome(Verdict.lost, (), reason, result)
    return Outcome(Verdict.failed, (), f"{kind}: {reason}", result)


def mean_of(outcomes: Sequence[Outcome]) -> Outcome:
    """A trial of several seeds: the mean where all completed, else what the first one that did not came to."""
    for outcome in outcomes:
        if outcome.verdict is not Verdict.completed:
            return outcome
    columns = zip(*(outcome.values for outcome in outcomes), strict=True)
    return Outcome(Verdict.completed, tuple(math.fsum(column) / len(outcomes) for column in columns))


def field_of(result: Mapping[str, Any], name: str) -> float | None:
    """A metric or a field of a result; None where it has none."""
    value = (result.get("metrics") or {}).get(name, result.get(name))
    return float(value) if value is not None and _is_number(value) else None


def oom_kills() -> int | None:
    """How often the kernel has killed a process for memory, in this container or on this machine; None: unknown."""
    for path, word in (
        ("/sys/fs/cgroup/memory.events", "oom_kill "),
        ("/sys/fs/cgroup/memory/memory.oom_control", "oom_kill "),
        ("/proc/vmstat", "oom_kill "),
    ):
        try:
            lines = Path(path).read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith(word):
                return int(line.removeprefix(word))
    return None


def _message(result: Mapping[str, Any]) -> str:
    return str((result.get("error") or {}).get("message", ""))


def _how(code: int) -> str:
    import signal

    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
