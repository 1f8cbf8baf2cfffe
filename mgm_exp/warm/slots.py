"""The sweep's side: workers that stay, one for each slot, and what becomes of a run whose worker ends under it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.bootstrap import WARM
from mgm_exp.config import Device
from mgm_exp.gpus import visible_gpus
from mgm_exp.local import checked_settings, places_of
from mgm_exp.memory_use import tree_gib
from mgm_exp.search.outcome import Ending, oom_kills
from mgm_exp.slots import (
    ONE_MACHINE,
    OUTPUT,
    ChildProcesses,
    Slots,
    Work,
    environment_of,
    goes_first,
    last_words,
    over_limit,
    refuse_leaving,
    run_arguments_of,
)
from mgm_exp.warm.protocol import Answer, Channel, Order, Rest, Run
from mgm_exp.warm.relay import Wire
from mgm_exp.warm.settings import WarmConfig

if TYPE_CHECKING:
    from mgm_exp.config import ExperimentConfig

# Seconds in which a worker that was told to go has gone.
_GOING_S = 10.0
# Memory is looked at so often.
_LOOK_S = 0.5


def settings_of(launcher: Mapping[str, Any]) -> WarmConfig:
    """The checked settings of a composed ``hydra.launcher`` node.

    Raises:
        ConfigError: What was given, what is allowed.
    """
    return checked_settings(WarmConfig, launcher, "docs/launchers.md")


def warm_slots(settings: WarmConfig, config: ExperimentConfig, program: Sequence[str]) -> Slots:
    """The slots of a sweep; with ``sweep.isolate=true`` each trial still has a process of its own.

    Raises:
        ConfigError: as :func:`mgm_exp.local.places_of`.
    """
    refuse_leaving(config)
    if settings.slots is None and config.sweep.slots is None and _takes_machines(config):
        places: list[list[str]] = [[]]  # one trial at a time, which finds its GPUs itself
    else:
        places = places_of(settings, config)
    if config.sweep.isolate:
        return ChildProcesses(places, program, settings.mem_gb)
    return WarmSlots(places, program, settings.mem_gb, settings.max_growth_gb)


def _takes_machines(config: ExperimentConfig) -> bool:
    """Whether a trial needs more than this machine: hosts are given, or more GPUs than there are here."""
    if config.launch.hostfile:
        return True
    gpus = [] if config.device is Device.cpu else visible_gpus()
    return 0 < len(gpus) < config.devices


class WarmSlots(Slots):
    """Several slots on this machine, a worker for each: a trial that crashes costs its worker, and no other trial.

    Args:
        places: The GPUs of each slot, as CUDA_VISIBLE_DEVICES names them; an empty list where there are none.
        program: The command line that runs one experiment, without its overrides.
        mem_gb: GiB of host memory that a run may use; None: no limit.
        max_growth_gb: GiB that a worker may hold after a run beyond what it began with and keeps; None: no limit.
        say: Takes a sentence for the user.
    """

    def __init__(
        self,
        places: Sequence[Sequence[str]],
        program: Sequence[str],
        mem_gb: float | None = None,
        max_growth_gb: float | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.size, self._places, self._program = len(places), places, list(program)
        self._mem_gb, self._max_growth_gb, self._say = mem_gb, max_growth_gb, say or _say
        self._workers: dict[int, Worker] = {}
        self._looked_s = 0.0

    @property
    def busy(self) -> int:
        return sum(bool(worker.works) for worker in self._workers.values())

    @property
    def pids(self) -> list[int]:
        """Of the workers that are there."""
        return [worker.process.pid for worker in self._workers.values()]

    def start(self, work: Work) -> None:
        self.start_all([work])

    def start_all(self, works: Sequence[Work]) -> None:
        """Hands one worker several runs; a slot must be free. They are reported when the last of them has ended."""
        slot = next(n for n in range(self.size) if n not in self._workers or not self._workers[n].works)
        for work in works:
            work.run_dir.mkdir(parents=True, exist_ok=True)
        extra = [ONE_MACHINE] if self.size > 1 else []
        worker = self._workers.get(slot)
        if worker is not None and worker.take(works, extra, self._max_growth_gb):
            return
        if worker is not None:  # it was ended from outside while it waited
            worker.end()
        environment = environment_of(self._places[slot], self.size)
        worker = Worker(self._program, environment, works[0].run_dir / OUTPUT, is_shown=self.size == 1)
        self._workers[slot] = worker
        worker.take(works, extra, self._max_growth_gb)

    def ended(self, timeout_s: float) -> list[tuple[Work, Ending]]:
        deadline = time.monotonic() + timeout_s
        while True:
            found = self._collect()
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            if not self.busy:
                time.sleep(left)
                return []
            self._end_those_above_the_limit()
            listening = [end for worker in self._workers.values() for end in worker.ends]
            select.select(listening, [], [], min(left, _LOOK_S))

    def stop(self) -> list[tuple[Work, Ending]]:
        for worker in self._workers.values():
            if worker.works:
                worker.signal(signal.SIGTERM)
        found = []
        while self.busy:
            found += self.ended(1.0)
        self.close()
        return found

    def close(self) -> None:
        for worker in self._workers.values():
            worker.end()
        self._workers.clear()

    def _collect(self) -> list[tuple[Work, Ending]]:
        found = []
        for slot, worker in list(self._workers.items()):
            if not worker.works:
                continue
            ended = worker.collect(self._mem_gb)
            found += ended
            if worker.is_gone:
                worker.end()
                del self._workers[slot]
            elif ended:
                self._replace_if_grown(slot, worker)
        return found

    def _replace_if_grown(self, slot: int, worker: Worker) -> None:
        for sentence in worker.rest.says:
            self._say(sentence)
        where, grown = worker.growth()
        if self._max_growth_gb is None or grown <= self._max_growth_gb:
            return
        self._say(
            f"the worker holds {grown:.2f} GiB of {where} more than it began with (hydra.launcher.max_growth_gb="
            f"{self._max_growth_gb:g}); a new one takes its place"
        )
        worker.end()
        del self._workers[slot]

    def _end_those_above_the_limit(self) -> None:
        now = time.monotonic()
        if self._mem_gb is None or now - self._looked_s < _LOOK_S:
            return
        self._looked_s = now
        for worker in self._workers.values():
            if worker.works and worker.over_gib is None:
                used = tree_gib(worker.process.pid)
                if used > self._mem_gb:
                    worker.over_gib = used
                    worker.signal(signal.SIGKILL)  # what it started ends with it


class Worker:
    """One worker process, seen from the sweep.

    Args:
        program: Its command line.
        environment: What its environment says besides ours.
        output: File for what it prints before its first run.
        is_shown: Whether what it prints is shown, too.
    """

    def __init__(self, program: Sequence[str], environment: Mapping[str, str], output: Path, *, is_shown: bool) -> None:
        ours, theirs = socket.socketpair()
        self.works: list[Work] = []
        self.codes: dict[int, int] = {}
        self.is_gone = False
        self.over_gib: float | None = None
        self.began = self.rest = Rest(0.0, 0.0, is_first=True)
        self._wires = [Wire("stdout"), Wire("stderr")] if is_shown else []
        self._kills: int | None = None
        with open(output, "ab") as file, theirs:
            streams: tuple[Any, Any] = tuple(wire.theirs for wire in self._wires) or (file, file)  # type: ignore[assignment]
            # From the main thread: the kernel watches the thread that made a child. A session of its own: Ctrl-C comes
            # to the sweep, which asks its workers to stop, once.
            self.process = subprocess.Popen(
                program,
                stdin=subprocess.DEVNULL,
                stdout=streams[0],
                stderr=streams[1],
                env={**os.environ, **environment, WARM: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        goes_first(self.process.pid)
        for wire in self._wires:
            wire.hand_over()
        ours.setblocking(False)
        self._channel = Channel(ours)

    @property
    def ends(self) -> list[Any]:
        """What to listen to."""
        return [self._channel, *self._wires] if self.works else []

    def take(self, works: Sequence[Work], extra: Sequence[str], may_grow_gib: float | None = None) -> bool:
        """Hands it runs, after which it may hold so much more than at first; False if it is not there any more."""
        if self.process.poll() is not None:
            return False
        for wire in self._wires:
            wire.fit()
            wire.write_to(works[0].run_dir / OUTPUT)
        runs = tuple(
            Run(
                work.number,
                None if self._wires else str((work.run_dir / OUTPUT).resolve()),
                (*run_arguments_of(work), *extra),
            )
            for work in works
        )
        self.works, self.codes, self.over_gib, self._kills = list(works), {}, None, oom_kills()
        with contextlib.suppress(OSError):  # it has just ended: see collect
            self._channel.send(Order(runs, may_grow_gib))
        return True

    def collect(self, mem_gb: float | None) -> list[tuple[Work, Ending]]:
        """Its runs, where all have ended or it has."""
        try:
            for said in self._channel.receive():
                if isinstance(said, Answer):
                    self.codes[said.number] = said.exit_code
                elif isinstance(said, Rest):
                    self.rest = said
                    if said.is_first:
                        self.began = said
                    else:
                        self._pump()
                        return self._endings(0, mem_gb)
        except EOFError:
            self.is_gone = True
            code = self._wait()
            self._pump()
            return self._endings(code, mem_gb)
        self._pump()
        return []

    def growth(self) -> tuple[str, float]:
        """Which memory has grown most since it began, and by how many GiB."""
        grown = {
            "host memory": self.rest.host_gib - self.began.host_gib,
            "GPU memory": self.rest.gpu_gib - self.began.gpu_gib,
        }
        where = max(grown, key=lambda name: grown[name])
        return where, grown[where]

    def signal(self, number: int) -> None:
        """Sends it a signal, if it is there."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self) -> None:
        """It ends, and is waited for."""
        self._channel.close()
        self._wait()
        for wire in self._wires:
            wire.close()
        self._wires = []

    def _endings(self, code: int, mem_gb: float | None) -> list[tuple[Work, Ending]]:
        works, self.works = self.works, []
        kills = oom_kills()
        memory = kills is not None and self._kills is not None and kills > self._kills
        found = []
        for work in works:
            own = self.codes.get(work.number, code)
            if self.over_gib is not None and own != 0:
                found.append((work, Ending(own, over_limit=over_limit(self.over_gib, mem_gb))))
            else:
                found.append((work, Ending(own, memory, last_words(work.run_dir / OUTPUT))))
        return found

    def _pump(self) -> None:
        for wire in self._wires:
            wire.pump()

    def _wait(self) -> int:
        """Its exit code; one that does not end is killed."""
        deadline = time.monotonic() + _GOING_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self._pump()  # it may have something to say still
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait()


def _say(sentence: str) -> None:
    print(sentence, flush=True)
