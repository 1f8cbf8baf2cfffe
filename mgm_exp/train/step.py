"""One optimizer step: count, forward and backward of the micro-batches, update.

Numbers that must come out the same for any split of the global batch over processes and micro-batches:
- the loss is the sum over the supervised tokens of the global batch over their number (``loss_norm=tokens``);
- dropout draws from a generator that is seeded anew for each micro-batch of the stage, whoever computes it.

A step is launched, and its numbers are read later (:meth:`Launched.outcome`): a GPU is not waited for between steps.

Whoever trains says which passes through the model are due (:class:`Pass`), and somebody else takes them: one after
another (:func:`alone`), or together with those of other trials (:mod:`mgm_exp.train.pack`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mgm_exp.config import LossNorm
from mgm_exp.train.agreement import check_agreement
from mgm_exp.train.engine import Engine, Update
from mgm_exp.train.guards import Limits
from mgm_exp.train.job import StageSettings, derived_seed
from mgm_exp.train.optimizer import learning_rates
from mgm_exp.train.profile import part
from mgm_exp.train.ranks import Ranks
from mgm_exp.train.time_shares import COMMUNICATION, DATA, LLM, OPTIMIZER


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
        return {key: _on(value, device) for key, value in self.batch.items()}


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _on(part, device) for key, part in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class Outcome:
    """What one optimizer step did, the same on every process.

    Args:
        loss: Over the whole global batch; NaN where nothing was to be learnt.
        applied: Whether the weights changed.
        event: Why not, if not: ``not_finite``, ``spike`` (beyond the limits), ``loss_scale`` (fp16 found its scale too
            large) or ``nothing_to_learn``.
        tokens: Non-padding merged tokens of the global batch.
        samples, images: Of the global batch.
        lr: Optimizer group -> learning rate.
        sample_ids: Of the whole global batch, where the step was not applied; else empty.
        connector_norm: Of the gradient of projector and mining; None: not known.
        mining: Scores of patch info mining that were NaN, and infinite, over all processes.
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
    connector_norm: float | None = None
    mining: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Launched:
    """A step whose numbers may still be on their way.

    Args:
        has_limits: Whether there was a limit to loss and gradient norm.
        table: Of every process: its share of the loss, gradient norm, whether the step was applied, norm of the
            connector's gradient (negative: not known), NaN and infinite scores of mining; None: nothing was learnt.
        ids: Samples of this process.
        started: When it was launched (``time.perf_counter``).
        waited: Seconds that this process waited for its data before.
    """

    ranks: Ranks
    table: Tensor | None
    has_limits: bool
    loss_scale: float | None
    tokens: int
    samples: int
    images: int
    lr: dict[str, float]
    ids: list[str]
    started: float
    waited: float = 0.0

    def outcome(self) -> Outcome:
        """Reads the numbers, and waits for them; called by all processes."""
        event, applied, loss, grad_norm, connector_norm, mining = "nothing_to_learn", False, math.nan, 0.0, None, (0, 0)
        if self.table is not None:
            rows = self.ranks.read(self.table)
            loss = sum(row[0] for row in rows)
            # What the first process sees counts for all: every one of them decides by the same numbers
            grad_norm, applied = rows[0][1], all(row[2] for row in rows)
            connector_norm = rows[0][3] if rows[0][3] >= 0 else None
            mining = int(sum(row[4] for row in rows)), int(sum(row[5] for row in rows))
            is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
            event = "" if applied else "spike" if self.has_limits and is_finite else "not_finite"
            if event and self.loss_scale is not None and self.loss_scale > 1 and math.isfinite(loss):
                event = "loss_scale"
        return Outcome(
            loss=loss,
            applied=applied,
            event=event or None,
            grad_norm=grad_norm,
            loss_scale=self.loss_scale,
            tokens=self.tokens,
            samples=self.samples,
            images=self.images,
            lr=self.lr,
            sample_ids=self.ranks.gather_texts(self.ids) if event else [],
            connector_norm=connector_norm,
            mining=mining,
        )


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass that is due; its answer is the detached loss.

    Args:
        normalizer: What the summed loss is divided by.
        last: Whether it is the last one of its step.
    """

    engine: Engine
    micro: CountedBatch
    normalizer: float
    last: bool

    def take(self) -> Tensor:
        """Takes it, by itself."""
        with part(DATA):
            batch = self.micro.on(self.engine.ranks.device)
        with part(LLM):  # but for what the model marks as vision
            return self.engine.accumulate(batch, self.normalizer, last=self.last)


T = TypeVar("T")
# Asks for passes, gets their losses, and gives something in the end.
Passes = Generator[Pass, Tensor, T]


def alone(passes: Passes[T]) -> T:
    """Takes all passes one after another; an error of one is raised where it was asked for."""
    try:
        due = next(passes)
        while True:
            try:
                loss = due.take()
            except BaseException as error:  # noqa: BLE001 - handed to whoever asked
                due = passes.throw(error)
            else:
                due = passes.send(loss)
    except StopIteration as end:
        result: T = end.value
        return result


def take_step(
    engine: Engine,
    settings: StageSettings,
    ranks: Ranks,
    micro_batches: Sequence[CountedBatch],
    step: int,
    lr_factor: float,
    fingerprint: int = 0,
    limits: Limits | None = None,
    mining: Tensor | None = None,
    before_update: Callable[[], None] | None = None,
) -> Passes[Launched]:
    """Launches one optimizer step over this process's micro-batches of the global batch: asks for their passes.

    Args:
        step: Its number, from 0.
        lr_factor: Of the peak learning rates.
        fingerprint: Of the global batch; see :func:`mgm_exp.train.agreement.batch_fingerprint`.
        limits: It is applied up to these; None: always, where it is finite.
        mining: (2,) where mining counts its NaN and infinite scores; it is set to zero here.
        before_update: Called when the gradients are complete.

    Raises:
        TrainingFailed: The processes are not at the same step of the same data.
    """
    started = time.perf_counter()
    counted = [
        sum(micro.supervised for micro in micro_batches),
        sum(micro.supervised > 0 for micro in micro_batches),
        sum(micro.tokens for micro in micro_batches),
        sum(micro.samples for micro in micro_batches),
        sum(micro.images for micro in micro_batches),
        step,
        fingerprint,
    ]
    with part(COMMUNICATION):
        totals = ranks.gather(counted)
    *counts, steps, fingerprints = zip(*totals, strict=True)
    check_agreement(steps, fingerprints)
    supervised, learning, tokens, samples, images = (int(sum(column)) for column in counts)
    table: Tensor | None = None
    update = Update(False, 0.0)
    if supervised:
        total = torch.zeros((), dtype=torch.float32, device=ranks.device)
        if mining is not None:
            mining.zero_()
        for j, micro in enumerate(micro_batches):
            seed_generators(settings.seed, step, j * ranks.world_size + ranks.rank)
            normalizer = supervised if settings.loss_norm is LossNorm.tokens else max(micro.supervised, 1) * learning
            total += yield Pass(engine, micro, float(normalizer), last=j == len(micro_batches) - 1)
            ranks.marks.tick()
        if before_update is not None:
            before_update()
        loss = None if limits is None else ranks.table(total[None])[:, 0].sum()
        with part(OPTIMIZER):
            update = engine.update(lr_factor, limits, loss)
        table = ranks.table(_numbers(total, update, mining))
    return Launched(
        ranks=ranks,
        table=table,
        has_limits=limits is not None,
        loss_scale=update.loss_scale,
        tokens=tokens,
        samples=samples,
        images=images,
        lr=learning_rates(engine.groups),
        ids=[name for micro in micro_batches for name in micro.ids],
        started=started,
    )


def _numbers(total: Tensor, update: Update, mining: Tensor | None) -> Tensor:
    """(6,) float64; see :class:`Launched`."""
    connector_norm = -1.0 if update.connector_norm is None else update.connector_norm
    numbers = (total, update.norm, update.verdict, connector_norm)
    # full(), not tensor(): that would copy a number from the host, and wait for the device
    parts = [
        n.double() if isinstance(n, Tensor) else torch.full((), float(n), dtype=torch.float64, device=total.device)
        for n in numbers
    ]
    counted = torch.zeros(2, dtype=torch.float64, device=total.device) if mining is None else mining.to(torch.float64)
    return torch.cat([torch.stack(parts), counted])


def seed_generators(seed: int, step: int, micro_batch: int) -> None:
    """Seeds torch's generators for one micro-batch of the global batch, whichever process computes it."""
    value = derived_seed(seed, "dropout", step, micro_batch)
    if torch.cuda.is_initialized():
        torch.manual_seed(value)
    else:  # the others have drawn nothing, and looking for each of them takes a millisecond
        torch.default_generator.manual_seed(value)
