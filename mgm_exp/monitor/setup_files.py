"""What Prometheus, Alertmanager and Grafana need to know of runs, in files: ``mgm-exp monitor --write DIR``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mgm_exp.config import MonitorLimitsConfig
from mgm_exp.monitor.dashboard import dashboard
from mgm_exp.monitor.exporter import targets_folder
from mgm_exp.monitor.rule_cases import RuleCase, interval_of, rule_cases
from mgm_exp.monitor.rules import AlertRule, rules
from mgm_exp.store import write_atomic, write_json_atomic

RULES, RULES_TEST, PROMETHEUS = "rules.yml", "rules_test.yml", "prometheus.yml"
ALERTMANAGER, DASHBOARD = "alertmanager.yml", "dashboard.json"


@dataclass(frozen=True)
class Setup:
    """One Prometheus with its Alertmanager.

    Args:
        root: ``paths.root`` of the runs.
        limits: When alerts are raised.
        interval_s: Seconds between two questions to a run.
        static: Addresses (``HOST:PORT``) of runs whose target files cannot be read here.
        node_exporter: Address of the node_exporter that reads ``monitor.textfile``; None: there is none.
        alertmanager: Address of the Alertmanager.
        webhook: Where it posts alerts.
    """

    root: Path
    limits: MonitorLimitsConfig = field(default_factory=MonitorLimitsConfig)
    interval_s: int = 15
    static: tuple[str, ...] = ()
    node_exporter: str | None = None
    alertmanager: str = "127.0.0.1:9093"
    webhook: str = "http://127.0.0.1:9304/"

    def write(self, folder: Path) -> list[Path]:
        """Writes all files, each whole or not at all; their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        content: Mapping[str, Any] = {
            PROMETHEUS: self.prometheus(),
            RULES: rules_file(self.limits),
            RULES_TEST: rules_test_file(self.limits),
            ALERTMANAGER: self.alertmanager_file(),
        }
        for name, values in content.items():
            write_atomic(folder / name, yaml.safe_dump(values, sort_keys=False, width=1000))
        write_json_atomic(folder / DASHBOARD, dashboard())
        return [folder / name for name in (*content, DASHBOARD)]

    def prometheus(self) -> dict[str, Any]:
        """``prometheus.yml``: who is asked, which rules there are, where alerts go."""
        every = f"{self.interval_s}s"
        runs: dict[str, Any] = {
            "job_name": "mgm_train",
            # A run's own labels are what they are, not exported_run.
            "honor_labels": True,
            "file_sd_configs": [
                {"files": [str(targets_folder(self.root.resolve()) / "*.json")], "refresh_interval": every}
            ],
        }
        if self.static:
            runs["static_configs"] = [{"targets": list(self.static)}]
        jobs = [runs]
        if self.node_exporter:
            jobs.append({"job_name": "node", "static_configs": [{"targets": [self.node_exporter]}]})
        return {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
            "rule_files": [RULES],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [self.alertmanager]}]}]},
            "scrape_configs": jobs,
        }

    def alertmanager_file(self) -> dict[str, Any]:
        """``alertmanager.yml``: one message for an alert and run; a dead process is not also a stalled one."""
        return {
            "route": {
                "receiver": "hook",
                "group_by": ["alertname", "run"],
                "group_wait": f"{self.interval_s}s",
                "group_interval": f"{20 * self.interval_s}s",
                "repeat_interval": "12h",
                "routes": [
                    {"matchers": ['severity="critical"'], "repeat_interval": "1h"},
                ],
            },
            "inhibit_rules": [
                {
                    "source_matchers": ['alertname="TrainerDown"'],
                    "target_matchers": ['alertname=~"StalledStep|ThroughputDrop|GPUIdle"'],
                    "equal": ["run"],
                },
                {
                    "source_matchers": ['alertname="StalledStep"'],
                    "target_matchers": ['alertname=~"ThroughputDrop|GPUIdle"'],
                    "equal": ["run"],
                },
                {
                    "source_matchers": ['alertname="TrainLossNaN"'],
                    "target_matchers": ['alertname="TrainSpike"'],
                    "equal": ["run"],
                },
            ],
            "receivers": [{"name": "hook", "webhook_configs": [{"url": self.webhook, "send_resolved": True}]}],
        }


def rules_file(limits: MonitorLimitsConfig) -> dict[str, Any]:
    """``rules.yml``."""
    return {"groups": [{"name": "mgm_exp", "rules": [_alert(rule) for rule in rules(limits)]}]}


def _alert(rule: AlertRule) -> dict[str, Any]:
    return {
        "alert": rule.name,
        "expr": rule.expr,
        **({"for": f"{round(rule.for_s * 1000)}ms"} if rule.for_s else {}),
        "labels": {"severity": rule.severity},
        "annotations": _annotations(rule),
    }


def _annotations(rule: AlertRule, run: str = "{{ $labels.run }}") -> dict[str, str]:
    return {"summary": f"{run}: {rule.summary}", "runbook": f"mgm-exp doctor --entry {rule.runbook}"}


def rules_test_file(limits: MonitorLimitsConfig) -> dict[str, Any]:
    """``rules_test.yml`` for ``promtool test rules``: each alert is raised where it should be, and only there."""
    known = {rule.name: rule for rule in rules(limits)}
    every = f"{interval_of(limits)}s"
    return {
        "rule_files": [RULES],
        "evaluation_interval": every,
        "tests": [_test(case, known[case.rule], every) for case in rule_cases(limits)],
    }


def _test(case: RuleCase, rule: AlertRule, every: str) -> dict[str, Any]:
    expected = []
    if case.labels is not None:
        labels = {"severity": rule.severity, **case.labels}
        expected.append({"exp_labels": labels, "exp_annotations": _annotations(rule, case.labels["run"])})
    return {
        "name": f"{case.rule}: {case.what}",
        "interval": every,
        "input_series": [
            {
                "series": name + "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}",
                "values": values,
            }
            for name, labels, values in case.series
        ],
        "alert_rule_test": [
            {"eval_time": f"{round(case.at)}s", "alertname": rule.name, "exp_alerts": expected},
        ],
    }
