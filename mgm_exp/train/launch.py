"""Runs a stage: in this process, or in several that this one starts, follows and cleans up after.

Worker processes come from torch's elastic launcher (``python -m mgm_exp.train.worker``). They die with this process,
hold its lease, write what they print to files, and tell what happens through one file that this process follows. When
one of them dies the others are stopped at once, and the first error is the one that is shown.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import mgm_exp
from mgm_exp import errors
from mgm_exp.config import Device, ExperimentConfig, Precision
from mgm_exp.errors import Interrupted, MgmError, MissingDependencyError, ProcessKilled, Pruned, TrainingFailed
from mgm_exp.store import lease_of, write_atomic
from mgm_exp.train.job import StageSummary, TrainJob
from mgm_exp.train.listener import Listener
from mgm_exp.train.metrics_file import read_rows
from mgm_exp.train.stop import StopRequest

# How long the others may take to end by themselves once one process has failed.
SHUTDOWN_S = 5
POLL_S = 0.1
# What a parent answers to a validation point.
GO_ON, STOP = "go on", "stop"


def run_stage(
    job: TrainJob,
    *,
    on_start: Callable[[int, list[dict[str, Any]]], None] | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    say: Callable[[str], None] | None = None,
    on_validation: Callable[[int, float], bool] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> StageSummary:
    """Trains one stage to its end, continuing from what is in ``job.work``.

    Args:
        job: The stage.
        on_start: ``(total steps, rows that a checkpoint had already)`` before the first step.
        on_row: Each line of ``metrics.jsonl`` (optimizer steps, and events).
        on_checkpoint: The folder of each finished checkpoint.
        say: One line for the reader.
        on_validation: ``(step, score)`` of each validation point; True stops the stage there, its state saved.
        should_stop: Asked once a step; True saves the state and raises Interrupted.

    Returns:
        The summary, which also stands in ``out/summary.json``.

    Raises:
        Interrupted: A signal or ``should_stop``; the state is saved, the same call continues.
        Pruned: ``on_validation`` said so; the state is saved.
        TrainingFailed: It cannot go on; says which process failed first, and why.
        UserError: The model, the data or the machine cannot do what the configuration asks for.
    """
    given = {
        "on_start": on_start,
        "on_row": on_row,
        "on_checkpoint": on_checkpoint,
        "say": say,
        "on_validation": on_validation,
    }
    listener = Listener(**{name: call for name, call in given.items() if call is not None})  # type: ignore[arg-type]
    config = job.experiment()
    check_machine(config)
    stop = StopRequest(should_stop)
    with stop.listening():
        if config.devices == 1 and config.zero.stage == 0:
            summary = _in_this_process(job, config, listener, stop)
        else:
            summary = _in_processes(job, config, listener, stop)
    if stop.reason is not None:  # it came during the last step: the stage is complete, but nobody else has heard of it
        raise Interrupted(
            f"The {job.stage} stage was stopped by {stop.reason} after its last step; its state is saved.",
            advice="The same command continues from there.",
        )
    return summary


def check_machine(config: ExperimentConfig) -> None:
    """Fails before anything is loaded where a package or a device is missing.

    Raises:
        MissingDependencyError: DeepSpeed for ``zero=2|3``, a GPU for each process, a GPU for fp16.
    """
    if config.zero.stage:
        from mgm_exp.train.deepspeed_engine import check_deepspeed

        check_deepspeed(config.zero.stage)
    if config.device is Device.cpu:
        return
    from mgm_exp.train.ranks import compute_device

    if compute_device(config.device, 0).type == "cuda":
        compute_device(Device.cuda, config.devices - 1)
    elif config.train.precision is Precision.fp16:
        raise MissingDependencyError(
            "train.precision=fp16 needs a GPU, and torch sees none here.", advice="Use train.precision=bf16 or fp32."
        )


def _in_this_process(job: TrainJob, config: ExperimentConfig, listener: Listener, stop: StopRequest) -> StageSummary:
    from mgm_exp.train.loop import train_stage
    from mgm_exp.train.ranks import Ranks

    return train_stage(job, Ranks.alone(config.device), listener, stop)


# -- several processes --------------------------------------------------------------------------------------------


class LaunchFolder:
    """The files through which a parent and its workers talk; made anew for each launch.

    ``job.json``, ``launch.json`` (from the parent), ``pid-<rank>`` (of each process), ``events.jsonl`` (of the first
    one), ``answer-<step>`` (to its validation points: go on, or stop), ``outcome-<rank>.json`` (how a process ended),
    ``stop`` (asks all to stop), ``logs/`` (what each one printed).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job = folder / "job.json"
        self.facts = folder / "launch.json"
        self.events = folder / "events.jsonl"
        self.stop = folder / "stop"
        self.logs = folder / "logs"

    def pid(self, rank: int) -> Path:
        return self.folder / f"pid-{rank}"

    def outcome(self, rank: int) -> Path:
        return self.folder / f"outcome-{rank}.json"

    def answer(self, step: int) -> Path:
        return self.folder / f"answer-{step}"

    def renew(self, job: TrainJob) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.job.write_text(job.to_json(), encoding="utf-8")
        facts = {"parent": os.getpid(), "lease": str(lease) if (lease := _lease(job)) else None}
        self.facts.write_text(json.dumps(facts), encoding="utf-8")
        self.events.touch()


