"""A run's numbers as Prometheus knows them: ``mgm_train_*``, ``mgm_device_*``, ``mgm_host_*``, ``mgm_disk_*``.

They are put together when somebody asks, so that a training step only leaves its row here. All carry the labels ``run``
and ``adapter``; those of training also ``stage``, so that one stage is no history of the next. :data:`METRICS` names
each with its type; docs/monitoring.md has the same table.
"""

from __future__ import annotations

import bisect
import math
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from mgm_exp.config import MonitorLimitsConfig
from mgm_exp.monitor.watch import Watch
from mgm_exp.monitor.window import Row, Step, median_seconds

GIB, MIB = 2**30, 2**20
# Upper bounds of step times, in seconds.
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

# Name -> type, what it says. Labels: run, adapter; of mgm_train_* but the heartbeat also stage, and as said.
METRICS = {
    "mgm_train_run_active": ("gauge", "1 while the stage trains, else 0"),
    "mgm_train_step": ("gauge", "optimizer steps done"),
    "mgm_train_steps": ("gauge", "optimizer steps of the stage"),
    "mgm_train_loss": ("gauge", "loss of the last step; NaN where it was no number"),
    "mgm_train_grad_norm": ("gauge", "gradient norm of the last step, before clipping"),
    "mgm_train_learning_rate": ("gauge", "learning rate of the last step"),
    "mgm_train_tokens_per_second": ("gauge", "tokens a second in the last step"),
    "mgm_train_samples_per_second": ("gauge", "samples a second in the last step"),
    "mgm_train_data_wait_seconds": ("gauge", "how long the last step waited for its data"),
    "mgm_train_validation": ("gauge", "score of the last validation point"),
    "mgm_train_last_step_timestamp_seconds": ("gauge", "when training last gave a sign"),
    "mgm_train_step_seconds_median": ("gauge", "median time of the last 50 steps"),
    "mgm_train_step_seconds": ("histogram", "times of steps"),
    "mgm_train_nonfinite_steps": ("counter", "steps whose loss or gradient was no number"),
    "mgm_train_spikes": ("counter", "steps far above those before them (monitor.limits)"),
    "mgm_train_heartbeat_timestamp_seconds": ("gauge", "when the process last gave these numbers"),
    "mgm_device_memory_used_bytes": ("gauge", "memory in use on a GPU, by anybody (label device)"),
    "mgm_device_memory_total_bytes": ("gauge", "memory of a GPU (label device)"),
    "mgm_device_utilization_ratio": ("gauge", "share of the last moments in which a GPU computed (label device)"),
    "mgm_device_power_watts": ("gauge", "power that a GPU draws (label device)"),
    "mgm_device_temperature_celsius": ("gauge", "temperature of a GPU (label device)"),
    "mgm_host_cpu_ratio": ("gauge", "share of the machine's processors in use"),
    "mgm_host_memory_used_bytes": ("gauge", "memory of the machine in use"),
    "mgm_host_memory_total_bytes": ("gauge", "memory of the machine"),
    "mgm_host_network_receive_bytes_per_second": ("gauge", "network traffic in"),
    "mgm_host_network_transmit_bytes_per_second": ("gauge", "network traffic out"),
    "mgm_process_memory_bytes": ("gauge", "memory of the run's processes"),
    "mgm_process_cpu_cores": ("gauge", "processors that the run's processes keep busy"),
    "mgm_disk_free_bytes": ("gauge", "free space of a disk of the run (label disk: root, store)"),
    "mgm_disk_total_bytes": ("gauge", "size of a disk of the run (label disk)"),
}
_OF_ROW = {
    "mgm_train_grad_norm": "grad_norm",
    "mgm_train_learning_rate": "lr",
    "mgm_train_tokens_per_second": "tokens_per_s",
    "mgm_train_samples_per_second": "samples_per_s",
    "mgm_train_data_wait_seconds": "data_wait_s",
}
# Name in the metrics, name in a sample, unit; a path with a dot goes into a group.
_OF_SAMPLE = {
    "mgm_host_cpu_ratio": ("cpu", 1),
    "mgm_host_memory_used_bytes": ("memory_gib", GIB),
    "mgm_host_memory_total_bytes": ("memory_total_gib", GIB),
    "mgm_host_network_receive_bytes_per_second": ("network.received_mib_s", MIB),
    "mgm_host_network_transmit_bytes_per_second": ("network.sent_mib_s", MIB),
    "mgm_process_memory_bytes": ("process_memory_gib", GIB),
    "mgm_process_cpu_cores": ("process_cpu", 1),
}
_OF_GPU = {
    "mgm_device_memory_used_bytes": ("memory_used_gib", GIB),
    "mgm_device_memory_total_bytes": ("memory_total_gib", GIB),
    "mgm_device_utilization_ratio": ("utilization", 1),
    "mgm_device_power_watts": ("power_w", 1),
    "mgm_device_temperature_celsius": ("temperature_c", 1),
}
_OF_DISK = {"mgm_disk_free_bytes": ("free_gib", GIB), "mgm_disk_total_bytes": ("total_gib", GIB)}

