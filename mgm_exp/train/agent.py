"""One machine's part in a stage of several processes: starts them through torch's elastic launcher, waits, cleans up.

    python -m mgm_exp.train.agent LAUNCH_FOLDER [MACHINE]     started by Slurm, a remote shell or a waiting agent
    python -m mgm_exp.train.agent --wait BOARD MACHINE        waits for work until the experiment is over

The agent ends at once, and its processes with it, when the starter asks for it, dies or is not heard of any more.
Where all processes are on one machine the starter runs :func:`run_processes` itself, in a thread.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mgm_exp.signals import STOP_SIGNALS
from mgm_exp.store import die_with_parent, write_json_atomic
from mgm_exp.train.launch_folder import POLL_S, LaunchFacts, LaunchFolder

# Environment variable by which a process knows the agent that it ends with.
AGENT = "MGM_EXP_AGENT"
# How long the others may take to end by themselves once one process has failed.
SHUTDOWN_S = 5
# A starter on another machine that was not heard of for so long is dead, or cannot be reached.
LOST_S = 60.0
# Agents that do not meet within this time give up.
MEET_S = 300


def run_processes(launch: LaunchFolder, facts: LaunchFacts, machine: int) -> None:
    """Starts the processes of one machine and waits for them; how they ended stands in ``agent-<machine>.json``."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what it has to say is said by the starter, in our words
    failed: dict[str, Any] = {}
    try:
        settings = _settings(launch, facts, machine)
        elastic_launch(settings, sys.executable)("-m", "mgm_exp.train.worker", str(launch.folder))
    except ChildFailedError as error:
        failed = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
    except Exception as error:  # noqa: BLE001 - the launcher itself failed: the starter raises it
        failed = {"launcher": f"{type(error).__name__}: {error}"}
    write_json_atomic(launch.agent(machine), failed)


def _settings(launch: LaunchFolder, facts: LaunchFacts, machine: int) -> Any:
    """Several machines meet at an address known to all, in their order; a single one chooses a free port."""
    from torch.distributed.launcher.api import LaunchConfig

    if facts.endpoint is None:
        meeting: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "127.0.0.1"}
    else:
        address, port = facts.endpoint
        meeting = {
            "rdzv_backend": "static",
            "rdzv_endpoint": f"{address}:{port}",
            "rdzv_configs": {"rank": machine, "timeout": MEET_S},
        }
    return LaunchConfig(
        min_nodes=len(facts.names),
        max_nodes=len(facts.names),
        nproc_per_node=facts.per_machine,
        run_id=facts.run_id,
        max_restarts=0,  # the starter decides: all machines begin again together, from one checkpoint
        start_method="spawn",
        monitor_interval=POLL_S,
        shutdown_timeout=SHUTDOWN_S,
        logs_specs=_logs(launch),
        **meeting,
    )


def _logs(launch: LaunchFolder) -> Any:
    """What each process prints goes to files of its rank."""
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, Std

    class RankLogs(LogsSpecs):
        @property
        def root_log_dir(self) -> str:
            return str(launch.logs)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            ranks = {local: int(variables["RANK"]) for local, variables in envs.items()}
            for local, rank in ranks.items():
                envs[local]["TORCHELASTIC_ERROR_FILE"] = str(launch.log(rank, "error.json"))
            return LogsDest(
                stdouts={local: str(launch.log(rank, "out")) for local, rank in ranks.items()},
                stderrs={local: str(launch.log(rank, "err")) for local, rank in ranks.items()},
                error_files={local: str(launch.log(rank, "error.json")) for local, rank in ranks.items()},
            )

    return RankLogs(str(launch.logs), Std.ALL)


# -- an agent in a process of its own -----------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """The exit code: 0 whenever the starter can read how it ended."""
    parser = argparse.ArgumentParser(prog="python -m mgm_exp.train.agent")
    parser.add_argument("folder", type=Path, help="launch folder; with --wait the board that work is posted on")
    parser.add_argument(
        "machine", type=int, nargs="?", help="number of this machine (in a Slurm step or a Volcano job: its own)"
    )
    parser.add_argument("--wait", action="store_true", help="wait for work until the experiment is over")
    parser.add_argument("--parent", type=int, help="process id of the parent that this agent ends with")
    parser.add_argument("--stdin", action="store_true", help="end when stdin is closed: a remote shell was lost")
    options = parser.parse_args(arguments)
    if options.parent is not None:
        die_with_parent(parent_pid=options.parent)
    if options.stdin:
        threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
    machine = _own_number() if options.machine is None else options.machine
    if options.wait:
        from mgm_exp.train.board import wait_for_work

        return wait_for_work(options.folder, machine)
    launch = LaunchFolder(options.folder)
    facts = LaunchFacts.read(launch.facts)
    os.environ.update(facts.environment)
    os.environ[AGENT] = str(os.getpid())
    threading.Thread(target=_end_with_starter, args=(launch, facts), name="starter-watch", daemon=True).start()
    for number in STOP_SIGNALS:  # the processes get them, too, and save; what is to end is for the starter to say
        signal.signal(number, lambda *_: None)
    agent = threading.Thread(target=run_processes, args=(launch, facts, machine), name="elastic-agent")
    agent.start()
    agent.join()
    return 0


def _own_number() -> int:
    """Of this machine, in a Slurm step or among the pods of a Volcano job (where the first one runs the experiment)."""
    if "SLURM_NODEID" in os.environ:
        return int(os.environ["SLURM_NODEID"])
    return int(os.environ["VC_TASK_INDEX"]) + 1


def _end_with_stdin() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    _end_now("the shell that started it was closed")


def _end_with_starter(launch: LaunchFolder, facts: LaunchFacts) -> None:
    """Ends this process when it is asked to, or when the starter's number stands still."""
    watch = AliveWatch(launch.alive, facts.run_id)
    while not launch.abort.exists():
        if watch.silent_s() > LOST_S:
            _end_now(f"the command that started it was not heard of for {LOST_S:g} s")
        time.sleep(POLL_S * 5)
    _end_now("it was asked to")


class AliveWatch:
    """How long a number in a file, which somebody else keeps adding to, has stood still; no clocks are compared.

    Args:
        path: The file, ``<name> <number>``.
        name: Whose number counts.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name, self._text, self._since = path, name, "", time.monotonic()

    def silent_s(self) -> float:
        """Seconds since the number was last seen to change."""
        with contextlib.suppress(OSError):
            text = self._path.read_text(encoding="ascii")
            if text != self._text and text.split(" ")[0] == self._name:
                self._text, self._since = text, time.monotonic()
        return time.monotonic() - self._since


def _end_now(why: str) -> None:
    """The kernel ends the processes with their agent (``die_with_parent``)."""
    sys.stderr.write(f"agent {os.getpid()} ends: {why}\n")
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    ended = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)
