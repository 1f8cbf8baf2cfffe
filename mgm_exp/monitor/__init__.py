"""Watching a run while it runs: its machine in ``system.jsonl``, its numbers for Prometheus, the rules of both.

Rules are stated once (:func:`rules`): for Prometheus as an expression, for the run itself as a function. Nothing here
imports torch.
"""

from mgm_exp.monitor.rules import AlertRule, rules
from mgm_exp.monitor.watch import Alert, Watch
from mgm_exp.monitor.window import Step, Window, median_seconds, spike_of

__all__ = ["Alert", "AlertRule", "Step", "Watch", "Window", "median_seconds", "rules", "spike_of"]