def _lease(job: TrainJob) -> Path | None:
    """The lease that guards the work folder, if it is one of the store's."""
    try:
        lease = lease_of(job.work)
    except ValueError:
        return None
    return lease if lease.is_dir() else None


def _in_processes(job: TrainJob, config: ExperimentConfig, listener: Listener, stop: StopRequest) -> StageSummary:
    launch = LaunchFolder(job.work / "launch")
    launch.renew(job)
    listener.say(f"{job.stage}: {config.devices} process(es), {'DeepSpeed' if config.zero.stage else 'PyTorch'}")
    agent = threading.Thread(target=_run_agent, args=(launch, config), name="elastic-agent", daemon=True)
    with _environment(worker_environment(config)):
        agent.start()
        try:
            with open(launch.events, encoding="utf-8") as events:
                follower = Follower(events, job, listener, launch)
                while agent.is_alive():
                    follower.follow()
                    _pass_on(stop, launch)
                    agent.join(POLL_S)
                follower.follow()
        except BaseException:  # a callback failed, or ended the run: the workers save and end before it goes on
            write_atomic(launch.stop, "its parent")
            agent.join()
            raise
    return _outcome(job, launch, config.devices, listener)


def _pass_on(stop: StopRequest, launch: LaunchFolder) -> None:
    if stop.is_requested() and not launch.stop.exists():
        write_atomic(launch.stop, stop.reason or "a request")


