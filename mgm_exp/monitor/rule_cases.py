"""For each rule: series that raise its alert, and series that do not, as ``promtool test rules`` reads them.

Values follow the limits, so that rules under changed limits are tested as well. A series is ``AxN`` (A, and N times
more), ``A+BxN`` (steps of B) or values one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mgm_exp.config import MonitorLimitsConfig
from mgm_exp.monitor.rules import GIB, ROOMY

RUN = {"run": "demo-3-0a1b2c3d", "adapter": "lora_r16"}
STAGE = {**RUN, "stage": "instruct"}
GPU, DISK = {**RUN, "device": "0"}, {**RUN, "disk": "root"}
UP = {**RUN, "job": "mgm_train", "instance": "127.0.0.1:9301"}


@dataclass(frozen=True)
class RuleCase:
    """One test.

    Args:
        rule: Name of the alert.
        what: What happens.
        series: Notation of each metric, by name and labels.
        at: Seconds after which the rule is asked.
        labels: Of the alert that is raised then; None: none is.
    """

    rule: str
    what: str
    series: tuple[tuple[str, dict[str, str], str], ...]
    at: float
    labels: dict[str, str] | None


def interval_of(limits: MonitorLimitsConfig) -> int:
    """Seconds between two values of a series."""
    return max(1, min(15, int(limits.recent_s / 8)))


def rule_cases(limits: MonitorLimitsConfig) -> Iterator[RuleCase]:
    """All of them: each rule raises its alert in one at least, and does not in another."""
    by, i = limits, interval_of(limits)

    def n(seconds: float) -> int:
        return math.ceil(seconds / i)

    def flat(value: float, seconds: float = 4 * (by.history_s + by.stalled_s)) -> str:
        return f"{value:.10g}x{n(seconds)}"

    for rule, counter in (
        ("TrainLossNaN", "mgm_train_nonfinite_steps_total"),
        ("TrainSpike", "mgm_train_spikes_total"),
    ):
        count = ((counter, STAGE, "0 0 1" + " 1" * n(3 * by.recent_s)),)
        yield RuleCase(rule, "one step", count, 3 * i, STAGE)
        yield RuleCase(rule, "one step, long ago", count, by.recent_s + 4 * i, None)
        yield RuleCase(rule, "none", ((counter, STAGE, flat(7)),), 4 * i, None)
    yield RuleCase("TrainLossNaN", "the last loss is NaN", (("mgm_train_loss", STAGE, "2 NaN NaN NaN"),), 3 * i, STAGE)
    yield RuleCase("TrainLossNaN", "a loss", (("mgm_train_loss", STAGE, "2 1 1 1"),), 3 * i, None)

    total = ("mgm_device_memory_total_bytes", GPU, flat(80 * GIB))
    high, low = ((by.memory_share + 1) / 2 * 80 * GIB, 0.99 * by.memory_share * 80 * GIB)
    used = "mgm_device_memory_used_bytes"
    yield RuleCase("DeviceMemoryHigh", "for long", ((used, GPU, flat(high)), total), by.memory_s + 2 * i, GPU)
    yield RuleCase("DeviceMemoryHigh", "not for long", ((used, GPU, flat(high)), total), max(0, by.memory_s - i), None)
    yield RuleCase("DeviceMemoryHigh", "below the limit", ((used, GPU, flat(low)), total), by.memory_s + 2 * i, None)

    silence, sign = max(by.stalled_s, by.stalled_steps), "mgm_train_last_step_timestamp_seconds"
    median, active = ("mgm_train_step_seconds_median", STAGE, flat(1)), ("mgm_train_run_active", STAGE, flat(1))
    over, slow = ("mgm_train_run_active", STAGE, flat(0)), ("mgm_train_step_seconds_median", STAGE, flat(by.stalled_s))
    yield RuleCase("StalledStep", "silence", ((sign, STAGE, flat(0)), median, active), silence + 2 * i, STAGE)
    yield RuleCase("StalledStep", "not yet", ((sign, STAGE, flat(0)), median, active), silence - i, None)
    yield RuleCase("StalledStep", "nothing trains", ((sign, STAGE, flat(0)), median, over), silence + 2 * i, None)
    if by.stalled_steps > 2:
        yield RuleCase("StalledStep", "slow steps", ((sign, STAGE, flat(0)), slow, active), silence + 2 * i, None)
    yield RuleCase(
        "StalledStep", "steps", ((sign, STAGE, f"0+{i}x{n(2 * silence)}"), median, active), silence + 2 * i, None
    )

    beat = "mgm_train_heartbeat_timestamp_seconds"
    alive = (("up", UP, flat(1)), (beat, RUN, f"0+{i}x{n(9 * by.down_s) + 9}"))
    yield RuleCase(
        "TrainerDown", "it does not answer", (("up", UP, "1 0" + " 0" * n(3 * by.down_s)),), by.down_s + 2 * i, UP
    )
    yield RuleCase("TrainerDown", "a text file is left", ((beat, RUN, flat(0)),), 2 * by.down_s + 3 * i, RUN)
    yield RuleCase("TrainerDown", "it lives", alive, 2 * by.down_s + 3 * i, None)
    yield RuleCase("TrainerDown", "it ended in order", (("up", UP, "1 1 stale"), (beat, RUN, "0 1 stale")), 9 * i, None)

    limit = by.disk_free_gib * GIB
    free, size = "mgm_disk_free_bytes", ("mgm_disk_total_bytes", DISK, flat(100 * limit))
    fall = 20 * limit / (20 + by.disk_hours * 3600 / i)
    some, much = (f"{share * 100 * limit:.0f}-{fall:.0f}x40" for share in (0.75 * ROOMY, 2.5 * ROOMY))
    yield RuleCase("DiskFilling", "little is left", ((free, DISK, flat(0.99 * limit)), size), i, DISK)
    yield RuleCase("DiskFilling", "it will be full", ((free, DISK, some), size), 20 * i, DISK)
    yield RuleCase("DiskFilling", "much is left", ((free, DISK, much), size), 20 * i, None)
    yield RuleCase("DiskFilling", "nothing grows", ((free, DISK, flat(15 * limit)), size), 20 * i, None)

    speed = "mgm_train_tokens_per_second"
    drop, dip = (
        f"1000x{n(3 * by.recent_s)} {1000 * by.throughput_share * share:.10g}x{n(3 * by.recent_s)}"
        for share in (0.8, 1.1)
    )
    yield RuleCase("ThroughputDrop", "slower", ((speed, STAGE, drop), active), 5.5 * by.recent_s, STAGE)
    yield RuleCase("ThroughputDrop", "for a moment", ((speed, STAGE, drop), active), 3.5 * by.recent_s, None)
    yield RuleCase("ThroughputDrop", "a little", ((speed, STAGE, dip), active), 5.5 * by.recent_s, None)
    yield RuleCase("ThroughputDrop", "nothing trains", ((speed, STAGE, drop), over), 5.5 * by.recent_s, None)

    use = "mgm_device_utilization_ratio"
    idle, busy = (use, GPU, flat(0.5 * by.idle_share)), (use, GPU, flat(min(1.0, 1.5 * by.idle_share)))
    yield RuleCase("GPUIdle", "it waits", (idle, active), by.recent_s + 2 * i, GPU)
    yield RuleCase("GPUIdle", "not for long", (idle, active), max(0, by.recent_s - i), None)
    yield RuleCase("GPUIdle", "it computes", (busy, active), by.recent_s + 2 * i, None)
    yield RuleCase("GPUIdle", "nothing trains", (idle, over), by.recent_s + 2 * i, None)
