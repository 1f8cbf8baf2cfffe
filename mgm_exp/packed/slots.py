"""Places for trials that train together: as many as make a pack, in one process for each pack.

Trials are gathered until the sweep has none to add, and handed to a process (:mod:`.process`). Should it die, be it for
one of its trials, they go on from their checkpoints in two processes of half as many, one after the other, and so on:
in the end the one that it died of is alone with it, and the others never hear of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mgm_exp.errors import ConfigError
from mgm_exp.packed.settings import USUAL_TRIALS, PackedConfig
from mgm_exp.search.outcome import Ending, oom_kills
from mgm_exp.slots import ONE_MACHINE, Slots, Work, environment_of, goes_first, last_words, run_arguments_of

if TYPE_CHECKING:
    from mgm_exp.config import ExperimentConfig

# What the process of a pack prints about all its trials, in the folder of the first one; lines that begin so are also
# for the user.
OUTPUT, ABOUT = "pack.txt", "pack:"
_OWN_PROGRAM = [sys.executable, "-m", "mgm_exp"]
_PROCESS = (sys.executable, "-m", "mgm_exp.packed.process")


@dataclass
class _Pack:
    """A process and the runs that it still has."""

    process: subprocess.Popen[bytes]
    works: dict[int, Work]
    size: int
    answers: IO[bytes]
    output: Path
    kills_before: int | None
    torn: bytes = b""
    told: int = 0  # bytes of its output

    def tell(self) -> None:
        """Prints what it says of the pack: who trains alone and why, how many share a pass."""
        with open(self.output, "rb") as file:
            file.seek(self.told)
            *lines, rest = file.read().split(b"\n")
            self.told = file.tell() - len(rest)
        for line in lines:
            if line.startswith(ABOUT.encode()):
                print(line.decode(errors="replace"), flush=True)


@dataclass
class _Queue:
    """Runs that wait for a process, in the order they came; those of a process that died in groups of their own."""

    new: list[Work] = field(default_factory=list)
    again: list[list[Work]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.new) + sum(map(len, self.again))

    def next(self, most: int) -> list[Work]:
        if self.again:
            return self.again.pop(0)
        taken, self.new = self.new[:most], self.new[most:]
        return taken


class PackedSlots(Slots):
    """See the module.

    Args:
        places: The GPUs of each pack, as CUDA_VISIBLE_DEVICES names them; an empty list where there are none.
        program: The command line that runs one experiment of this package.
        trials: Of one pack.
        process: The command line of a pack's process.
    """

    def __init__(
        self,
        places: Sequence[Sequence[str]],
        program: Sequence[str],
        trials: int,
        process: Sequence[str] = _PROCESS,
    ) -> None:
        if list(program[:3]) != _OWN_PROGRAM:
            raise ConfigError("hydra/launcher=packed runs experiments of this package only.")
        self._config_dir = list(program[4:5]) if list(program[3:4]) == ["--config-dir"] else []
        self.size, self._trials, self._places = trials * len(places), trials, places
        self._process = list(process)
        self._waiting = _Queue()
        self._packs: dict[int, _Pack] = {}  # by place
        self._is_stopping = False

    @property
    def busy(self) -> int:
        return len(self._waiting) + sum(len(pack.works) for pack in self._packs.values())

    def has_begun(self, number: int) -> bool:
        return any(number in pack.works for pack in self._packs.values())

    def start(self, work: Work) -> None:
        self._waiting.new.append(work)

    def ended(self, timeout_s: float) -> list[tuple[Work, Ending]]:
        self._fill()
        self._wait(timeout_s)
        found: list[tuple[Work, Ending]] = []
        for place, pack in list(self._packs.items()):
            code = pack.process.poll()
            found += _heard(pack)  # after the look: nothing that it said before it ended is missed
            pack.tell()
            if code is None:
                continue
            del self._packs[place]
            pack.answers.close()
            found += self._died(pack, code)
        return found

    def stop(self) -> list[tuple[Work, Ending]]:
        self._is_stopping = True
        waiting = [*self._waiting.new, *(work for group in self._waiting.again for work in group)]
        self._waiting = _Queue()
        for pack in self._packs.values():
            if pack.process.poll() is None:
                pack.process.send_signal(signal.SIGTERM)
        found = [(work, Ending(130)) for work in waiting]
        while self._packs:
            found += self.ended(1.0)
        return found

    def _fill(self) -> None:
        """Hands runs to places without a process; new ones in equal parts."""
        free = [place for place in range(len(self._places)) if place not in self._packs]
        for position, place in enumerate(free):
            share = -(-len(self._waiting.new) // (len(free) - position))
            works = self._waiting.next(min(self._trials, share))
            if works:
                self._packs[place] = self._begun(place, works)

    def _begun(self, place: int, works: list[Work]) -> _Pack:
        for work in works:
            work.run_dir.mkdir(parents=True, exist_ok=True)
        read_end, write_end = os.pipe()
        output = works[0].run_dir / OUTPUT
        with open(output, "ab") as file:
            told = file.seek(0, os.SEEK_END)
            # As in ChildProcesses: from the main thread, in a session of its own
            process = subprocess.Popen(
                [*self._process, str(write_end), *self._config_dir],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment_of(self._places[place], len(self._places))},
                start_new_session=True,
                pass_fds=(write_end,),
            )
        goes_first(process.pid)
        os.close(write_end)
        orders = [
            {"number": work.number, "run_dir": str(work.run_dir), "arguments": self._arguments(work)} for work in works
        ]
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it died at once: seen when it is waited for
            process.stdin.write(json.dumps(orders).encode())
        os.set_blocking(read_end, False)
        answers = os.fdopen(read_end, "rb", buffering=0)
        by_number = {work.number: work for work in works}
        return _Pack(process, by_number, len(works), answers, output, oom_kills(), told=told)

    def _arguments(self, work: Work) -> list[str]:
        here = [ONE_MACHINE] if len(self._places) > 1 else []
        return [*run_arguments_of(work), "launch.pack=true", *here]

    def _wait(self, timeout_s: float) -> None:
        """Until something is heard of a pack, or ``timeout_s`` has passed."""
        ends = [pack.answers for pack in self._packs.values()]
        if ends:
            select.select(ends, [], [], max(timeout_s, 0))
            for pack in self._packs.values():  # its end of the pipe closes a moment before it is gone
                if not pack.works:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        pack.process.wait(timeout=max(timeout_s, 0))
        elif timeout_s > 0:
            time.sleep(min(timeout_s, 0.05))

    def _died(self, pack: _Pack, code: int) -> list[tuple[Work, Ending]]:
        """What becomes of the runs that a process left behind."""
        left = list(pack.works.values())
        if not left:
            return []
        if self._is_stopping:  # it was asked to end; while it starts it cannot say that it heard
            return [(work, Ending(130)) for work in left]
        if len(left) > 1 and code != 130:
            half = (len(left) + 1) // 2
            self._waiting.again += [left[:half], left[half:]]
            print(
                f"the process of a pack of {pack.size} ended with {code}; its {len(left)} trials go on from their "
                f"checkpoints, {half} at a time",
                flush=True,
            )
            return []
        kills = oom_kills()
        memory = kills is not None and pack.kills_before is not None and kills > pack.kills_before
        return [(work, Ending(code, memory, last_words(pack.output))) for work in left]


def _heard(pack: _Pack) -> list[tuple[Work, Ending]]:
    """Runs whose ends the process has told of."""
    while True:
        try:
            came = os.read(pack.answers.fileno(), 65536)
        except BlockingIOError:
            break
        if not came:
            break
        pack.torn += came
    *lines, pack.torn = pack.torn.split(b"\n")
    found = []
    for line in lines:
        answer = json.loads(line)
        work = pack.works.pop(int(answer["number"]))
        found.append((work, Ending(int(answer["exit_code"]), output=_said(work))))
    return found


def _said(work: Work) -> str:
    from mgm_exp.slots import OUTPUT as OF_RUN

    return last_words(work.run_dir / OF_RUN)


def packed_slots(settings: PackedConfig, config: ExperimentConfig, program: Sequence[str]) -> PackedSlots:
    """The slots of a sweep whose trials train together.

    Raises:
        ConfigError: Two numbers of trials are given, or there are too few GPUs, or runs are to be apart.
    """
    from mgm_exp.config import Device
    from mgm_exp.gpus import dealt, visible_gpus

    if not config.launch.wait:
        raise ConfigError("launch.wait=false needs somebody else who runs the trials: hydra/launcher=slurm.")
    if config.sweep.isolate:
        raise ConfigError(
            "sweep.isolate=true gives each trial a process of its own, and hydra/launcher=packed trains them in one.",
            advice="Take hydra/launcher=local, or leave sweep.isolate away.",
        )
    gpus = [] if config.device is Device.cpu else visible_gpus()
    packs = settings.packs or max(1, len(gpus) // config.devices)
    places = dealt(gpus, packs, config.devices, share=False)
    trials, slots = settings.trials, config.sweep.slots
    if None not in (trials, slots) and slots != (trials or 0) * packs:
        raise ConfigError(
            f"sweep.slots={slots} and hydra.launcher.trials={trials} in {packs} pack(s) say different things; give one."
        )
    return PackedSlots(places, program, trials or (-(-slots // packs) if slots else USUAL_TRIALS))
