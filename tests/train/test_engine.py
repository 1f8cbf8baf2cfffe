"""Plain PyTorch's engine on a module with the loss's face: what an update does, and when it does not happen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgm_exp.config import Device, Precision
from mgm_exp.train.engine import PlainEngine, poisoned_if_not_finite
from mgm_exp.train.guards import Limits
from mgm_exp.train.job import StageSettings, stage_settings
from mgm_exp.train.optimizer import build_optimizer, parameter_groups
from mgm_exp.train.ranks import Ranks

from .conftest import experiment

SETTINGS = stage_settings(experiment(lr=0.1), "instruct")


class Regression(nn.Module):
    """Summed squared error over a normalizer; ``factor`` multiplies it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, batch: dict[str, Any], normalizer: float) -> Tensor:
        error = self.second(torch.tanh(self.first(batch["x"]))) - batch["y"]
        return (error.float() ** 2).sum() * batch.get("factor", 1.0) / normalizer


def engine_of(settings: StageSettings = SETTINGS, **kwargs: Any) -> PlainEngine:
    module = Regression()
    named = dict(module.named_parameters())
    optimizer = build_optimizer(parameter_groups(named, set(), settings), settings)
    return PlainEngine(module, named, optimizer, settings, Ranks.alone(Device.cpu), **kwargs)


def batch_of(n: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(n, 4, generator=generator), "y": torch.randn(n, 1, generator=generator), **more}


def parts(batch: dict[str, Any], size: int) -> list[dict[str, Any]]:
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, len(batch["x"]), size)]


def weights(engine: PlainEngine) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine.trainable.items()}


def train(engine: PlainEngine, batches: list[dict[str, Any]], normalizer: float, lr: float = 1.0) -> Any:
    for i, batch in enumerate(batches):
        engine.accumulate(batch, normalizer, last=i == len(batches) - 1)
    return engine.update(lr)


def test_accumulation_gives_the_update_of_the_whole_batch() -> None:
    whole, split = engine_of(), engine_of()
    for step in range(3):
        batch = batch_of(8, step)
        a, b = train(whole, [batch], 8.0), train(split, parts(batch, 2), 8.0)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], weight, rtol=1e-6, atol=1e-7)


def test_the_update_is_torchs_adamw_with_clipping() -> None:
    engine = engine_of()
    reference = Regression()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.1 * 0.25, betas=SETTINGS.betas, weight_decay=0.0)
    reference(batch_of(8), 1.0).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    assert norm > 1.0
    optimizer.step()
    update = train(engine, [batch_of(8)], 1.0, lr=0.25)
    assert update.applied
    assert update.grad_norm == float(norm)
    assert all(
        torch.equal(weight, dict(reference.named_parameters())[name]) for name, weight in weights(engine).items()
    )


def test_without_clipping_the_norm_is_only_reported() -> None:
    clipped, free = engine_of(), engine_of(replace(SETTINGS, max_grad_norm=0.0))
    a, b = train(clipped, [batch_of(8)], 0.01), train(free, [batch_of(8)], 0.01)
    assert a.grad_norm == b.grad_norm > 1.0
    # Adam's first step hides the scale of a gradient; its second moment does not
    second = {e: e.optimizer.state[e.trainable["first.weight"]]["exp_avg_sq"].sum() for e in (clipped, free)}
    assert second[free] > second[clipped] * 100


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_gradient_that_is_not_finite_changes_nothing(factor: float, bad: int) -> None:
    engine = engine_of()
    train(engine, [batch_of(8)], 8.0)
    before, state = weights(engine), {key: value.clone() for key, value in engine._states()}
    batches = [batch_of(4, 1), batch_of(4, 2)]
    batches[bad]["factor"] = factor
    update = train(engine, batches, 8.0)
    assert not update.applied
    assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())
    assert all(torch.equal(value, state[key]) for key, value in engine._states())
    assert train(engine, [batch_of(8, 3)], 8.0).applied, "the next step must not see the bad gradient"


