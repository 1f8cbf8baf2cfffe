"""``-m``: every cell once, whatever happens to the others, and the same command goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

SWEEP_KEYS = "schema_version name direction objective trials best".split()
TRIAL_KEYS = "number overrides params status metrics run_dir seconds".split()


def states(sweep: dict[str, Any]) -> list[str]:
    return [trial["status"] for trial in sweep["trials"]]


def test_a_grid_runs_and_keeps_books(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert app("-m", "adapter.rank=4,8", "seed=0,1") == 0
    sweep = app.sweep()
    assert [key for key in SWEEP_KEYS if key not in sweep] == []
    assert [key for trial in sweep["trials"] for key in TRIAL_KEYS if key not in trial] == []
    assert [trial["params"] for trial in sweep["trials"]] == [
        {"seed": 0, "adapter.rank": 4},
        {"seed": 0, "adapter.rank": 8},
        {"seed": 1, "adapter.rank": 4},
        {"seed": 1, "adapter.rank": 8},
    ]
    assert states(sweep) == ["completed"] * 4
    assert (sweep["objective"], sweep["direction"], sweep["pending"]) == ("demo/accuracy", "maximize", [])
    assert sweep["best"] == {"number": 1, "value": 0.4, "run_dir": "1"}
    for trial in sweep["trials"]:
        folder = app.sweep_dir / trial["run_dir"]
        assert trial["run_dir"] == str(trial["number"])
        assert (folder / ".hydra" / "config.yaml").is_file()
        called = (folder / "calls.txt").read_text(encoding="utf-8").split()
        assert called[:2] == [sweep["name"], str(trial["number"])], "the run knows its sweep and its number"
    assert app.sweep_dir.name == sweep["name"]
    assert not (app.root / "runs").exists()


def test_the_sweep_ends_with_the_comparison_as_a_table_and_as_files(
    app: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app("-m", "adapter.rank=4,16") == 0
    comparison = json.loads((app.sweep_dir / "comparison.json").read_text(encoding="utf-8"))
    assert len(comparison["runs"]) == 2
    assert comparison["pairs"][0]["difference"] == pytest.approx(0.6)
    assert "|" in (app.sweep_dir / "table.md").read_text(encoding="utf-8")
    assert "adapter.rank" in (app.sweep_dir / "report.html").read_text(encoding="utf-8")
    assert "adapter.rank" in capsys.readouterr().out


def test_the_same_command_repeats_nothing(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert app("-m", "adapter.rank=4", "seed=0,1") == 0
    first = app.sweep()
    capsys.readouterr()
    assert app("-m", "seed=0,1", "adapter.rank=4") == 0
    assert [app.calls(number) for number in range(2)] == [1, 1]
    assert app.sweep()["trials"] == first["trials"]
    assert capsys.readouterr().out.count("completed before, demo/accuracy") == 2


def test_a_failing_cell_harms_no_other_and_ends_with_1(app: Any) -> None:
    assert app("-m", "adapter.rank=4,8,16", fail="8") == 1
    sweep = app.sweep()
    assert states(sweep) == ["completed", "failed", "completed"]
    assert "told to fail" in sweep["trials"][1]["error"]["message"]
    assert sweep["best"]["number"] == 2


def test_a_failed_trial_is_run_again_only_where_it_is_asked_for(app: Any) -> None:
    assert app("-m", "adapter.rank=4,8", fail="8") == 1
    assert app("-m", "adapter.rank=4,8") == 1, "it stays failed"
    assert (app.calls(0), app.calls(1)) == (1, 1)
    assert app("-m", "adapter.rank=4,8", "sweep.rerun=failed") == 0
    assert (app.calls(0), app.calls(1)) == (1, 2)
    assert app("-m", "adapter.rank=4,8", "sweep.rerun=all") == 0
    assert (app.calls(0), app.calls(1)) == (2, 3)
    assert states(app.sweep()) == ["completed", "completed"]


def test_a_cell_that_does_not_compose_is_a_failed_trial_with_a_record(
    app: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app("-m", "adapter=lora_r8,lora_r17", "adapter.rank=4,-1") == 1
    sweep = app.sweep()
    assert states(sweep) == ["completed", "failed", "failed", "failed"]
    output = capsys.readouterr().out
    assert "Did you mean adapter=lora_r16?" in output and "must be 1 or above" in output
    assert output.index("not started") < output.index("trial 0 (1/1)"), "said before the first one starts"
    result = json.loads((app.sweep_dir / "2" / "result.json").read_text(encoding="utf-8"))
    assert result["error"]["type"] == "ConfigError"
    assert "lora_r17" in (app.sweep_dir / "2" / "log.txt").read_text(encoding="utf-8")
    assert app("-m", "adapter=lora_r8,lora_r17", "adapter.rank=4,-1") == 1
    assert app.calls(0) == 1
    assert len(app.sweep()["trials"]) == 4, "a cell that still does not compose keeps its number"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["adapter.rank=4,8", "train.lrr=1"], "Did you mean train.lr?"),
        (["adapter.rank=4,8", "train.lr=-1"], "train.lr=-1.0"),
        (["train.lr=interval(1,2)"], "interval"),
        (["adapter.rank=4,8", "sweep.name=../x"], "not a folder name"),
        (["adapter.rank=4,8", "hydra.sweep.dir=/tmp/elsewhere"], "outside of paths.root"),
        (["adapter.rank=4,8", "hydra/sweeper=basic"], "mgm_grid"),
        (["adapter.rank=4,8", "hydra.job.chdir=true"], "chdir"),
        (["adapter.rank=4,8", "hydra.output_subdir=../../x"], "plain folder name"),
    ],
)
def test_what_no_cell_can_be_is_refused_before_anything_is_written(
    app: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert app("-m", *arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert not list(app.root.glob("*/*")) and not list(app.root.glob("sweeps/*/*"))


def test_a_trial_keeps_its_number_when_the_grid_grows(app: Any) -> None:
    name = "sweep.name=mine"
    assert app("-m", "adapter.rank=8,16", name) == 0
    assert app("-m", "adapter.rank=4,8,16", name) == 0
    ranks = {trial["number"]: trial["params"]["adapter.rank"] for trial in app.sweep()["trials"]}
    assert ranks == {0: 8, 1: 16, 2: 4}
    assert [app.calls(number) for number in range(3)] == [1, 1, 1]


def test_another_configuration_is_another_trial_even_with_the_same_cell(app: Any) -> None:
    assert app("-m", "adapter.rank=8", "sweep.name=mine") == 0
    assert app("-m", "adapter.rank=8", "sweep.name=mine", "train.max_steps=7") == 0
    sweep = app.sweep()
    assert len(sweep["trials"]) == 2
    assert len({trial["config_hash"] for trial in sweep["trials"]}) == 2
    assert [app.calls(number) for number in range(2)] == [1, 1]


def test_what_does_not_define_an_experiment_repeats_nothing(app: Any) -> None:
    assert app("-m", "adapter.rank=8") == 0
    assert app("-m", "adapter.rank=8", "tracker=disabled", "train.checkpoint.every_steps=3") == 0
    assert app.calls(0) == 1


def test_cells_that_differ_only_in_name_are_trials_of_their_own(app: Any) -> None:
    assert app("-m", "name=one,two") == 0
    assert len(app.sweep()["trials"]) == 2


def test_a_choice_named_by_a_number_is_swept(app: Any) -> None:
    assert app("-m", "zero=2,3") == 0
    sweep = app.sweep()
    assert [trial["params"] for trial in sweep["trials"]] == [{"zero": "2"}, {"zero": "3"}]
    assert sweep["name"].startswith("zero=2,3-")
    assert app("-m", "zero=choice(2,3)") == 0
    assert [app.calls(number) for number in range(2)] == [1, 1]


def test_a_ready_made_sweep_needs_no_flag(app: Any) -> None:
    assert app("+sweeps=ablation", "data=raw", "adapter=full,lora_r8") == 0
    sweep = app.sweep()
    assert len(sweep["trials"]) == 2
    assert sweep["name"].startswith("adapter=full,lora_r8-")


def test_an_objective_to_be_small_is_ordered_the_other_way(app: Any) -> None:
    assert app("-m", "adapter.rank=4,2,8", "sweep.direction=minimize", "sweep.objective=demo/accuracy") == 0
    assert app.sweep()["best"] == {"number": 1, "value": 0.1, "run_dir": "1"}
    called = (app.sweep_dir / "0" / "calls.txt").read_text(encoding="utf-8")
    assert "sweep.objective=demo/accuracy" in called, "the run sees the sweep's settings"


def test_no_best_without_a_completed_trial(app: Any) -> None:
    assert app("-m", "adapter.rank=4,8", fail="4,8") == 1
    assert app.sweep()["best"] is None


def test_a_folder_of_the_sweep_inside_of_the_root_may_be_chosen(app: Any) -> None:
    assert app("-m", "adapter.rank=4", f"hydra.sweep.dir={app.root}/sweeps/my_place") == 0
    assert app.sweep_dir.name == "my_place"
    assert app.sweep()["name"] == "my_place"


def test_books_that_cannot_be_read_are_not_overwritten(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert app("-m", "adapter.rank=4") == 0
    (app.sweep_dir / "sweep.json").write_text("{", encoding="utf-8")
    assert app("-m", "adapter.rank=4") == 2
    assert "Move it away" in capsys.readouterr().err
    assert (app.sweep_dir / "sweep.json").read_text(encoding="utf-8") == "{"
    (app.sweep_dir / "sweep.json").unlink()
    assert app("-m", "adapter.rank=4") == 0
    assert [trial["number"] for trial in app.sweep()["trials"]] == [1], "nothing of the old ones is overwritten"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_sweep_with_130_and_the_same_command_goes_on(app: Any, number: int) -> None:
    arguments = ("-m", "adapter.rank=4,8,16")
    process = app.start(*arguments, stop="8")
    app.waits_in("sweeps/*/1", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    sweep = app.sweep()
    assert (sweep["status"], states(sweep)) == ("interrupted", ["completed", "interrupted"])
    assert [trial["number"] for trial in sweep["pending"]] == [2]
    assert app(*arguments) == 0
    assert states(app.sweep()) == ["completed"] * 3
    assert [app.calls(trial) for trial in range(3)] == [1, 2, 1]


def test_kill_9_loses_no_finished_trial_and_repeats_none(app: Any) -> None:
    arguments = ("-m", "adapter.rank=4,8,16")
    process = app.start(*arguments, stop="8")
    app.waits_in("sweeps/*/1", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    sweep = app.sweep()
    assert states(sweep) == ["completed"]
    assert [trial["number"] for trial in sweep["pending"]] == [1, 2]
    assert app(*arguments) == 0
    assert [trial["number"] for trial in app.sweep()["trials"]] == [0, 1, 2]
    assert states(app.sweep()) == ["completed"] * 3
    assert [app.calls(trial) for trial in range(3)] == [1, 2, 1]


def test_two_sweeps_of_one_name_at_once_are_refused_with_the_name_of_the_first(
    app: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("-m", "adapter.rank=4,8")
    process = app.start(*arguments, stop="4")
    folder: Path = app.waits_in("sweeps/*/0", process)
    try:
        assert app(*arguments) == 2
        error = capsys.readouterr().err
        assert "is running already" in error and str(process.pid) in error
        assert app("-m", "adapter.rank=4,8", "sweep.name=another") == 0
    finally:
        (folder / "go").touch()
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def test_the_folders_keep_the_contract(app: Any) -> None:
    """With the checker that is published with the contract, where it is at hand."""
    checker = os.environ.get("MGM_CONTRACT_CHECKER")
    if checker is None:
        pytest.skip("MGM_CONTRACT_CHECKER does not name the contract's checker")
    assert app("-m", "adapter=lora_r8,lora_r17", "adapter.rank=4,8", fail="8") == 1
    done = subprocess.run(["python3", checker, str(app.sweep_dir)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_slots_run_cells_side_by_side_and_each_once(app: Any) -> None:
    process = app.start("-m", "adapter.rank=4,8,12", "sweep.slots=2", stop="4")
    folder = app.waits_in("sweeps/*/0", process)
    end = time.monotonic() + 300
    while not (app.sweep_dir / "2" / "result.json").exists():
        assert time.monotonic() < end and process.poll() is None, "the other slot does the others meanwhile"
        time.sleep(0.05)
    (folder / "go").touch()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert states(app.sweep()) == ["completed"] * 3
    assert [app.calls(number) for number in range(3)] == [1, 1, 1]


def test_a_killed_cell_is_continued_and_a_failing_one_harms_no_other(app: Any) -> None:
    arguments = ("-m", "adapter.rank=4,8,12", "sweep.slots=2", "sweep.retries=1")
    assert app(*arguments, fail="4:killed,8:failed") == 1
    sweep = app.sweep()
    assert states(sweep) == ["failed", "failed", "completed"]
    assert [app.calls(number) for number in range(3)] == [2, 1, 1]
    assert "SIGKILL" in sweep["trials"][0]["error"]["message"]
    assert app(*arguments, "sweep.rerun=failed") == 0
    assert states(app.sweep()) == ["completed"] * 3


def test_cells_that_share_no_early_stage_are_begun_first(app: Any) -> None:
    """With two slots, the second one does not wait for the stages that the first one makes."""
    process = app.start("-m", "data=raw,blip2", "adapter.rank=4,8", "sweep.slots=2", stop="4")
    app.waits_in("sweeps/*/0", process)
    app.waits_in("sweeps/*/2", process)
    assert not (app.sweep_dir / "1").exists()
    for number in (0, 2):
        (app.sweep_dir / str(number) / "go").touch()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert states(app.sweep()) == ["completed"] * 4


def seed_calls(app: Any, number: int) -> dict[str, int]:
    """How often the task was called for each seed of a trial."""
    files = sorted((app.sweep_dir / str(number)).glob("seed_*/calls.txt"))
    return {file.parent.name: len(file.read_text(encoding="utf-8").splitlines()) for file in files}


def test_repeats_are_one_trial_with_their_mean_and_one_arm(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("-m", "adapter.rank=4,8", "sweep.seeds=2", "seed=5")
    assert app(*arguments) == 0
    sweep = app.sweep()
    assert (sweep["seeds"], states(sweep)) == (2, ["completed", "completed"])
    assert [trial["metrics"]["demo/accuracy"] for trial in sweep["trials"]] == [pytest.approx(0.2), pytest.approx(0.4)]
    assert [trial["seconds"] for trial in sweep["trials"]] == [1.0, 1.0]
    assert sweep["best"] == {"number": 1, "value": pytest.approx(0.4), "run_dir": "1"}
    assert seed_calls(app, 0) == seed_calls(app, 1) == {"seed_5": 1, "seed_6": 1}
    called = (app.sweep_dir / "1" / "seed_6" / "calls.txt").read_text(encoding="utf-8")
    assert called.split()[:2] == [sweep["name"], "1"] and "seed=6" in called
    comparison = json.loads((app.sweep_dir / "comparison.json").read_text(encoding="utf-8"))
    assert [len(arm["seeds"]) for arm in comparison["arms"]] == [2, 2]
    output = capsys.readouterr().out
    order = [output.index(f"adapter.rank={rank} seed={seed}") for seed in (5, 6) for rank in (4, 8)]
    assert order == sorted(order), "seeds decide the early stages, so that cells of one seed follow each other"
    assert "trial 1 completed demo/accuracy 0.4000 (mean of 2 seeds)" in output
    assert app(*arguments) == 0
    assert seed_calls(app, 0) == {"seed_5": 1, "seed_6": 1}, "repeated, it repeats nothing"
    from mgm_exp.cli import main

    assert main(["status", sweep["name"], "--root", str(app.root)]) == 0
    assert capsys.readouterr().out.count("seed=6") == 2


def test_more_seeds_are_added_and_one_run_a_trial_is_another_sweep(
    app: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A seed that fails ends its trial: a mean of fewer would be another number."""
    arguments = ("-m", "adapter.rank=4", "sweep.name=mine")
    assert app(*arguments, "sweep.seeds=2", fail="4") == 1
    assert seed_calls(app, 0) == {"seed_0": 1}
    assert "told to fail" in app.sweep()["trials"][0]["error"]["message"]
    assert app(*arguments, "sweep.seeds=3", "sweep.rerun=failed") == 0
    assert seed_calls(app, 0) == {"seed_0": 2, "seed_1": 1, "seed_2": 1}
    assert app(*arguments) == 2
    assert "sweep.seeds=3" in capsys.readouterr().err
    assert app("-m", "adapter.rank=4", "seed=0,1", "sweep.seeds=2") == 2
    assert "seed is swept" in capsys.readouterr().err
    assert app("-m", "adapter.rank=4", "sweep.constraints=['adapter.rank <= 4']") == 2
    assert "mgm_optuna" in capsys.readouterr().err


