"""The files for Prometheus, Alertmanager and Grafana: their own tools accept them, and each rule does what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from mgm_exp.cli import main
from mgm_exp.config import MonitorLimitsConfig
from mgm_exp.errors import EXIT_BAD_INPUT, EXIT_DONE
from mgm_exp.monitor import METRICS, rules
from mgm_exp.monitor.dashboard import dashboard, expressions
from mgm_exp.monitor.rule_cases import rule_cases
from mgm_exp.monitor.setup_files import Setup, rules_file
from tests.monitor.tools import needs_prometheus, said_by

QUICK = MonitorLimitsConfig(
    recent_s=5, history_s=40, memory_s=3, stalled_s=4, stalled_steps=3, down_s=3, disk_hours=1.1
)


@needs_prometheus
@pytest.mark.parametrize("limits", [MonitorLimitsConfig(), QUICK], ids=["usual", "quick"])
def test_every_rule_is_raised_and_not_raised_in_promtool(limits: MonitorLimitsConfig, tmp_path: Path) -> None:
    Setup(tmp_path, limits).write(tmp_path)
    assert "SUCCESS" in said_by("promtool", "test", "rules", "rules_test.yml", folder=tmp_path)


def test_every_rule_has_a_case_of_both_kinds() -> None:
    cases = list(rule_cases(MonitorLimitsConfig()))
    names = {rule.name for rule in rules()}
    assert {case.rule for case in cases if case.labels} == {case.rule for case in cases if not case.labels} == names


@needs_prometheus
def test_promtool_finds_a_rule_that_is_wrong(tmp_path: Path) -> None:
    Setup(tmp_path).write(tmp_path)
    wrong = (tmp_path / "rules.yml").read_text().replace("> 0.9", "> 0.99")
    (tmp_path / "rules.yml").write_text(wrong)
    with pytest.raises(AssertionError, match="DeviceMemoryHigh: for long"):
        said_by("promtool", "test", "rules", "rules_test.yml", folder=tmp_path)


@needs_prometheus
def test_prometheus_and_alertmanager_accept_their_files(tmp_path: Path) -> None:
    Setup(tmp_path, static=("node7:9301",), node_exporter="127.0.0.1:9100").write(tmp_path)
    said = said_by("promtool", "check", "config", "prometheus.yml", folder=tmp_path)
    assert "8 rules found" in said
    assert "3 inhibit rules" in said_by("amtool", "check-config", "alertmanager.yml", folder=tmp_path)
    jobs = yaml.safe_load((tmp_path / "prometheus.yml").read_text())["scrape_configs"]
    assert [job["static_configs"][0]["targets"] for job in jobs] == [["node7:9301"], ["127.0.0.1:9100"]]


@needs_prometheus
def test_promtool_accepts_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    recorded = [{"record": f"panel:{n}", "expr": expr} for n, expr in enumerate(expressions())]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    assert f"{len(recorded)} rules found" in said_by("promtool", "check", "rules", "panels.yml", folder=tmp_path)


def test_expressions_name_only_metrics_that_there_are() -> None:
    known = set(METRICS)
    for expr in [*expressions(), *(rule.expr for rule in rules())]:
        used = {re.sub(r"_(total|bucket)$", "", name) for name in re.findall(r"\bmgm_\w+", expr)} - {"mgm_train"}
        used |= set(re.findall(r"\bmgm_\w+_total_bytes", expr))
        assert used <= known, expr


def test_the_dashboard_has_the_form_that_grafana_imports() -> None:
    found = json.loads(json.dumps(dashboard()))
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 15
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    variables = {variable["name"] for variable in found["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)\}?", json.dumps(panels))) == variables == {"source", "run"}
    for panel in panels:
        assert panel["title"] and panel["targets"] and panel["datasource"]["type"] == "prometheus"


def test_the_committed_page_names_every_alert_with_its_runbook() -> None:
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    for rule in rules():
        assert f"| `{rule.name}` | {rule.severity} |" in page
        assert f"mgm-exp doctor --entry {rule.runbook}" in page
    assert [name for name in METRICS if f"`{name}" not in page] == []


# -- the command line ------------------------------------------------------------------------------------------------


def test_limits_and_root_of_the_command_line_stand_in_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "results"
    given = ["monitor", "--write", str(tmp_path / "w"), f"paths.root={root}", "monitor.limits.memory_share=0.8"]
    assert main([*given, "--interval", "5", "--webhook", "https://example.org/hook"]) == EXIT_DONE
    assert "written:" in capsys.readouterr().out
    prometheus = yaml.safe_load((tmp_path / "w" / "prometheus.yml").read_text())
    assert prometheus["global"]["scrape_interval"] == "5s"
    assert prometheus["scrape_configs"][0]["file_sd_configs"][0]["files"] == [f"{root}/monitor/targets/*.json"]
    written = yaml.safe_load((tmp_path / "w" / "rules.yml").read_text())
    assert written == rules_file(MonitorLimitsConfig(memory_share=0.8))
    hook = yaml.safe_load((tmp_path / "w" / "alertmanager.yml").read_text())["receivers"][0]["webhook_configs"][0]
    assert hook["url"] == "https://example.org/hook"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "takes one run's folder"),
        (["--write", "w", "--target", "nowhere"], "HOST:PORT"),
        (["--write", "w", "--interval", "0"], "1..3600"),
        (["--write", "w", "--webhook", "slack"], "--webhook slack"),
        (["--write", "w", "monitor.limits.memory_share=2"], "memory_share=2.0 must lie in (0, 1]"),
        (["--write", "w", "monitor.textfile=.", "monitor.every_s=60"], "must lie below monitor.limits.down_s=60"),
        (["."], "has no system.jsonl"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["monitor", *arguments]) == EXIT_BAD_INPUT
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_summed_up_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = {"index": 0, "memory_used_gib": 70.0, "memory_total_gib": 80.0, "utilization": 0.5}
    samples = [
        {"t": 60.0 * n, "stage": "instruct", "step": n, "cpu": 0.5, "memory_gib": 3.0, "memory_total_gib": 8.0,
         "process_memory_gib": 1.5, "disks": {"root": {"free_gib": 9.0, "total_gib": 10.0}}, "gpus": [gpu]}
        for n in range(11)
    ]  # fmt: skip
    (tmp_path / "system.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert main(["monitor", str(tmp_path)]) == EXIT_DONE
    said = capsys.readouterr().out
    assert "11 samples in 10.0 minutes, the last one in instruct step 10" in said
    assert "70.0 of 80.0 GiB on one GPU" in said
    assert "50% while a stage trained, idle for 0% of that time" in said
    assert "1.50 GiB at most in the run's processes" in said


@pytest.mark.parametrize(
    "line",
    [
        '{"t": 1, "memory_gib": "much"}',
        '{"t": 1, "disks": 3}',
        '{"t": 1, "gpus": [{}]}',
        '{"t": 1, "memory_gib": 1.0}',
        '{"t": 1, "stage": "a", "step": "b"}',
        f'{{"t": 1{"0" * 400}, "memory_gib": 1.0}}',
    ],
)
def test_a_foreign_file_is_refused_in_words(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "system.jsonl").write_text(f'{{"t": 0, "memory_gib": 0.5}}\n{line}\n')
    assert main(["monitor", str(tmp_path)]) == EXIT_BAD_INPUT
    assert "is not what a run writes" in capsys.readouterr().err


def test_a_foreign_file_does_not_speak_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disks = {"\x1b]0;PWNED\x07": {"free_gib": 1.0, "total_gib": 2.0}}
    (tmp_path / "system.jsonl").write_text(json.dumps({"t": 1, "stage": "\x1b[2J", "step": 1, "disks": disks}) + "\n")
    assert main(["monitor", str(tmp_path)]) == EXIT_DONE
    assert "\x1b" not in capsys.readouterr().out
