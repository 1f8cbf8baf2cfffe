"""A run's numbers where Prometheus finds them: over HTTP, in a text file, for several runs at once."""

from __future__ import annotations

import json
import logging
import math
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from mgm_exp.config import MonitorConfig, MonitorLimitsConfig
from mgm_exp.errors import ConfigError, MissingDependencyError
from mgm_exp.monitor import METRICS, Exporter, RunMetrics, check_monitor, exporter

LIMITS = MonitorLimitsConfig()
ROW = {"stage": "instruct", "step": 1, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-4, "tokens_per_s": 900.0,
       "samples_per_s": 3.0, "seconds": 4.0, "data_wait_s": 0.1}  # fmt: skip
SAMPLE = {
    "t": 1.0,
    "cpu": 0.5,
    "memory_gib": 3.0,
    "memory_total_gib": 8.0,
    "process_memory_gib": 2.0,
    "process_cpu": 1.5,
    "network": {"received_mib_s": 1.0, "sent_mib_s": 2.0},
    "disks": {"root": {"free_gib": 10.0, "total_gib": 100.0}, "store": {"free_gib": 20.0, "total_gib": 100.0}},
    "gpus": [
        {"index": 0, "memory_used_gib": 9.0, "memory_total_gib": 80.0, "utilization": 0.9, "power_w": 400.0,
         "temperature_c": 60},
        {"index": 1, "memory_used_gib": 9.0, "memory_total_gib": 80.0, "utilization": None, "power_w": None,
         "temperature_c": None},
    ],
}  # fmt: skip


def metrics(run: str = "demo-3-aa") -> RunMetrics:
    return RunMetrics({"run": run, "adapter": "lora_r8"}, LIMITS)


def training(run: str = "demo-3-aa") -> RunMetrics:
    found = metrics(run)
    found.stage_started("instruct", 40, 1000.0)
    found.row(ROW, 1001.0)
    found.sample(SAMPLE)
    return found


