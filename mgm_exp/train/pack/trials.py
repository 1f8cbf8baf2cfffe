"""The trials of a pack take turns, and their passes are taken together; read :meth:`Pack.train` first.

A trial that ends, is pruned, fails or is stopped drops out; the others do not notice. The order of events is a function
of the trials alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mgm_exp.config import CudaGraphs
from mgm_exp.data import IMAGE_TOKEN_INDEX
from mgm_exp.train.assemble import Stage, assemble
from mgm_exp.train.determinism import determinism
from mgm_exp.train.generators import OwnGenerators
from mgm_exp.train.job import StageSummary, TrainJob, derived_seed
from mgm_exp.train.listener import Listener
from mgm_exp.train.loop import training
from mgm_exp.train.pack.base import SharedBase
from mgm_exp.train.pack.capture import CannotRecord, CudaRecorder, Recorder
from mgm_exp.train.pack.passes import Body
from mgm_exp.train.ranks import Ranks
from mgm_exp.train.step import Pass, Passes
from mgm_exp.train.stop import StopRequest
from mgm_exp.train.tf32 import tf32

# As it stands in records and checkpoints, where a trial alone has "pytorch".
ENGINE = "pack"
# Positions (samples times length) of a pass beyond which a CPU core is slower, not faster, with more: they leave its
# caches. With layers of 256 to 1024, passes of 180 positions taken together took 1.3 times as long as one by one,
# passes of 720 (two trials) 1.25 times.
CPU_POSITIONS = 256
# Positions that a pass of its own costs on a CPU beside those that it computes: shorter rows are not filled up by more.
CPU_FILLED = 32


class Trial:
    """One trial of a pack, and what came of it.

    Args:
        job: Its instruct stage.
        listener: Hears of it.
        around: Opened whenever it goes on: what it prints goes where it belongs.
    """

    def __init__(
        self, job: TrainJob, listener: Listener, around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self.job, self.listener, self._around = job, listener, around
        self.stage: Stage | None = None
        self.due: Pass | None = None
        self.summary: StageSummary | None = None
        self.error: BaseException | None = None
        config = job.experiment()
        self._ranks = Ranks.alone(config.device)
        self.generators = OwnGenerators(derived_seed(config.seed, job.stage), self._ranks.device)
        self._passes: Passes[StageSummary] | None = None

    @property
    def device(self) -> torch.device:
        return self._ranks.device

    def begin(self, base: SharedBase, stop: StopRequest) -> None:
        """Puts it together, and goes on to its first pass."""

        def make(*given: Any) -> Stage:
            self.stage = stage = assemble(*given, build=base.build)
            stage.engine.name = stage.belongs_to["engine"] = ENGINE
            return stage

        self._passes = passes = training(self.job, self._ranks, self.listener, stop, make)
        self._go_on(lambda: next(passes))

    def take(self) -> None:
        """Takes its pass by itself, and goes on to the next one."""
        due, passes = self.due, self._passes
        assert due is not None and passes is not None

        def alone() -> Pass:
            try:
                loss = due.take()
            except Exception as error:  # noqa: BLE001 - handed to whoever asked for the pass
                return passes.throw(error)
            return passes.send(loss)

        self._go_on(alone)

    def taken(self, loss: Tensor, state: Tensor) -> None:
        """Its pass was taken with those of others: goes on to the next one."""
        passes = self._passes
        assert passes is not None
        self.generators.torch = state
        self._go_on(lambda: passes.send(loss))

    def _go_on(self, to_next: Callable[[], Pass]) -> None:
        self.due = None
        try:
            with self._around(), self.generators.in_place():
                self.due = to_next()
        except StopIteration as end:
            self.summary = end.value
        except Exception as error:  # noqa: BLE001 - one trial's failure never takes the others; told by its own run
            self.error = error

    def result(self) -> StageSummary:
        """The summary, or the error that ended it."""
        if self.error is not None:
            raise self.error
        assert self.summary is not None
        return self.summary


class Pack:
    """See the module.

    Args:
        say: Prints a line.
        width: Trials whose passes are taken together at most; None: all.
        recorder_of: Makes what records passes on a device, with ``train.cuda_graphs=packs``.
    """

    def __init__(
        self,
        say: Callable[[str], None] = print,
        width: int | None = None,
        recorder_of: Callable[[torch.device], Recorder] = CudaRecorder,
    ) -> None:
        self._say, self._width, self._recorder_of = say, width, recorder_of

    def train(self, trials: Sequence[Trial], stop: StopRequest) -> None:
        """Trains them to their ends; each one then has a summary or an error."""
        base = SharedBase()
        train = trials[0].job.experiment().train
        with determinism(train.deterministic), tf32(train.tf32):
            for trial in trials:
                trial.begin(base, stop)
            ready = [trial for trial in trials if trial.due is not None]
            if not ready:
                return
            places = {id(trial): place for place, trial in enumerate(ready)}
            does_record = train.cuda_graphs is CudaGraphs.packs
            recorder = self._recorder_of(ready[0].device) if does_record else None
            body = Body(base.view(), [trial.stage for trial in ready if trial.stage is not None], recorder)
            while alive := [trial for trial in ready if trial.due is not None]:
                for group in self._groups(alive):
                    self._take(group, body, [places[id(trial)] for trial in group])
            if body.counts is not None:
                self._say(f"pack: {body.counts}")
        for trial in trials:
            trial.stage = None  # its weights are written

    def _groups(self, alive: Sequence[Trial]) -> list[list[Trial]]:
        """Whose passes are taken together: trials with equally many samples of much the same length (shorter ones are
        filled up), as many as there is memory for, and as still gain by it."""
        found: list[list[Trial]] = []
        samples = longest = 0
        for trial in sorted(alive, key=_size):
            mine, length = _size(trial)
            group = found[-1] if found else []
            most, most_filled = _limits(trial)
            is_full = len(group) == self._width or (len(group) + 1) * mine * length > most
            if not group or mine != samples or is_full or len(group) * mine * (length - longest) > most_filled:
                group = []
                found.append(group)
            samples, longest = mine, length
            group.append(trial)
        return found

    def _take(self, group: Sequence[Trial], body: Body, places: Sequence[int]) -> None:
        if len(group) == 1 and not body.replays(*_size(group[0])):
            group[0].take()
            return
        passes = [trial.due for trial in group if trial.due is not None]
        fault, taken = "", []
        try:
            taken = body.take(places, passes, [trial.generators.torch for trial in group])
        except CannotRecord:
            raise  # nobody's own: it would be so for each of them
        except torch.OutOfMemoryError:
            fault = "memory"
        except Exception as error:  # noqa: BLE001 - whoever caused it meets it again by itself
            fault = f"{type(error).__name__}: {error}"
        # Out of the handlers: a traceback holds what takes the memory
        if fault == "memory" and body.let_go_of_graphs():
            self._say("pack: memory is full; passes are not replayed by CUDA graphs any more")
            if group[0].device.type == "cuda":
                torch.cuda.empty_cache()
            self._take(group, body, places)
        elif fault == "memory":
            half = (len(group) + 1) // 2
            self._width = half
            self._say(f"pack: memory is full with {len(group)} trials at once; from here they go {half} at a time")
            if passes[0].engine.ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            self._take(group[:half], body, places[:half])
            self._take(group[half:], body, places[half:])
        elif fault:
            self._say(f"pack: a pass of {len(group)} trials failed ({fault}); each takes it by itself")
            for trial in group:
                trial.take()
        else:
            for trial, (loss, state) in zip(group, taken, strict=True):
                trial.taken(loss, state)


def _limits(trial: Trial) -> tuple[float, float]:
    """Positions of a pass, and those by which one more trial may fill up the rows of the others."""
    assert trial.due is not None
    is_on_cpu = trial.due.engine.ranks.device.type == "cpu"
    return (CPU_POSITIONS, CPU_FILLED) if is_on_cpu else (math.inf, math.inf)


def _size(trial: Trial) -> tuple[int, int]:
    """Samples of the pass that is due, and the length of its longest row as the model will merge it."""
    due, stage = trial.due, trial.stage
    assert due is not None and stage is not None
    ids, mask = due.micro.batch["input_ids"], due.micro.batch["attention_mask"]
    images = ((ids == IMAGE_TOKEN_INDEX) & mask).sum(1)
    lengths = mask.sum(1) + images * (stage.processor.n_visual_tokens - 1)
    return due.micro.samples, min(int(lengths.max()), stage.settings.max_length)
