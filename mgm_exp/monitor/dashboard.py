"""The Grafana dashboard: one page for all runs that Prometheus knows, or one of them."""

from __future__ import annotations

from typing import Any

RUN = '{run=~"$run"}'
# Title, unit of Grafana, (expression, legend) of each line.
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "none", ((f"mgm_train_loss{RUN}", "{{run}} {{stage}}"),)),
    ("Gradient norm", "none", ((f"mgm_train_grad_norm{RUN}", "{{run}} {{stage}}"),)),
    ("Learning rate", "sci", ((f"mgm_train_learning_rate{RUN}", "{{run}} {{stage}}"),)),
    (
        "Progress of the stage",
        "percentunit",
        ((f"mgm_train_step{RUN} / mgm_train_steps{RUN}", "{{run}} {{stage}}"),),
    ),
    ("Tokens a second", "none", ((f"mgm_train_tokens_per_second{RUN}", "{{run}} {{stage}}"),)),
    (
        "Time of a step",
        "s",
        (
            (f"mgm_train_step_seconds_median{RUN}", "median {{run}} {{stage}}"),
            (
                f"histogram_quantile(0.95, sum by (run, stage, le) (rate(mgm_train_step_seconds_bucket{RUN}[5m])))",
                "95 % {{run}} {{stage}}",
            ),
            (f"mgm_train_data_wait_seconds{RUN}", "waiting for data {{run}} {{stage}}"),
        ),
    ),
    (
        "Seconds since the last sign, while a stage trains",
        "s",
        (
            (
                f"(time() - mgm_train_last_step_timestamp_seconds{RUN}) and mgm_train_run_active == 1",
                "{{run}} {{stage}}",
            ),
        ),
    ),
    (
        "Steps that were no number, and spikes",
        "none",
        (
            (f"increase(mgm_train_nonfinite_steps_total{RUN}[5m])", "no number {{run}}"),
            (f"increase(mgm_train_spikes_total{RUN}[5m])", "spikes {{run}}"),
        ),
    ),
    ("Validation score", "percentunit", ((f"mgm_train_validation{RUN}", "{{run}} {{stage}}"),)),
    (
        "GPU memory",
        "percentunit",
        ((f"mgm_device_memory_used_bytes{RUN} / mgm_device_memory_total_bytes{RUN}", "{{run}} GPU {{device}}"),),
    ),
    ("GPU use", "percentunit", ((f"mgm_device_utilization_ratio{RUN}", "{{run}} GPU {{device}}"),)),
    ("GPU power", "watt", ((f"mgm_device_power_watts{RUN}", "{{run}} GPU {{device}}"),)),
    ("GPU temperature", "celsius", ((f"mgm_device_temperature_celsius{RUN}", "{{run}} GPU {{device}}"),)),
    (
        "Processors",
        "none",
        ((f"mgm_process_cpu_cores{RUN}", "cores of {{run}}"), (f"mgm_host_cpu_ratio{RUN}", "share of the machine")),
    ),
    (
        "Memory",
        "bytes",
        (
            (f"mgm_process_memory_bytes{RUN}", "{{run}}"),
            (f"mgm_host_memory_used_bytes{RUN}", "machine"),
            (f"mgm_host_memory_total_bytes{RUN}", "there is"),
        ),
    ),
    ("Free on disks", "bytes", ((f"mgm_disk_free_bytes{RUN}", "{{disk}} of {{run}}"),)),
    (
        "Network",
        "Bps",
        (
            (f"mgm_host_network_receive_bytes_per_second{RUN}", "in"),
            (f"mgm_host_network_transmit_bytes_per_second{RUN}", "out"),
        ),
    ),
    ("Alerts", "none", (('ALERTS{alertstate="firing"}', "{{alertname}} {{run}}"),)),
)
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 8


def dashboard() -> dict[str, Any]:
    """The dashboard's JSON model, as Grafana imports it."""
    return {
        "uid": "mgm-exp",
        "title": "mgm_exp runs",
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-3h", "to": "now"},
        "tags": ["mgm_exp"],
        "templating": {
            "list": [
                {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run",
                    "label": "Run",
                    "type": "query",
                    "datasource": _SOURCE,
                    "query": {"query": "label_values(mgm_train_heartbeat_timestamp_seconds, run)", "refId": "run"},
                    "refresh": 2,
                    "sort": 1,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".+",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "annotations": {"list": []},
        "panels": [_panel(place, *panel) for place, panel in enumerate(PANELS)],
    }


def expressions() -> list[str]:
    """Every expression of the dashboard, for all runs: what can be checked without a Grafana."""
    return [expr.replace("$run", ".+") for _, _, lines in PANELS for expr, _ in lines]


def _panel(place: int, title: str, unit: str, lines: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    row, column = divmod(place, _COLUMNS)
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": title,
        "datasource": _SOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"spanNulls": False}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": _SOURCE, "expr": expr, "legendFormat": legend}
            for n, (expr, legend) in enumerate(lines)
        ],
    }
