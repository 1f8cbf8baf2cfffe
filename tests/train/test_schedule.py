"""The learning rate is the one the official recipe's Trainer would set."""

from __future__ import annotations

import math

import pytest
import torch

from mgm_exp.train.schedule import cosine_with_warmup, warmup_steps


@pytest.mark.parametrize(("ratio", "steps"), [(0.03, 4687), (0.03, 130), (0.05, 80), (0.0, 10), (0.5, 3), (0.99, 4)])
def test_every_step_has_the_rate_of_transformers_schedule(ratio: float, steps: int) -> None:
    from transformers import get_cosine_schedule_with_warmup

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    warmup = warmup_steps(ratio, steps)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        assert cosine_with_warmup(step, warmup, steps) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("ratio", "steps"), [(0.03, 4687), (0.03, 1), (0.0, 7), (0.1, 20)])
def test_warmup_is_as_long_as_in_transformers(ratio: float, steps: int) -> None:
    assert warmup_steps(ratio, steps) == math.ceil(ratio * steps)


def test_without_warmup_the_first_step_has_the_peak_rate_and_the_end_is_zero() -> None:
    assert cosine_with_warmup(0, 0, 100) == 1.0
    assert cosine_with_warmup(100, 0, 100) == pytest.approx(0.0, abs=1e-12)
