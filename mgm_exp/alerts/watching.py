"""One run, watched by the rules: which messages go out, and when."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mgm_exp.alerts.channels import Channels
from mgm_exp.alerts.messages import Message, of_alert, of_death, of_result
from mgm_exp.alerts.rate import Rate
from mgm_exp.config import MonitorLimitsConfig
from mgm_exp.monitor import Watch
from mgm_exp.store import read_record

# Seconds between two looks at the rules.
POLL_S = 2.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watched:
    """What the run tells of itself at first.

    Args:
        name, folder: The run's.
        urls, every_minutes, on_finish: Of ``alerts``.
        limits: ``monitor.limits``.
        rate_folder: Of the run, or of its sweep.
        in_sweep: Whether it is a trial: its sweep says how it ended.
        parent: The run's process.
        poll_s: Seconds between two looks.
    """

    name: str
    folder: str
    urls: list[str]
    every_minutes: float
    on_finish: bool
    limits: dict[str, Any]
    rate_folder: str
    in_sweep: bool
    parent: int
    poll_s: float = POLL_S

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Watcher:
    """Watches one run.

    Args:
        watched: The run.
        channels: Where messages go.
    """

    def __init__(self, watched: Watched, channels: Channels) -> None:
        self.watched, self.channels = watched, channels
        self.watch = Watch(MonitorLimitsConfig(**watched.limits))
        self.rate = Rate(Path(watched.rate_folder), watched.every_minutes * 60)
        # Rules that held at the last look, and when a message of each was last tried
        self._raised: dict[str, float] = {}
        self._last: Mapping[str, Any] = {}
        self._result = Path(watched.folder) / "result.json"
        self._result_before = _stamp(self._result)  # of an earlier attempt

    def hear(self, call: Mapping[str, Any], now: float) -> bool:
        """Takes one line in; whether it was the run's last one."""
        what = call.get("call")
        if what == "stage_started":
            self.watch.stage_started(now)
        elif what == "stage_finished":
            self.watch.stage_finished()
        elif what == "row":
            self._last = call["row"]
            self.watch.row(call["row"], now)
        elif what == "sample":
            self.watch.sample(call["sample"])
        elif what == "finish":
            self.look(now)  # what its last steps raised
            self._finished(call["result"], now)
            return True
        return False

    def look(self, now: float) -> None:
        """Sends what began to hold, and again what still holds after ``alerts.every_minutes``."""
        raised = {alert.rule.name: alert for alert in self.watch.raised(now)}
        self._raised = {name: at for name, at in self._raised.items() if name in raised}
        for name, alert in raised.items():
            if now - self._raised.get(name, float("-inf")) < self.watched.every_minutes * 60:
                continue
            self._raised[name] = now
            self._send(of_alert(alert, self.watched.name, self.watched.folder), now)

    def died(self, now: float) -> None:
        """The run is gone without a word; or its last word did not come through, and stands in ``result.json``."""
        if (stamp := _stamp(self._result)) is not None and stamp != self._result_before:
            self._finished(read_record(self._result), now)
            return
        self.look(now)
        place = f"{self._last.get('stage')} step {self._last.get('step')}" if self._last else "before its first step"
        folder = self.watched.folder
        self._send(of_death(self.watched.name, folder, f"last sign: {place}", _causes(Path(folder))), now)

    def _finished(self, result: Mapping[str, Any], now: float) -> None:
        message = of_result(result, self.watched.name, self.watched.folder)
        if message is None:
            return
        if result.get("status") == "failed":
            self._send(message, now)
        elif self.watched.on_finish and not self.watched.in_sweep:
            self.channels.send(message)

    def _send(self, message: Message, now: float) -> None:
        held_back = self.rate.take(message.kind, now)
        if held_back is None:
            return
        if held_back:
            more = f"{message.body}\n({held_back} more of this kind since the last message)"
            message = replace(message, body=more)
        self.channels.send(message)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Which file stands there: another one where it was written anew."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def _causes(folder: Path) -> Sequence[str]:
    """The doctor's most likely cause, where it finds one."""
    from mgm_exp.doctor import case_of_run, diagnose

    try:
        found = diagnose(case_of_run(folder, quick=True)).findings[:1]
    except Exception as error:  # noqa: BLE001 - the message goes out whatever is in the folder
        log.warning("doctor: no diagnosis (%s)", type(error).__name__)
        return ()
    return [f"doctor: {finding.entry.title} ({finding.entry.id}): {finding.entry.fix[0]}" for finding in found]
