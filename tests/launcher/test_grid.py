"""The cells of a grid, their order, and the name of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mgm_exp.config import NAME
from mgm_exp.errors import ConfigError
from mgm_exp.grid import parse_grid

Trees = Callable[..., Any]


def params(*overrides: str, file: dict[str, str] | None = None) -> list[dict[str, Any]]:
    return [cell.params for cell in parse_grid(list(overrides), file or {}).cells()]


def name(compose_tree: Trees, *overrides: str) -> str:
    return parse_grid(list(overrides), {}).name(compose_tree(*overrides, is_sweep=True))


def test_a_grid_has_every_combination_once() -> None:
    cells = params("data=raw,blip2", "seed=1,2", "train.lr=1e-3")
    assert cells == [
        {"data": "raw", "seed": 1},
        {"data": "raw", "seed": 2},
        {"data": "blip2", "seed": 1},
        {"data": "blip2", "seed": 2},
    ]


def test_what_shares_early_stages_comes_together_whatever_the_order_of_the_arguments() -> None:
    one = params("adapter=full,lora_r8", "train.lr=1,2", "data=raw,blip2", "model=tiny,mgm_2b")
    other = params("model=tiny,mgm_2b", "data=raw,blip2", "adapter=full,lora_r8", "train.lr=1,2")
    assert one == other
    assert list(one[0]) == ["model", "data", "adapter", "train.lr"]
    keys = [list(cell) for cell in params("adapter=full,lora_r8", "train.align.lr=1,2", "seed=0,1", "zero=2,3")]
    assert keys[0] == ["seed", "zero", "train.align.lr", "adapter"]


def test_a_cell_carries_the_fixed_overrides_and_its_own() -> None:
    cells = list(parse_grid(["+sweeps=ablation", "train.lr=1e-4", "zero=2,3"], {}).cells())
    assert [cell.overrides for cell in cells] == [
        ("+sweeps=ablation", "train.lr=1e-4", "zero='2'"),
        ("+sweeps=ablation", "train.lr=1e-4", "zero='3'"),
    ]


def test_the_command_line_wins_over_the_sweep_file() -> None:
    file = {"data": "raw,blip2", "adapter": "full,lora_r8"}
    assert params("data=raw", file=file) == [{"adapter": "full"}, {"adapter": "lora_r8"}]
    assert params("data=blip2,raw", "adapter=full", file=file) == [{"data": "blip2"}, {"data": "raw"}]


def test_values_may_be_a_choice_a_range_or_lists() -> None:
    assert params("adapter.rank=choice(4,8)") == [{"adapter.rank": 4}, {"adapter.rank": 8}]
    assert params("adapter.rank=range(2,8,2)") == [{"adapter.rank": rank} for rank in (2, 4, 6)]
    assert params("adapter.target_modules=[q_proj],[q_proj,v_proj]") == [
        {"adapter.target_modules": ["q_proj"]},
        {"adapter.target_modules": ["q_proj", "v_proj"]},
    ]


def test_a_pattern_stands_for_the_choices_that_match(_hydra: Any) -> None:
    grid = parse_grid(["tracker=glob(d*)"], {}, _hydra.config_loader)
    assert [cell.params for cell in grid.cells()] == [{"tracker": "default"}, {"tracker": "disabled"}]
    with pytest.raises(ConfigError, match="has no value"):
        parse_grid(["adapter=glob(nothing*)"], {}, _hydra.config_loader)
    with pytest.raises(ConfigError, match="a pattern is text"):
        parse_grid(["zero=glob([23])"], {}, _hydra.config_loader)


def test_a_value_given_twice_is_one_cell() -> None:
    assert params("seed=1,1,2") == [{"seed": 1}, {"seed": 2}]


def test_nothing_swept_is_one_cell() -> None:
    assert params("seed=1") == [{}]


@pytest.mark.parametrize("override", ["train.lr=interval(1e-5,1e-3)", "train.lr=tag(log,interval(1e-5,1e-3))"])
def test_an_interval_is_no_grid(override: str) -> None:
    with pytest.raises(ConfigError, match="interval"):
        parse_grid([override], {})


@pytest.mark.parametrize("key", ["paths.root", "sweep.name", "sweep.rerun", "trial", "+sweeps"])
def test_where_a_sweep_runs_is_not_swept(key: str) -> None:
    with pytest.raises(ConfigError, match="has one value"):
        parse_grid([f"{key}=a,b"], {})


def test_a_slip_of_the_finger_is_not_a_million_runs() -> None:
    with pytest.raises(ConfigError, match="1,000,000 cells"):
        parse_grid(["seed=range(0,1000)", "train.max_steps=range(1,1001)"], {})


def test_the_name_says_what_is_swept_and_does_not_depend_on_the_order(compose_tree: Trees) -> None:
    one = name(compose_tree, "adapter=lora_r8,lora_r16", "data=raw,blip2", "train.max_steps=9", "seed=3")
    other = name(compose_tree, "seed=3", "data=raw,blip2", "train.max_steps=9", "adapter=lora_r8,lora_r16")
    assert one == other
    assert one.startswith("data=raw,blip2+adapter=lora_r8,lora_r16-")


def test_the_name_changes_with_the_rest_of_the_configuration_only(compose_tree: Trees) -> None:
    base = name(compose_tree, "adapter=lora_r8,lora_r16")
    assert name(compose_tree, "adapter=lora_r8,lora_r16", "seed=1") != base
    assert name(compose_tree, "adapter=lora_r8,lora_r16", "model=mgm_2b") != base
    for unimportant in ("tracker=disabled", "paths.root=/elsewhere", "sweep.rerun=failed", "train.checkpoint.keep=2"):
        assert name(compose_tree, "adapter=lora_r8,lora_r16", unimportant) == base, unimportant


@pytest.mark.parametrize(
    "override",
    [
        "zero=2,3",
        "train.lr=1e-3,1e-4",
        "adapter.target_modules=[q_proj],[q_proj,v_proj]",
        "name='../x',y",
        "adapter.rank=range(1,900)",
        "data.path='/a/b c.json','/d/e.json'",
    ],
)
def test_every_name_is_a_folder_name(compose_tree: Trees, override: str) -> None:
    made = name(compose_tree, override)
    assert NAME.fullmatch(made), made
    assert len(made) <= 120


def test_long_lists_of_values_still_tell_sweeps_apart(compose_tree: Trees) -> None:
    one = name(compose_tree, "seed=range(0,500)")
    assert one.startswith("seed-")
    assert one != name(compose_tree, "seed=range(0,501)")
