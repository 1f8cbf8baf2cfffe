"""Projector and mining are a group of their own; norms and biases are not decayed; small ones are updated at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mgm_exp.train.job import stage_settings
from mgm_exp.train.optimizer import (
    build_optimizer,
    learning_rates,
    parameter_groups,
    set_learning_rates,
    update_at_once,
)

from .conftest import experiment

SETTINGS = stage_settings(experiment(lr=1e-2), "instruct")
NAMED = {
    "layer.weight": nn.Parameter(torch.ones(2, 2)),
    "norm.weight": nn.Parameter(torch.ones(2)),
    "projector.weight": nn.Parameter(torch.ones(2, 2)),
    "projector.bias": nn.Parameter(torch.ones(2)),
}
CONNECTOR = {"projector.weight", "projector.bias"}


def test_the_connector_has_its_own_learning_rate() -> None:
    groups = parameter_groups(NAMED, CONNECTOR, SETTINGS)
    assert [(group["group"], group["peak_lr"], len(group["params"])) for group in groups] == [
        ("llm", 1e-2, 2),
        ("connector", 1e-3, 2),
    ]
    optimizer = build_optimizer(groups, SETTINGS)
    set_learning_rates(optimizer.param_groups, 0.5)
    assert learning_rates(optimizer.param_groups) == {"llm": 5e-3, "connector": 5e-4}


def test_lora_plus_and_the_towers_have_rates_of_their_own() -> None:
    named = {**NAMED, "tower.weight": nn.Parameter(torch.ones(2)), "b.weight": nn.Parameter(torch.ones(2, 2))}
    settings = replace(SETTINGS, vision_tower_lr=1e-6)
    groups = parameter_groups(named, CONNECTOR, settings, towers={"tower.weight"}, rates={"b.weight": 16.0})
    assert [(group["group"], group["peak_lr"], len(group["params"])) for group in groups] == [
        ("llm", 1e-2, 2),
        ("llm_x16", 0.16, 1),
        ("connector", 1e-3, 2),
        ("towers", 1e-6, 1),
    ]


def test_weight_decay_spares_norms_and_biases() -> None:
    groups = parameter_groups(NAMED, CONNECTOR, replace(SETTINGS, weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {name: decay[id(parameter)] for name, parameter in NAMED.items()} == {
        "layer.weight": 0.1,
        "norm.weight": 0.0,
        "projector.weight": 0.1,
        "projector.bias": 0.0,
    }


def test_an_untrained_group_does_not_exist() -> None:
    only = {"layer.weight": NAMED["layer.weight"]}
    assert [group["group"] for group in parameter_groups(only, set(), SETTINGS)] == ["llm"]


def updated(dtype: torch.dtype, *, at_once: bool, steps: int = 5) -> list[torch.Tensor]:
    """Weights and moments after some steps; every third gradient is missing in each."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 32), (64, 8), (3,), (), (1, 1), (5, 7, 2), (40, 41)]
    named = {f"{n}": nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for n, shape in enumerate(shapes)}
    own = replace(SETTINGS, weight_decay=0.1)
    optimizer = build_optimizer(parameter_groups(named, {"2", "5"}, own), own)
    if at_once:
        update_at_once(optimizer.param_groups)
        assert all(group["foreach"] is (True if dtype.itemsize >= 4 else None) for group in optimizer.param_groups)
    for step in range(steps):
        set_learning_rates(optimizer.param_groups, 1 / (step + 1))
        for number, parameter in enumerate(named.values()):
            drawn = torch.randn(parameter.shape, generator=generator) * 10.0 ** (number - 4)
            parameter.grad = drawn.to(dtype) if (step + number) % 3 else None
        optimizer.step()
    states = [state[key] for state in optimizer.state.values() for key in ("step", "exp_avg", "exp_avg_sq")]
    return [*(parameter.detach() for parameter in named.values()), *states]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tensors_updated_at_once_have_the_bits_of_one_by_one(dtype: torch.dtype) -> None:
    one_by_one, at_once = updated(dtype, at_once=False), updated(dtype, at_once=True)
    assert len(one_by_one) == len(at_once) == 7 + 7 * 3
    for expected, found in zip(one_by_one, at_once, strict=True):
        assert expected.dtype == found.dtype and torch.equal(expected.nan_to_num(), found.nan_to_num())


def test_large_groups_are_not_copied() -> None:
    large = nn.Parameter(torch.empty(2**22 + 1, device="meta"))
    groups = [{"params": [large]}, {"params": [nn.Parameter(torch.empty(2, device="meta"))]}]
    groups += [
        {"params": [nn.Parameter(torch.empty(2**21)) for _ in range(3)]},
        {"params": [nn.Parameter(torch.ones(2))]},
    ]
    groups += [{"params": [nn.Parameter(torch.ones(2))], "fused": True}]
    update_at_once(groups)
    assert [group.get("foreach") for group in groups] == [None, None, None, True, None]
