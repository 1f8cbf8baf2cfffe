"""A stage has random generators of its own, and they go on where a checkpoint left them."""

from __future__ import annotations

import random

import numpy as np
import torch

from mgm_exp.train.generators import generator_states, own_generators, set_generator_states

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float]:
    return random.gauss(0, 1), float(np.random.normal()), float(torch.randn(()))


def test_every_generator_goes_on_where_it_was() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()  # leaves a cached second Gaussian in python and numpy
    states = generator_states(CPU)
    expected = [draw() for _ in range(5)]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    set_generator_states(states, CPU)
    assert [draw() for _ in range(5)] == expected


def test_inside_they_start_from_the_seed_and_outside_nothing_was_drawn() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = draw()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    drawn = []
    for seed in (7, 7, 8):
        with own_generators(seed, CPU):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))
    assert draw() == expected
