"""The metrics file is cut back to a step, and a torn last line is not a row."""

from __future__ import annotations

from pathlib import Path

from mgm_exp.train.metrics_file import MetricsFile, read_rows


def test_rows_after_the_step_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.cut_back(0) == []
    for step in range(1, 5):
        metrics.append({"step": step, "loss": step / 3})
    metrics.append({"event": "resumed", "step": 2})
    with open(metrics.path, "a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in read_rows(metrics.path)] == [1, 2, 3, 4, 2]
    kept = metrics.cut_back(2)
    assert [row["step"] for row in kept] == [1, 2, 2]
    assert read_rows(metrics.path) == kept
    assert kept[0]["loss"] == 1 / 3
