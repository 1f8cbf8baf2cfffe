"""The state of a running stage on disk: whole or not there, sealed with SHA-256, and enough to go on bit for bit.

    checkpoints/step-000050/
        trainable.safetensors, optimizer.safetensors      every tensor whole and by name, whatever the engine
        rng-0.json, rng-1.json, ...                       python, numpy and torch generators of each process, as lists
        state.json                                        step, counters, loss scaler, what the checkpoint belongs to
        MANIFEST.json                                     written last by the store room

Everything is written into ``step-000050.tmp`` by the first process, and renamed when it is whole.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import CheckpointConfig
from mgm_exp.errors import DiskFullError, TrainingFailed
from mgm_exp.store import (
    disk_full_named,
    newest_whole,
    prune,
    publish_folder,
    read_json,
    remove_folder,
    write_atomic,
    write_json_atomic,
)
from mgm_exp.train.generators import generator_states, set_generator_states
from mgm_exp.train.ranks import Ranks

if TYPE_CHECKING:
    from mgm_exp.train.engine import Engine, Snapshot

SCHEMA_VERSION = 1
# What a checkpoint takes beside its tensors: states of generators, the manifest, blocks that are not full.
ROOM_FACTOR, ROOM_BYTES = 1.02, 1 << 20
# Who computes what: a stage may be continued with others of these. Its steps stay the same up to rounding.
SPLIT = ("micro_batch_size", "accumulation", "world_size", "zero_stage", "engine")


@dataclass
class Progress:
    """How far a stage is. The data position is the step: the batch plan is a pure function of it.

    Args:
        step: Optimizer steps done, skipped ones included.
        updates: Steps that changed the weights.
        tokens: Non-padding merged tokens so far, all processes.
        seconds: Wall time of the steps so far.
        data_wait: Wall time that the steps waited for their data, of the process that waited longest.
        last_loss: Loss of the last step that was applied.
        verified: What the trainable-set check has found so far.
        guards: What the guards remember (:class:`mgm_exp.train.guards.Guards`).
        split_changed: What of :data:`SPLIT` was other in the checkpoint that was loaded: ``[then, now]``.
        best: Steps with the best validation scores, ``[step, score]``, the best first.
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0
    peak_memory_gib: float = 0.0
    last_loss: float | None = None
    resumed_from: list[int] = field(default_factory=list)
    verified: dict[str, Any] = field(default_factory=dict)
    guards: dict[str, Any] = field(default_factory=dict)
    best: list[list[float]] = field(default_factory=list)
    split_changed: dict[str, list[Any]] = field(default_factory=dict)

    def is_among_best(self, score: float, keep: int) -> bool:
        """Takes a validation score in; whether it is one of the ``keep`` best, an earlier one first among equals."""
        found = sorted([*self.best, [self.step, score]], key=lambda pair: (-pair[1], pair[0]))[:keep]
        self.best = found
        return any(step == self.step for step, _ in found)

    def data_wait_share(self, *, is_hidden: bool) -> float:
        """Share of the time in which steps waited for their data, in 0..1.

        Args:
            is_hidden: Whether the device works on the step before meanwhile: ``seconds`` then hold the wait, and the
                share is what it may have cost at most.
        """
        whole = max(self.seconds, self.data_wait) if is_hidden else self.seconds + self.data_wait
        return self.data_wait / whole if whole > 0 else 0.0

    @classmethod
    def read(cls, values: dict[str, Any]) -> Progress:
        """From ``state.json``; what an earlier version counted besides is left out."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


class Saver:
    """Writes a stage's checkpoints; every process has one, the first one's writes.

    In the background: the state is copied to the host, and a thread writes, hashes and publishes the copy while
    training goes on. One is in flight at most. An error of the thread is raised by the next call.

    Args:
        root: The stage's ``checkpoints/``.
        belongs_to: Settings that a run must share to continue from one of them.
        keep: Newest checkpoints that stay.
        in_background: Whether to go on while one is written.
        on_done: Told of the folder of each finished one, in the thread that called.
    """

    def __init__(
        self,
        root: Path,
        engine: Engine,
        belongs_to: dict[str, Any],
        ranks: Ranks,
        *,
        keep: int,
        in_background: bool = False,
        on_done: Callable[[Path], None] | None = None,
    ) -> None:
        self._root, self._engine, self._belongs_to, self._ranks = root, engine, belongs_to, ranks
        self._keep, self._in_background, self._on_done = keep, in_background, on_done
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._folder: Path | None = None

    def save(self, progress: Progress) -> None:
        """Saves the state after ``progress.step``; called by all processes at the same step.

        Raises:
            DiskFullError: There is no room for it, which is looked at before anything is written, or the disk filled up
                meanwhile. Nothing half-written stays, and the checkpoints before are as they were.
        """
        self.finish()
        ranks, final = self._ranks, self._root / step_name(progress.step)
        unfinished = final.with_name(final.name + ".tmp")
        if ranks.is_first:
            remove_folder(unfinished)
        _check_room(self._root, sum(row[0] for row in ranks.gather([self._engine.bytes_to_save()])), ranks)
        snapshot = self._engine.snapshot()
        generators = ranks.gather_texts([json.dumps(generator_states(ranks.device))])
        if ranks.is_first:
            state = {
                "schema_version": SCHEMA_VERSION,
                "progress": asdict(progress),
                "belongs_to": self._belongs_to,
                "engine": snapshot.extra,
            }
            self._folder = final
            if self._in_background:
                self._thread = threading.Thread(
                    target=self._write_and_remember, args=(unfinished, snapshot, generators, state), name="checkpoint"
                )
                self._thread.start()
            else:
                self._write(unfinished, snapshot, generators, state)
        if not self._in_background:
            self._tell()
            ranks.barrier()

    def look(self) -> None:
        """Tells of what was finished meanwhile, and raises what went wrong; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Waits for the one in flight."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            error, self._error, self._folder = self._error, None, None
            raise error
        self._tell()

    def close(self) -> None:
        """Waits for the one in flight when training ends with an error of its own, which is the one to be shown."""
        if self._thread is not None:
            self._thread.join()

    def _tell(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None and self._on_done is not None:
            self._on_done(folder)

    def _write_and_remember(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that trains
            self._error = error

    def _write(self, unfinished: Path, snapshot: Snapshot, generators: list[str], state: dict[str, Any]) -> None:
        assert self._folder is not None
        try:
            with disk_full_named(unfinished):
                unfinished.mkdir(parents=True)
                snapshot.write(unfinished)
                for rank, text in enumerate(generators):
                    write_atomic(unfinished / f"rng-{rank}.json", text)
                write_json_atomic(unfinished / "state.json", state)
                publish_folder(unfinished, self._folder)
        except DiskFullError:
            remove_folder(unfinished)  # room for the logs that are still to be written
            raise
        best = [step_name(int(step)) for step, _ in state["progress"]["best"]]
        prune(self._root, self._keep, protect=best)


def step_name(step: int) -> str:
    """The folder of the checkpoint after ``step`` steps."""
    return f"step-{step:06d}"


def _check_room(root: Path, needed: float, ranks: Ranks) -> None:
    """The same answer on every process: the first one looks."""
    root.mkdir(parents=True, exist_ok=True)
    needed = int(needed * ROOM_FACTOR) + ROOM_BYTES
    free = int(ranks.gather([shutil.disk_usage(root).free])[0][0])
    if free < needed:
        raise DiskFullError(
            f"A checkpoint of about {needed:,} bytes has no room in {root}: {free:,} bytes are free there. Nothing was "
            "written, and the last checkpoint is as it was.",
            advice="Free some space (`mgm-exp gc` drops unused store entries; train.checkpoint.keep says how many "
            "checkpoints stay) and give the same command again: it continues from the last checkpoint.",
        )


def load_newest(
    root: Path, engine: Engine, belongs_to: dict[str, Any], ranks: Ranks
) -> tuple[Progress | None, list[str]]:
    """Continues from the newest checkpoint that verifies in full; called by all processes.

    Returns:
        Its progress (None: there is none) and why newer ones were passed over.

    Raises:
        TrainingFailed: There are checkpoints and none is whole, or it belongs to other settings.
    """
    folder, passed_over = newest_whole(root) if ranks.is_first else (None, [])
    passed_over = ranks.gather_texts(passed_over)
    name = ranks.gather_texts([folder.name] if folder else [])
    if not name:
        if passed_over:
            raise TrainingFailed(
                f"No checkpoint in {root} is whole: {'; '.join(passed_over)}.",
                advice="Delete that folder to train the stage from its beginning.",
            )
        return None, []
    folder = root / name[0]
    state = read_json(folder / "state.json")
    found = state["belongs_to"]
    changed = [key for key in sorted({*belongs_to, *found}) if belongs_to.get(key) != found.get(key)]
    differing = [key for key in changed if key not in SPLIT]
    if differing:
        raise TrainingFailed(
            f"The checkpoint {folder} was made with other settings: "
            + ", ".join(f"{key}={found.get(key)!r} (now {belongs_to.get(key)!r})" for key in differing)
            + ".",
            advice="Give the settings it was made with, or delete it to train the stage from its beginning.",
        )
    if "tag" in state["engine"]:
        raise TrainingFailed(
            f"The checkpoint {folder} holds DeepSpeed's own files, which an earlier version wrote.",
            advice="Finish the stage with that version, or delete the folder to train the stage from its beginning.",
        )
    engine.load(folder, state["engine"])
    generators = folder / f"rng-{ranks.rank}.json"  # there were fewer processes: each micro-batch is seeded anew anyway
    set_generator_states(read_json(generators if generators.exists() else folder / "rng-0.json"), ranks.device)
    progress = Progress.read(state["progress"])
    progress.split_changed = {key: [found.get(key), belongs_to.get(key)] for key in changed}
    return progress, passed_over


class CheckpointClock:
    """When the next checkpoint is due: by steps and by time, whichever comes first."""

    def __init__(self, config: CheckpointConfig, step: int) -> None:
        self._config = config
        self.last_step = step
        self._last_time = time.monotonic()

    def is_due(self, step: int, ranks: Ranks) -> bool:
        """The same answer on every process: the first one's clock decides."""
        config = self._config
        if config.every_steps is not None and step % config.every_steps == 0:
            return True
        if config.every_minutes is None:
            return False
        is_late = time.monotonic() - self._last_time >= config.every_minutes * 60
        return bool(ranks.gather([is_late])[0][0])

    def saved(self, step: int) -> None:
        self.last_step, self._last_time = step, time.monotonic()
