"""Runs a stage: in this process, or in several that this one starts, follows and cleans up after.

The processes (``python -m mgm_exp.train.worker``) are started by an agent on each machine, through torch's elastic
launcher. They die with it, hold this process's lease, write what they print to files, and tell what happens through
files that this process follows. When one of them dies, hangs or raises, the others are stopped at once and the first
error is the one that is shown; what may go well the next time begins again from the newest checkpoint.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import mgm_exp
from mgm_exp.config import Device, ExperimentConfig, Precision
from mgm_exp.errors import Interrupted, MissingDependencyError, OutOfMemory
from mgm_exp.store import usable_cores, write_atomic
from mgm_exp.train.agent import AGENT, SHUTDOWN_S
from mgm_exp.train.agents import Agents, agents_for
from mgm_exp.train.determinism import environment
from mgm_exp.train.failures import failure_of, result_of
from mgm_exp.train.job import StageSummary, TrainJob, stage_settings
from mgm_exp.train.launch_folder import GO_ON, POLL_S, STOP, LaunchFacts, LaunchFolder, guard_of
from mgm_exp.train.listener import Listener
from mgm_exp.train.machines import Cluster, cluster_of
from mgm_exp.train.metrics_file import read_rows
from mgm_exp.train.micro_batch import settled, shrunk
from mgm_exp.train.pulse import Hang, PulseWatch, beat_s
from mgm_exp.train.stop import StopRequest

# Variables that reach processes on other machines, beside what this module sets: none of them holds a secret.
_PASSED_ON = (
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "UCX_",
    "FI_",
    "OMP_WAIT_POLICY",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "LD_LIBRARY_PATH",
)


def run_stage(
    job: TrainJob,
    *,
    on_start: Callable[[int, list[dict[str, Any]]], None] | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    say: Callable[[str], None] | None = None,
    on_validation: Callable[[int, float], bool] | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
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
        on_progress: ``(what, images done, images in all)`` while features are made.

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
        "on_progress": on_progress,
    }
    listener = Listener(**{name: call for name, call in given.items() if call is not None})  # type: ignore[arg-type]
    config = job.experiment()
    check_machine(config)
    stop = StopRequest(should_stop)
    job = settled(job)
    with stop.listening():
        while True:
            try:
                summary = _train(job, job.experiment(), listener, stop)
                break
            except OutOfMemory as error:
                smaller = shrunk(job, error.message)
                if smaller is None or stop.is_requested():
                    raise
                job = smaller
                size = stage_settings(job.experiment(), job.stage).micro_batch_size
                listener.say(
                    f"{job.stage}: {error.message} It goes on with micro-batches of {size} (train.auto_micro_batch) "
                    "and more of them in a step: the global batch stays as it is."
                )
    if stop.reason is not None:
        raise stopped_after_the_end(job, stop.reason)
    return summary


def stopped_after_the_end(job: TrainJob, reason: str) -> Interrupted:
    """A stop that came during the last step: the stage is complete, but nobody else has heard of it."""
    return Interrupted(
        f"The {job.stage} stage was stopped by {reason} after its last step; its state is saved.",
        advice="The same command continues from there.",
    )


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
        compute_device(Device.cuda, cluster_of(config).per_machine - 1)
    elif config.train.precision is Precision.fp16:
        raise MissingDependencyError(
            "train.precision=fp16 needs a GPU, and torch sees none here.", advice="Use train.precision=bf16 or fp32."
        )


def _train(job: TrainJob, config: ExperimentConfig, listener: Listener, stop: StopRequest) -> StageSummary:
    if config.devices == 1 and config.zero.stage == 0:
        return _in_this_process(job, config, listener, stop)
    return _in_processes(job, config, listener, stop)


def _in_this_process(job: TrainJob, config: ExperimentConfig, listener: Listener, stop: StopRequest) -> StageSummary:
    from mgm_exp.train.loop import train_stage
    from mgm_exp.train.ranks import Ranks

    return train_stage(job, Ranks.alone(config.device), listener, stop)


# -- several processes --------------------------------------------------------------------------------------------


def _in_processes(job: TrainJob, config: ExperimentConfig, listener: Listener, stop: StopRequest) -> StageSummary:
    from mgm_exp.model.resident import let_go

    let_go()  # the processes that are started now have the GPUs to themselves
    cluster = cluster_of(config)
    engine = "DeepSpeed" if config.zero.stage else "PyTorch"
    where = f" on {', '.join(cluster.names)}" if cluster.size > 1 else ""
    listener.say(f"{job.stage}: {config.devices} process(es){where}, {engine}")
    attempt = 0
    shutil.rmtree(job.work / "launch", ignore_errors=True)
    while True:
        launch = LaunchFolder.attempt(job.work, attempt)
        facts = _facts(job, config, cluster)
        launch.begin(job, facts)
        with _environment({**facts.environment, AGENT: str(os.getpid())}):
            agents = agents_for(cluster, config.launch.remote_shell, launch, facts)
            hang, lost = _run(agents, job, listener, stop)
        summary = result_of(job.stage, launch, facts)
        if summary is not None:
            return summary
        failure = failure_of(job.stage, launch, facts, hang, lost)
        for who, traceback in failure.tracebacks:
            listener.say(f"{who}: {traceback}")
        if not failure.may_restart or attempt == config.launch.max_restarts:
            raise failure.error
        if stop.is_requested():
            raise Interrupted(
                f"The {job.stage} stage was stopped by {stop.reason}; before that: {failure.error.message}",
                advice="The same command continues from the last checkpoint.",
            ) from failure.error
        attempt += 1
        listener.say(
            f"{job.stage}: {failure.error.message} It begins again from its newest checkpoint (restart {attempt} of "
            f"{config.launch.max_restarts})."
        )


def _facts(job: TrainJob, config: ExperimentConfig, cluster: Cluster) -> LaunchFacts:
    lease, token = guard_of(job)
    return LaunchFacts(
        names=cluster.names,
        per_machine=cluster.per_machine,
        endpoint=(cluster.address, _free_port()) if cluster.size > 1 else None,
        run_id=f"{job.stage}-{secrets.token_hex(4)}",
        timeout_s=config.launch.timeout_s,
        lease=lease,
        token=token,
        environment=worker_environment(config, cluster),
    )


def _free_port() -> int:
    """A port that was free a moment ago; should somebody take it meanwhile, the next start takes another."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _run(agents: Agents, job: TrainJob, listener: Listener, stop: StopRequest) -> tuple[Hang | None, dict[int, str]]:
    """One start of the processes, until all have ended: who hung, and which agents ended without a word."""
    launch, facts = agents.launch, agents.facts
    paths = {rank: launch.pulse(rank) for rank in range(facts.devices)}
    watch = PulseWatch(paths, facts.timeout_s, beat_s(facts.timeout_s))
    hang: Hang | None = None
    agents.start()
    try:
        with open(launch.events, encoding="utf-8") as events:
            follower = Follower(events, job, listener, launch)
            while agents.are_at_work(POLL_S):
                if follower.follow():
                    watch.heard()
                _pass_on(stop, launch)
                hang = watch.hang()
                if hang is not None or agents.any_failed():
                    _end(agents, wait_for_stacks=hang is not None)
                    break
            follower.follow()
        return hang, agents.lost()
    except BaseException:  # a callback failed, or ended the run: the processes save and end before it goes on
        write_atomic(launch.stop, "its parent")
        while agents.are_at_work(POLL_S):
            if watch.hang() is not None or agents.any_failed():
                _end(agents)
                break
        raise
    finally:
        agents.close()


