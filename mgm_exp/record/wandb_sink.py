"""Weights & Biases as a copy of the run for people; the files in the run folder stay the source of truth.

The W&B client lives in a process of its own (:mod:`mgm_exp.record.wandb_client`) that is fed through a pipe which never
blocks: its import time, its memory, a network that is down, a server that never answers or a crash cost the training
process nothing but rows in W&B. The first failure switches the sink off, with one warning.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mgm_exp.config import TrackerConfig, TrackerMode, plain
from mgm_exp.record.recorder import Row, RunInfo, Sink

log = logging.getLogger(__name__)

# Bytes that may wait for the client beyond what the pipe holds; more rows than that are left out of W&B, and counted.
BACKLOG = 32 * 2**20
PIPE = 2**20
# Seconds that the end of a run waits for the client at most.
FINISH_S = 45.0


class WandbSink(Sink):
    """Copies a run to W&B: online where a key is found (``WANDB_API_KEY``, netrc) or asked for, else offline.

    Args:
        tracker: Mode, project, entity, server, size of the predictions table.
        finish_s: Seconds that :meth:`finish` waits at most; what was not sent stays in the run folder.
        backlog: Bytes that may wait for the client.
    """

    def __init__(self, tracker: TrackerConfig, *, finish_s: float = FINISH_S, backlog: int = BACKLOG) -> None:
        self._tracker = tracker
        self._finish_s = finish_s
        self._backlog = backlog
        self._client: subprocess.Popen[bytes] | None = None
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._left_out = 0
        self._replies = b""
        self._is_offline = False
        self._is_finished = False
        self._folder = Path()

    @property
    def is_on(self) -> bool:
        """Whether there is a client that takes rows."""
        return self._client is not None

    @property
    def client_pid(self) -> int | None:
        """The client's process."""
        return None if self._client is None else self._client.pid

    def start(self, run: RunInfo) -> None:
        """Starts the client; only the first process of a run does."""
        if os.environ.get("RANK", "0") != "0" or self._is_unwanted():
            return
        self._folder = folder = run.run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "client.log").open("ab") as client_log:
            self._client = subprocess.Popen(
                [sys.executable, "-m", "mgm_exp.record.wandb_client", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=client_log,
                env=_environment(folder),
                # Ctrl-C is for the run, which tells the client what became of it.
                start_new_session=True,
            )
        assert self._client.stdin is not None and self._client.stdout is not None
        os.set_blocking(self._client.stdin.fileno(), False)
        os.set_blocking(self._client.stdout.fileno(), False)
        _enlarge(self._client.stdin.fileno())
        self._send("start", run={**asdict(run), "run_dir": str(run.run_dir)}, tracker=plain(self._tracker))

    def stage_started(self, stage: str, total_steps: int, rows: Sequence[Row]) -> None:
        """Sends the rows that hold already, where W&B does not have them."""
        self._send("stage_started", stage=stage, rows=list(rows))

    def row(self, row: Row) -> None:
        """Sends one row."""
        self._send("row", row=row)

    def stage_finished(self, stage: str, summary: Mapping[str, Any], reused: bool) -> None:
        """Puts the stage's summary into the run's."""
        self._send("stage_finished", stage=stage, summary=dict(summary), reused=reused)

    def predictions(self, benchmark: str, path: Path, image_root: Path, metrics: Mapping[str, float]) -> None:
        """Sends the metrics and a table of predictions with their images."""
        self._send(
            "predictions", benchmark=benchmark, path=str(path), image_roots=[str(image_root)], metrics=dict(metrics)
        )

    def finish(self, result: Mapping[str, Any]) -> None:
        """Closes the W&B run, or gives up after ``finish_s`` seconds."""
        if self._client is None:
            return
        self._send("finish", result=dict(result))
        deadline = time.monotonic() + self._finish_s
        while self._client is not None and not self._is_finished:
            left = deadline - time.monotonic()
            if left <= 0:
                self._switch_off(f"no answer within {self._finish_s:g} s at the end of the run")
                break
            self._exchange(wait_s=left)
        self._end_client()
        if self._left_out:
            log.warning("W&B was too slow: %d rows are in metrics.jsonl only", self._left_out)
        if self._is_offline or not self._is_finished or self._left_out:
            folder = str(self._folder.parent)
            shown = min(folder, os.path.relpath(folder), key=len)
            print(f"W&B: not sent, or not all of it; later: mgm-exp wandb-sync {shown}", flush=True)

    def _is_unwanted(self) -> bool:
        mode = self._tracker.mode
        switched_off = mode is TrackerMode.auto and os.environ.get("WANDB_MODE") == "disabled"
        return mode is TrackerMode.disabled or switched_off

    def _send(self, call: str, **arguments: Any) -> None:
        if self._client is None:
            return
        line = json.dumps({"call": call, **arguments}, default=str).encode() + b"\n"
        if call == "row" and self._waiting_bytes + len(line) > self._backlog:
            self._left_out += 1
        else:
            self._waiting.append(line)
            self._waiting_bytes += len(line)
        self._exchange(wait_s=0)

    def _exchange(self, wait_s: float) -> None:
        """Writes what the pipe takes and reads what the client says, waiting for either if ``wait_s`` is not 0."""
        assert self._client is not None and self._client.stdin is not None and self._client.stdout is not None
        to_client, from_client = self._client.stdin.fileno(), self._client.stdout.fileno()
        if wait_s:
            select.select([from_client], [to_client] if self._waiting else [], [], wait_s)
        try:
            while self._waiting:
                sent = os.write(to_client, self._waiting[0])
                self._waiting_bytes -= sent
                if sent < len(self._waiting[0]):
                    self._waiting[0] = self._waiting[0][sent:]
                else:
                    self._waiting.popleft()
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._read(from_client)
            self._switch_off("its process ended unexpectedly")
            return
        self._read(from_client)

    def _read(self, from_client: int) -> None:
        while True:
            try:
                chunk = os.read(from_client, 65536)
            except BlockingIOError:
                return
            *lines, self._replies = (self._replies + chunk).split(b"\n")
            for line in lines:
                self._heard(json.loads(line))
            if not chunk and not self._is_finished:
                self._switch_off("its process ended unexpectedly")
            if not chunk or self._client is None:
                return

    def _heard(self, reply: Mapping[str, Any]) -> None:
        self._is_offline = reply.get("is_offline", self._is_offline)
        if "warning" in reply:
            log.warning("%s", reply["warning"])
        if "failure" in reply:
            self._switch_off(str(reply["failure"]))
        self._is_finished = self._is_finished or "finished" in reply

    def _switch_off(self, why: str) -> None:
        """No more rows, one warning. What W&B wrote so far stays in the run folder."""
        if self._client is None:
            return
        log.warning("W&B is switched off for this run (%s); its files are complete: mgm-exp wandb-sync sends them", why)
        self._end_client()

    def _end_client(self) -> None:
        client, self._client = self._client, None
        self._waiting.clear()
        self._waiting_bytes = 0
        if client is None:
            return
        assert client.stdin is not None and client.stdout is not None
        client.stdin.close()
        client.stdout.close()
        if not self._is_finished:
            kill_client(client)
        try:
            client.wait(timeout=2)
        except subprocess.TimeoutExpired:
            kill_client(client)
            client.wait()
        # A run folder can be moved and archived; W&B links to its log files although it is told not to.
        for path in [path for path in self._folder.rglob("*") if path.is_symlink()]:
            path.unlink(missing_ok=True)


def kill_client(client: subprocess.Popen[bytes]) -> None:
    """Kills a client and first W&B's own process, which would go on sending into what is sent anew meanwhile."""
    for child in _children(client.pid):
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            log.debug("W&B's process %d has ended", child)
    client.kill()


def _children(parent: int) -> list[int]:
    """Children of a process; none where there is no /proc (W&B's process then ends by itself, a little later)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state_and_parent = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(state_and_parent[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def _environment(folder: Path) -> dict[str, str]:
    """The client's environment: this package importable, and everything W&B writes inside the run folder.

    Tables are staged in the home folder by default, where ``wandb sync`` loses them without a word once it is gone.
    """
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": root if not inherited else f"{root}{os.pathsep}{inherited}",
        "WANDB_DATA_DIR": str(folder / "data"),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_ERROR_REPORTING": "false",
    }


def _enlarge(pipe: int) -> None:
    """A pipe that takes the rows of a whole small run, where the system has such pipes."""
    if sys.platform.startswith("linux"):
        import fcntl

        try:
            fcntl.fcntl(pipe, 1031, PIPE)  # F_SETPIPE_SZ, named in fcntl since Python 3.10 on newer systems only
        except OSError as error:
            log.debug("the pipe keeps its size (%s)", error)
