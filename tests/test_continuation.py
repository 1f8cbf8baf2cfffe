"""A run goes on from another one's unfinished stage with other processes: taken over, said, recorded, or refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from recorded_run import overrides_for, write_data

from mgm_exp.cli import main
from mgm_exp.command import run
from mgm_exp.errors import ConfigError, Interrupted, UserError
from mgm_exp.folders import LEASE
from mgm_exp.record import Recorder
from mgm_exp.store import Lease

STEPS = 4
Make = Callable[..., Path]


def settings_in(folder: Path) -> tuple[str, ...]:
    given = overrides_for(folder / "data", folder / "outputs")
    kept = [text for text in given if not text.startswith(("tracker", "train.max_steps", "train.checkpoint"))]
    return (*kept, "tracker=disabled", f"train.max_steps={STEPS}", "train.checkpoint.every_steps=1")


def interrupted(given: Sequence[str], stage: str, step: int) -> None:
    """Runs until the step of the stage, and is then asked to stop."""
    row = Recorder.row

    def stopping(self: Recorder, found: dict[str, Any]) -> None:
        row(self, found)
        if (found["stage"], found["step"]) == (stage, step) and "event" not in found:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "row", stopping)
        with pytest.raises(Interrupted):
            run(given)


def newest(folder: Path) -> Path:
    return max((folder / "outputs" / "runs" / "recorded").iterdir())


def steps_of(folder: Path, stage: str = "instruct") -> list[tuple[float, float, str]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["loss"], r["grad_norm"], r["batch_name"]) for r in rows if r["stage"] == stage and "loss" in r]


def stages_of(folder: Path) -> dict[str, tuple[str, bool]]:
    listed = json.loads((folder / "manifest.json").read_text())["stages"]
    return {stage["name"]: (stage["key"], stage["reused"]) for stage in listed}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of everything, and in it a run that was stopped after the second of four steps."""
    folder = tmp_path_factory.mktemp("begun")
    write_data(folder / "data", "a red sign")
    interrupted(settings_in(folder), "instruct", 2)
    return folder, newest(folder)


