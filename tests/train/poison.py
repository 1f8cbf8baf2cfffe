"""Not a test: makes samples bad on their way to the model, as a broken image or a hardware fault would."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mgm_exp.train.step import CountedBatch


@contextmanager
def poison_pixels(ids: Collection[str]) -> Iterator[None]:
    """The pixels of every micro-batch that holds one of these samples become NaN."""
    original = CountedBatch.on

    def on(self: CountedBatch, device: torch.device) -> dict[str, Any]:
        batch = original(self, device)
        if set(self.ids) & set(ids):
            batch["images"] = batch["images"] * float("nan")
        return batch

    CountedBatch.on = on  # type: ignore[method-assign]
    try:
        yield
    finally:
        CountedBatch.on = original  # type: ignore[method-assign]


@contextmanager
def loud(ids: Collection[str], factor: float = 1000.0) -> Iterator[None]:
    """The loss of every micro-batch that holds one of these samples is so many times larger, and its gradient too."""
    from mgm_exp.model import LossModule

    original = LossModule.forward

    def forward(self: LossModule, batch: Any, normalizer: float | None = None) -> torch.Tensor:
        loss: torch.Tensor = original(self, batch, normalizer)
        return loss * factor if set(batch["ids"]) & set(ids) else loss

    LossModule.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        LossModule.forward = original  # type: ignore[method-assign]


def limit_memory(samples: int, from_call: int) -> None:
    """From its ``from_call``-th micro-batch on, this process has memory for so many samples at once, as on a GPU."""
    original, calls = CountedBatch.on, itertools.count(1)

    def on(self: CountedBatch, device: torch.device) -> dict[str, Any]:
        if next(calls) >= from_call and len(self.ids) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, device)

    CountedBatch.on = on  # type: ignore[method-assign]
