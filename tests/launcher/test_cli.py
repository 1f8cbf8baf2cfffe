"""``mgm-exp VERB``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.cli import VERBS, main


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert main(arguments) == 0
        output = capsys.readouterr().out
        assert all(f"  {verb}" in output for verb in VERBS)


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([verb, "--help"])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 0
    assert len(capsys.readouterr().out.splitlines()) > 3


@pytest.mark.parametrize(("verb", "near"), [("serve", None), ("statu", "status"), ("repot", "report")])
def test_an_unknown_verb_is_refused_with_those_that_there_are(
    verb: str, near: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb]) == 2
    error = capsys.readouterr().err
    assert all(known in error for known in VERBS)
    assert near is None or f"Did you mean {near}?" in error


def test_run_is_the_same_as_the_package_as_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--cfg", "job", "--package", "zero", "zero=2"]) == 0
    assert "stage: 2" in capsys.readouterr().out
    assert main(["run", "train.lrr=1"]) == 2
    assert "Did you mean train.lr?" in capsys.readouterr().err


def test_status_tells_what_is_done_what_failed_and_why(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    app("-m", "adapter.rank=4,8", "sweep.name=mine", fail="8")
    app("seed=5")
    capsys.readouterr()
    assert main(["status", "--root", str(app.root)]) == 0
    output = capsys.readouterr().out
    for part in ("mine: failed", "best: trial 0", "adapter.rank=4", "completed", "told to fail", "tiny-raw-lora_r8/"):
        assert part in output
    assert main(["status", "mine", "--root", str(app.root)]) == 0
    assert "tiny-raw-lora_r8/" not in capsys.readouterr().out
    assert main(["status", str(app.root / "sweeps" / "mine")]) == 0
    assert "told to fail" in capsys.readouterr().out


def test_status_tells_what_runs_and_what_waits(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    process = app.start("-m", "adapter.rank=4,8,16", "sweep.name=mine", stop="8")
    folder = app.waits_in("sweeps/mine/1", process)
    try:
        assert main(["status", "mine", "--root", str(app.root)]) == 0
        rows = [line for line in capsys.readouterr().out.splitlines() if "adapter.rank=" in line]
        assert [word for row in rows for word in ("completed", "running", "not started") if word in row] == [
            "completed",
            "running",
            "not started",
        ]
    finally:
        (folder / "go").touch()
        process.communicate(timeout=60)


def test_status_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--root", str(tmp_path)]) == 0
    assert "no run and no sweep" in capsys.readouterr().out
    assert main(["status", "nope", "--root", str(tmp_path)]) == 2
    assert "neither a sweep nor the folder of one" in capsys.readouterr().err


def test_report_compares_sweeps_and_runs(app: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app("-m", "adapter.rank=4,16", "sweep.name=mine")
    folder = app.root / "sweeps" / "mine"
    assert main(["report", str(folder / "0"), str(folder / "1"), "--out", str(tmp_path / "r.md")]) == 0
    comparison = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert len(comparison["runs"]) == 2
    assert "|" in (tmp_path / "r.md").read_text(encoding="utf-8")
    (folder / "comparison.json").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "comparison.json").is_file()


def test_report_as_html_is_one_page(app: Any, tmp_path: Path) -> None:
    app("-m", "adapter.rank=4,16", "sweep.name=mine")
    assert main(["report", str(app.root / "sweeps" / "mine"), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "comparison.json").is_file()
    assert (tmp_path / "r.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")


@pytest.mark.parametrize(("out", "says"), [("r.pdf", "must end in .md"), ("nowhere/r.md", "is not a folder")])
def test_report_refuses_a_file_it_cannot_write(
    out: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / out)]) == 2
    assert says in capsys.readouterr().err


def test_gc_drops_what_nobody_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mgm_exp.store import Store

    def make(work: Path) -> dict[str, Any]:
        (work / "out").mkdir(exist_ok=True)
        (work / "out" / "file").write_bytes(b"x" * 1000)
        return {}

    store = Store(tmp_path / "store")
    entry = store.produce("demo", "k" * 20, make, inputs={}).path
    common = ["gc", "--root", str(tmp_path)]
    assert main([*common, "--dry-run", "--older-than", "0"]) == 0
    assert "would drop 1 item" in capsys.readouterr().out and entry.is_dir()
    assert main(common) == 0
    assert "dropped 0 item" in capsys.readouterr().out and entry.is_dir()
    assert main([*common, "--older-than", "0"]) == 0
    assert "dropped 1 item" in capsys.readouterr().out and not entry.is_dir()
    assert main(["gc", "--root", str(tmp_path / "nowhere")]) == 2
