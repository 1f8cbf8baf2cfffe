"""How the shipped tiny models are taught: pixels, batches, dense losses, and the one optimisation loop of all phases.

Phases are counted in steps, never in seconds: equal seeds, versions and thread counts give equal weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Report = Callable[[str, int, int, dict[str, float]], None]
"""Called as report(phase, step, steps, measures) after each step."""

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalised(pixels: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W), normalised as CLIP's pixels, stored channels-last."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).float().div_(255.0)
    x = (x - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    return x.permute(0, 3, 1, 2)


NOTHING_WEIGHT = 0.2
"""Weight of class 0 ("nothing here"), which most positions have."""


def dense_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of (..., classes) against uint8 classes (...), class 0 down-weighted."""
    classes = logits.shape[-1]
    weight = torch.ones(classes)
    weight[0] = NOTHING_WEIGHT
    return F.cross_entropy(logits.reshape(-1, classes), target.reshape(-1).long(), weight=weight)


def found_share(logits: Tensor, target: Tensor) -> float:
    """Accuracy over the positions that hold something."""
    is_there = target > 0
    return float((logits.argmax(-1) == target)[is_there].float().mean()) if bool(is_there.any()) else 0.0


class Sampler:
    """Endless batches of indices: a new permutation each epoch, from its own seed."""

    def __init__(self, n: int, batch: int, seed: int) -> None:
        if n < batch:
            raise ValueError(f"{n} examples cannot fill a batch of {batch}.")
        self._n, self._batch = n, batch
        self._rng = np.random.RandomState(seed)
        self._left = np.empty(0, dtype=np.int64)

    def __call__(self) -> np.ndarray:
        if len(self._left) < self._batch:
            self._left = self._rng.permutation(self._n)
        taken, self._left = self._left[: self._batch], self._left[self._batch :]
        return taken


def optimise(
    phase: str,
    modules: Iterable[nn.Module],
    step_loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    lr: float,
    report: Report | None = None,
    betas: tuple[float, float] = (0.9, 0.98),
    weight_decay: float = 0.01,
    warmup: float = 0.15,
    clip: float = 1.0,
) -> None:
    """Train all parameters of `modules` that require gradients for `steps` steps.

    Args:
        phase: name handed to `report`.
        step_loss: step number -> (loss, measures to report).
        lr: peak of the one-cycle schedule (cosine up over `warmup` of the steps, cosine down to 0).
    """
    parameters: Sequence[nn.Parameter] = [p for m in modules for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=max(2, steps), pct_start=warmup, cycle_momentum=False
    )
    for step in range(steps):
        loss, measures = step_loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if step + 1 < max(2, steps):
            schedule.step()
        if report is not None:
            report(phase, step + 1, steps, {"loss": float(loss.detach()), **measures})
