"""What a run tells the process that watches it (:mod:`mgm_exp.alerts.watcher`), through a pipe that never blocks."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mgm_exp.alerts.channels import Channels
from mgm_exp.alerts.messages import of_sweep
from mgm_exp.alerts.rate import Rate
from mgm_exp.alerts.watching import POLL_S, Watched
from mgm_exp.config import AlertsConfig, MonitorLimitsConfig, variables_of
from mgm_exp.errors import MissingDependencyError
from mgm_exp.record import RunInfo, Sink
from mgm_exp.record.recorder import Row

log = logging.getLogger(__name__)

# Seconds that the end of a run, or of a sweep, waits for its messages.
FINISH_S = 5.0
# Bytes that may wait beyond what the pipe holds; more is left out.
BACKLOG = 4 << 20
LOG = "alerts.log"


def check_alerts(alerts: AlertsConfig) -> None:
    """
    Raises:
        MissingDependencyError: messages are asked for, and the package that sends them is not here.
    """
    if alerts.urls and importlib.util.find_spec("apprise") is None:
        raise MissingDependencyError(
            "alerts.urls needs the package apprise, which is not here.",
            advice="pip install 'mgm-exp[monitor]' (or apprise==2.2.0), or drop alerts.urls.",
        )


class AlertSink(Sink):
    """Has one run watched, and messages sent to ``alerts.urls``.

    Args:
        alerts: Addresses, rate, whether a good end is told.
        limits: When a rule holds.
        finish_s: Seconds that the run's end waits.
        poll_s: Seconds between two looks at the rules.
    """

    hears_refusals = True

    def __init__(
        self,
        alerts: AlertsConfig,
        limits: MonitorLimitsConfig,
        *,
        finish_s: float = FINISH_S,
        poll_s: float = POLL_S,
    ) -> None:
        self._alerts, self._limits, self._finish_s, self._poll_s = alerts, limits, finish_s, poll_s
        self._watcher: subprocess.Popen[bytes] | None = None
        self._waiting: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._folder = Path()

    def start(self, run: RunInfo) -> None:
        """Starts the process."""
        if not self._alerts.urls:
            return
        missing = [name for url in self._alerts.urls for name in variables_of(url) if not os.environ.get(name)]
        if missing:
            named = ", ".join(f"${name}" for name in dict.fromkeys(missing))
            log.warning("alerts: %s not set in the environment: addresses that name it get no message", named)
        self._folder = run.run_dir
        with (run.run_dir / LOG).open("ab") as file:
            self._watcher = subprocess.Popen(
                [sys.executable, "-m", "mgm_exp.alerts.watcher"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=file,
                env=_environment(),
                # Ctrl-C is for the run, and a kill of its group must be told by somebody
                start_new_session=True,
            )
        assert self._watcher.stdin is not None
        os.set_blocking(self._watcher.stdin.fileno(), False)
        watched = Watched(
            name=run.name,
            folder=str(run.run_dir),
            urls=list(self._alerts.urls),
            every_minutes=self._alerts.every_minutes,
            on_finish=self._alerts.on_finish,
            limits=asdict(self._limits),
            rate_folder=str(_rate_folder(run)),
            in_sweep=run.group is not None,
            parent=os.getpid(),
            poll_s=self._poll_s,
        )
        self._write(watched.to_json())

    def stage_started(self, stage: str, total_steps: int, rows: Sequence[Row]) -> None:
        """A stage begins to train: what others did is no measure for it."""
        self._write({"call": "stage_started"})

    def row(self, row: Row) -> None:
        """One step, or an event."""
        self._write({"call": "row", "row": dict(row)})

    def sample(self, sample: Mapping[str, Any]) -> None:
        """One line of ``system.jsonl``; from another thread."""
        self._write({"call": "sample", "sample": dict(sample)})

    def stage_finished(self, stage: str, summary: Mapping[str, Any], reused: bool) -> None:
        """Nothing trains."""
        self._write({"call": "stage_finished"})

    def finish(self, result: Mapping[str, Any]) -> None:
        """Tells how the run ended, and waits for the messages, some seconds at most."""
        self._write({"call": "finish", "result": dict(result)})
        watcher = self._watcher
        if watcher is None:
            return
        deadline = time.monotonic() + self._finish_s
        while self._waiting and self._watcher is not None and (left := deadline - time.monotonic()) > 0:
            assert watcher.stdin is not None
            select.select([], [watcher.stdin.fileno()], [], left)
            self._push()
        self._end()
        try:
            watcher.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("alerts: messages are still on their way (%s)", self._folder / LOG)

    def _write(self, call: Mapping[str, Any]) -> None:
        if self._watcher is None:
            return
        line = json.dumps(call, default=str).encode() + b"\n"
        with self._lock:
            if call.get("call") in ("row", "sample") and sum(map(len, self._waiting)) > BACKLOG:
                return
            self._waiting.append(line)
        self._push()

    def _push(self) -> None:
        """Writes what the pipe takes."""
        with self._lock:
            watcher = self._watcher
            if watcher is None or watcher.stdin is None:
                return
            try:
                while self._waiting:
                    sent = os.write(watcher.stdin.fileno(), self._waiting[0])
                    if sent == len(self._waiting[0]):
                        self._waiting.popleft()
                    else:
                        self._waiting[0] = self._waiting[0][sent:]
                return
            except BlockingIOError:
                return
            except BrokenPipeError:
                log.warning("alerts: the process that sends them ended; there are none from here on (%s)", LOG)
        self._end()

    def _end(self) -> None:
        with self._lock:
            watcher, self._watcher = self._watcher, None
            self._waiting.clear()
        if watcher is not None and watcher.stdin is not None:
            watcher.stdin.close()


def tell_sweep(alerts: AlertsConfig, folder: Path, content: Mapping[str, Any], *, wait_s: float = FINISH_S) -> None:
    """Sends how a sweep ended, with ``alerts.on_finish``; whatever goes wrong is said and changes nothing.

    Args:
        folder: The sweep's, with its ``comparison.json`` where there is one.
        content: Of ``sweep.json``.
    """
    if not alerts.urls or not alerts.on_finish or content.get("status") not in ("completed", "failed"):
        return
    report = next((name for name in ("report.html", "table.md", "sweep.json") if (folder / name).is_file()), "")
    held_back = Rate(folder, alerts.every_minutes * 60).held_back()
    message = of_sweep(content, str(folder), _verdict(folder), str(folder / report), held_back)
    if alerts.attach_report and report == "report.html":
        message = replace(message, file=str(folder / report))
    try:
        import apprise  # noqa: F401 - takes seconds, which are none of a server's
    except ImportError as error:
        log.warning("alerts: how the sweep ended is not told: %s", error)
        return
    channels = Channels(alerts.urls, lambda sentence: log.warning("alerts: %s", sentence))
    channels.send(message)
    if not channels.close(wait_s):
        log.warning("alerts: the sweep's verdict was not taken within %g s", wait_s)


def _verdict(folder: Path) -> list[str]:
    """Of ``comparison.json``; nothing where there is none, or it cannot be read."""
    from mgm_exp.compare.wording import verdict_lines
    from mgm_exp.store import read_record

    try:
        return list(verdict_lines(read_record(folder / "comparison.json")))
    except (OSError, ValueError, LookupError, TypeError) as error:
        log.debug("no verdict in %s: %s", folder, error)
        return []


def _rate_folder(run: RunInfo) -> Path:
    """The sweep's folder where there is one: its trials share the rate."""
    if run.group is None:
        return run.run_dir
    return run.run_dir.parent.parent if run.run_dir.name.startswith("seed_") else run.run_dir.parent


def _environment() -> dict[str, str]:
    """This package importable, whatever the folder is."""
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": root if not inherited else f"{root}{os.pathsep}{inherited}"}
