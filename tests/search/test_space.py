"""What a search may choose from: Hydra's grammar, ends that are not lost, conditions, derived values, fixed points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.compose import parse
from mgm_exp.errors import ConfigError
from mgm_exp.search.space import Choice, Dimension, Numbers, Space, as_text, parse_space


def space_of(*arguments: str, **params: Any) -> Space:
    return parse_space(list(arguments), params, parse)


def domain(argument: str) -> Choice | Numbers:
    (item,) = space_of(argument).dimensions
    return item.domain


def nothing(name: str, overrides: Sequence[str]) -> Any:
    raise AssertionError(f"{name} was looked up in the configuration")


def drawn(space: Space, params: dict[str, Any], config_value: Callable[..., Any] = nothing) -> Any:
    return space.choose(optuna.trial.FixedTrial(params), config_value)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("adapter.rank=choice(4,8,16)", Choice((4, 8, 16), ("4", "8", "16"))),
        ("adapter.rank=4,8", Choice((4, 8), ("4", "8"))),
        ("adapter=lora_r8,full", Choice(("lora_r8", "full"), ("lora_r8", "full"))),
        ("data.path=null,a", Choice((None, "a"), ("null", "a"))),
        ("train.freeze_connector=true,false", Choice((True, False), ("true", "false"))),
        ("zero=2,3", Choice(("2", "3"), ("'2'", "'3'"))),
        ("zero=choice(none,2)", Choice(("none", "2"), ("none", "'2'"))),
        ("train.lr=interval(1,2)", Numbers(1.0, 2.0)),
        ("train.lr=tag(log,interval(1e-5,1e-3))", Numbers(1e-5, 1e-3, None, True)),
        ("train.max_steps=int(interval(4,16))", Numbers(4, 16, None, False, True)),
        ("train.max_steps=tag(log,int(interval(4,64)))", Numbers(4, 64, None, True, True)),
        ("train.max_steps=range(8,17,8)", Numbers(8, 16, 8, False, True)),
        ("train.max_steps=range(0,5)", Numbers(0, 4, 1, False, True)),
        ("train.max_steps=range(5,0,-2)", Numbers(1, 5, 2, False, True)),
        ("train.lr=range(0,0.11,0.05)", Numbers(0.0, 0.1, 0.05)),
        ("train.lr=range(0,0.1,0.05)", Numbers(0.0, 0.05, 0.05)),
        ("train.max_steps=tag(log,range(1,65))", Numbers(1, 64, None, True, True)),
        (
            "adapter.target_modules=[q_proj],[q_proj,v_proj]",
            Choice(("[q_proj]", "[q_proj,v_proj]"), ("[q_proj]", "[q_proj,v_proj]")),
        ),
    ],
)
def test_hydras_grammar(argument: str, expected: Any) -> None:
    assert domain(argument) == expected


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("train.lr=tag(log,interval(0,1))", "begins above 0"),
        ("train.lr=interval(2,1)", "lower one first"),
        ("train.lr=interval(1,inf)", "finite"),
        ("train.lr=tag(log,range(0.1,1,0.1))", "no steps"),
        ("train.lr=tag(logg,interval(1,2))", "logg"),
        ("seed=range(3,3)", "no value"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(argument: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        space_of(argument)


@settings(max_examples=60, deadline=None)
@given(st.integers(-50, 50), st.integers(1, 200), st.integers(1, 9))
def test_a_range_has_exactly_pythons_values(start: int, length: int, step: int) -> None:
    expected = list(range(start, start + length, step))
    found = domain(f"seed=range({start},{start + length},{step})")
    assert found.points() == expected
    distribution: Any = found.distribution()
    assert (distribution.low, distribution.high) == (expected[0], expected[-1]), "the last value is not lost"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_a_text_survives_the_grammar(text: str) -> None:
    if any(ord(c) < 32 for c in text):
        return
    (override,) = parse([f"data.path={as_text(text)}"])
    assert override.value() == text


def test_fixed_overrides_stay_and_the_command_line_wins_over_the_file() -> None:
    space = space_of(
        "adapter.rank=8", "seed=3", **{"adapter.rank": "choice(4,8)", "train.lr": "interval(1,2)", "model": "tiny"}
    )
    assert space.keys == ["train.lr"]
    assert sorted(space.fixed) == ["adapter.rank=8", "model=tiny", "seed=3"]
    space = space_of("train.lr=choice(1,2)", **{"train.lr": "interval(1,2)"})
    assert isinstance(space.dimensions[0].domain, Choice)


CONDITIONAL = {
    "adapter.alpha": {"value": "_ratio * adapter.rank", "when": "adapter.kind == 'lora'"},
    "adapter.rank": {"space": "choice(4,8)", "when": "adapter.kind == 'lora'"},
    "_ratio": {"space": "choice(1,2,4)", "when": "adapter.kind == 'lora'"},
    "adapter": "full,lora_r8",
    "train.lr": [
        {"space": "tag(log,interval(1e-4,1e-2))", "when": "adapter == 'full'"},
        {"space": "tag(log,interval(1e-3,1e-1))"},
    ],
}


def kind(name: str, overrides: Sequence[str]) -> Any:
    assert name == "adapter.kind"
    return "full" if "adapter=full" in overrides else "lora"


def test_what_is_conditional_is_chosen_only_where_its_condition_holds() -> None:
    space = space_of("seed=1", **CONDITIONAL)
    assert space.is_conditional
    point = drawn(space, {"adapter": "lora_r8", "adapter.rank": 8, "_ratio": 4, "train.lr@2": 0.05}, kind)
    assert point.params == {"adapter": "lora_r8", "_ratio": 4, "adapter.rank": 8, "adapter.alpha": 32, "train.lr": 0.05}
    assert point.overrides[0] == "seed=1"
    assert set(point.overrides[1:]) == {
        "adapter=lora_r8", "adapter.rank=8", "adapter.alpha=32", "train.lr=0.05",
    }  # fmt: skip
    point = drawn(space, {"adapter": "full", "train.lr": 0.001}, kind)
    assert point.params == {"adapter": "full", "train.lr": 0.001}


def test_groups_come_before_what_depends_on_them_whatever_the_order_of_the_file() -> None:
    order = [item.key for item in space_of(**CONDITIONAL).items]
    assert order.index("adapter") < order.index("_ratio")
    assert order.index("adapter.rank") < order.index("adapter.alpha")
    assert order.index("train.lr") == len(order) - 2 or order.index("adapter") < order.index("train.lr")


def test_a_circle_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"circle: a\.b, c"):
        space_of(**{"a.b": {"value": "c + 1"}, "c": {"value": "a.b - 1"}})


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"spcae": "1,2"}, "it takes space"),
        ({"space": "1,2", "value": "3"}, "it takes space"),
        ({"when": "true"}, "it takes space"),
        ({"space": "1,2", "when": "import os"}, "not a formula"),
        ({"value": "open('x')"}, "calls open"),
    ],
)
def test_a_sweep_file_that_says_something_else_is_refused(entry: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        space_of(seed=entry)


def test_a_fixed_value_may_be_conditional_too() -> None:
    space = space_of(**{"zero": "none,2", "zero.offload_optimizer": {"space": "cpu", "when": "zero == '2'"}})
    assert "zero.offload_optimizer=cpu" in drawn(space, {"zero": "2", "zero.offload_optimizer": "cpu"}).overrides
    point = drawn(space, {"zero": "none"})
    assert point.overrides == ("zero=none",)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"adapter.rank": 8, "_ratio": 2}, {"adapter.rank": 8, "_ratio": 2}),
        ({"adapter": "full", "train.lr": 5e-3}, {"adapter": "full", "train.lr": 5e-3, "train.lr@2": 5e-3}),
        ({"train.lr": 0.05}, {"train.lr@2": 0.05}),
        ({"adapter.rank": 8.0}, {"adapter.rank": 8}),
    ],
)
def test_a_point_to_be_tried_first_is_named_as_the_study_names_it(given: Any, names: Any) -> None:
    assert space_of(**CONDITIONAL).fixed_point(given, "sweep.enqueue[0]") == names


def test_nothing_may_be_a_choice() -> None:
    space = space_of("data.max_samples=null,100")
    assert space.fixed_point({"data.max_samples": None}, "x") == {"data.max_samples": None}
    study = optuna.create_study()
    study.enqueue_trial(space.fixed_point({"data.max_samples": None}, "x"), skip_if_exists=True)
    study.enqueue_trial(space.fixed_point({"data.max_samples": None}, "x"), skip_if_exists=True)
    assert len(study.trials) == 1
    assert space.choose(study.ask(), nothing).overrides == ("data.max_samples=null",)


def test_numbers_that_name_files_are_enqueued_as_the_study_holds_them() -> None:
    space = space_of("zero=2,3", "seed=range(0,6,2)")
    assert space.fixed_point({"zero": 2, "seed": 4}, "x") == {"zero": "2", "seed": 4}
    assert drawn(space, {"zero": "2", "seed": 4}).overrides == ("zero='2'", "seed=4")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"adapter.rank": 5}, "4, 8"),
        ({"adapter.alpha": 5}, "follows from others"),
        ({"train.epochs": 5}, "is not chosen in this search"),
        ({"train.lr": 7.0}, "from 0.0001 to 0.01 or numbers from 0.001 to 0.1"),
        ({"train.lr": True}, "is not what"),
    ],
)
def test_a_point_that_the_search_does_not_contain_is_refused(given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        space_of(**CONDITIONAL).fixed_point(given, "sweep.enqueue[0]")


def test_the_grid_keeps_its_upper_bounds() -> None:
    space = space_of("a=range(8,17,8)", "b=range(0,0.11,0.05)", "c=int(interval(1,3))", "d=x,y")
    assert space.grid() == {"a": [8, 16], "b": [0.0, 0.05, 0.1], "c": [1, 2, 3], "d": ["x", "y"]}
    with pytest.raises(ConfigError, match="no end"):
        space_of("train.lr=interval(0,1)").grid()


def test_each_dimension_is_a_distribution_of_optuna() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    space = space_of("a=1,2", "b=tag(log,interval(1,2))", "c=range(0,9,2)", "d=int(interval(1,3))")
    found = {item.key: item.domain.distribution() for item in space.dimensions}
    assert found == {
        "a": CategoricalDistribution((1, 2)),
        "b": FloatDistribution(1, 2, log=True),
        "c": IntDistribution(0, 8, step=2),
        "d": IntDistribution(1, 3),
    }
    assert all(isinstance(item, Dimension) for item in space.items)
