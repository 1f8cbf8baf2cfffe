"""Gives a run's numbers to Prometheus: over HTTP, or as a text file for node_exporter where no port may be opened.

Every run has an exporter and a port of its own, also where several share a process or a machine: ``prometheus_port`` or
the next free one. Which one it is, Prometheus reads in the run's target file, which goes when the run ends in any
orderly way. So a run that ended raises no alert, and one that was killed does.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgm_exp.config import MonitorConfig
from mgm_exp.errors import ConfigError, MissingDependencyError
from mgm_exp.monitor.metrics import RunMetrics
from mgm_exp.store import write_json_atomic

log = logging.getLogger(__name__)

# Ports that are tried, from prometheus_port on.
PORTS_TRIED = 64
_EVERYWHERE = ("", "0.0.0.0", "::")


def targets_folder(root: Path) -> Path:
    """Where Prometheus finds the runs of ``paths.root``: one file each (``file_sd_configs``)."""
    return root / "monitor" / "targets"


def check_monitor(monitor: MonitorConfig) -> None:
    """Looks whether what is asked for can be given.

    Raises:
        MissingDependencyError: prometheus_client is not installed.
        ConfigError: ``monitor.textfile`` is no folder, or nothing can be written there.
    """
    if monitor.prometheus_port is None and monitor.textfile is None:
        return
    asked = "monitor.prometheus_port" if monitor.prometheus_port is not None else "monitor.textfile"
    if importlib.util.find_spec("prometheus_client") is None:
        raise MissingDependencyError(
            f"{asked} is given, and the package prometheus_client is not installed.",
            advice="pip install 'mgm-exp[monitor]', or leave the key out: system.jsonl is written without it.",
        )
    if monitor.textfile is not None:
        try:
            with tempfile.TemporaryFile(dir=monitor.textfile):
                pass
        except OSError as error:
            raise ConfigError(
                f"monitor.textfile={monitor.textfile} is no folder that can be written ({error.strerror}).",
                advice="Give the folder that node_exporter reads (--collector.textfile.directory).",
            ) from error


class Exporter:
    """One run's numbers, where Prometheus finds them, until :meth:`close`.

    Args:
        monitor: Port, address and folder.
        metrics: The numbers.
        targets: Folder of target files.
    """

    def __init__(self, monitor: MonitorConfig, metrics: RunMetrics, targets: Path) -> None:
        from prometheus_client import CollectorRegistry

        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(metrics)
        self._labels = metrics.labels
        self._server: Any = None
        self._target: Path | None = None
        self._textfile: Path | None = None
        self.url: str | None = None
        if monitor.prometheus_port is not None:
            self._serve(monitor.prometheus_host, monitor.prometheus_port, targets)
        if monitor.textfile is not None:
            self._textfile = Path(monitor.textfile) / f"mgm_exp-{self._labels['run']}.prom"

    def _serve(self, host: str, first: int, targets: Path) -> None:
        from prometheus_client import start_http_server

        last = min(first + PORTS_TRIED - 1, 65_535)
        claimed = _claimed(targets, self._labels["run"])
        # A killed run keeps its address as long as there are others: its alert would be over when another one answers.
        for port in sorted(range(first, last + 1), key=lambda port: _address(host, port) in claimed):
            try:
                self._server, self._thread = start_http_server(port, addr=host, registry=self._registry)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    log.warning("monitor: %s:%d cannot be listened on (%s); the run goes on without", host, port, error)
                    return
        if self._server is None:
            log.warning("monitor: ports %d to %d of %s are all taken; the run goes on without", first, last, host)
            return
        port = self._server.server_port
        if port != first:
            log.warning("monitor: port %d is another run's; this one has %d", first, port)
        address = _address(host, port)
        self.url = f"http://{address}/metrics"
        self._target = targets / f"{self._labels['run']}.json"
        targets.mkdir(parents=True, exist_ok=True)
        if address in claimed:
            claimed[address].unlink(missing_ok=True)  # of a run that was killed: the address is ours now
        write_json_atomic(self._target, [_target(address, self._labels)])

    def write(self) -> None:
        """Writes the text file anew, whole or not at all; nothing without ``monitor.textfile``."""
        if self._textfile is not None:
            from prometheus_client import write_to_textfile

            write_to_textfile(str(self._textfile), self._registry)

    def close(self) -> None:
        """The run ended: its numbers go, so that nobody takes it for one that stopped answering."""
        if self._target is not None:
            self._target.unlink(missing_ok=True)
        written, self._textfile = self._textfile, None  # a sample that comes late does not bring it back
        if written is not None:
            written.unlink(missing_ok=True)
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None


def _address(host: str, port: int) -> str:
    name = socket.gethostname() if host in _EVERYWHERE else host
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _target(address: str, labels: Mapping[str, str]) -> dict[str, Any]:
    return {"targets": [address], "labels": {**labels, "machine": socket.gethostname()}}


def _claimed(targets: Path, run: str) -> dict[str, Path]:
    """Addresses of this machine that other runs' target files name: of runs that live, or were killed."""
    found = {}
    for path in targets.glob("*.json"):
        try:
            (known,) = json.loads(path.read_text(encoding="utf-8"))
            (address,), labels = known["targets"], known["labels"]
            if labels["machine"] == socket.gethostname() and labels["run"] != run:
                found[str(address)] = path
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no file of ours, or one that went meanwhile
    return found