def test_a_step_that_is_decided_on_the_device_is_the_same_one() -> None:
    here, there = engine_of(), engine_of(on_device=True)
    assert (here.reads_late, there.reads_late) == (False, True)
    for step in range(4):
        a, b = (train(engine, [batch_of(8, step)], 8.0) for engine in (here, there))
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6)
        assert b.applied
    for name, weight in weights(here).items():
        torch.testing.assert_close(weights(there)[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("what", ["nan", "loss", "gradient"])
def test_a_step_beyond_its_limits_changes_no_bit(on_device: bool, what: str, tmp_path: Path) -> None:
    engine = engine_of(on_device=on_device)
    train(engine, [batch_of(8)], 8.0)
    before, state = weights(engine), {key: value.clone() for key, value in engine._states()}
    loss = engine.accumulate(batch_of(8, 1, factor=float("nan") if what == "nan" else 1.0), 8.0, last=True)
    limits = {"nan": Limits(1e9, 1e9), "loss": Limits(loss=0.0), "gradient": Limits(grad_norm=0.0)}[what]
    update = engine.update(1.0, limits, loss)
    assert not update.applied
    assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())
    assert all(torch.equal(value, state[key]) for key, value in engine._states())
    assert train(engine, [batch_of(8, 3)], 8.0).applied
    extra = engine.save(tmp_path)
    resumed = engine_of(on_device=on_device)
    resumed.load(tmp_path, extra)
    for e in (engine, resumed):
        train(e, [batch_of(8, 4)], 8.0)
    assert all(torch.equal(weight, weights(resumed)[name]) for name, weight in weights(engine).items())


def test_what_is_not_finite_is_named() -> None:
    engine = engine_of()
    assert engine.not_finite() == []
    train(engine, [batch_of(8)], 8.0)
    engine.optimizer.state[engine.trainable["second.bias"]]["exp_avg_sq"].fill_(float("inf"))
    engine.trainable["first.weight"].data[0, 0] = float("nan")
    assert engine.not_finite() == ["first.weight", "exp_avg_sq/second.bias"]


def test_an_infinite_loss_with_a_finite_gradient_is_not_applied() -> None:
    x = torch.tensor([1.0], requires_grad=True)
    (x.sum() + float("inf")).backward()
    assert torch.isfinite(x.grad).all(), "else this test shows nothing"
    x.grad = None
    poisoned_if_not_finite(x.sum() + float("inf")).backward()
    assert x.grad is not None
    assert x.grad.isnan().all()


def test_a_finite_loss_passes_bit_for_bit() -> None:
    loss = torch.rand(1000) * 100
    assert torch.equal(poisoned_if_not_finite(loss), loss)


def test_fp16_halves_its_loss_scale_after_an_overflow_and_goes_on() -> None:
    settings = replace(SETTINGS, precision=Precision.fp16)
    engine = engine_of(settings, initial_loss_scale=2.0**40)
    before, scales = weights(engine), []
    while not (update := train(engine, [batch_of(8)], 8.0)).applied:
        scales.append(update.loss_scale)
        assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())
    assert scales[:3] == [2.0**40, 2.0**39, 2.0**38]
    assert update.loss_scale is not None
    assert update.loss_scale < 2.0**40
    assert not all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())


@pytest.mark.parametrize("precision", list(Precision))
def test_saved_state_continues_bit_for_bit(precision: Precision, tmp_path: Path) -> None:
    settings = replace(SETTINGS, precision=precision)
    undisturbed, first = engine_of(settings), engine_of(settings)
    for step in range(6):
        train(undisturbed, [batch_of(8, step)], 8.0)
    for step in range(3):
        train(first, [batch_of(8, step)], 8.0)
    extra = first.save(tmp_path)
    resumed = engine_of(settings)
    resumed.load(tmp_path, extra)
    for step in range(3, 6):
        train(resumed, [batch_of(8, step)], 8.0)
    assert all(torch.equal(weight, weights(undisturbed)[name]) for name, weight in weights(resumed).items())
    assert resumed.scaler.state_dict() == undisturbed.scaler.state_dict()


def test_nothing_trained_yet_is_saved_and_loaded_too(tmp_path: Path) -> None:
    engine = engine_of()
    other = engine_of()
    other.load(tmp_path, engine.save(tmp_path))
    assert train(other, [batch_of(8)], 8.0) == train(engine, [batch_of(8)], 8.0)
