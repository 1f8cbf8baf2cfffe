"""Faults put into real training raise their alerts, and the doctor names what was put in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("apprise")

from mgm_exp.alerts import AlertSink
from mgm_exp.config import AlertsConfig, GuardAction, GuardsConfig, MonitorLimitsConfig
from mgm_exp.doctor import explained_error
from mgm_exp.errors import TrainingFailed
from mgm_exp.record import FilesSink, Recorder, RunInfo, explain
from mgm_exp.train import run_stage
from tests.train.conftest import job_in

from .faults import BEGIN, END, FAULTS, KEY, PAGE, VARIABLE, Fault, holding, meet
from .webhook import webhook


def test_a_loss_that_breaks_is_told_while_it_trains_and_again_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("train: {lr: 1.0e+9, precision: fp32}\n")
    job = job_in(tmp_path, steps=9, lr=1e9, guards=GuardsConfig(on_nonfinite=GuardAction.stop))
    with webhook() as hook:
        alerts = AlertSink(AlertsConfig([f"{hook.url}/${VARIABLE}"]), MonitorLimitsConfig(), finish_s=30.0, poll_s=0.1)
        run = RunInfo("id", run_dir, "broken", None, "run", (), {})
        with Recorder([FilesSink(run_dir), alerts], run) as recorder:
            recorder.begin()
            with pytest.raises(TrainingFailed) as failed:
                run_stage(
                    job,
                    on_start=lambda total, rows: recorder.stage_started("instruct", total, rows),
                    on_row=recorder.row,
                )
            error = explained_error(explain(failed.value), run_dir)
            recorder.finish({"status": "failed", "metrics": {}, "error": error})
    assert hook.titles == ["mgm_exp TrainLossNaN: broken", "mgm_exp failed: broken"]
    assert "mgm-exp doctor --entry loss-not-finite" in hook.heard[0]["message"]
    assert "nan-rate-too-high" in hook.heard[1]["message"]
    assert hook.heard[1]["path"].endswith(KEY) and holding(tmp_path, KEY) == []


def test_the_page_has_a_row_for_every_fault() -> None:
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(FAULTS)
    for fault, row in zip(FAULTS, rows, strict=True):
        assert fault.title in row and f"`{fault.alert}`" in row
        assert f"`{fault.doctor}`" in row if fault.doctor else row.endswith("| none |")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.alert for fault in FAULTS])
def test_a_fault_raises_its_alert_and_the_doctor_names_it(fault: Fault, tmp_path: Path) -> None:
    if fault.disk_mib is not None and os.geteuid() != 0:
        pytest.skip("a small disk needs root")
    seen = meet(fault, tmp_path)
    assert fault.alert in seen.alerts
    assert seen.doctor == fault.doctor
