"""What is said: of a rule that holds, of a run that failed, died or finished, of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mgm_exp.monitor import Alert
from mgm_exp.record import redact_text

FAILED, FINISHED, SWEEP, DOWN = "RunFailed", "RunFinished", "SweepFinished", "TrainerDown"
# Chats cut longer messages, or refuse them.
LONGEST = 1500


@dataclass(frozen=True)
class Message:
    """One message.

    Args:
        kind: Name of the rule, or one of the constants above; the rate is kept for each.
        severity: ``critical``, ``warning`` or ``info``.
        file: Path of a file that goes along where a service takes files.
    """

    kind: str
    severity: str
    title: str
    body: str
    file: str | None = None


def of_alert(alert: Alert, name: str, folder: str) -> Message:
    """A rule that holds.

    Args:
        name: The run's.
        folder: Where it lies.
    """
    rule = alert.rule
    lines = [rule.summary, alert.detail, f"what to do: mgm-exp doctor --entry {rule.runbook}", f"run: {folder}"]
    return _message(rule.name, rule.severity, f"{rule.name}: {name}", lines)


def of_death(name: str, folder: str, last: str, causes: Sequence[str]) -> Message:
    """A run whose process is gone without a word."""
    lines = ["The run's process is gone: it was killed, or crashed.", last, *causes, f"more: mgm-exp doctor {folder}"]
    return _message(DOWN, "critical", f"{DOWN}: {name}", lines)


def of_result(result: Mapping[str, Any], name: str, folder: str) -> Message | None:
    """How a run ended: a failure with its most likely cause, or its scores; None: it goes on later, or was stopped."""
    status = result.get("status")
    if status == "failed":
        error = result.get("error") or {}
        doctor = error.get("doctor") or {}
        found = [f"doctor: {doctor.get('title')} ({doctor.get('id')})", *list(doctor.get("fix") or ())[:1]]
        own = [error.get("cause"), error.get("advice")]
        said = f"{error.get('type') or 'error'}: {error.get('message') or 'no message'}"
        lines = [said, *(found if doctor else own), f"more: mgm-exp doctor {folder}"]
        return _message(FAILED, "critical", f"failed: {name}", lines)
    if status != "completed":
        return None
    scores = [f"{key} {value:.4f}" for key, value in (result.get("metrics") or {}).items() if _is_number(value)]
    took = f"{float(result.get('wall_s') or 0) / 60:.1f} minutes, {result.get('steps') or 0} steps"
    return _message(FINISHED, "info", f"finished: {name}", [*scores[:8], took, f"run: {folder}"])


def of_sweep(content: Mapping[str, Any], folder: str, verdict: Sequence[str], report: str, held_back: int) -> Message:
    """How a sweep ended.

    Args:
        content: Of ``sweep.json``.
        verdict: What the comparison says: winner, difference, how sure.
        report: Path of the report.
        held_back: Messages of its trials that the rate held back.
    """
    states = [str(trial.get("status")) for trial in content.get("trials") or ()]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    best = content.get("best") or {}
    value = best.get("value")
    told = f"best: trial {best['number']}, {content.get('objective')} {value:.4f}" if _is_number(value) else ""
    rest = f"{held_back} message(s) of its trials were held back by alerts.every_minutes" if held_back else ""
    lines = [*verdict[:4], told, f"trials: {counted or 'none'}", rest, f"report: {report}", f"sweep: {folder}"]
    is_well = "failed" not in states
    severity, ended = ("info", "finished") if is_well else ("warning", "ended with failures")
    return _message(SWEEP, severity, f"sweep {ended}: {content.get('name')}", lines)


def _message(kind: str, severity: str, title: str, lines: Sequence[Any]) -> Message:
    body = redact_text("\n".join(str(line) for line in lines if line))
    return Message(kind, severity, redact_text(f"mgm_exp {title}"), body[:LONGEST])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