def test_another_split_is_offered_and_taken_over(begun: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, origin = begun
    other = [*settings_in(folder), "train.micro_batch_size=2"]
    run(other)
    anew = newest(folder)
    said = capsys.readouterr().out
    assert f"train.checkpoint.continue_from={origin}" in said and "instruct has a checkpoint after step 2" in said

    run([*other, f"train.checkpoint.continue_from={origin}"])
    continued = newest(folder)
    said = capsys.readouterr().out
    assert f"align: as {origin} has finished it" in said and "not to the last bit" in said
    assert steps_of(continued)[:2] == steps_of(origin), "what was trained is not trained again"
    assert len(steps_of(continued)) == STEPS
    for mine, theirs in zip(steps_of(continued), steps_of(anew), strict=True):
        assert mine[:2] == pytest.approx(theirs[:2], rel=1e-5) and mine[2] == theirs[2]
    manifest = json.loads((continued / "manifest.json").read_text())
    taken = manifest["continued_from"]["stages"]["instruct"]
    assert (taken["step"], taken["split"]) == (2, {"micro_batch_size": [4, 2]})
    keys = [stages_of(run)["instruct"][0] for run in (anew, continued)]
    assert keys[0] != keys[1], "other bits, another key"
    assert stages_of(continued)["align"] == (stages_of(origin)["align"][0], True)

    run([*other, f"train.checkpoint.continue_from={origin}"])
    assert stages_of(newest(folder))["instruct"] == (keys[1], True), "the same command finds what it made"
    capsys.readouterr()
    assert main(["replay", str(continued), "--stage", "instruct", "--from", "3"]) == 0
    said = capsys.readouterr().out
    assert "went on from another run after step 2" in said and "settings changed" not in said


def test_anything_else_that_differs_is_refused_by_name(begun: tuple[Path, Path], subtests: pytest.Subtests) -> None:
    folder, origin = begun
    taken = [*settings_in(folder), "train.micro_batch_size=2", f"train.checkpoint.continue_from={origin}"]
    for changed, words in {
        "train.lr=0.5": r"instruct stage differs in section\.lr",
        "train.loss_norm=official": "depends on how a batch is split",
        "data.max_samples=8": "other rows",
        "train.checkpoint.continue_from=/nowhere": "is not a run's folder",
    }.items():
        with subtests.test(changed), pytest.raises((ConfigError, UserError), match=words):
            run([*taken, changed])
    lease = Lease(origin / LEASE)
    lease.acquire(wait=False)
    with subtests.test("a run that is at work"), pytest.raises(UserError, match="is being written"):
        run(taken)
    lease.release()


def test_a_run_whose_store_is_gone_goes_on_from_what_its_folder_kept(begun: tuple[Path, Path], tmp_path: Path) -> None:
    folder, origin = begun
    shutil.copytree(folder, tmp_path / "copy")
    (work,) = (tmp_path / "copy" / "outputs" / "store" / "instruct").glob("*.work")
    shutil.rmtree(work)
    kept = tmp_path / "copy" / "outputs" / "runs" / "recorded" / origin.name
    newest_one = max((kept / "checkpoints" / "instruct").iterdir())
    (newest_one / "optimizer.safetensors").chmod(0o644)
    (newest_one / "optimizer.safetensors").write_bytes(b"damaged")
    given = [text.replace(str(folder / "outputs"), str(tmp_path / "copy" / "outputs")) for text in settings_in(folder)]
    run([*given, "train.micro_batch_size=2", f"train.checkpoint.continue_from={kept}"])
    manifest = json.loads((newest(tmp_path / "copy") / "manifest.json").read_text())
    assert manifest["continued_from"]["stages"]["instruct"]["step"] == 1, "a damaged one is passed over"
    assert len(steps_of(newest(tmp_path / "copy"))) == STEPS


def test_a_run_that_pauses_says_how_it_goes_on_and_nothing_of_others(begun: tuple[Path, Path]) -> None:
    points = ("train.validation.every_steps=1", "train.validation.questions=1", "name=pausing", "train.lr=2e-3")
    result = run([*settings_in(begun[0]), *points, "sweep.pause_after=1"])
    assert (result["status"], result["steps"], result["planned_steps"]) == ("paused", 1, STEPS)
    assert "a later sweep.pause_after" in result["error"]["advice"]
    assert "do better" not in json.dumps(result["error"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "stage"),
    [
        (["devices=2"], ["devices=1"], "instruct"),
        (["devices=2", "zero=2"], ["devices=1", "zero=none"], "align"),
        (["devices=1"], ["devices=2", "zero=3"], "instruct"),
    ],
)
def test_other_processes_and_engines_go_on_up_to_rounding(
    tmp_path: Path, before: list[str], after: list[str], stage: str
) -> None:
    write_data(tmp_path / "data", "a red sign")
    small = [*settings_in(tmp_path), "train.micro_batch_size=1", "train.align.micro_batch_size=1"]
    interrupted([*small, *before], stage, 1)
    origin = newest(tmp_path)
    run([*small, *after, f"train.checkpoint.continue_from={origin}"])
    continued = newest(tmp_path)
    run([*small, *before])
    assert newest(tmp_path) == continued, "the run that was begun goes on in its own folder"
    for name, number in (("align", 2), ("instruct", STEPS)):
        assert len(steps_of(continued, name)) == number
        for mine, theirs in zip(steps_of(continued, name), steps_of(origin, name), strict=True):
            assert mine[:2] == pytest.approx(theirs[:2], rel=1e-4) and mine[2] == theirs[2]
    manifest = json.loads((continued / "manifest.json").read_text())
    assert list(manifest["continued_from"]["stages"]) == [stage]
    assert main(["replay", str(continued), "--stage", "instruct", "--from", "3"]) == 0
