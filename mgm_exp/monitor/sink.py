"""The sink by which a run is watched: samples of its machine to ``system.jsonl``, its numbers to Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.config import Device, ExperimentConfig
from mgm_exp.monitor.exporter import Exporter, targets_folder
from mgm_exp.monitor.gpus import Gpus, open_gpus
from mgm_exp.monitor.machine import Machine
from mgm_exp.monitor.metrics import RunMetrics
from mgm_exp.monitor.sampler import OnSample, Sampler
from mgm_exp.monitor.summary import Summary
from mgm_exp.monitor.system_file import NAME, SystemFile, read_samples
from mgm_exp.record import RunInfo, Sink
from mgm_exp.record.recorder import Row


class MonitorSink(Sink):
    """Watches one run, from its start to its end, by ``config.monitor``.

    Args:
        config: The run's configuration.
        run_dir: Its folder.
        listeners: Called with each sample too, in the sampler's thread.
    """

    def __init__(self, config: ExperimentConfig, run_dir: Path, listeners: Sequence[OnSample] = ()) -> None:
        self.config, self.run_dir = config, Path(run_dir)
        self._listeners = listeners
        self._stage: str | None = None
        self._step = 0
        self._gpus: Gpus | None = None
        self._sampler: Sampler | None = None
        self._file: SystemFile | None = None
        self._summary: Summary | None = None
        self._metrics: RunMetrics | None = None
        self._exporter: Exporter | None = None

    def start(self, run: RunInfo) -> None:
        """Begins to sample and to answer."""
        monitor = self.config.monitor
        if monitor.every_s is not None:  # first: a file that cannot be continued leaves no port open
            path = self.run_dir / NAME
            self._summary, self._file = Summary(monitor.limits, read_samples(path)), SystemFile(path)
        if monitor.prometheus_port is not None or monitor.textfile is not None:
            self._metrics = RunMetrics({"run": run.run_id, "adapter": self.config.adapter.name}, monitor.limits)
            self._exporter = Exporter(monitor, self._metrics, targets_folder(Path(self.config.paths.root).resolve()))
            if self._exporter.url:
                print(f"monitor: {self._exporter.url}", flush=True)
        if monitor.every_s is not None:
            self._sampler = Sampler(self._machine(), monitor.every_s, self._place, list(self._hearing()))
            self._sampler.start()

    def _hearing(self) -> Iterator[OnSample]:
        """Who hears of samples. Files come last: when one meets a full disk, those who tell of it have heard."""
        yield from self._listeners
        if self._metrics is not None:
            yield self._metrics.sample
        if self._summary is not None:
            yield self._summary.add
        if self._exporter is not None:
            write = self._exporter.write
            yield lambda sample: write()
        if self._file is not None:
            yield self._file.append

    def _machine(self) -> Machine:
        if self.config.device is not Device.cpu:
            self._gpus, why_not = open_gpus(self.config.devices)
            if why_not:
                print(f"monitor: {why_not}", flush=True)
        paths = self.config.paths
        return Machine({"root": Path(paths.root).resolve(), "store": Path(paths.store).resolve()}, self._gpus)

    def _place(self) -> dict[str, Any]:
        return {"stage": self._stage, "step": self._step if self._stage else None}

    def stage_started(self, stage: str, total_steps: int, rows: Sequence[Row]) -> None:
        """Samples belong to the stage from here on."""
        self._step = max((int(row["step"]) for row in rows if "event" not in row), default=0)
        self._stage = stage
        if self._metrics is not None:
            self._metrics.stage_started(stage, total_steps, time.time())

    def row(self, row: Row) -> None:
        """Remembers the step."""
        self._step = int(row.get("step") or self._step)
        if self._metrics is not None:
            self._metrics.row(row, time.time())

    def stage_finished(self, stage: str, summary: Mapping[str, Any], reused: bool) -> None:
        """Samples belong to no stage until the next one begins."""
        self._stage = None
        if self._metrics is not None:
            self._metrics.stage_finished()

    def end(self) -> dict[str, Any] | None:
        """Takes the last sample; what all of them come to (:meth:`Summary.as_json`), None where nothing is sampled."""
        if self._sampler is not None:
            self._sampler.stop()
        return None if self._summary is None else self._summary.as_json()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Ends what :meth:`start` began."""
        self.end()
        if self._exporter is not None:
            self._exporter.close()
        if self._file is not None:
            self._file.close()
        if self._gpus is not None:
            self._gpus.close()