def shown(found: RunMetrics) -> dict[str, Any]:
    """name{stage, device, disk, le} -> value, of what Prometheus would get."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(found)
    from prometheus_client import generate_latest

    return parsed(generate_latest(registry).decode())


def parsed(text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            assert {"run", "adapter"} <= set(one.labels)
            rest = [one.labels[key] for key in ("device", "disk", "le") if key in one.labels]
            values["/".join([one.name, *rest])] = one.value
    return values


def test_every_metric_is_shown_under_its_name() -> None:
    found = training()
    found.row({"stage": "instruct", "step": 1, "event": "validation", "value": 0.5}, 1002.0)
    found.row({**ROW, "step": 2, "seconds": 4.2}, 1003.0)
    values = shown(found)
    assert {family.name for family in found.collect()} == set(METRICS)
    assert values["mgm_train_step"] == 2
    assert values["mgm_train_steps"] == 40
    assert values["mgm_train_loss"] == 2.5
    assert values["mgm_train_validation"] == 0.5
    assert values["mgm_train_last_step_timestamp_seconds"] == 1003.0
    assert values["mgm_train_step_seconds_median"] == pytest.approx(0.2)
    assert values["mgm_train_step_seconds_count"] == 1
    assert values["mgm_train_step_seconds_bucket/0.1"] == 0
    assert values["mgm_train_step_seconds_bucket/0.25"] == 1
    assert values["mgm_device_memory_used_bytes/0"] == 9 * 2**30
    assert values["mgm_disk_free_bytes/store"] == 20 * 2**30
    assert "mgm_device_power_watts/1" not in values


def test_a_loss_that_is_no_number_and_a_spike_are_counted() -> None:
    found = training()
    for step in range(2, 14):
        found.row({**ROW, "step": step, "seconds": 4.0 + step}, 1000.0 + step)
    found.row({**ROW, "step": 14, "grad_norm": 10.5}, 1014.0)
    found.row({**ROW, "step": 15, "event": "not_finite", "loss": None, "grad_norm": None}, 1015.0)
    values = shown(found)
    assert values["mgm_train_spikes_total"] == 1
    assert values["mgm_train_nonfinite_steps_total"] == 1
    assert math.isnan(values["mgm_train_loss"])


def test_a_new_stage_begins_anew_and_an_ended_one_is_not_active() -> None:
    found = training()
    found.row({**ROW, "event": "not_finite", "loss": None}, 1002.0)
    assert shown(found)["mgm_train_run_active"] == 1
    found.stage_finished()
    ended = shown(found)
    assert ended["mgm_train_run_active"] == 0
    assert "mgm_train_last_step_timestamp_seconds" not in ended
    found.stage_started("instruct", 7, 2000.0)
    begun = shown(found)
    assert (begun["mgm_train_run_active"], begun["mgm_train_steps"]) == (1, 7)
    assert begun["mgm_train_nonfinite_steps_total"] == 0
    assert "mgm_train_loss" not in begun


def test_before_a_stage_there_is_a_heartbeat() -> None:
    assert set(shown(metrics())) == {"mgm_train_heartbeat_timestamp_seconds"}


# -- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    all_of_them = []

    def make(found: RunMetrics, **settings: Any) -> Exporter:
        all_of_them.append(Exporter(MonitorConfig(**settings), found, tmp_path / "targets"))
        return all_of_them[-1]

    yield make
    for one in all_of_them:
        one.close()


def read(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return parsed(answer.read().decode())


def test_several_runs_of_a_machine_each_have_a_port_and_a_target_file(
    opened: Any, port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (opened(training(run), prometheus_port=port) for run in ("one", "two"))
    assert first.url == f"http://127.0.0.1:{port}/metrics"
    assert first.url != second.url
    assert f"port {port} is another run's" in caplog.text
    assert read(first.url)["mgm_train_loss"] == read(second.url)["mgm_train_loss"] == 2.5
    (target,) = json.loads((tmp_path / "targets" / "two.json").read_text())
    assert target["targets"] == [second.url.removeprefix("http://").removesuffix("/metrics")]
    assert target["labels"] == {"run": "two", "adapter": "lora_r8", "machine": socket.gethostname()}
    first.close()
    assert sorted(path.name for path in (tmp_path / "targets").iterdir()) == ["two.json"]
    with pytest.raises(OSError):
        read(first.url)


def leave(folder: Path, name: str, address: str, machine: str = "") -> None:
    folder.mkdir(exist_ok=True)
    labels = {"run": name, "machine": machine or socket.gethostname()}
    (folder / f"{name}.json").write_text(json.dumps([{"targets": [address], "labels": labels}]))


def test_a_killed_run_keeps_its_address_and_gets_it_again(opened: Any, port: int, tmp_path: Path) -> None:
    """Its alert would be over when another run answered there."""
    leave(tmp_path / "targets", "killed", f"127.0.0.1:{port}")
    other = opened(training("other"), prometheus_port=port)
    assert other.url is not None and f":{port}/" not in other.url
    assert (tmp_path / "targets" / "killed.json").exists()
    assert opened(training("killed"), prometheus_port=port).url == f"http://127.0.0.1:{port}/metrics"


def test_an_address_is_taken_from_a_killed_run_where_there_is_no_other(
    opened: Any, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "PORTS_TRIED", 1)
    folder = tmp_path / "targets"
    leave(folder, "killed", f"127.0.0.1:{port}")
    leave(folder, "another-port", "127.0.0.1:1")
    (folder / "broken.json").write_text("{")
    opened(training("mine"), prometheus_port=port)
    assert {path.stem for path in folder.iterdir()} == {"another-port", "broken", "mine"}


def test_runs_of_another_machine_have_addresses_of_their_own(opened: Any, port: int, tmp_path: Path) -> None:
    leave(tmp_path / "targets", "elsewhere", f"127.0.0.1:{port}", "another-machine")
    assert opened(training("mine"), prometheus_port=port).url == f"http://127.0.0.1:{port}/metrics"
    assert (tmp_path / "targets" / "elsewhere.json").exists()


def test_where_all_ports_are_taken_the_run_goes_on(
    opened: Any, port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(exporter, "PORTS_TRIED", 1)
    opened(training(), prometheus_port=port)
    second = opened(training("two"), prometheus_port=port)
    assert second.url is None
    assert "all taken" in caplog.text and caplog.records[-1].levelno == logging.WARNING
    assert not (tmp_path / "targets" / "two.json").exists()


def test_an_address_that_is_not_of_this_machine_is_a_warning(
    opened: Any, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert opened(training(), prometheus_port=port, prometheus_host="192.0.2.1").url is None
    assert "192.0.2.1" in caplog.text and "the run goes on" in caplog.text


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1:9301"), ("::1", "[::1]:9301"), ("0.0.0.0", f"{socket.gethostname()}:9301")],
)
def test_an_address_is_one_that_prometheus_can_ask(host: str, address: str) -> None:
    assert exporter._address(host, 9301) == address


# -- as a text file --------------------------------------------------------------------------------------------------


def test_the_text_file_is_whole_and_goes_with_the_run(opened: Any, tmp_path: Path) -> None:
    writing = opened(training(), textfile=str(tmp_path))
    path = tmp_path / "mgm_exp-demo-3-aa.prom"
    writing.write()
    before = path.stat().st_ino
    writing.write()
    assert path.stat().st_ino != before  # another file took its name
    assert parsed(path.read_text())["mgm_train_loss"] == 2.5
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    writing.close()
    writing.write()  # a sample that came late
    assert list(tmp_path.iterdir()) == []


# -- what is asked for and cannot be given ---------------------------------------------------------------------------


def test_what_is_missing_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_monitor(MonitorConfig(prometheus_port=9301, textfile=str(tmp_path)))
    with pytest.raises(ConfigError, match="is no folder"):
        check_monitor(MonitorConfig(textfile=str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match="is no folder that can be written"):
        check_monitor(MonitorConfig(textfile="/proc"))
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None)
    check_monitor(MonitorConfig())
    with pytest.raises(MissingDependencyError, match=r"monitor\.prometheus_port.*mgm-exp\[monitor\]"):
        check_monitor(MonitorConfig(prometheus_port=9301))
    with pytest.raises(MissingDependencyError, match=r"monitor\.textfile"):
        check_monitor(MonitorConfig(textfile=str(tmp_path)))
