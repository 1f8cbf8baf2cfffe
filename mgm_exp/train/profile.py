"""``train.profile``: some steps of a stage under PyTorch's profiler. It changes no bit of what is computed.

RUN/profile/instruct.trace.json.gz    the trace, for https://ui.perfetto.dev
RUN/profile/instruct.memory.pickle    on a GPU: every allocation of these steps, for https://pytorch.org/memory_viz
RUN/profile/profile.json              where the time went, by part; ``mgm-exp doctor RUN`` reads it
"""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from mgm_exp.store import read_record, write_json_atomic
from mgm_exp.train.time_shares import PREFIX, VISION, time_shares

if TYPE_CHECKING:
    from mgm_exp.train.assemble import Stage
    from mgm_exp.train.job import TrainJob
    from mgm_exp.train.ranks import Ranks

# Steps that are recorded where none are named; steps before them that are not typical, where there are enough.
STEPS, LEFT_OUT = 2, 2
# Allocations that a memory snapshot holds.
MOST_ALLOCATIONS = 200_000
FILE = "profile.json"


def part(name: str) -> AbstractContextManager[Any]:
    """Marks what is asked for while it is open as a part of the step; some microseconds where nobody records.

    Args:
        name: One of :data:`mgm_exp.train.time_shares.PARTS`.
    """
    return record_function(PREFIX + name)


class StepProfiler:
    """Records some steps of one stage, on its first process; at most one at a time in a process.

    Args:
        job: Its ``profile`` is the folder; None: nothing is recorded.
        stage: What is trained.
        ranks: This process.
        steps_to_go: How many steps the stage still has.
        is_alone: Whether all that this process does belongs to this stage.
        say: Is told where the time went.
    """

    def __init__(
        self,
        job: TrainJob,
        stage: Stage,
        ranks: Ranks,
        *,
        steps_to_go: int,
        is_alone: bool,
        say: Callable[[str], None],
    ) -> None:
        asked = stage.config.train.profile
        self._folder, self._name, self._say = job.profile, job.stage, say
        self._stage, self._device = stage, ranks.device
        self._steps = min(STEPS if asked is True else int(asked), steps_to_go)
        self._warm_up = min(1, steps_to_go - self._steps)
        self._before = min(LEFT_OUT, steps_to_go - self._steps - self._warm_up)
        self._begun = 0
        self._profile: profile | None = None
        self._open = ExitStack()
        self._is_wanted = bool(asked and job.profile is not None and ranks.is_first and self._steps)
        if self._is_wanted and not is_alone:
            self._is_wanted = False
            say(f"{job.stage}: train.profile records nothing where trials train together: launch.pack=false")

    def step(self) -> None:
        """A step begins."""
        if not self._is_wanted:
            return
        self._begun += 1
        at = self._begun - 1 - self._before
        if at == 0:
            self._start()
        elif self._profile is not None:
            self._profile.step()
            if at == self._warm_up + self._steps:
                self._finish()

    def close(self) -> None:
        """The stage ends: what was recorded is written, also where it is less than was asked for."""
        if self._profile is not None:
            self._profile.step()
            self._finish()

    def discard(self) -> None:
        """The stage ends by an error: nothing is written."""
        if self._profile is not None:
            self._profile.stop()
        self._profile, self._is_wanted = None, False
        self._open.close()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
            self._open.callback(torch.cuda.memory._record_memory_history, enabled=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a stage of so few steps has none to warm up
            plan = schedule(wait=0, warmup=self._warm_up, active=self._steps, repeat=1)
        self._profile = profile(activities=activities, schedule=plan)
        self._open.enter_context(_eyes_marked(self._stage.model))
        try:
            self._profile.start()
        except RuntimeError as error:  # somebody else records this process
            self._profile, self._is_wanted = None, False
            self._open.close()
            self._say(f"{self._name}: train.profile: nothing is recorded: {error}")

    def _finish(self) -> None:
        recorded, self._profile, self._is_wanted = self._profile, None, False
        assert recorded is not None and self._folder is not None
        recorded.stop()
        try:
            self._write(recorded, self._folder)
        except OSError as error:
            self._say(f"{self._name}: train.profile: the profile is not written: {error}")
        finally:
            self._open.close()

    def _write(self, recorded: profile, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trace = folder / f"{self._name}.trace.json.gz"
        recorded.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            shares = time_shares(json.load(file)["traceEvents"])
        found: dict[str, Any] = {"trace": trace.name, "device": self._device.type}
        if self._device.type == "cuda":
            memory = folder / f"{self._name}.memory.pickle"
            torch.cuda.memory._dump_snapshot(str(memory))
            found["memory"] = memory.name
        if shares is None:
            self._say(f"{self._name}: train.profile: the stage ended before a step was recorded")
            return
        content = {**_written(folder / FILE), self._name: {**shares.as_json(), **found}}
        write_json_atomic(folder / FILE, {"schema_version": 1, "stages": content})
        self._say(f"{self._name}: profile of {shares.in_words}")
        snapshot = f"; memory: {folder / found['memory']} (pytorch.org/memory_viz)" if "memory" in found else ""
        self._say(f"{self._name}: trace: {trace} (ui.perfetto.dev){snapshot}")


def _written(path: Path) -> dict[str, Any]:
    """What other stages of the run have written there."""
    try:
        stages = read_record(path)["stages"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return stages if isinstance(stages, dict) else {}


def _eyes_marked(model: Any) -> ExitStack:
    """Marks what a model of transformers computes outside of its language model as vision; MGM marks its own."""
    from mgm_exp.model.mgm import MGMForConditionalGeneration

    marks = ExitStack()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(inner, MGMForConditionalGeneration) or not hasattr(inner, "get_decoder"):
        return marks
    decoder, head = inner.get_decoder(), inner.get_output_embeddings()
    text = {id(module) for module in (*decoder.modules(), head)}

    def mark(module: Any) -> None:
        if id(module) in text:
            return
        if any(id(child) in text for child in module.modules()):
            for child in module.children():
                mark(child)
            return
        open_marks: list[Any] = []

        def enter(*_: Any) -> None:
            open_marks.append(part(VISION))
            open_marks[-1].__enter__()

        def leave(*_: Any) -> None:
            open_marks.pop().__exit__(None, None, None)

        marks.callback(module.register_forward_pre_hook(enter).remove)
        marks.callback(module.register_forward_hook(leave, always_call=True).remove)

    mark(inner)
    return marks
