"""The state of a running stage on disk: whole or not there, sealed with SHA-256, and enough to go on bit for bit.

    checkpoints/step-000050/
        trainable.safetensors, optimizer.safetensors      every tensor whole and by name, whatever the engine
        rng-0.json, rng-1.json, ...                       python, numpy and torch generators of each process, as lists
        state.json                                        step, counters, loss scaler, what the checkpoint belongs to
        MANIFEST.json                                     written last by the store room

Everything is written into ``step-000050.tmp`` and renamed when all processes are done.
"""

from __future__ import annotations

import shutil
import time
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
    write_json_atomic,
)
from mgm_exp.train.generators import generator_states, set_generator_states
from mgm_exp.train.ranks import Ranks

if TYPE_CHECKING:
    from mgm_exp.train.engine import Engine

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

    @classmethod
    def read(cls, values: dict[str, Any]) -> Progress:
        """From ``state.json``; what an earlier version counted besides is left out."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def save_checkpoint(
    root: Path, engine: Engine, progress: Progress, belongs_to: dict[str, Any], ranks: Ranks, *, keep: int
) -> Path:
    """Saves the state after ``progress.step``; called by all processes at the same step.

    Args:
        root: The stage's ``checkpoints/``.
        belongs_to: Settings that a run must share to continue from it.
        keep: Newest checkpoints that stay.

    Raises:
        DiskFullError: There is no room for it, which is looked at before anything is written, or the disk fills up
            meanwhile. Nothing half-written stays, and the checkpoints before are as they were.
    """
    final = root / step_name(progress.step)
    unfinished = final.with_name(final.name + ".tmp")
    if ranks.is_first:
        remove_folder(unfinished)
    _check_room(root, sum(row[0] for row in ranks.gather([engine.bytes_to_save()])), ranks)
    if ranks.is_first:
        unfinished.mkdir(parents=True)
    ranks.barrier()
    try:
        with disk_full_named(unfinished):
            extra = engine.save(unfinished)
            write_json_atomic(unfinished / f"rng-{ranks.rank}.json", generator_states(ranks.device), indent=None)
    except DiskFullError:
        remove_folder(unfinished)  # room for the logs that are still to be written
        raise
    ranks.barrier()
    if ranks.is_first:
        state = {
            "schema_version": SCHEMA_VERSION,
            "progress": asdict(progress),
            "belongs_to": belongs_to,
            "engine": extra,
        }
        write_json_atomic(unfinished / "state.json", state)
        publish_folder(unfinished, final)
        prune(root, keep, protect=[step_name(int(step)) for step, _ in progress.best])
    ranks.barrier()
    return final


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
