"""Learning rate over the steps: linear warm-up, then a cosine to zero.

A pure function of the step, so that a resumed run needs no scheduler state. Equal, value for value, to transformers'
``get_cosine_schedule_with_warmup`` (optimization.py) with half a cosine period, as the official recipe uses it.
"""

from __future__ import annotations

import math


def warmup_steps(ratio: float, total_steps: int) -> int:
    """Steps of the warm-up: ceil(ratio * steps), as transformers' ``TrainingArguments.get_warmup_steps``."""
    return math.ceil(ratio * total_steps)


def cosine_with_warmup(step: int, warmup: int, total_steps: int) -> float:
    """Factor of the peak learning rate at a step.

    Args:
        step: Optimizer steps done before this one; the first step has 0, and a factor of 0 where there is a warm-up.
        warmup: Steps of the linear warm-up.
        total_steps: Steps of the whole stage.

    Returns:
        A factor in 0..1.
    """
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))
