"""What is read of a run's folder, how findings are weighed, and what is said at a run's own end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.doctor import (
    Case,
    case_of_run,
    case_of_text,
    compare_runs,
    diagnose,
    diagnose_sweep,
    explained_error,
    in_words,
)
from mgm_exp.doctor.facts import Fact, conditions_of
from mgm_exp.errors import UserError
from mgm_exp.store import Lease
from tests.doctor.runs import falling, rows, write_run

OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.91 GiB."


def failed(folder: Path, message: str, log: str = "", kind: str = "TrainingFailed") -> Path:
    """A run that failed with that error."""
    error = {"type": kind, "message": message, "cause": "training cannot go on", "advice": "See log.txt."}
    result = {"schema_version": 1, "status": "failed", "metrics": {}, "error": error}
    write_run(folder, rows(30, falling), result=result)
    (folder / "log.txt").write_text(log)
    return folder


def test_the_error_of_the_run_counts_more_than_a_line_of_its_log(tmp_path: Path) -> None:
    log = "PIL.UnidentifiedImageError: cannot identify image file 'a.jpg' (row left out)\nfurther on\n"
    found = diagnose(case_of_run(failed(tmp_path, "Disk quota exceeded", log)))
    assert [finding.entry.id for finding in found.findings] == ["quota-exceeded", "image-damaged"]
    assert found.findings[0].confidence > found.findings[1].confidence + 0.2


def test_what_follows_from_a_cause_stands_behind_it(tmp_path: Path) -> None:
    log = f"[rank1]: {OOM}\n" + "[rank0]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=8)\n" * 4
    found = diagnose(case_of_run(failed(tmp_path, "RuntimeError: Connection closed by peer [10.0.4.17]", log)))
    first, *others = found.findings
    assert first.entry.id == "cuda-out-of-memory" and not first.follows_from
    assert {(item.entry.id, item.follows_from) for item in others} == {
        ("nccl-timeout", "cuda-out-of-memory"),
        ("nccl-remote-gone", "cuda-out-of-memory"),
    }
    assert first.evidence[0].place == "log.txt:1"


def test_what_ends_a_run_stands_before_what_it_would_have_survived() -> None:
    text = "wandb: ERROR Run initialization has timed out after 90 sec\nMemoryError\nConnection closed by peer\n"
    found = diagnose(case_of_text(text)).findings
    assert [finding.entry.id for finding in found] == ["host-out-of-memory", "wandb-unreachable", "nccl-remote-gone"]
    assert found[2].follows_from == "host-out-of-memory"


def test_settings_and_curves_that_fit_make_a_cause_surer(tmp_path: Path) -> None:
    alone = diagnose(case_of_text("Loss or gradient was not finite (loss nan)")).findings[0]
    nan = rows(60, lambda step: None if step > 50 else falling(step))
    error = {"type": "LossNotFinite", "message": "Loss or gradient was not finite (loss nan)"}
    write_run(
        tmp_path,
        nan,
        config={"train": {"precision": "fp16"}},
        result={"status": "failed", "error": error},
    )
    in_a_run = diagnose(case_of_run(tmp_path)).findings[0]
    assert in_a_run.entry.id == alone.entry.id == "loss-not-finite"
    assert in_a_run.confidence > alone.confidence
    assert {item.place for item in in_a_run.evidence} == {"result.json:1", "metrics.jsonl:51", "config.yaml"}


def test_a_run_that_completed_got_over_what_its_log_says(tmp_path: Path) -> None:
    write_run(tmp_path, rows(60, falling))
    (tmp_path / "log.txt").write_text(
        f"trying again after: {OOM}\nwandb: ERROR Run initialization has timed out after 90 s\n"
    )
    assert [finding.entry.id for finding in diagnose(case_of_run(tmp_path)).findings] == ["wandb-unreachable"]


def test_an_error_that_nobody_knows_is_quoted_and_called_unknown(tmp_path: Path) -> None:
    found = diagnose(case_of_run(failed(tmp_path, "the flux compensator is out of tune")))
    assert not found.findings and "flux compensator" in found.unexplained[0].quote
    assert "no known fault fits this error" in in_words(found)
    text = diagnose(case_of_text("Traceback (most recent call last):\n  File x\nmodule.FluxError: out of tune\n"))
    assert text.unexplained[0].quote == "module.FluxError: out of tune"


def test_damaged_and_hostile_files_of_a_run_are_noted_and_passed_over(tmp_path: Path) -> None:
    failed(tmp_path, "No space left on device")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe not json")
    (tmp_path / "config.yaml").write_text("a: &a [*a]\n")
    (tmp_path / "data.json").write_text("[" * 100_000)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "instruct", "step": 1}\n[1]\n{"loss": nan-nan}\n"x"\ntorn')
    (tmp_path / "quarantine.jsonl").write_text('{"sample_ids": [{"a": 1}, 7, "b"]}\n{"sample_ids": "x"}\n')
    found = diagnose(case_of_run(tmp_path))
    assert found.findings[0].entry.id == "disk-full"
    noted = " ".join(found.notes)
    assert all(name in noted for name in ("manifest.json", "config.yaml", "data.json", "metrics.jsonl"))


@pytest.mark.parametrize("key", ["step", "stage", "event", "batch_name", "loss", "lr", "tokens_per_s", "grad_norm"])
def test_rows_of_others_may_hold_anything_and_nothing_that_a_terminal_obeys(tmp_path: Path, key: str) -> None:
    found: list[dict[str, Any]] = [{**row, "batch_name": "b"} for row in rows(60, falling)]
    strange = [None, True, "x", "\x1b]0;evil\x07", [[1]], {"a": [1]}, 10**400, float("nan"), float("inf"), 1e308, -1]
    for place, value in enumerate(strange, 20):
        found[place] = {**found[place], "event": "spike", "detail": "\x1b[2J", key: value}
    found.append({"stage": "\x1b[31mred", "event": "vision_dead", "step": 60, "detail": "\x1b[2J"})
    data = {"instruct": {"rows": 10**400, "kept": 10**400, "text": {"words_mean": 10**400}}}
    for place, broken in (("a", found), ("b", rows(60, falling))):
        write_run(tmp_path / place, broken, data=data)
    told = in_words(diagnose(case_of_run(tmp_path / "a"))) + compare_runs(tmp_path / "a", tmp_path / "b").in_words()
    assert "vision-is-dead" in told and "\x1b" not in told and "instruct" in told


@pytest.mark.parametrize("status", ["failed", "interrupted", "completed"])
def test_a_run_that_was_begun_again_is_not_judged_by_how_it_ended_before(tmp_path: Path, status: str) -> None:
    run = failed(tmp_path, OOM)
    result = {**json.loads((run / "result.json").read_text()), "status": status}
    (run / "result.json").write_text(json.dumps(result))
    (run / "manifest.json").write_text('{"started_at": "2026-01-01T00:00:00+00:00", "ended_at": null}')
    with Lease(run / ".lease"):
        going_on = diagnose(case_of_run(run))
    assert going_on.is_well and not going_on.status and "begun again" in going_on.notes[0]
    (gone,) = diagnose(case_of_run(run)).findings
    assert gone.entry.id == "killed-without-a-word"


def test_a_link_in_the_place_of_a_log_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(f"{OOM}\n")
    run = failed(tmp_path / "run", "unheard of")
    (run / "log.txt").unlink()
    (run / "log.txt").symlink_to(tmp_path / "elsewhere")
    assert not diagnose(case_of_run(run)).findings


def test_conditions_hold_only_where_the_fact_is_known() -> None:
    facts = {
        fact.name: fact for fact in (Fact("a", 3, ""), Fact("b", "fp16", ""), Fact("c", True, ""), Fact("d", None, ""))
    }
    cases = {
        "a": [({"above": 2}, True), ({"below": 3}, False), (3, True), ({"among": [1, 3]}, True), ({"not": 3}, False)],
        "b": [("fp16", True), ({"matches": "^FP"}, True), ({"above": 2}, False)],
        "c": [(True, True), (1, False), ({"above": 0}, False)],
        "d": [({"known": False}, True), ({"not": 1}, False)],
        "e": [({"known": False}, True), ({"known": True}, False), ({"below": 9}, False)],
    }
    for name, wanted in cases.items():
        for condition, holds in wanted:
            (found,) = conditions_of({name: condition})
            assert found.holds(facts) is holds, (name, condition)


# -- at the end of a run -------------------------------------------------------------------------------------------


def test_a_failed_run_keeps_its_error_and_gains_what_the_doctor_says(tmp_path: Path) -> None:
    error = {"type": "OutOfMemory", "message": "CUDA out of memory in step 3", "cause": "c", "advice": "a"}
    said: list[str] = []
    write_run(tmp_path, rows(3, falling), status="")
    found = explained_error(error, tmp_path, said.append)
    assert {key: found[key] for key in error} == error
    assert found["doctor"]["id"] == "cuda-out-of-memory"
    assert found["doctor"]["evidence"][0]["quote"] == "OutOfMemory: CUDA out of memory in step 3"
    assert all(line.startswith("doctor: ") for line in said) and "micro_batch_size" in said[1]
    assert str(tmp_path) in said[2]
    json.dumps(found)


def test_an_unknown_error_stays_as_it_was(tmp_path: Path) -> None:
    error = {"type": "ValueError", "message": "seven is not a colour", "cause": "unknown", "advice": ""}
    assert explained_error(error, tmp_path / "never made", pytest.fail) == error


def test_a_fault_of_the_doctor_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> Case:
        raise RuntimeError("a knowledge base that was damaged")

    monkeypatch.setattr("mgm_exp.doctor.ending.case_of_run", broken)
    error = {"type": "OutOfMemory", "message": "CUDA out of memory", "cause": "c", "advice": "a"}
    with caplog.at_level(logging.WARNING):
        assert explained_error(error, tmp_path) == error
    assert "no diagnosis (RuntimeError: a knowledge base that was damaged)" in caplog.text


# -- sweeps ----------------------------------------------------------------------------------------------------------


def test_the_failed_trials_of_a_sweep_are_grouped_by_their_cause(tmp_path: Path) -> None:
    for number, message in enumerate((OOM, "", "Disk quota exceeded", OOM, "unheard of")):
        if message:
            failed(tmp_path / str(number), message)
    failed(tmp_path / "5" / "seed_0", OOM)
    states = ["failed", "completed", "failed", "failed", "failed", "failed", "failed"]
    trials = [{"number": number, "status": status} for number, status in enumerate(states)]
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": trials}))
    found = diagnose_sweep(tmp_path)
    assert found.groups() == {"cuda-out-of-memory": ["0", "3", "5/seed_0"], "quota-exceeded": ["2"], "unknown": ["4"]}
    assert "5 of 7 trials have something" in found.in_words()
    json.dumps(found.as_json())


@pytest.mark.parametrize("trial", ['{"number": "x", "status": "failed"}', '{"number": Infinity, "status": ""}', "7"])
def test_a_damaged_sweep_is_said_to_be(tmp_path: Path, trial: str) -> None:
    (tmp_path / "sweep.json").write_text(f'{{"trials": [{trial}]}}')
    with pytest.raises(UserError, match="damaged"):
        diagnose_sweep(tmp_path)
