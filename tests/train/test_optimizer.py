"""Projector and mining are a group of their own; norms and biases are not decayed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from mgm_exp.train.job import stage_settings
from mgm_exp.train.optimizer import build_optimizer, learning_rates, parameter_groups, set_learning_rates

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
