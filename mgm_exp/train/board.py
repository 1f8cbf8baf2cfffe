"""How an experiment hands work to agents that were started beforehand (the pods of a Volcano job), on a shared folder.

    BOARD/alive            "<session> <number>": a new session for each start of the experiment; grows while it lives
    BOARD/<session>/<n>    the n-th piece of work: a launch folder
    BOARD/<session>/done   the experiment is over, nothing more comes

An agent trusts a session only after it saw the number grow: what an earlier start left behind is not taken for work.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from mgm_exp.errors import EXIT_INTERRUPTED
from mgm_exp.store import Heartbeat, write_atomic
from mgm_exp.train.launch_folder import POLL_S, LaunchFolder
from mgm_exp.train.machines import VOLCANO_BOARD, VOLCANO_OTHERS

# Environment variable that holds the session of the experiment, for the processes that it starts.
SESSION = "MGM_EXP_BOARD_SESSION"

BEAT_S = 5.0
# A sign of life of the experiment that stands still for so long means that it is gone.
GONE_S = 120.0
# Until the experiment is heard of for the first time: its pod may have to load a large image first.
COMES_S = 3600.0


class Board:
    """Where the experiment posts work, and shows that it lives while it is open.

    Processes that the experiment starts (trials of a sweep) find its session in their environment and post there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.session = secrets.token_hex(8)
        self._beats = 0
        self._heartbeat = Heartbeat(self._beat, BEAT_S)

    def __enter__(self) -> Board:
        (self.folder / self.session).mkdir(parents=True)
        os.environ[SESSION] = self.session
        self._beat()
        self._heartbeat.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing more comes: the agents end."""
        self._heartbeat.stop()
        write_atomic(self.folder / self.session / "done", "")
        os.environ.pop(SESSION, None)

    def _beat(self) -> bool:
        self._beats += 1
        with contextlib.suppress(OSError):  # a network file system may be away for a while
            write_atomic(self.folder / "alive", f"{self.session} {self._beats}")
        return True


def board_of_experiment(environment: Mapping[str, str] = os.environ) -> AbstractContextManager[object]:
    """Open while a command runs whose agents wait on other machines; nothing else is done where there are none."""
    folder = environment.get(VOLCANO_BOARD)
    if not folder or not environment.get(VOLCANO_OTHERS) or environment.get(SESSION):
        return nullcontext()
    return Board(Path(folder))


def post(launch: LaunchFolder) -> None:
    """Every waiting agent takes part in this launch."""
    folder = Path(os.environ[VOLCANO_BOARD]) / os.environ[SESSION]
    number = sum(path.name.isdigit() for path in folder.iterdir())
    write_atomic(folder / str(number), str(launch.folder.resolve()))


def wait_for_work(folder: Path, machine: int, *, comes_s: float = COMES_S, gone_s: float = GONE_S) -> int:
    """The agent's side: takes part in everything that is posted.

    SIGTERM (its machine is wanted back) asks the stage at hand to save its state, on all machines.

    Returns:
        0 when the experiment is over, 1 when it is not heard of any more (the job's policies start it again), 130 after
        SIGTERM.
    """
    last, heard_at, done, session = _read(folder), time.monotonic(), 0, ""
    with _Eviction() as eviction:
        while not eviction.is_asked:
            now = _read(folder)
            if now != last:
                last, heard_at = now, time.monotonic()
                if now.split(" ")[0] != session:
                    session, done = now.split(" ")[0], 0
                    print(f"machine {machine}: the experiment is there ({session})", flush=True)
            if session and (folder / session / str(done)).exists():
                launch = LaunchFolder(Path((folder / session / str(done)).read_text(encoding="utf-8")))
                _take_part(launch, machine, eviction)
                done += 1
                heard_at = time.monotonic()
            elif session and (folder / session / "done").exists():
                return 0
            elif time.monotonic() - heard_at > (gone_s if session else comes_s):
                sys.stderr.write(f"machine {machine}: no sign of life of the experiment in {folder}\n")
                return 1
            else:
                time.sleep(POLL_S * 5)
    return EXIT_INTERRUPTED


class _Eviction:
    """Hears of SIGTERM while it is open; in the main thread, where Python can."""

    def __init__(self) -> None:
        self.is_asked = False
        self._before: Any = None

    def __enter__(self) -> _Eviction:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._asked)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True


def _take_part(launch: LaunchFolder, machine: int, eviction: _Eviction) -> None:
    """In a process of its own: what a stage leaves behind in one does not reach the next."""
    command = [sys.executable, "-m", "mgm_exp.train.agent", str(launch.folder), str(machine), "--parent"]
    agent = subprocess.Popen([*command, str(os.getpid())], stdin=subprocess.DEVNULL)
    while agent.poll() is None:
        if eviction.is_asked and not launch.stop.exists():
            write_atomic(launch.stop, f"SIGTERM on machine {machine}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(POLL_S * 5)
    if agent.returncode:
        sys.stderr.write(f"machine {machine}: its agent for {launch.folder} ended with {agent.returncode}\n")


def _read(folder: Path) -> str:
    try:
        return (folder / "alive").read_text(encoding="ascii")
    except OSError:
        return ""