def _run_agent(launch: LaunchFolder, config: ExperimentConfig) -> None:
    """Starts the workers and waits for them; how they ended is told by their files, or by ``agent.json``."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what it has to say is said below, in our words
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.devices,
        run_id="stage",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="spawn",
        monitor_interval=POLL_S,
        shutdown_timeout=SHUTDOWN_S,
        logs_specs=DefaultLogsSpecs(log_dir=str(launch.logs), redirects=Std.ALL),
    )
    failed: dict[str, Any] = {}
    try:
        elastic_launch(settings, sys.executable)("-m", "mgm_exp.train.worker", str(launch.folder))
    except ChildFailedError as error:
        failed = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
    except Exception as error:  # noqa: BLE001 - the launcher itself failed: the parent's main thread raises it
        failed = {"launcher": f"{type(error).__name__}: {error}"}
    (launch.folder / "agent.json").write_text(json.dumps(failed), encoding="utf-8")


def worker_environment(config: ExperimentConfig) -> dict[str, str]:
    """What the workers need in their environment before they import torch."""
    from mgm_exp.train.ranks import compute_device

    package_root = str(Path(mgm_exp.__file__).resolve().parent.parent)
    path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    device = compute_device(config.device, 0).type
    variables = {
        "PYTHONPATH": os.pathsep.join(path),
        "DS_ACCELERATOR": device,
        "OMP_NUM_THREADS": str(threads_each(config.devices)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu" and sys.platform.startswith("linux"):  # else gloo looks the host's name up, which may be slow
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return variables


def threads_each(processes: int) -> int:
    """CPU threads of one process: the cores this one may use (or OMP_NUM_THREADS), shared out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    total = min(cores, int(asked)) if asked.isdigit() and int(asked) else cores
    return max(1, total // processes)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for the children that are started inside; the launcher has no other way."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Follower:
    """Reads what the first worker writes to ``events.jsonl`` and tells it to the listener."""

    def __init__(self, events: TextIO, job: TrainJob, listener: Listener, launch: LaunchFolder) -> None:
        self._file, self._launch = events, launch
        self._job, self._listener, self._torn = job, listener, ""

    def follow(self) -> None:
        """Tells everything that was written since the last call."""
        while line := self._file.readline():
            self._torn += line
            if not self._torn.endswith("\n"):
                return
            line, self._torn = self._torn, ""
            self._tell(**json.loads(line))

    def _tell(self, kind: str, value: Any) -> None:
        if kind == "start":
            self._listener.on_start(value["total"], read_rows(self._job.metrics)[: value["rows"]])
        elif kind == "row":
            self._listener.on_row(value)
        elif kind == "checkpoint":
            if Path(value).is_dir():  # else pruned meanwhile
                self._listener.on_checkpoint(Path(value))
        elif kind == "validation":
            stop = self._listener.on_validation(value["step"], value["value"])
            write_atomic(self._launch.answer(value["step"]), STOP if stop else GO_ON)
        else:
            self._listener.say(value)


def _outcome(job: TrainJob, launch: LaunchFolder, devices: int, listener: Listener) -> StageSummary:
    """The summary, or the error that happened first."""
    outcomes = {rank: _read_outcome(launch.outcome(rank)) for rank in range(devices)}
    agent = json.loads((launch.folder / "agent.json").read_text(encoding="utf-8"))
    if not agent and outcomes[0] and outcomes[0]["kind"] == "done":
        return StageSummary(**outcomes[0]["summary"])
    if not agent and outcomes[0] and outcomes[0]["kind"] == "interrupted":
        raise Interrupted(outcomes[0]["message"], advice=outcomes[0]["advice"])
    if not agent and outcomes[0] and outcomes[0]["kind"] == "pruned":
        raise Pruned(outcomes[0]["message"])
    if "launcher" in agent:
        raise TrainingFailed(
            f"The {job.stage} stage's processes could not be started: {agent['launcher']}.",
            advice=f"Their logs are in {launch.logs}.",
        )
    for rank, outcome in outcomes.items():
        if outcome and outcome["kind"] == "error":
            listener.say(f"process {rank} of {devices}: {outcome['traceback']}")
    raise _first_failure(job, launch, outcomes, agent, devices)


def _first_failure(
    job: TrainJob, launch: LaunchFolder, outcomes: dict[int, Any], exit_codes: dict[str, int], devices: int
) -> MgmError:
    """Which process failed first: one that was killed (it could not say so itself), else the earliest error."""
    killed = {
        int(rank): -code
        for rank, code in exit_codes.items()
        if code < 0 and -code != signal.SIGTERM and not (outcomes[int(rank)] and outcomes[int(rank)]["kind"] == "error")
    }
    if killed:
        rank, number = min(killed.items())
        name = signal.Signals(number).name
        hint = (
            " SIGKILL usually comes from the kernel when memory ends (see dmesg): use a smaller "
            "train.micro_batch_size, model.gradient_checkpointing=true or zero=3."
            if number == signal.SIGKILL
            else ""
        )
        return ProcessKilled(
            f"Process {rank} of {devices} of the {job.stage} stage was killed by {name}; the others were stopped.",
            advice=f"The same command continues from the last checkpoint.{hint}",
        )
    errors_by_time = sorted(
        (outcome["time"], rank, outcome)
        for rank, outcome in outcomes.items()
        if outcome is not None and outcome["kind"] == "error"
    )
    if errors_by_time:
        _, rank, first = errors_by_time[0]
        return _rebuilt(first, f"process {rank} of {devices}", launch)
    codes = (
        ", ".join(f"process {rank}: exit code {code}" for rank, code in sorted(exit_codes.items())) or "no exit code"
    )
    tail = _log_tail(launch.logs)
    return TrainingFailed(
        f"The {job.stage} stage's processes ended without a result ({codes}){': ' + tail if tail else ''}.",
        advice=f"Their logs are in {launch.logs}.",
    )


def _rebuilt(outcome: dict[str, Any], where: str, launch: LaunchFolder) -> MgmError:
    """The worker's error as one of ours: the same class where it was one of ours."""
    kind = getattr(errors, outcome["type"], None)
    if isinstance(kind, type) and issubclass(kind, MgmError):
        return kind(f"{outcome['message']} ({where})", advice=outcome["advice"])
    return TrainingFailed(
        f"{outcome['type']} in {where}: {outcome['message']}",
        advice=f"The traceback is in log.txt, what each process printed in {launch.logs}.",
    )


def _read_outcome(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def _log_tail(logs: Path) -> str:
    """The last lines on stderr of any process that wrote some."""
    for path in sorted(logs.rglob("stderr.log")):
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if lines:
            return " | ".join(lines[-3:])
    return ""
