"""Finished runs of this machine beside the plan: speeds, errors, and what becomes of the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mgm_exp.cli import main
from mgm_exp.config import plain
from mgm_exp.plan import Measured, architecture_of, calibrate, plan_cell
from mgm_exp.plan.probe import measure, read_probe
from tests.plan.settings import config_of

MACHINE = "Card X"
SPEED = 5e9


def finished_run(
    root: Path, name: str, *, machine: str = MACHINE, seconds_factor: float = 1.0, key: str | None = None, **facts: Any
) -> Path:
    """A run folder whose steps took what the plan's count takes at SPEED, times a factor."""
    config = config_of("train.align.max_steps=0", "train.max_steps=12")
    config.plan.rows = 24
    plan = plan_cell(config).stages[-1]
    assert plan.flops is not None and plan.steps == 12 and plan.tokens is not None
    folder = root / "runs" / "r" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config)), encoding="utf-8")
    data = {stage: {"kept": 24, **facts.get("data", {})} for stage in ("align", "instruct")}
    (folder / "data.json").write_text(json.dumps(data), encoding="utf-8")
    step = {"stage": "instruct", "loss": 1.0, "peak_memory_gib": facts.get("peak", 9.0)}
    seconds = plan.flops / 12 / SPEED * seconds_factor
    # Sums so far, as a run writes them; the first two steps warm up, and do not count
    rows: list[dict[str, Any]] = [
        {**step, "step": i + 1, "seconds": 1e6 + seconds * max(0, i - 1), "tokens": plan.tokens / 12 * (i + 1)}
        for i in range(12)
    ]
    rows.append({"stage": "instruct", "event": "resumed", "step": 12, "seconds": 1e6})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    manifest = {
        "device": {"name": machine, "type": facts.get("type", "cpu")},
        "stages": [{"name": "instruct", "key": key or name}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    result = {"status": facts.get("status", "completed")}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def test_the_speed_is_the_median_of_finished_stages_of_this_machine(tmp_path: Path) -> None:
    for number, factor in enumerate((1.0, 2.0, 1.25)):
        finished_run(tmp_path, f"{number}", seconds_factor=factor)
    finished_run(tmp_path, "other", machine="Card Y", seconds_factor=50)
    finished_run(tmp_path, "broken", status="failed", seconds_factor=50)
    damaged = finished_run(tmp_path, "damaged", seconds_factor=50)
    (damaged / "config.yaml").write_text("seed: [", encoding="utf-8")
    found = calibrate(tmp_path, MACHINE)
    assert len(found.finished) == 3
    assert found.speed("tiny") == pytest.approx(SPEED / 1.25)
    assert found.speed("mgm_2b") == pytest.approx(SPEED / 1.25), "better than nothing"
    errors = sorted(found.time_error(stage) or 0.0 for stage in found.finished)
    # Each from the median of the other two: 0.5 / 0.9, 0.8 / 0.75, 1 / 0.65
    assert errors == pytest.approx([0.5 / 0.9 - 1, 0.8 / 0.75 - 1, 1 / 0.65 - 1])
    assert found.memory_factor() is None, "on the CPU the whole process was measured"
    assert calibrate(tmp_path / "nothing", MACHINE).speed("tiny") is None


def test_a_run_is_planned_with_the_lengths_of_its_own_rows(tmp_path: Path) -> None:
    """As a plan of now knows the rows that were curated: with longer ones its memory would seem to be less."""
    short = {"tokens": 24 * 80, "supervised_tokens": 24 * 8, "lengths": {"max": 90.0}}
    (usual,) = calibrate(finished_run(tmp_path / "a", "0").parents[2], MACHINE).finished
    (own,) = calibrate(finished_run(tmp_path / "b", "0", data=short).parents[2], MACHINE).finished
    assert own.predicted_gib < 0.9 * usual.predicted_gib
    # Its steps had more tokens than these rows have: the count is scaled to what was learnt
    assert own.speed == pytest.approx(usual.speed, rel=0.1)


def test_a_table_of_prices_that_is_gone_does_not_hide_a_run(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, "0")
    file = folder / "config.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    content["plan"]["prices"] = "gone.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert len(calibrate(tmp_path, MACHINE).finished) == 1


def test_answers_have_a_speed_of_their_own(tmp_path: Path) -> None:
    """The same count over the seconds that the manifest has; baselines and variants are asked otherwise."""
    folder = finished_run(tmp_path, "0")
    record = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, key, seconds in (("the trained model", "k", 50.0), ("untouched base", "b", 1.0)):
        record["stages"].append({"name": f"evaluate[demo] {name}", "key": key, "seconds": seconds})
    (folder / "manifest.json").write_text(json.dumps(record), encoding="utf-8")
    found = calibrate(tmp_path, MACHINE)
    trained, answered = found.finished
    assert (answered.stage, answered.steps, answered.seconds, answered.is_training) == (
        "evaluate[demo]",
        600,
        50,
        False,
    )
    assert found.trained == (trained,) and found.answer_speed("tiny") == answered.flops / 50
    assert found.time_error(trained) is None and found.time_error(answered) is None
    speed = found.answer_speed("tiny")
    cell = plan_cell(config_of(), measured=Measured(SPEED, "as measured", answers_flops_per_s=speed))
    assert (cell.hours_of["evaluate[demo]"] or 0) * 3600 == pytest.approx(50, rel=1e-3)


def test_a_stage_that_runs_share_counts_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        finished_run(tmp_path, name, key="same")
    found = calibrate(tmp_path, MACHINE)
    assert len(found.finished) == 1 and found.time_error(found.finished[0]) is None


def test_memory_that_was_above_the_plan_makes_the_verdict_stricter(tmp_path: Path) -> None:
    predicted = calibrate(finished_run(tmp_path / "x", "0").parents[2], MACHINE).finished[0].predicted_gib
    for number in range(3):
        finished_run(tmp_path, f"{number}", type="cuda", peak=1.3 * predicted)
    found = calibrate(tmp_path, MACHINE)
    factor = found.memory_factor()
    assert factor == pytest.approx(1.3)
    assert [stage.memory_error for stage in found.finished] == pytest.approx([1 / 1.3 - 1] * 3)
    cell = plan_cell(config_of(), measured=Measured(SPEED, "as measured", factor))
    assert any("had 1.30 of the memory" in note and "verdict" in note for note in cell.notes)
    flops = sum(part.flops or 0 for part in (*cell.stages, *cell.phases))
    assert cell.hours == pytest.approx(flops / SPEED / 3600, rel=1e-3)
    huge = plan_cell(config_of(), measured=Measured(None, memory_factor=1e6))
    assert (cell.verdict, huge.verdict) == ("fits", "does not fit")
    named = plan_cell(config_of("plan.device=a10"), measured=Measured(SPEED, "as measured", 1e6))
    assert named.verdict == "fits", "what was measured here says nothing of another card"


def test_the_verb_shows_prediction_and_measurement_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mgm_exp.record.environment import this_device

    for number in range(2):
        finished_run(tmp_path, f"{number}", machine=this_device()["name"], seconds_factor=1 + number)
    file = tmp_path / "plan.json"
    assert main(["plan", f"paths.root={tmp_path}", "--calibration", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "at the speed of 2 finished stages on this machine" in printed and "resizing images" not in printed
    assert "r/0" in printed and "-50%" in printed
    content = json.loads(file.read_text(encoding="utf-8"))
    assert sorted(row["time_error"] for row in content["calibration"]) == pytest.approx([-0.5, 1.0])
    assert content["cells"][0]["hours"] > 0


def test_a_probe_is_kept_and_belongs_to_its_machine_precision_and_threads(tmp_path: Path) -> None:
    sizes = architecture_of(config_of().model)
    probe = measure(sizes, MACHINE, "fp32", tokens=64, seconds=0.01)
    assert probe.flops_per_s > 1e6
    probe.save(tmp_path)
    assert read_probe(tmp_path, MACHINE, "fp32", probe.threads) == probe
    for other in ((MACHINE, "bf16", probe.threads), ("Card Y", "fp32", probe.threads), (MACHINE, "fp32", 99)):
        assert read_probe(tmp_path, *other) is None
    (tmp_path / "machine.json").write_text("{", encoding="utf-8")
    assert read_probe(tmp_path, MACHINE, "fp32", probe.threads) is None
