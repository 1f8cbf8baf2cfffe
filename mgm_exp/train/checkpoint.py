"""The state of a running stage on disk: whole or not there, sealed with SHA-256, and enough to go on bit for bit.

    checkpoints/step-000050/
        trainable.safetensors, optimizer.safetensors      plain PyTorch
        deepspeed/                                        ZeRO: DeepSpeed's own shards, opened only after the manifest
        rng-0.json, rng-1.json, ...                       python, numpy and torch generators of each process, as lists
        state.json                                        step, counters, loss scaler, what the checkpoint belongs to
        MANIFEST.json                                     written last by the store room

Everything is written into ``step-000050.tmp`` and renamed when all processes are done.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import CheckpointConfig
from mgm_exp.errors import TrainingFailed
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
# Settings of which a stage may be continued with others: the steps stay the same up to rounding.
SPLIT = ("micro_batch_size", "accumulation")


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
        DiskFullError: Nothing half-written is taken for a checkpoint later.
    """
    final = root / f"step-{progress.step:06d}"
    unfinished = final.with_name(final.name + ".tmp")
    if ranks.is_first:
        remove_folder(unfinished)
        unfinished.mkdir(parents=True)
    ranks.barrier()
    with disk_full_named(unfinished):
        extra = engine.save(unfinished)
        write_json_atomic(unfinished / f"rng-{ranks.rank}.json", generator_states(ranks.device), indent=None)
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
        prune(root, keep)
    ranks.barrier()
    return final


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
    engine.load(folder, state["engine"])
    set_generator_states(read_json(folder / f"rng-{ranks.rank}.json"), ranks.device)
    return Progress.read(state["progress"]), passed_over


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