Reading = tuple[str, Mapping[str, str], float]


class RunMetrics:
    """What one run shows. Rows come from its own thread, samples from the sampler's, questions from a server's.

    Args:
        labels: ``run`` and ``adapter``.
        limits: What a spike is.
    """

    def __init__(self, labels: Mapping[str, str], limits: MonitorLimitsConfig) -> None:
        self.labels = dict(labels)
        self._watch = Watch(limits)
        self._lock = threading.Lock()
        self._sample: Row = {}
        self._stage: str | None = None
        self._begin_stage(0)

    def _begin_stage(self, total: int) -> None:
        self._total, self._is_active = total, False
        self._last: Step | None = None
        self._nonfinite = self._spikes = 0
        self._validation: float | None = None
        self._seconds = [0] * (len(BUCKETS) + 1)
        self._seconds_sum = 0.0
        self._before: float | None = None

    def stage_started(self, stage: str, total: int, now: float) -> None:
        """A stage trains from now on."""
        with self._lock:
            self._stage = stage
            self._begin_stage(total)
            self._is_active = True
            self._watch.stage_started(now)

    def stage_finished(self) -> None:
        """It does so no more; its last numbers stay until the next one begins."""
        with self._lock:
            self._is_active = False
            self._watch.stage_finished()

    def row(self, row: Row, now: float) -> None:
        """A line of ``metrics.jsonl``."""
        with self._lock:
            if row.get("event") == "validation" and isinstance(row.get("value"), (int, float)):
                self._validation = float(row["value"])
            step = self._watch.row(row, now)
            if step is None:
                return
            self._last = step
            self._nonfinite += step.is_nonfinite
            self._spikes += step.spike is not None
            if (seconds := row.get("seconds")) is not None:
                # What a checkpoint had already is no step of this process.
                took = seconds - self._before if self._before is not None else None
                self._before = seconds
                if took is not None and took >= 0:
                    self._seconds[bisect.bisect_left(BUCKETS, took)] += 1
                    self._seconds_sum += took

    def sample(self, sample: Row) -> None:
        """A sample of the machine."""
        with self._lock:
            self._sample = sample

    def collect(self) -> Iterator[Any]:
        """All of it, in the classes of prometheus_client: called when somebody asks."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        families: dict[str, Any] = {}
        with self._lock:
            for name, extra, value in [*self._of_training(), *self._of_machine()]:
                labels = {**self.labels, **extra}
                if name not in families:
                    kind, says = METRICS[name]
                    family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
                    families[name] = family(name, says, labels=list(labels))
                families[name].add_metric(list(labels.values()), value)
            if self._stage is not None:
                labels = {**self.labels, "stage": self._stage}
                name = "mgm_train_step_seconds"
                families[name] = HistogramMetricFamily(name, METRICS[name][1], labels=list(labels))
                families[name].add_metric(list(labels.values()), self._buckets(), self._seconds_sum)
        yield from families.values()

    def describe(self) -> list[Any]:
        """Nothing is known beforehand: without this, registering would ask for everything."""
        return []

    def _of_training(self) -> Iterator[Reading]:
        yield "mgm_train_heartbeat_timestamp_seconds", {}, time.time()
        if self._stage is None:
            return
        at = {"stage": self._stage}
        window = self._watch.window(time.time())
        yield "mgm_train_run_active", at, float(self._is_active)
        yield "mgm_train_steps", at, self._total
        yield "mgm_train_nonfinite_steps", at, self._nonfinite
        yield "mgm_train_spikes", at, self._spikes
        yield "mgm_train_step_seconds_median", at, median_seconds(window.steps)
        if window.sign_at is not None:
            yield "mgm_train_last_step_timestamp_seconds", at, window.sign_at
        if self._validation is not None:
            yield "mgm_train_validation", at, self._validation
        if self._last is not None:
            row = self._last.row
            loss = row.get("loss")
            yield "mgm_train_step", at, row.get("step", 0)
            yield "mgm_train_loss", at, math.nan if loss is None else loss
            for name, key in _OF_ROW.items():
                if row.get(key) is not None:
                    yield name, at, row[key]

    def _of_machine(self) -> Iterator[Reading]:
        yield from _readings(_OF_SAMPLE, self._sample, {})
        for gpu in self._sample.get("gpus") or ():
            yield from _readings(_OF_GPU, gpu, {"device": str(gpu["index"])})
        for name, disk in (self._sample.get("disks") or {}).items():
            yield from _readings(_OF_DISK, disk, {"disk": name})

    def _buckets(self) -> list[tuple[str, float]]:
        found, total = [], 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self._seconds, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


def _readings(names: Mapping[str, tuple[str, int]], values: Row, extra: Mapping[str, str]) -> Iterator[Reading]:
    for name, (key, unit) in names.items():
        group, _, inner = key.rpartition(".")
        value = ((values.get(group) or {}) if group else values).get(inner)
        if value is not None:
            yield name, extra, value * unit
