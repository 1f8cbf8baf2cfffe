"""Starts one agent on each machine of a stage, and sees to it that they end: in a thread, by srun, by a remote shell.

An agent (:mod:`mgm_exp.train.agent`) starts the processes of its machine. What they and their processes have to say
stands in the launch folder; here it only matters whether they run.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from mgm_exp.store import Heartbeat, write_atomic
from mgm_exp.train import board
from mgm_exp.train.agent import SHUTDOWN_S, run_processes
from mgm_exp.train.attached import attached
from mgm_exp.train.launch_folder import LaunchFacts, LaunchFolder
from mgm_exp.train.machines import Cluster, Reach

BEAT_S = 5.0
_MODULE = "mgm_exp.train.agent"


class Agents(ABC):
    """The agents of one start."""

    def __init__(self, launch: LaunchFolder, facts: LaunchFacts) -> None:
        self.launch, self.facts = launch, facts

    @abstractmethod
    def start(self) -> None:
        """Starts them; call it from the main thread, which they end with."""

    @abstractmethod
    def are_at_work(self, wait_s: float) -> bool:
        """Whether any of them still is; waits up to ``wait_s`` for their end."""

    @abstractmethod
    def end(self) -> None:
        """Ends their processes at once; :meth:`are_at_work` is False soon after."""

    def close(self) -> None:  # noqa: B027 - not every kind has something to tidy up
        """Called once, when none is at work any more."""

    def lost(self) -> dict[int, str]:
        """Machine -> how its agent ended, for those that could not say so themselves."""
        return {}

    def any_failed(self) -> bool:
        """Whether some machine's processes have failed: then those of the others only wait for them."""
        return any(self.launch.read_agent(machine) for machine in range(len(self.facts.names)))


def agents_for(cluster: Cluster, remote_shell: Sequence[str], launch: LaunchFolder, facts: LaunchFacts) -> Agents:
    """Those that reach the machines of ``cluster``."""
    if cluster.reach is Reach.here:
        return ThreadAgent(launch, facts)
    if cluster.reach is Reach.slurm:
        return SlurmAgents(launch, facts)
    if cluster.reach is Reach.volcano:
        return WaitingAgents(launch, facts)
    return ShellAgents(launch, facts, remote_shell)


class ThreadAgent(Agents):
    """All processes are on this machine: a thread of this process is their agent."""

    def start(self) -> None:
        self._thread = threading.Thread(
            target=run_processes, args=(self.launch, self.facts, 0), name="elastic-agent", daemon=True
        )
        self._thread.start()

    def are_at_work(self, wait_s: float) -> bool:
        self._thread.join(wait_s)
        return self._thread.is_alive()

    def end(self) -> None:
        for pid in self.launch.pids().values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


class ProcessAgents(Agents):
    """Agents in processes of their own, on several machines. They watch a number that this process keeps adding to."""

    def __init__(self, launch: LaunchFolder, facts: LaunchFacts) -> None:
        super().__init__(launch, facts)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._beats = 0
        self._heartbeat = Heartbeat(self._beat, BEAT_S)

    def _beat(self) -> bool:
        self._beats += 1
        with contextlib.suppress(OSError):  # a network file system may be away for a while
            write_atomic(self.launch.alive, f"{self.facts.run_id} {self._beats}")
        return True

    def start(self) -> None:
        self._beat()
        self._heartbeat.start()
        with open(self.launch.logs / "agents.txt", "ab") as log:
            for machine, (command, stdin) in self._commands().items():
                self._processes[machine] = subprocess.Popen(
                    command, stdin=stdin, stdout=log, stderr=log, start_new_session=True
                )

    @abstractmethod
    def _commands(self) -> dict[int, tuple[list[str], int]]:
        """Machine -> command line and stdin; one for several machines has the number of the first."""

    def _here(self, machine: int) -> tuple[list[str], int]:
        command = [sys.executable, "-m", _MODULE, str(self.launch.folder), str(machine), "--parent", str(os.getpid())]
        return command, subprocess.DEVNULL

    def are_at_work(self, wait_s: float) -> bool:
        running = [process for process in self._processes.values() if process.poll() is None]
        if not running:
            return False
        try:
            running[0].wait(wait_s)
        except subprocess.TimeoutExpired:
            return True
        return any(process.poll() is None for process in running)

    def any_failed(self) -> bool:
        ended = [machine for machine, process in self._processes.items() if process.poll() is not None]
        return super().any_failed() or any(self.launch.read_agent(machine) is None for machine in ended)

    def end(self) -> None:
        self.launch.ask_to_end("the stage ends")
        for process in self._processes.values():
            try:
                process.wait(2 * SHUTDOWN_S)
            except subprocess.TimeoutExpired:
                process.terminate()  # srun and ssh end what they started; an agent that does not answer is killed
                try:
                    process.wait(2 * SHUTDOWN_S)
                except subprocess.TimeoutExpired:
                    process.kill()
        self.close()

    def close(self) -> None:
        self._heartbeat.stop()
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()

    def lost(self) -> dict[int, str]:
        return {
            machine: f"exit code {process.returncode}"
            for machine, process in self._processes.items()
            if process.poll() is not None and self.launch.read_agent(machine) is None
        }


class SlurmAgents(ProcessAgents):
    """One step of the Slurm job, a task on each machine; the step ends with srun, and srun with this process."""

    def _commands(self) -> dict[int, tuple[list[str], int]]:
        n = len(self.facts.names)
        step = [
            "srun", "--overlap", f"--nodes={n}", f"--ntasks={n}", "--ntasks-per-node=1", "--mem=0", "--cpu-bind=none",
            "--kill-on-bad-exit=1", "--export=ALL", "--job-name=mgm_exp-stage",
        ]  # fmt: skip
        return {0: (attached([*step, sys.executable, "-m", _MODULE, str(self.launch.folder)]), subprocess.DEVNULL)}


class ShellAgents(ProcessAgents):
    """A remote shell (ssh) for each other machine. An agent ends when its stdin is closed: when the shell is lost."""

    def __init__(self, launch: LaunchFolder, facts: LaunchFacts, remote_shell: Sequence[str]) -> None:
        super().__init__(launch, facts)
        self._remote_shell = list(remote_shell)

    def _commands(self) -> dict[int, tuple[list[str], int]]:
        commands = {0: self._here(0)}
        for machine, name in enumerate(self.facts.names[1:], 1):
            line = remote_command(self.launch.folder, machine, Path.cwd(), os.environ.get("PYTHONPATH", ""))
            commands[machine] = attached([*self._remote_shell, name, line]), subprocess.PIPE
        return commands


class WaitingAgents(ProcessAgents):
    """Agents that were started beforehand and wait on a board (the other pods of a Volcano job)."""

    def _commands(self) -> dict[int, tuple[list[str], int]]:
        board.post(self.launch)
        return {0: self._here(0)}


def remote_command(folder: Path, machine: int, cwd: Path, python_path: str) -> str:
    """What a remote shell is given: the same folder, Python and package path as here."""
    command = [sys.executable, "-m", _MODULE, str(folder.resolve()), str(machine), "--stdin"]
    return f"cd {shlex.quote(str(cwd))} && exec {shlex.join(['env', f'PYTHONPATH={python_path}', *command])}"
