"""A model that does not see, or does not learn, is named; one that does is left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mgm_exp.config import Device
from mgm_exp.train.memory import SETTLING_STEPS, TREND_STEPS, MemoryGrowth, trend
from mgm_exp.train.micro_batch import smaller_micro_batch
from mgm_exp.train.ranks import Ranks
from mgm_exp.train.vitals import Vitals, layer_group

ALONE = Ranks.alone(Device.cpu)


class Body(nn.Module):
    """A projector between images and an LLM that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.mm_projector = nn.Linear(4, 4)
        self.mining_faults: Any = None


def vitals_of(b_values: tuple[float, ...] = (1.0,)) -> tuple[Vitals, Body]:
    body = Body()
    trainable = {f"layers.{i}.lora_B.weight": nn.Parameter(torch.full((3, 2), v)) for i, v in enumerate(b_values)}
    engine: Any = SimpleNamespace(trainable=trainable, master=lambda name: trainable[name].detach())
    model = nn.Module()
    model.model = body
    return Vitals(model, engine, ALONE, 20), body


def look(vitals: Vitals, body: Body, pixels: torch.Tensor, connector_norm: float | None = 1.0) -> list[str]:
    with vitals.watching([SimpleNamespace(batch={})]):
        body.mm_projector(pixels)
    return [detail for _, detail in vitals.faults(True, connector_norm)]


def test_tokens_that_differ_are_alive_and_equal_ones_are_not() -> None:
    torch.manual_seed(0)
    vitals, body = vitals_of()
    assert look(vitals, body, torch.randn(2, 5, 4)) == []
    assert "are the same" in look(vitals, body, torch.ones(2, 5, 4))[0]
    body.mm_projector.weight.data.zero_()
    assert "are the same" in look(vitals, body, torch.randn(2, 5, 4))[0]
    assert not body.mm_projector._forward_hooks, "it looks only while it was asked to"


def test_cached_tokens_are_looked_at_and_rows_without_an_image_are_not() -> None:
    vitals, _ = vitals_of()
    torch.manual_seed(0)
    tokens = torch.cat([torch.randn(2, 5, 4), torch.zeros(1, 5, 4)])
    for cached, is_dead in ((tokens, False), (torch.cat([torch.ones(2, 5, 4), torch.zeros(1, 5, 4)]), True)):
        with vitals.watching([SimpleNamespace(batch={"visual_tokens": cached})]):
            pass
        assert bool(vitals.faults(True, None)) == is_dead
    with vitals.watching([SimpleNamespace(batch={"visual_tokens": torch.zeros(3, 5, 4)})]):
        pass
    assert vitals.faults(False, None) == [], "there was nothing to see"


def test_a_connector_without_a_gradient_and_a_lora_that_stays_zero() -> None:
    torch.manual_seed(0)
    vitals, body = vitals_of((0.0, 1.0))
    found = look(vitals, body, torch.randn(2, 5, 4), connector_norm=0.0)
    assert [text.split()[0] for text in found] == ["the", "1"]
    assert "gradient of projector and mining is zero" in found[0]
    assert "layers.0.lora_B.weight" in found[1]


def test_a_look_is_due_now_and_then() -> None:
    vitals, _ = vitals_of()
    assert [n for n in range(61) if vitals.is_due(n)] == [20, 40, 60]


def test_mining_counts_what_it_replaces() -> None:
    from mgm_exp.model.mining import mine

    torch.manual_seed(0)
    query, aux, val = nn.Linear(4, 4), nn.Linear(6, 4), nn.Linear(6, 4)
    low, high = torch.randn(1, 4, 4), torch.randn(1, 6, 4, 4)
    faults = torch.zeros(2, dtype=torch.int64)
    clean = mine(low, high, query, aux, val, faults)
    assert faults.tolist() == [0, 0]
    assert torch.equal(clean, mine(low, high, query, aux, val))
    low[0, 0, 0] = float("nan")
    mine(low, high, query, aux, val, faults)
    assert faults.tolist() == [4, 0], "one patch asks its four pixels"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.self_attn.q_proj.lora_A.weight", "layers.3.lora_A"),
        ("model.layers.11.mlp.up_proj.weight", "layers.11"),
        ("model.mm_projector.0.bias", "mm_projector"),
        ("model.embed_tokens.weight", "embed_tokens"),
    ],
)
def test_layers_have_names(name: str, group: str) -> None:
    assert layer_group(name) == group


# -- memory ------------------------------------------------------------------------------------------------------------


def grown(per_step: float, *, limit: float = 10.0, steps_to_go: int = 10_000, jump: bool = False) -> list[str]:
    growth = MemoryGrowth({"host memory": limit})
    found = []
    for step in range(SETTLING_STEPS + 2 * TREND_STEPS):
        gib = 2.0 + (per_step * 100 if jump and step > 150 else per_step * step * (not jump)) + 0.001 * (step % 7)
        found.append(growth.note([gib], steps_to_go - step))
    return [str(leak) for leak in found if leak is not None]


def test_a_leak_is_named_with_the_steps_that_are_left() -> None:
    found = grown(0.002)
    assert len(found) == 2, "once a window"
    assert "host memory grows by 2.0" in found[0]
    assert "it ends in about 3,7" in found[0], found[0]


@pytest.mark.parametrize(
    "settings", [{"per_step": 0.0}, {"per_step": 0.01, "jump": True}, {"per_step": 0.002, "steps_to_go": 600}]
)
def test_a_level_a_jump_and_what_ends_after_the_stage_are_no_leak(settings: dict[str, Any]) -> None:
    assert grown(**settings) == []


def test_a_trend_is_the_least_squares_line() -> None:
    slope, correlation = trend([1.0, 3.0, 5.0, 7.0])
    assert (slope, correlation) == pytest.approx((2.0, 1.0))
    assert trend([4.0] * 9) == (0.0, 0.0)


@pytest.mark.parametrize(("samples", "size", "smaller"), [(8, 8, 4), (6, 3, 1), (12, 6, 3), (4, 1, None), (7, 7, 1)])
def test_a_smaller_micro_batch_divides_the_samples_of_a_process(samples: int, size: int, smaller: int | None) -> None:
    assert smaller_micro_batch(samples, size) == smaller
