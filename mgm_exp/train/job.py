"""What is trained, and what came of it: plain data that travels between processes as JSON.

A :class:`TrainJob` holds everything a stage needs; :class:`StageSettings` is the part of the configuration that one
stage reads, so that the loop does not ask "align or instruct?" at every turn.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mgm_exp.config import Aspect, ExperimentConfig, GroupBy, LossNorm, Precision, from_plain, trains_towers
from mgm_exp.errors import ConfigError

STAGES = ("align", "instruct", "features")


@dataclass(frozen=True)
class TrainJob:
    """One stage to be trained.

    Args:
        stage: ``align`` (projector + mining), ``instruct`` (adapter or LLM), ``features`` (visual tokens only).
        config: The whole experiment, as :func:`mgm_exp.config.plain` gives it.
        records: The curated rows of this stage (JSON lines).
        image_root: Folder that the rows' image paths are relative to.
        connector: The aligned connector to start from; None: the checkpoint's own.
        visual_tokens: Folder of cached visual tokens; None: images are encoded in every step.
        work: Folder that survives an interruption: ``checkpoints/``, ``metrics.jsonl``, ``out/``.
        demo: Folder of the generated demo data, for validation on its questions; None: not needed.
        profile: Folder that ``train.profile`` writes to; None: nothing is recorded.
    """

    stage: str
    config: dict[str, Any]
    records: Path
    image_root: Path
    connector: Path | None
    visual_tokens: Path | None
    work: Path
    demo: Path | None = None
    profile: Path | None = None

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ConfigError(f"stage={self.stage!r}; allowed are {list(STAGES)}.")

    @property
    def out(self) -> Path:
        """Where the stage's results are written."""
        return self.work / "out"

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One line an optimizer step; copied to ``out/`` at the end."""
        return self.work / "metrics.jsonl"

    def experiment(self) -> ExperimentConfig:
        return from_plain(self.config)

    def to_json(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in values.items()})

    @classmethod
    def from_json(cls, text: str) -> TrainJob:
        values = json.loads(text)
        for key in ("records", "image_root", "connector", "visual_tokens", "work", "demo", "profile"):
            values[key] = Path(values[key]) if values[key] is not None else None
        return cls(**values)


@dataclass(frozen=True)
class StageSettings:
    """How one stage is trained: ``train`` for instruct, ``train.align`` with what it shares of ``train`` for align.

    Args:
        lr: Peak learning rate of adapter or LLM (instruct); of the connector (align).
        connector_lr: Peak learning rate of projector and mining.
        vision_tower_lr: Peak learning rate of what is trained of the towers.
        accumulation: Micro-batches of one process in one optimizer step.
        seed: Of this stage: data order, dropout.
    """

    stage: str
    lr: float
    connector_lr: float
    vision_tower_lr: float
    epochs: float
    max_steps: int | None
    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    warmup_ratio: float
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: float
    max_length: int
    precision: Precision
    image_aspect: Aspect
    group_by: GroupBy
    loss_norm: LossNorm
    seed: int
    zero_stage: int
    world_size: int


def stage_settings(config: ExperimentConfig, stage: str) -> StageSettings:
    """The settings of ``stage`` (``features`` reads images as instruct does)."""
    train, align = config.train, config.train.align
    section = align if stage == "align" else train
    return StageSettings(
        stage=stage,
        lr=section.lr,
        connector_lr=align.lr if stage == "align" else train.projector_lr,
        vision_tower_lr=train.vision_tower_lr if stage == "instruct" and trains_towers(train) else 0.0,
        epochs=section.epochs,
        max_steps=section.max_steps,
        global_batch_size=section.global_batch_size,
        micro_batch_size=section.micro_batch_size,
        accumulation=section.global_batch_size // (section.micro_batch_size * config.devices),
        warmup_ratio=section.warmup_ratio,
        weight_decay=section.weight_decay,
        betas=(train.beta1, train.beta2),
        max_grad_norm=train.max_grad_norm,
        max_length=section.max_length,
        precision=train.precision,
        image_aspect=section.image_aspect,
        group_by=section.group_by,
        loss_norm=train.loss_norm,
        seed=derived_seed(config.seed, stage),
        zero_stage=config.zero.stage,
        world_size=config.devices,
    )


def derived_seed(seed: int, *what: str | int) -> int:
    """A seed of its own for each purpose: equal inputs give equal seeds, on every machine (63 bits)."""
    digest = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class StageSummary:
    """What one trained stage cost and reached; ``summary.json``.

    Args:
        steps: Optimizer steps, skipped ones included.
        skipped_steps: Steps without an update (a loss or gradient that was not finite, nothing to learn).
        tokens: Non-padding tokens of the merged sequences that went through the model, all processes together.
        seconds: Wall time of the steps, summed over interruptions.
        peak_memory_gib: Largest memory of one process: CUDA allocations, or resident memory on the CPU.
        final_loss: Loss of the last step that was applied; None if there was none.
        data_wait_share: Share of the time in which steps waited for their data (on a GPU: at most, since it works on
            the step before meanwhile).
        trainable: ``{n_lora, n_other, n_total, patterns}`` and how the set was verified.
        n_parameters: All parameters of the model, adapter included.
        resumed_from: Steps at which the stage was continued from a checkpoint.
        n_train: Samples of the stage's data.
        ended_early: Whether early stopping ended it before its last step.
        guards: What the guards found and did (:meth:`mgm_exp.train.guards.Guards.record`).
    """

    stage: str
    steps: int
    skipped_steps: int
    tokens: int
    seconds: float
    train_tokens_per_s: float
    samples_per_s: float
    peak_memory_gib: float
    final_loss: float | None
    trainable: dict[str, Any]
    engine: dict[str, Any]
    n_parameters: int
    n_train: int
    resumed_from: list[int] = field(default_factory=list)
    load_report: dict[str, Any] = field(default_factory=dict)
    ended_early: bool = False
    guards: dict[str, Any] = field(default_factory=dict)
    data_wait_share: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
