"""The alert rules: each one holds where it should, and not beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from mgm_exp.config import MonitorLimitsConfig
from mgm_exp.doctor import entry
from mgm_exp.monitor import Step, Watch, Window, rules, spike_of

LIMITS = MonitorLimitsConfig()
RULES = {rule.name: rule for rule in rules(LIMITS)}
NOW = 10_000.0


def step(number: int, at: float = NOW, **changes: Any) -> Step:
    row = {"stage": "instruct", "step": number, "loss": 1.0, "grad_norm": 2.0, "tokens_per_s": 1000.0}
    return Step(at, {**row, "seconds": float(number), **changes}, changes.get("spike"))


def gpu(used: float = 10.0, utilization: float | None = 0.9, index: int = 0) -> dict[str, Any]:
    return {"index": index, "memory_used_gib": used, "memory_total_gib": 80.0, "utilization": utilization}


def sample(at: float = NOW, gpus: Iterable[dict[str, Any]] = (), free: float = 500.0) -> dict[str, Any]:
    return {"t": at, "gpus": list(gpus), "disks": {"root": {"free_gib": free, "total_gib": 1000.0}}}


def slower(share: float, steps: int = 60) -> list[Step]:
    """A step every 30 s, the last ten of them slower."""
    return [
        step(n, NOW - 30 * (steps - n), tokens_per_s=1000.0 * (share if n > steps - 10 else 1.0))
        for n in range(1, steps + 1)
    ]


HOLDS = {
    "a step was skipped": ("TrainLossNaN", Window(NOW, [step(1, loss=None, event="not_finite")])),
    "the loss itself": ("TrainLossNaN", Window(NOW, [step(1, loss=float("nan")), step(2)])),
    "the gradient": ("TrainLossNaN", Window(NOW, [step(1, grad_norm=float("inf"))])),
    "a spike": ("TrainSpike", Window(NOW, [step(1, spike="gradient norm 99"), step(2)])),
    "one of two GPUs": ("DeviceMemoryHigh", Window(NOW, samples=[sample(gpus=[gpu(), gpu(72.5, index=1)])])),
    "no sign": ("StalledStep", Window(NOW, [step(1)], sign_at=NOW - 301)),
    "not one step": ("StalledStep", Window(NOW, sign_at=NOW - 301)),
    "little space": ("DiskFilling", Window(NOW, samples=[sample(free=9.9)])),
    "space that ends": (
        "DiskFilling",
        Window(NOW, samples=[sample(NOW - 10 * (100 - n), free=150 - n / 2) for n in range(1, 101)]),
    ),
    "half the speed": ("ThroughputDrop", Window(NOW, slower(0.49), sign_at=NOW)),
    "a GPU waits": (
        "GPUIdle",
        Window(NOW, samples=[sample(NOW - n, [gpu(), gpu(utilization=0.09, index=1)]) for n in range(9)], sign_at=NOW),
    ),
}
DOES_NOT_HOLD = {
    "numbers": ("TrainLossNaN", Window(NOW, [step(1), step(2)])),
    "long ago": ("TrainLossNaN", Window(NOW, [step(1, NOW - 301, loss=None, event="not_finite")])),
    "no spike": ("TrainSpike", Window(NOW, [step(1)])),
    "at the limit": ("DeviceMemoryHigh", Window(NOW, samples=[sample(gpus=[gpu(72.0)])])),
    "it was before": ("DeviceMemoryHigh", Window(NOW, samples=[sample(gpus=[gpu(79.0)]), sample(gpus=[gpu()])])),
    "no GPU": ("DeviceMemoryHigh", Window(NOW, samples=[sample()])),
    "memory is not told": (
        "DeviceMemoryHigh",
        Window(NOW, samples=[sample(gpus=[{"index": 0, "memory_used_gib": None, "memory_total_gib": None}])]),
    ),
    "in time": ("StalledStep", Window(NOW, [step(1)], sign_at=NOW - 299)),
    "steps are slow": ("StalledStep", Window(NOW, [step(n, seconds=60.0 * n) for n in range(9)], sign_at=NOW - 599)),
    "nothing trains": ("StalledStep", Window(NOW, [step(1, NOW - 9999)])),
    "space": ("DiskFilling", Window(NOW, samples=[sample()])),
    "much is left": (
        "DiskFilling",
        Window(NOW, samples=[sample(NOW - 10 * (100 - n), free=300 - n / 2) for n in range(1, 101)]),
    ),
    "a first burst is no trend": (
        "DiskFilling",
        Window(NOW, samples=[sample(NOW - 10 * (9 - n), free=150 - n) for n in range(9)]),
    ),
    "space comes back": (
        "DiskFilling",
        Window(NOW, samples=[sample(NOW - 10 * (100 - n), free=100 + n / 2) for n in range(1, 101)]),
    ),
    "no sample yet": ("DiskFilling", Window(NOW)),
    "a little slower": ("ThroughputDrop", Window(NOW, slower(0.51), sign_at=NOW)),
    "too few steps": ("ThroughputDrop", Window(NOW, slower(0.1, steps=15), sign_at=NOW)),
    "it has ended": ("ThroughputDrop", Window(NOW, slower(0.1))),
    "it works": ("GPUIdle", Window(NOW, samples=[sample(gpus=[gpu(utilization=0.11)])], sign_at=NOW)),
    "the driver does not say": ("GPUIdle", Window(NOW, samples=[sample(gpus=[gpu(utilization=None)])], sign_at=NOW)),
    "evaluation is not judged": ("GPUIdle", Window(NOW, samples=[sample(gpus=[gpu(utilization=0.0)])])),
}


@pytest.mark.parametrize("case", HOLDS)
def test_a_rule_holds(case: str) -> None:
    name, window = HOLDS[case]
    check = RULES[name].check
    assert check is not None
    assert check(window)


@pytest.mark.parametrize("case", DOES_NOT_HOLD)
def test_a_rule_does_not_hold(case: str) -> None:
    name, window = DOES_NOT_HOLD[case]
    check = RULES[name].check
    assert check is not None
    assert check(window) is None


def test_every_rule_but_one_is_tried_both_ways() -> None:
    judged = {rule.name for rule in RULES.values() if rule.check is not None}
    assert {name for name, _ in HOLDS.values()} == {name for name, _ in DOES_NOT_HOLD.values()} == judged
    assert set(RULES) - judged == {"TrainerDown"}
    assert len(RULES) == 8


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_a_runbook_is_an_entry_of_the_doctor(rule: Any) -> None:
    assert entry(rule.runbook).fix


def test_limits_stand_in_the_expressions() -> None:
    changed = {
        rule.name: rule.expr for rule in rules(MonitorLimitsConfig(memory_share=0.5, recent_s=0.5, disk_hours=1.1))
    }
    assert "> 0.5" in changed["DeviceMemoryHigh"]
    assert "[500ms]" in changed["TrainLossNaN"]
    assert "[3600s], 3960) < 0" in changed["DiskFilling"]  # a number of seconds, not a duration


@pytest.mark.parametrize(
    ("row", "is_spike"),
    [
        ({"grad_norm": 21.0, "loss": 1.0}, True),
        ({"grad_norm": 20.0, "loss": 1.0}, False),
        ({"grad_norm": 2.0, "loss": 3.1}, True),
        ({"grad_norm": 2.0, "loss": 2.9}, False),
        ({"grad_norm": None, "loss": None}, False),
    ],
)
def test_a_spike_stands_far_above_the_median(row: dict[str, Any], is_spike: bool) -> None:
    before = [{"loss": 1.0 + n / 100, "grad_norm": 2.0} for n in range(-5, 6)]
    assert bool(spike_of(row, before, LIMITS)) is is_spike
    assert spike_of(row, before[:9], LIMITS) is None


def test_a_scattered_loss_near_zero_is_no_spike() -> None:
    before = [{"loss": loss, "grad_norm": 1.0} for loss in (0.001, 0.004, 0.01, 0.002, 0.03) * 4]
    assert spike_of({"loss": 0.02, "grad_norm": 1.0}, before, LIMITS) is None


# -- following a run -------------------------------------------------------------------------------------------------


def names(watch: Watch, now: float) -> list[str]:
    return [alert.rule.name for alert in watch.raised(now)]


def test_an_alert_waits_until_its_rule_has_held_and_begins_anew_when_it_stops() -> None:
    watch = Watch(MonitorLimitsConfig(memory_s=60.0))
    full, empty = sample(gpus=[gpu(79.0)]), sample(gpus=[gpu(1.0)])
    watch.sample(full)
    assert names(watch, NOW) == names(watch, NOW + 59) == []
    assert names(watch, NOW + 60) == ["DeviceMemoryHigh"]
    watch.sample(empty)
    assert names(watch, NOW + 61) == []
    watch.sample(full)
    assert names(watch, NOW + 62) == []
    assert watch.raised(NOW + 122)[0].since == NOW + 62


def test_a_stage_is_not_measured_by_the_one_before_it() -> None:
    watch = Watch(LIMITS)
    for stage, norm in (("align", 0.1), ("instruct", 5.0)):
        watch.stage_started(NOW)
        for number in range(20):
            made = watch.row({"stage": stage, "step": number, "loss": 1.0, "grad_norm": norm}, NOW + number)
            assert made is not None and made.spike is None
    spike = watch.row({"stage": "instruct", "step": 20, "loss": 1.0, "grad_norm": 51.0}, NOW + 20)
    assert spike is not None and spike.spike == "gradient norm 51, 10.2 times the median of 20 steps"
    assert names(watch, NOW + 21) == ["TrainSpike"]


def test_events_are_signs_but_no_steps() -> None:
    watch = Watch(LIMITS)
    watch.stage_started(NOW)
    assert watch.row({"stage": "instruct", "step": 3, "event": "validation", "value": 0.5}, NOW + 250) is None
    assert names(watch, NOW + 500) == []
    assert names(watch, NOW + 551) == ["StalledStep"]
    watch.stage_finished()
    assert names(watch, NOW + 9999) == []


def test_memory_is_bounded() -> None:
    watch = Watch(LIMITS)
    watch.stage_started(NOW)
    for number in range(1100):
        watch.sample(sample(NOW + number))
    assert len(watch.window(NOW).samples) == 1024