def test_a_kill_continues_with_the_seeds_that_are_missing(app: Any) -> None:
    arguments = ("-m", "adapter.rank=4,8", "sweep.seeds=2")
    process = app.start(*arguments, stop="8")
    app.waits_in("sweeps/*/1/seed_0", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert app(*arguments) == 0
    assert states(app.sweep()) == ["completed", "completed"]
    assert seed_calls(app, 0) == {"seed_0": 1, "seed_1": 1}
    assert seed_calls(app, 1) == {"seed_0": 2, "seed_1": 1}


@pytest.mark.slow
def test_seeds_of_a_grid_take_the_slots_there_are(app: Any) -> None:
    assert app("-m", "adapter.rank=4", "sweep.seeds=3", "sweep.slots=2", "sweep.retries=0", fail="") == 0
    assert app.sweep()["trials"][0]["metrics"]["demo/accuracy"] == pytest.approx(0.2)
    assert seed_calls(app, 0) == {"seed_0": 1, "seed_1": 1, "seed_2": 1}


def test_a_grid_has_no_rungs_and_says_what_has(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    points = "train.validation.every_steps=1"
    assert app("-m", "adapter.rank=1,2", "sweep.pruner.name=rungs", points) == 2
    assert "sweep.sampler.name=grid" in capsys.readouterr().err
    assert app("-m", "adapter.rank=1,2", "sweep.pause_after=3", points) == 2
