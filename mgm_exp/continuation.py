"""A run that goes on from another run's unfinished stage, with another number of processes or another ZeRO stage.

How many processes compute a stage decides its last bits, so it belongs to the stage's key, and the stage with another
number is another stage. With ``train.checkpoint.continue_from=RUN`` that stage begins with the newest whole checkpoint
of the run in place of the beginning; its steps are then those of the run up to rounding. What it was begun from belongs
to its key: it is neither the one stage nor the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from mgm_exp import stages
from mgm_exp.config import ExperimentConfig, LossNorm, ZeroConfig, from_plain
from mgm_exp.errors import ConfigError, UserError
from mgm_exp.folders import DONE, LEASE, read_record
from mgm_exp.store import MARK, Lease, Store, file_sha256, link_tree, newest_whole, read_yaml, write_atomic

# What of a payload may be other: who computes what. The rest decides which steps they are.
_SPLIT = ("engine.world_size", "engine.zero", "section.micro_batch_size")
# How many of the newest runs of a name are looked at for one that could be continued.
_LOOKED_AT = 20


@dataclass(frozen=True)
class Begun:
    """An unfinished stage of another run.

    Args:
        checkpoint: Its newest whole checkpoint.
        rows: The stage's ``metrics.jsonl``, or the run's.
        split: What is other now: ``{"world_size": [2, 1]}``.
    """

    stage: str
    checkpoint: Path
    rows: Path
    split: dict[str, list[Any]]

    @property
    def step(self) -> int:
        return int(self.checkpoint.name.partition("-")[2])

    def facts(self) -> dict[str, Any]:
        """What belongs to the key of the stage that begins with it."""
        return {"step": self.step, "checkpoint": file_sha256(self.checkpoint / MARK), "split": self.split}

    def put_into(self, work: Path) -> Path:
        """Where the stage looks for a checkpoint, unless it has begun: the checkpoint, and the rows until there.

        Returns:
            The newest checkpoint there.
        """
        place = work / "checkpoints"
        if place.is_dir() and (there := sorted(place.glob("step-*[0-9]"))):
            return there[-1]
        from mgm_exp.train.metrics_file import read_rows

        mine = [row for row in read_rows(self.rows) if row.get("stage") == self.stage]
        write_atomic(work / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in mine))
        place.mkdir(parents=True, exist_ok=True)
        link_tree(self.checkpoint, place / self.checkpoint.name)
        return place / self.checkpoint.name


@dataclass
class Origin:
    """The run that is continued.

    Args:
        folder: Its folder.
        config: Its configuration.
        manifest: Its manifest.
        store: The store that holds what it has finished, and its unfinished stages.
        begun: The unfinished stages that were taken over.
    """

    folder: Path
    config: ExperimentConfig
    manifest: dict[str, Any]
    store: Store
    begun: dict[str, Begun] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ExperimentConfig, store: Store) -> Origin | None:
        """The run that ``train.checkpoint.continue_from`` names; None where it names none.

        Raises:
            UserError: it is no run's folder, or something writes it at this moment.
        """
        if config.train.checkpoint.continue_from is None:
            return None
        folder = Path(config.train.checkpoint.continue_from).expanduser().resolve()
        said = f"train.checkpoint.continue_from={config.train.checkpoint.continue_from}"
        found = _config_of(folder)
        if found is None:
            raise UserError(
                f"{said} is not a run's folder: it has no config.yaml that can be read.",
                advice="Give the folder of the run, <paths.root>/runs/NAME/TIME.",
            )
        if Lease(folder / LEASE).holder() is not None:
            raise UserError(f"{said} is being written by a run.", advice="Stop that run first, or wait for its end.")
        if config.train.loss_norm is LossNorm.official:
            raise ConfigError(
                f"{said} and train.loss_norm=official: that loss depends on how a batch is split, so that its steps "
                "would be others from there on.",
                advice="Go on with the number of processes that the run was begun with.",
            )
        return cls(folder, found, read_record(folder / "manifest.json"), store)

    def payload_of(
        self, stage: str, of: Callable[[ExperimentConfig], stages.Payload], config: ExperimentConfig, curated: str
    ) -> tuple[stages.Payload, bool]:
        """What a stage of the run that goes on is made of.

        Args:
            of: Its payload under a configuration.
            curated: Key of the rows.

        Returns:
            The payload, and whether the other run has finished the stage: then it is taken as it is.

        Raises:
            UserError: something else than the number of processes differs, or there is nothing to go on from.
        """
        then, now = of(self.config), of(config)
        split, others = _differences(then, now)
        if (before := self._continued(stage)) is not None:  # that run went on from another one
            then = {**then, "continued": before}
        self._refuse_other_rows(curated)
        finished = self._key_of(stage)
        if finished is not None:
            if finished != stages.key_of(stage, then) or self.store.entry(stage, finished) is None:
                raise UserError(
                    f"The {stage} stage that {self.folder} has finished is not in the store any more, or something "
                    "that it was made of has changed since.",
                    advice="Train without train.checkpoint.continue_from: the stages are made from their beginning.",
                )
            return then, True
        if others:
            raise ConfigError(
                f"{self.folder} cannot be gone on from: its {stage} stage differs in {', '.join(others)}.",
                advice="devices, zero.* and the micro-batch sizes may be other ones; nothing else may.",
            )
        if not split:
            return then, False  # the same stage: it continues by itself
        begun = self._begun(stage, then, split)
        if begun is None:
            if stage == "instruct" and "align" in self.begun:
                return now, False
            raise UserError(
                f"{self.folder} has no whole checkpoint of its {stage} stage to go on from.",
                advice="Leave train.checkpoint.continue_from out to train the stage from its beginning.",
            )
        self.begun[stage] = begun
        return {**now, "continued": begun.facts()}, False

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "run": str(self.folder),
            "run_id": self.manifest.get("run_id"),
            "stages": {stage: begun.facts() for stage, begun in self.begun.items()},
        }

    def _key_of(self, stage: str) -> str | None:
        listed = self.manifest.get("stages")
        found = [e.get("key") for e in listed if isinstance(e, dict) and e.get("name") == stage] if listed else []
        return str(found[-1]) if found and found[-1] else None

    def _continued(self, stage: str) -> dict[str, Any] | None:
        listed = (self.manifest.get("continued_from") or {}).get("stages") or {}
        return listed.get(stage)

    def _refuse_other_rows(self, curated: str) -> None:
        if self._key_of("curate") not in (None, curated):
            raise UserError(
                f"{self.folder} was trained on other rows: its data, recipe or model, or their files, differ.",
                advice="Give the settings of that run (its config.yaml), or leave train.checkpoint.continue_from out.",
            )

    def _begun(self, stage: str, then: stages.Payload, split: dict[str, list[Any]]) -> Begun | None:
        """The newest whole checkpoint: where the stage was made, or what the run kept of it."""
        key = stages.key_of(stage, then)
        if self.store.lease(stage, key).holder() is not None:
            raise UserError(
                f"The {stage} stage of {self.folder} is being trained by somebody.",
                advice="Stop that first, or wait for its end.",
            )
        work = sorted(self.store.folder(stage, key).parent.glob(f"{key}.work*"))
        places = [(folder / "checkpoints", folder / "metrics.jsonl") for folder in work]
        places.append((self.folder / "checkpoints" / stage, self.folder / "metrics.jsonl"))
        found = [(newest_whole(place)[0], rows) for place, rows in places if rows.is_file()]
        whole = [Begun(stage, checkpoint, rows, split) for checkpoint, rows in found if checkpoint is not None]
        return max(whole, key=lambda begun: begun.step, default=None)


def offered(run_dir: Path, config: ExperimentConfig) -> str:
    """A sentence that names an unfinished run of the same name that has trained with other processes; or "".

    Args:
        run_dir: The run that is about to begin.
    """
    wanted = _hash_without_split(config)
    for folder in sorted(run_dir.parent.iterdir(), reverse=True)[:_LOOKED_AT]:
        trained = sorted((folder / "checkpoints").glob("*/step-*[0-9]"))
        if folder == run_dir or not trained or read_record(folder / "result.json").get("status") in DONE:
            continue
        other = _config_of(folder)
        if other is None or _hash_without_split(other) != wanted or Lease(folder / LEASE).holder() is not None:
            continue
        newest = trained[-1]  # instruct comes after align
        return (
            f"{folder} was not finished: {newest.parent.name} has a checkpoint after step {int(newest.name[5:])}, with "
            f"devices={other.devices} zero.stage={other.zero.stage}. This run begins anew; it goes on from there with "
            f"train.checkpoint.continue_from={folder} (equal up to rounding, not to the last bit)."
        )
    return ""


def _hash_without_split(config: ExperimentConfig) -> str:
    align = replace(config.train.align, micro_batch_size=1)
    checkpoint = replace(config.train.checkpoint, continue_from=None)
    train = replace(config.train, micro_batch_size=1, align=align, checkpoint=checkpoint)
    return stages.config_hash(replace(config, devices=1, zero=ZeroConfig(), train=train))


def _config_of(folder: Path) -> ExperimentConfig | None:
    try:
        values = read_yaml(folder / "config.yaml")
        return from_plain(values) if isinstance(values, dict) else None
    except (OSError, ValueError, ConfigError, OmegaConfBaseException):
        return None


def _differences(then: stages.Payload, now: stages.Payload) -> tuple[dict[str, list[Any]], list[str]]:
    """What of the split differs, and what else."""
    a, b = _flat(then), _flat(now)
    changed = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    split = {key.rpartition(".")[2]: [a.get(key), b.get(key)] for key in changed if key in _SPLIT}
    return split, [key for key in changed if key not in _SPLIT]


def _flat(values: stages.Payload, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in _SPLIT:
            found |= _flat(value, f"{name}.")
        else:
            found[name] = value
    return found
