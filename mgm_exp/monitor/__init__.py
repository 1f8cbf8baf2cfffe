"""Watching a run while it runs: its machine in ``system.jsonl``, its numbers for Prometheus, the rules of both.

Rules are stated once (:func:`rules`): for Prometheus as an expression, for the run itself as a function. Nothing here
imports torch.
"""

from mgm_exp.monitor.exporter import Exporter, check_monitor, targets_folder
from mgm_exp.monitor.metrics import METRICS, RunMetrics
from mgm_exp.monitor.rules import AlertRule, rules
from mgm_exp.monitor.sink import MonitorSink
from mgm_exp.monitor.summary import Summary
from mgm_exp.monitor.system_file import SystemFile, read_samples
from mgm_exp.monitor.watch import Alert, Watch
from mgm_exp.monitor.window import Step, Window, median_seconds, spike_of

__all__ = [
    "METRICS",
    "Alert",
    "AlertRule",
    "Exporter",
    "MonitorSink",
    "RunMetrics",
    "Step",
    "Summary",
    "SystemFile",
    "Watch",
    "Window",
    "check_monitor",
    "median_seconds",
    "read_samples",
    "rules",
    "spike_of",
    "targets_folder",
]
