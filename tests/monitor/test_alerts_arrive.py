"""From a fault in a run to a message: a real Prometheus asks it, a real Alertmanager posts to a webhook."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.config import MonitorLimitsConfig
from mgm_exp.monitor import rules
from mgm_exp.monitor.setup_files import Setup
from tests.monitor.tools import needs_prometheus

pytestmark = needs_prometheus

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {
    "memory_s": 1,
    "stalled_s": 3,
    "stalled_steps": 3,
    "down_s": 1,
    "disk_free_gib": 1,
    "recent_s": 3,
    "history_s": 60,
}
PATIENCE_S = 90.0


class Webhook(ThreadingHTTPServer):
    """Keeps what is posted: when, whether the alert is firing or resolved, its labels and annotations."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Posted)
        self.arrived: list[tuple[float, dict[str, Any]]] = []
        self.changed = threading.Condition()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def names(self, status: str = "firing") -> set[str]:
        """Alerts that were posted so."""
        return {alert["labels"]["alertname"] for _, alert in self.arrived if alert["status"] == status}

    def wait_for(self, *names: str, status: str = "firing") -> None:
        """Until each of them was posted."""
        with self.changed:
            there = self.changed.wait_for(lambda: set(names) <= self.names(status), PATIENCE_S)
        assert there, f"{sorted(set(names) - self.names(status))} did not arrive as {status}"

    def seconds_until(self, name: str, since: float) -> float:
        """From a time to the first message of an alert."""
        return next(at - since for at, alert in self.arrived if alert["labels"]["alertname"] == name)


class Posted(BaseHTTPRequestHandler):
    """Takes Alertmanager's messages."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        assert isinstance(server, Webhook)
        with server.changed:
            server.arrived += [(time.time(), alert) for alert in body["alerts"]]
            server.changed.notify_all()
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


class Place:
    """A run, Prometheus, Alertmanager and the webhook, all on this machine's loopback."""

    def __init__(self, folder: Path, stack: ExitStack, **limits: float) -> None:
        limits = {**LIMITS, **limits}
        self.folder, self._stack = folder, stack
        self.hook = Webhook()
        stack.callback(self.hook.server_close)
        stack.callback(self.hook.shutdown)
        self._orders = folder / "faults.json"
        self.order()
        overrides = [f"monitor.limits.{key}={value}" for key, value in limits.items()]
        port, prometheus, alertmanager = _free_ports(3)
        self.run = self._start(
            *(sys.executable, "-m", "tests.monitor.faulty_run", str(self._orders), f"paths.root={folder / 'out'}"),
            *(f"monitor.prometheus_port={port}", "monitor.every_s=0.2", "device=cpu", *overrides),
        )
        address = f"127.0.0.1:{alertmanager}"
        url = f"http://127.0.0.1:{self.hook.server_port}/"
        by = MonitorLimitsConfig(**limits)
        Setup(folder / "out", by, interval_s=1, alertmanager=address, webhook=url).write(folder)
        self._start(
            *("prometheus-alertmanager", f"--config.file={folder}/alertmanager.yml", f"--storage.path={folder}/am"),
            *(f"--web.listen-address={address}", "--cluster.listen-address=", "--log.level=error"),
        )
        # Its list of runs is read when it starts, and when the folder changes: the folder must be there.
        self.targets = folder / "out" / "monitor" / "targets"
        _until(lambda: any(self.targets.glob("*.json")))
        self._start(
            *("prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"),
            *(f"--web.listen-address=127.0.0.1:{prometheus}", "--log.level=error"),
        )
        self._prometheus = f"http://127.0.0.1:{prometheus}"

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        """A process that does not outlive this one, however it ends."""
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            cwd=ROOT,
            env={**os.environ, "GOMAXPROCS": "1"},
            stdout=subprocess.DEVNULL,
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def order(self, *faults: str) -> float:
        """From now on the run has these faults, and no others; when that is."""
        temporary = self._orders.with_suffix(".new")
        temporary.write_text(json.dumps(faults))
        temporary.replace(self._orders)
        return time.time()

    def knows(self, expr: str) -> bool:
        """Whether an expression has a value in Prometheus."""
        import urllib.error
        import urllib.parse
        import urllib.request

        query = urllib.parse.urlencode({"query": expr})
        try:
            with urllib.request.urlopen(f"{self._prometheus}/api/v1/query?{query}", timeout=5) as answer:
                return bool(json.load(answer)["data"]["result"])
        except (urllib.error.URLError, OSError):
            return False  # it is still starting

    def wait_for_history(self, seconds: int) -> None:
        """Until Prometheus has so many scrapes."""
        _until(lambda: self.knows(f"count_over_time(mgm_train_tokens_per_second[5m]) >= {seconds}"))


def _until(is_so: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path, stack)


def test_faults_and_the_death_of_a_run_arrive_at_a_webhook(place: Place) -> None:
    place.order("nan", "disk")
    place.hook.wait_for("TrainLossNaN", "DiskFilling")
    place.run.kill()
    place.hook.wait_for("TrainerDown")
    assert place.hook.names() == {"TrainLossNaN", "DiskFilling", "TrainerDown"}
    labels = {alert["labels"]["alertname"]: alert for _, alert in place.hook.arrived}
    assert labels["TrainLossNaN"]["labels"]["run"] == labels["TrainerDown"]["labels"]["run"] == "faulty-1-ab"
    assert labels["TrainLossNaN"]["annotations"]["runbook"] == "mgm-exp doctor --entry loss-not-finite"


@pytest.mark.slow
def test_every_alert_arrives_and_resolves_and_none_without_its_fault(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.wait_for_history(20)
    assert place.hook.arrived == []
    seen: dict[str, float] = {}

    def raised(*names: str, since: float) -> None:
        place.hook.wait_for(*names)
        seen.update({name: place.hook.seconds_until(name, since) for name in names})

    raised("TrainSpike", since=place.order("spike"))
    raised("DeviceMemoryHigh", since=place.order("memory"))
    raised("DiskFilling", since=place.order("disk"))
    raised("ThroughputDrop", since=place.order("slow"))
    raised("GPUIdle", since=place.order("idle"))
    raised("TrainLossNaN", since=place.order("nan"))
    place.order()
    _until(lambda: not place.knows('ALERTS{alertstate="firing"}'))
    raised("StalledStep", since=place.order("stall"))
    healed = place.order()
    place.hook.wait_for(*(set(seen) - {"TrainerDown"}), status="resolved")
    resolved = max(at for at, alert in place.hook.arrived if alert["status"] == "resolved") - healed
    place.run.kill()
    raised("TrainerDown", since=time.time())
    assert set(seen) == {rule.name for rule in rules()}
    with capsys.disabled():
        print(json.dumps({name: round(seconds, 1) for name, seconds in seen.items()} | {"resolved": round(resolved)}))


@pytest.mark.slow
def test_a_run_that_ends_raises_no_alert(tmp_path: Path) -> None:
    """Prometheus takes up to five seconds to see that a target is gone, and does not get an answer in them."""
    with ExitStack() as stack:
        place = Place(tmp_path, stack, down_s=10)
        place.wait_for_history(3)
        place.order("end")
        assert place.run.wait(30) == 0
        assert list(place.targets.iterdir()) == []
        _until(lambda: not place.knows("mgm_train_run_active"))
        _until(lambda: not place.knows('up{job="mgm_train"}'))
        _until(lambda: not place.knows("ALERTS"))
        assert not place.knows('max_over_time(ALERTS{alertstate="firing"}[5m])')
        assert place.hook.arrived == []
