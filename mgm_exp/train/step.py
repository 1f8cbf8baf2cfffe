"""One optimizer step: count, forward and backward of the micro-batches, update.

Numbers that must come out the same for any split of the global batch over processes and micro-batches:
- the loss is the sum over the supervised tokens of the global batch over their number (``loss_norm=tokens``);
- dropout draws from a generator that is seeded anew for each micro-batch of the stage, whoever computes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mgm_exp.config import LossNorm
from mgm_exp.train.agreement import check_agreement
from mgm_exp.train.engine import Engine, Update
from mgm_exp.train.job import StageSettings, derived_seed
from mgm_exp.train.optimizer import learning_rates
from mgm_exp.train.ranks import Ranks


@dataclass(frozen=True)
class CountedBatch:
    """One micro-batch and what it holds, counted before the forward pass.

    Args:
        batch: What the data room collated (on the CPU).
        supervised: Tokens that are learnt, after the image tokens are inserted and the sequence is cut.
        tokens: Merged tokens, without padding.
    """

    batch: Mapping[str, Any]
    supervised: int
    tokens: int
    samples: int
    images: int

    @property
    def ids(self) -> list[str]:
        return list(self.batch["ids"])

    def on(self, device: torch.device) -> dict[str, Any]:
        """The tensors on the device that computes."""
        return {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in self.batch.items()
        }


@dataclass(frozen=True)
class Outcome:
    """What one optimizer step did, the same on every process.

    Args:
        loss: Over the whole global batch; NaN where nothing was to be learnt.
        applied: Whether the weights changed.
        event: Why not, if not: ``not_finite``, ``loss_scale`` (fp16 found its scale too large) or ``nothing_to_learn``.
        tokens: Non-padding merged tokens of the global batch.
        samples, images: Of the global batch.
        lr: Optimizer group -> learning rate.
        sample_ids: Of the whole global batch, where the step was not applied; else empty.
    """

    loss: float
    applied: bool
    event: str | None
    grad_norm: float
    loss_scale: float | None
    tokens: int
    samples: int
    images: int
    lr: dict[str, float]
    sample_ids: list[str]


def take_step(
    engine: Engine,
    settings: StageSettings,
    ranks: Ranks,
    micro_batches: Sequence[CountedBatch],
    step: int,
    lr_factor: float,
    fingerprint: int = 0,
) -> Outcome:
    """One optimizer step over this process's micro-batches of the global batch.

    Args:
        step: Its number, from 0.
        lr_factor: Of the peak learning rates.
        fingerprint: Of the global batch; see :func:`mgm_exp.train.agreement.batch_fingerprint`.

    Raises:
        TrainingFailed: The processes are not at the same step of the same data.
    """
    totals = ranks.gather(
        [
            sum(micro.supervised for micro in micro_batches),
            sum(micro.supervised > 0 for micro in micro_batches),
            sum(micro.tokens for micro in micro_batches),
            sum(micro.samples for micro in micro_batches),
            sum(micro.images for micro in micro_batches),
            step,
            fingerprint,
        ]
    )
    *counts, steps, fingerprints = zip(*totals, strict=True)
    check_agreement(steps, fingerprints)
    supervised, learning, tokens, samples, images = (int(sum(column)) for column in counts)
    if supervised == 0:
        update, loss = Update(False, 0.0), math.nan
    else:
        total = torch.zeros((), dtype=torch.float32, device=ranks.device)
        for j, micro in enumerate(micro_batches):
            seed_generators(settings.seed, step, j * ranks.world_size + ranks.rank)
            normalizer = supervised if settings.loss_norm is LossNorm.tokens else max(micro.supervised, 1) * learning
            total += engine.accumulate(micro.on(ranks.device), float(normalizer), last=j == len(micro_batches) - 1)
            ranks.marks.tick()
        update = engine.update(lr_factor)
        loss = sum(row[0] for row in ranks.gather([float(total)]))
    event = None
    if not update.applied:
        event = "nothing_to_learn" if supervised == 0 else "not_finite"
        if update.loss_scale is not None and update.loss_scale > 1 and math.isfinite(loss):
            event = "loss_scale"
    ids = ranks.gather_texts([name for micro in micro_batches for name in micro.ids]) if event else []
    return Outcome(
        loss=loss,
        applied=update.applied,
        event=event,
        grad_norm=update.grad_norm,
        loss_scale=update.loss_scale,
        tokens=tokens,
        samples=samples,
        images=images,
        lr=learning_rates(engine.groups),
        sample_ids=ids,
    )


def seed_generators(seed: int, step: int, micro_batch: int) -> None:
    """Seeds torch's generators for one micro-batch of the global batch, whichever process computes it."""
    torch.manual_seed(derived_seed(seed, "dropout", step, micro_batch))
