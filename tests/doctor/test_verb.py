"""``mgm-exp doctor`` as a user gives it: what it prints, what it writes, how it ends."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from mgm_exp.cli import main
from tests.doctor.accuracy import EXCERPTS, NO_FAULT
from tests.doctor.runs import FAULTY, HEALTHY, build, falling, rows, write_run


def doctor(*arguments: str | Path) -> int:
    return main(["doctor", *map(str, arguments)])


def test_a_log_gives_cause_evidence_fix_and_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(EXCERPTS / "shared-memory-full.txt", "--json", tmp_path / "found.json") == 1
    out = capsys.readouterr().out
    assert "1. Shared memory (/dev/shm) is full  [" in out
    assert "| shared-memory-full.txt:" in out and "--shm-size" in out and "more: https://" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["causes"][0]["id"] == "shared-memory-full" and found["schema_version"] == 1
    assert found["causes"][0]["evidence"][0]["place"].startswith("shared-memory-full.txt:")


def test_a_text_a_pipe_and_a_healthy_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor("OutOfMemoryError") == 1 and doctor("nothing that is known") == 0
    assert doctor("RuntimeError: CUDA error: out of memory") == 1
    assert "cuda-out-of-memory" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x\nOSError: [Errno 122] Disk quota exceeded\n")))
    assert doctor("-") == 1
    assert "standard input" in (out := capsys.readouterr().out) and "quota-exceeded" in out
    assert doctor(NO_FAULT / "own-run.txt") == 0
    assert "nothing that is known to be wrong was found" in capsys.readouterr().out


def test_runs_one_and_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = (
        build(tmp_path / "bad", FAULTY["diverged-rate-too-high"]()),
        build(tmp_path / "good", HEALTHY["falling"]()),
    )
    assert doctor(bad) == 1 and "the learning rate is too high" in capsys.readouterr().out
    assert doctor(good) == 0
    assert f"{good} (completed; instruct 300 steps)" in capsys.readouterr().out
    assert doctor(good, bad, "--json", tmp_path / "two.json") == 1
    assert "instruct: 160 steps in both" in capsys.readouterr().out
    (parting,) = json.loads((tmp_path / "two.json").read_text())["partings"]
    assert 80 < parting["parts_at"] < 110
    assert doctor(good, good) == 0


def test_a_sweep_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweeps" / "lora"
    build(sweep / "0", FAULTY["nan-from-the-first-step"]())
    (sweep / "sweep.json").write_text('{"trials": [{"number": 0, "status": "failed"}]}')
    assert doctor("lora", "--root", tmp_path) == 1
    assert "== nan-from-the-first-step: 1 trial(s): 0" in capsys.readouterr().out


def test_a_run_that_waits_at_its_rung_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "lora"
    run = write_run(sweep / "0", rows(20, falling), status="paused")
    error = {"type": "Paused", "message": "The instruct stage paused after step 20.", "cause": "", "advice": ""}
    (run / "result.json").write_text(json.dumps({"status": "paused", "error": error}))
    (run / "output.txt").write_text("CUDA out of memory\n")  # of an earlier start; it got over it
    (sweep / "sweep.json").write_text('{"trials": [{"number": 0, "status": "paused"}]}')
    assert doctor(run) == 0 == doctor(sweep)
    assert "nothing that is known to be wrong was found" in capsys.readouterr().out


def test_the_knowledge_base_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--search", "nccl timeout") == 0
    assert "nccl-timeout" in capsys.readouterr().out
    assert doctor("--search", "nonsenseword") == 1
    assert doctor("--list") == 0
    assert "disk-full" in capsys.readouterr().out
    assert doctor("--entry", "lora-trains-nothing") == 0
    assert "events.lora_b_zero above 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs a run, a log or an error text"),
        (["no/such/run"], "There is no no/such/run"),
        (["missing.log"], "There is no missing.log"),
        (["nosuch"], "There is no file, run or sweep nosuch"),
        (["one", "two", "three"], "3 arguments were given"),
        (["--entry", "nothing"], "There is no entry 'nothing'"),
        (["{empty}"], "neither a run's folder nor a sweep's"),
    ],
)
def test_bad_input_is_refused_in_words(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(*(argument.format(empty=tmp_path) for argument in arguments)) == 2
    assert words in capsys.readouterr().err
