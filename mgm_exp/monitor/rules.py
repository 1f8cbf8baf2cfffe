"""The alert rules: each one once, as an expression for Prometheus and as a function for the run itself.

Thresholds come from ``monitor.limits``; ``mgm-exp doctor --entry RUNBOOK`` says what to do. A rule holds when its
function gives a detail; its alert is raised when it has held for ``for_s`` seconds (:class:`mgm_exp.monitor.Watch`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mgm_exp.config import MonitorLimitsConfig
from mgm_exp.monitor.window import Row, Window, median_seconds

Check = Callable[[Window], "str | None"]

# Fewer are no history to compare with.
LEAST_STEPS = 10
# A trend over less than this share of the history is none.
LEAST_TREND = 0.25
# A disk with more than this share free is not called filling by its trend alone.
ROOMY = 0.2
GIB = 2**30


@dataclass(frozen=True)
class AlertRule:
    """One alert.

    Args:
        name: Of the alert.
        severity: ``critical`` or ``warning``.
        for_s: Seconds that it must have held.
        expr: In PromQL.
        summary: One sentence for people.
        runbook: Entry of the knowledge base of ``mgm-exp doctor``.
        check: Gives a detail in words where the rule holds, None where it does not. None: only another process can say.
    """

    name: str
    severity: str
    for_s: float
    expr: str
    summary: str
    runbook: str
    check: Check | None


def rules(limits: MonitorLimitsConfig | None = None) -> tuple[AlertRule, ...]:
    """The eight rules under the given limits, or the usual ones."""
    by = limits or MonitorLimitsConfig()
    recent, history = _seconds(by.recent_s), _seconds(by.history_s)
    return (
        AlertRule(
            "TrainLossNaN",
            "critical",
            0.0,
            f"increase(mgm_train_nonfinite_steps_total[{recent}]) > 0 or (mgm_train_loss != mgm_train_loss)",
            "The loss or the gradient is not a number.",
            "loss-not-finite",
            lambda window: _not_a_number(window, by),
        ),
        AlertRule(
            "TrainSpike",
            "warning",
            0.0,
            f"increase(mgm_train_spikes_total[{recent}]) > 0",
            "The loss or the gradient norm stands far above the steps before it.",
            "loss-spikes",
            lambda window: _spike(window, by),
        ),
        AlertRule(
            "DeviceMemoryHigh",
            "warning",
            by.memory_s,
            f"mgm_device_memory_used_bytes / mgm_device_memory_total_bytes > {by.memory_share:g}",
            "A GPU's memory is nearly full.",
            "cuda-out-of-memory",
            lambda window: _memory(window, by),
        ),
        AlertRule(
            "StalledStep",
            "critical",
            0.0,
            "(time() - mgm_train_last_step_timestamp_seconds > "
            f"clamp_min({by.stalled_steps:g} * mgm_train_step_seconds_median, {by.stalled_s:g}))"
            " and mgm_train_run_active == 1",
            "Training gives no sign.",
            "hang-no-progress",
            lambda window: _stalled(window, by),
        ),
        AlertRule(
            "TrainerDown",
            "critical",
            by.down_s,
            f'up{{job="mgm_train"}} == 0 or (time() - mgm_train_heartbeat_timestamp_seconds > {by.down_s:g})',
            "The run's process does not answer: it was killed, or its machine is gone.",
            "kernel-killed-for-memory",
            None,
        ),
        AlertRule(
            "DiskFilling",
            "critical",
            0.0,
            f"mgm_disk_free_bytes < {round(by.disk_free_gib * GIB)} or "
            f"(predict_linear(mgm_disk_free_bytes[{history}], {by.disk_hours * 3600:.10g}) < 0 and "
            f"mgm_disk_free_bytes / mgm_disk_total_bytes < {ROOMY:g})",
            "A disk of the run is full, or will soon be.",
            "disk-full",
            lambda window: _disk(window, by),
        ),
        AlertRule(
            "ThroughputDrop",
            "warning",
            by.recent_s,
            f"avg_over_time(mgm_train_tokens_per_second[{recent}]) < {by.throughput_share:g} * "
            f"quantile_over_time(0.5, mgm_train_tokens_per_second[{history}]) and mgm_train_run_active == 1",
            "Training is much slower than it was.",
            "throughput-falls",
            lambda window: _throughput(window, by),
        ),
        AlertRule(
            "GPUIdle",
            "warning",
            by.recent_s,
            f"avg_over_time(mgm_device_utilization_ratio[{recent}]) < {by.idle_share:g} and "
            "on (run, adapter) mgm_train_run_active == 1",
            "A GPU does next to nothing while a stage trains.",
            "loading-stalls",
            lambda window: _idle(window, by),
        ),
    )


def _seconds(value: float) -> str:
    """A duration of PromQL, which knows whole milliseconds."""
    return f"{round(value)}s" if value >= 1 and value == round(value) else f"{max(1, round(value * 1000))}ms"


def _not_a_number(window: Window, by: MonitorLimitsConfig) -> str | None:
    broken = [step.row for step in window.recent(by.recent_s) if step.is_nonfinite]
    if not broken:
        return None
    return f"{len(broken)} step(s) of the last {by.recent_s:g} s, the last one {_place(broken[-1])}"


def _spike(window: Window, by: MonitorLimitsConfig) -> str | None:
    spikes = [step for step in window.recent(by.recent_s) if step.spike]
    if not spikes:
        return None
    return f"{_place(spikes[-1].row)}: {spikes[-1].spike}"


def _memory(window: Window, by: MonitorLimitsConfig) -> str | None:
    for gpu in _gpus(window.samples[-1:]):
        used, total = gpu["memory_used_gib"], gpu["memory_total_gib"]
        if used is not None and used > by.memory_share * total:
            return f"GPU {gpu['index']}: {used:.1f} of {total:.1f} GiB ({used / total:.0%})"
    return None


def _stalled(window: Window, by: MonitorLimitsConfig) -> str | None:
    if window.sign_at is None:
        return None
    silence, usual = window.now - window.sign_at, median_seconds(window.steps)
    if silence <= max(by.stalled_s, by.stalled_steps * usual):
        return None
    last = f"the last step was {_place(window.steps[-1].row)}" if window.steps else "no step was made yet"
    return f"no sign for {silence:.0f} s; {last}, a step takes {usual:.3g} s"


def _disk(window: Window, by: MonitorLimitsConfig) -> str | None:
    if not window.samples:
        return None
    for name, disk in window.samples[-1].get("disks", {}).items():
        if disk["free_gib"] < by.disk_free_gib:
            return f"{name}: {disk['free_gib']:.2f} GiB free, limit {by.disk_free_gib:g}"
        if disk["free_gib"] < ROOMY * disk["total_gib"] and (hours := _hours_left(name, window, by)) is not None:
            return f"{name}: {disk['free_gib']:.1f} GiB free, full in {hours:.1f} h at this rate"
    return None


def _hours_left(name: str, window: Window, by: MonitorLimitsConfig) -> float | None:
    """Hours until a disk is full by the straight line through its samples, where that is soon."""
    points = [
        (sample["t"], sample["disks"][name]["free_gib"])
        for sample in window.sampled(by.history_s)
        if name in sample.get("disks", {})
    ]
    if len(points) < 3 or points[-1][0] - points[0][0] < LEAST_TREND * by.history_s:
        return None
    slope = statistics.linear_regression([at for at, _ in points], [free for _, free in points]).slope
    if slope >= 0:
        return None
    hours = points[-1][1] / -slope / 3600
    return hours if hours < by.disk_hours else None


def _throughput(window: Window, by: MonitorLimitsConfig) -> str | None:
    if window.sign_at is None:
        return None
    speeds = [
        (step.at, float(step.row["tokens_per_s"]))
        for step in window.recent(by.history_s)
        if step.row.get("tokens_per_s") is not None
    ]
    now = [speed for at, speed in speeds if at > window.now - by.recent_s]
    if len(speeds) < 2 * LEAST_STEPS or not now or len(now) == len(speeds):
        return None
    usual, mean = statistics.median(speed for _, speed in speeds), statistics.fmean(now)
    if mean >= by.throughput_share * usual:
        return None
    return f"{mean:,.0f} tokens a second in the last {by.recent_s:g} s, {mean / usual:.0%} of the median ({usual:,.0f})"


def _idle(window: Window, by: MonitorLimitsConfig) -> str | None:
    if window.sign_at is None:
        return None
    used: dict[int, list[float]] = {}
    for gpu in _gpus(window.sampled(by.recent_s)):
        if gpu.get("utilization") is not None:
            used.setdefault(gpu["index"], []).append(gpu["utilization"])
    for index, shares in sorted(used.items()):
        mean = statistics.fmean(shares)
        if mean < by.idle_share:
            return f"GPU {index}: {mean:.0%} busy in the last {by.recent_s:g} s"
    return None


def _gpus(samples: Sequence[Row]) -> list[Row]:
    return [gpu for sample in samples for gpu in sample.get("gpus") or ()]


def _place(row: Row) -> str:
    return f"{row.get('stage')} step {row.get('step')}"
