"""Messages to people without Prometheus: mail, Slack, DingTalk, Feishu, WeCom, a webhook (``alerts.urls``).

A run tells a process beside it what happens (:class:`AlertSink`, :mod:`mgm_exp.alerts.watcher`); that one applies the
rules of :mod:`mgm_exp.monitor`, keeps the rate and sends. Training waits for none of it.
"""

from mgm_exp.alerts.channels import Channels, deliver
from mgm_exp.alerts.messages import Message, of_alert, of_death, of_result, of_sweep
from mgm_exp.alerts.rate import Rate
from mgm_exp.alerts.sink import AlertSink, check_alerts, tell_sweep

__all__ = [
    "AlertSink",
    "Channels",
    "Message",
    "Rate",
    "check_alerts",
    "deliver",
    "of_alert",
    "of_death",
    "of_result",
    "of_sweep",
    "tell_sweep",
]
