"""The check of the trainable set can fail: it sees a frozen tensor that moved and a trained one that did not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgm_exp.config import Device
from mgm_exp.errors import TrainingFailed
from mgm_exp.model import TrainableSet
from mgm_exp.train.contract import MovementCheck, checksum
from mgm_exp.train.engine import PlainEngine
from mgm_exp.train.job import stage_settings
from mgm_exp.train.optimizer import build_optimizer, parameter_groups
from mgm_exp.train.ranks import Ranks

from .conftest import experiment

SETTINGS = stage_settings(experiment(), "instruct")
ALONE = Ranks.alone(Device.cpu)
AUX_BIAS = "model.vlm_uni_aux_projector.0.bias"


class Parts(nn.Module):
    """Parameters with official names; LoRA's A only has a gradient when B is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(torch.ones(3)) for name in NAMES})
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        with torch.no_grad():
            self.values["l/lora_B/weight"].zero_()

    def forward(self, batch: dict[str, Any], normalizer: float) -> Tensor:
        a, b = self.values["l/lora_A/weight"], self.values["l/lora_B/weight"]
        loss = (
            (a * b - 1).pow(2).sum()
            + self.values["model/norm"].sum()
            + 0 * self.values[AUX_BIAS.replace(".", "/")].sum()
        )
        return loss + self.values["projector"].sum() * batch["n_images"]


NAMES = ("l.lora_A.weight", "l.lora_B.weight", "model.norm", "projector", AUX_BIAS)
TRAINABLE = TrainableSet(
    lora=frozenset({"l.lora_A.weight", "l.lora_B.weight"}),
    connector=frozenset({"projector", AUX_BIAS}),
    llm=frozenset({"model.norm"}),
    patterns=(),
    n_lora=6,
    n_other=9,
    late=frozenset({"l.lora_A.weight"}),
)


def prepared() -> tuple[Parts, PlainEngine, MovementCheck]:
    module = Parts()
    named = {
        name.removeprefix("values.").replace("/", "."): p for name, p in module.named_parameters() if p.requires_grad
    }
    optimizer = build_optimizer(parameter_groups(named, TRAINABLE.connector_names, SETTINGS), SETTINGS)
    engine = PlainEngine(module, named, optimizer, SETTINGS, ALONE)
    return module, engine, MovementCheck(module, engine, TRAINABLE, ALONE)


def step(engine: PlainEngine, check: MovementCheck, n_images: int = 1) -> None:
    check.before_update()
    engine.accumulate({"n_images": n_images}, 1.0, last=True)
    engine.update(1.0)
    check.after_update(has_images=n_images > 0)


def test_it_is_complete_once_all_moved_that_can() -> None:
    _, engine, check = prepared()
    step(engine, check)
    assert check.report()["not_moved"] == ["l.lora_A.weight", AUX_BIAS]
    assert not check.is_done
    step(engine, check)
    assert check.is_done
    assert check.report() == {
        "frozen_tensors": 1,
        "frozen_check": "every element",
        "moved": 4,
        "not_moved": [AUX_BIAS],
        "is_complete": True,
    }


def test_the_connector_may_rest_in_a_batch_without_images() -> None:
    _, engine, check = prepared()
    step(engine, check, n_images=0)
    assert "projector" in check.report()["not_moved"]
    step(engine, check, n_images=0)
    assert not check.is_done
    step(engine, check)
    assert check.is_done


def test_a_frozen_tensor_that_moves_fails() -> None:
    module, engine, check = prepared()
    check.before_update()
    engine.accumulate({"n_images": 1}, 1.0, last=True)
    engine.update(1.0)
    with torch.no_grad():
        module.frozen[2] += 1e-6
    with pytest.raises(TrainingFailed, match="frozen is frozen and moved"):
        check.after_update(has_images=True)


@pytest.mark.parametrize("name", ["model.norm", "projector", "l.lora_B.weight"])
def test_a_trained_tensor_that_is_stuck_fails(name: str) -> None:
    _, engine, check = prepared()
    check.before_update()
    engine.accumulate({"n_images": 1}, 1.0, last=True)
    engine.trainable[name].grad = None
    engine.update(1.0)
    with pytest.raises(TrainingFailed, match=f"{name} is trained and did not move"):
        check.after_update(has_images=True)


def test_lora_a_has_to_move_in_the_second_update() -> None:
    _, engine, check = prepared()
    step(engine, check)
    engine.accumulate({"n_images": 1}, 1.0, last=True)
    engine.trainable["l.lora_A.weight"].grad = None
    engine.update(1.0)
    with pytest.raises(TrainingFailed, match="lora_A"):
        check.after_update(has_images=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [7, 5_000_000])
def test_a_checksum_sees_the_smallest_change(dtype: torch.dtype, n: int) -> None:
    tensor = torch.ones(n, dtype=dtype)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    bits = tensor.view(torch.int32 if dtype is torch.float32 else torch.int16)
    bits[n // 2] += 1
    assert checksum(tensor) != before
