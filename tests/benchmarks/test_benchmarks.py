from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.captions import captions
from benchmarks.measurement import Row

ROOT = Path(__file__).resolve().parents[2]


def test_a_row_says_whether_its_goal_is_met() -> None:
    row = Row("a", "s", ours=2.0, peer=5.0, goal=2.5, exactness="equal", evidence="n=1").to_json()
    assert (row["ratio"], row["met"]) == (2.5, True)
    assert Row("a", "s", 2.0, 4.9, 2.5, "equal", "n=1").to_json()["met"] is False
    assert Row("a", "s", 2.0, 4.9, None, "equal", "n=1").to_json()["met"] is None


def test_a_goal_above_what_is_possible_is_said_to_be_and_fails_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from benchmarks import __main__ as benchmarks

    most = [4.8]

    def run(name: str, work: Path | None, quick: bool) -> benchmarks.Took:
        row = Row("a", "s", ours=2.0, peer=4.9, goal=5.0, exactness="equal", evidence="n=1", most=most[0]).to_json()
        return benchmarks.Took([{"benchmark": name, **row}], 1.0, 1.0)

    for file in ("RESULTS", "README"):
        monkeypatch.setattr(benchmarks, file, tmp_path / file)
    benchmarks.README.write_text(f"{benchmarks.BEGIN}{benchmarks.END}", encoding="utf-8")
    monkeypatch.setattr(benchmarks, "_in_a_process", run)
    assert benchmarks.main(["pack"]) == 0
    assert "(goal 5.0: out of reach: 4.80 at most)" in capsys.readouterr().out
    assert "| 2.45 | 5.00 (out of reach: 4.80 at most) |" in benchmarks.README.read_text("utf-8")
    most[0] = 5.1
    assert benchmarks.main(["pack"]) == 1
    assert "(goal 5.0: MISSED)" in capsys.readouterr().out


def test_captions_are_the_same_every_time_and_as_long_as_real_ones() -> None:
    made = captions(3000)
    assert made == captions(3000) and made[:100] != captions(3000, seed=1)[:100]
    assert 8.5 < sum(len(caption.split()) for caption in made) / len(made) < 9.5
    assert any(not caption.isascii() for caption in made) and len(set(made)) < len(made)


def test_every_benchmark_has_a_file_and_a_line_in_the_page() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    files = {
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if "\ndef run(work: Path" in path.read_text("utf-8")
    }
    assert sorted(BENCHMARKS) == sorted(files)
    assert re.findall(r"^\| \[(\w+)\]", page, re.MULTILINE) == list(BENCHMARKS)


def test_one_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import __main__ as benchmarks

    asked: list[str] = []

    def run(name: str, work: Path | None, quick: bool) -> benchmarks.Took | benchmarks.Failed:
        asked.append(name)
        row = Row(f"row of {name}", "s", 1.0, 2.0, None, "equal", "n=1").to_json()
        if name in ("sweep_trainer", "train_head"):
            return benchmarks.Failed("OSError: no room")
        return benchmarks.Took([{"benchmark": name, **row}], 1.0, 1.0)

    monkeypatch.setattr(benchmarks, "_in_a_process", run)
    names = ["sweep_trainer", "ablation_grid", "train_head", "model_mining"]  # the last two run beside each other
    assert benchmarks.main([*names, "--quick"]) == 1
    assert set(asked) == set(names)
    told = capsys.readouterr()
    assert "row of ablation_grid" in told.out and "row of model_mining" in told.out
    assert "sweep_trainer failed:\nOSError: no room" in told.err
    assert "failed: sweep_trainer, train_head; " in told.err
    assert benchmarks.main(["ablation_grid", "--quick"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_and_finds_equal_results(name: str) -> None:
    if name in ("data_text_statistics", "data_recaptioning"):
        pytest.importorskip("data_juicer")
    if name == "scale_slurm" and "SLURM_CONF" not in os.environ:
        pytest.skip("no Slurm that may be filled (SLURM_CONF)")
    command = [sys.executable, "-m", "benchmarks", name, "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DIFFER" not in done.stdout and " x" in done.stdout