def _end(agents: Agents, wait_for_stacks: bool = False) -> None:
    """Ends what still runs.

    Args:
        wait_for_stacks: Leave the processes the time to write down where they are.
    """
    if wait_for_stacks:
        write_atomic(agents.launch.stacks, "no process makes progress")
        time.sleep(1.5 * beat_s(agents.facts.timeout_s))
    agents.end()
    deadline = time.monotonic() + 4 * SHUTDOWN_S
    while agents.are_at_work(POLL_S) and time.monotonic() < deadline:
        pass


def _pass_on(stop: StopRequest, launch: LaunchFolder) -> None:
    if stop.is_requested() and not launch.stop.exists():
        write_atomic(launch.stop, stop.reason or "a request")


def worker_environment(config: ExperimentConfig, cluster: Cluster) -> dict[str, str]:
    """What the processes need in their environment before they import torch, on every machine."""
    from mgm_exp.train.ranks import compute_device

    package_root = str(Path(mgm_exp.__file__).resolve().parent.parent)
    path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    device = compute_device(config.device, 0).type
    passed_on = {}
    if cluster.size > 1:
        passed_on = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    variables = {
        **passed_on,
        "PYTHONPATH": os.pathsep.join(path),
        "DS_ACCELERATOR": device,
        "OMP_NUM_THREADS": str(threads_each(cluster.per_machine)),
        "TOKENIZERS_PARALLELISM": "false",
        **environment(config.train.deterministic),
    }
    # Else gloo looks the host's name up, which may be slow, and on several machines takes the network it finds first.
    if device == "cpu" and sys.platform.startswith("linux") and cluster.is_loopback:
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return variables


def threads_each(processes: int) -> int:
    """CPU threads of one process: the cores this one may use (or OMP_NUM_THREADS), shared out."""
    cores = usable_cores()
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

    def follow(self) -> bool:
        """Tells everything that was written since the last call; whether there was something."""
        found = False
        while line := self._file.readline():
            self._torn += line
            if not self._torn.endswith("\n"):
                break
            line, self._torn = self._torn, ""
            self._tell(**json.loads(line))
            found = True
        return found

    def _tell(self, kind: str, value: Any) -> None:
        if kind == "start":
            self._listener.on_start(value["total"], read_rows(self._job.metrics)[: value["rows"]])
        elif kind == "row":
            self._listener.on_row(value)
        elif kind == "checkpoint":
            if Path(value).is_dir():  # else pruned meanwhile
                self._listener.on_checkpoint(Path(value))
        elif kind == "progress":
            self._listener.on_progress(*value)
        elif kind == "validation":
            stop = self._listener.on_validation(value["step"], value["value"])
            write_atomic(self._launch.answer(value["step"]), STOP if stop else GO_ON)
        else:
            self._listener.say(value)
