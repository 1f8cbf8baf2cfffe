"""``hydra/sweeper=mgm_optuna``: a search whose trials end in every way there is, and the same command again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

SEARCH = ("-m", "hydra/sweeper=mgm_optuna")
RANKS = "adapter.rank=range(1,17)"
LR = "train.lr=tag(log,interval(1e-4,1e-2))"


def states(sweep: dict[str, Any]) -> list[str]:
    return [trial["status"] for trial in sweep["trials"]]


def verdicts(sweep: dict[str, Any]) -> list[str]:
    return [trial["verdict"] for trial in sweep["trials"]]


def study_of(app: Any) -> optuna.Study:
    from mgm_exp.search import open_storage

    return optuna.load_study(study_name=app.sweep_dir.name, storage=open_storage(str(app.sweep_dir / "study.journal")))


def drawn(app: Any) -> list[dict[str, Any]]:
    return [trial["params"] for trial in app.sweep()["trials"]]


def test_a_search_runs_and_keeps_books(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert app(*SEARCH, RANKS, LR, "sweep.n_trials=5", "seed=3") == 0
    sweep = app.sweep()
    assert states(sweep) == ["completed"] * 5
    assert [trial["run_dir"] for trial in sweep["trials"]] == ["0", "1", "2", "3", "4"]
    best = max(sweep["trials"], key=lambda trial: trial["metrics"]["demo/accuracy"])
    assert sweep["best"] == {"number": best["number"], "value": best["values"][0], "run_dir": best["run_dir"]}
    study = study_of(app)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 5
    assert [trial.params["adapter.rank"] for trial in study.trials] == [p["adapter.rank"] for p in drawn(app)]
    for trial in sweep["trials"]:
        called = (app.sweep_dir / trial["run_dir"] / "calls.txt").read_text(encoding="utf-8")
        assert f"adapter.rank={trial['params']['adapter.rank']}" in called and "seed=3" in called
        assert called.split()[:2] == [sweep["name"], str(trial["number"])]
    assert (app.sweep_dir / "comparison.json").is_file()
    assert not list((app.sweep_dir / ".claims").glob("*")), "nothing of the work stays"
    output = capsys.readouterr().out
    assert "best: trial" in output and "adapter.rank" in output


def test_n_trials_is_a_total_and_the_same_command_repeats_nothing(app: Any) -> None:
    assert app(*SEARCH, RANKS, "sweep.n_trials=3") == 0
    first = app.sweep()["trials"]
    for _ in range(2):
        assert app(*SEARCH, RANKS, "sweep.n_trials=3") == 0
    assert app.sweep()["trials"] == first
    assert app(*SEARCH, RANKS, "sweep.n_trials=5") == 0
    assert app.sweep()["trials"][:3] == first
    assert [app.calls(number) for number in range(5)] == [1] * 5
    assert len({json.dumps(point) for point in drawn(app)}) > 3, "a restart does not repeat its first draws"


def test_a_search_in_two_calls_proposes_what_one_call_does(app: Any, tmp_path: Path) -> None:
    """Seeded by the trial's number, and told the same: the same points."""
    arguments = (*SEARCH, RANKS, LR, "sweep.sampler.startup=2")
    for total in (2, 3, 6):
        assert app(*arguments, f"sweep.n_trials={total}", "sweep.name=parts") == 0
    assert app(*arguments, "sweep.n_trials=6", "sweep.name=whole") == 0
    parts, whole = (
        json.loads((app.root / "sweeps" / name / "sweep.json").read_text())["trials"] for name in ("parts", "whole")
    )
    assert [trial["params"] for trial in parts] == [trial["params"] for trial in whole]


def test_each_ending_has_its_meaning(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    points = "[{adapter.rank: 4}, {adapter.rank: 8}, {adapter.rank: 12}, {adapter.rank: 16}]"
    arguments = (*SEARCH, "adapter.rank=4,8,12,16", f"sweep.enqueue={points}", "sweep.n_trials=4")
    assert app(*arguments, fail="8:oom,12:nan,16:failed") == 1
    sweep = app.sweep()
    assert verdicts(sweep) == ["completed", "infeasible", "not_finite", "failed"]
    assert states(sweep) == ["completed", "pruned", "pruned", "failed"]
    assert sweep["best"]["number"] == 0
    found = study_of(app).trials
    assert [trial.state.name for trial in found] == ["COMPLETE", "PRUNED", "PRUNED", "FAIL"]
    assert [trial.user_attrs["violations"] for trial in found] == [[0.0], [1.0], [0.0], [0.0]], "the sampler learns"
    assert "memory" in sweep["trials"][1]["error"]["cause"]
    assert "infeasible: the machine's memory is full" in capsys.readouterr().out


def test_a_failed_trial_is_run_again_where_it_is_asked_for_and_does_not_count_twice(app: Any) -> None:
    arguments = (
        *SEARCH,
        "adapter.rank=4,8",
        "sweep.enqueue=[{adapter.rank: 4}, {adapter.rank: 8}]",
        "sweep.n_trials=2",
    )
    assert app(*arguments, fail="8") == 1
    assert app(*arguments) == 1, "it stays failed"
    assert [app.calls(number) for number in range(2)] == [1, 1]
    assert app(*arguments, "sweep.rerun=failed") == 0
    sweep = app.sweep()
    assert states(sweep) == ["completed", "failed", "completed"]
    assert sweep["grid"] == [0, 2], "the new number takes the place of the failed one"
    assert sweep["trials"][2]["params"] == {"adapter.rank": 8}
    assert app(*arguments, "sweep.rerun=failed") == 0
    assert len(app.sweep()["trials"]) == 3


def test_a_users_error_stops_the_search_with_its_reason(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        *SEARCH,
        "adapter.rank=4,8",
        "sweep.enqueue=[{adapter.rank: 4}, {adapter.rank: 8}]",
        "sweep.n_trials=3",
    )
    assert app(*arguments, fail="8:user") == 2
    assert "trial 1 (rank=8): the rows are not there" in capsys.readouterr().err
    sweep = app.sweep()
    assert (sweep["status"], states(sweep)) == ("failed", ["completed", "interrupted"])
    assert app(*arguments) == 0, "once it is mended, the same command goes on, with the same trial"
    assert states(app.sweep()) == ["completed"] * 3
    assert [app.calls(number) for number in range(2)] == [1, 2]


def test_a_search_in_which_everything_fails_stops(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = ",".join(map(str, range(1, 17)))
    assert app(*SEARCH, RANKS, "sweep.n_trials=12", "sweep.max_failures=3", fail=ranks) == 1
    assert len(app.sweep()["trials"]) == 3
    assert "3 trials failed" in capsys.readouterr().err


def test_a_point_that_does_not_compose_stops_the_search_and_is_not_taken_up_again(
    app: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (*SEARCH, "adapter=full,lora_r8", "adapter.rank=4,8", "sweep.n_trials=2", "sweep.name=x")
    enqueue = "sweep.enqueue=[{adapter: full, adapter.rank: 4}]"
    assert app(*arguments, enqueue) == 2
    error = capsys.readouterr().err
    assert "trial 0 (adapter=full rank=4)" in error and "when" in error
    points = "[{adapter: lora_r8, adapter.rank: 4}, {adapter: lora_r8, adapter.rank: 8}]"
    assert app(*arguments, f"sweep.enqueue={points}") == 0
    assert [trial["number"] for trial in app.sweep()["trials"]] == [1, 2]
    assert app(*SEARCH, "adapter=full,lora_r16", "adapter.rank=4,8", "sweep.n_trials=2", "sweep.name=x") == 2
    assert "a study keeps its choices" in capsys.readouterr().err


def test_trials_that_do_worse_are_pruned_and_keep_what_they_reached(
    app: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMALL_STEPS", "9")
    points = "[{adapter.rank: 16}, {adapter.rank: 12}, {adapter.rank: 2}, {adapter.rank: 1}]"
    arguments = (
        *SEARCH, "adapter.rank=1,2,12,16", f"sweep.enqueue={points}", "sweep.n_trials=4", "sweep.pruner.name=median",
        "sweep.pruner.startup=1", "train.validation.every_steps=1",
    )  # fmt: skip
    assert app(*arguments) == 0
    sweep = app.sweep()
    assert states(sweep) == ["completed", "pruned", "pruned", "pruned"]
    folder = app.sweep_dir / "2"
    reports = [json.loads(line) for line in (folder / "reports.jsonl").read_text().splitlines()]
    assert [report["step"] for report in reports] == list(range(1, len(reports) + 1))
    assert [report["stop"] for report in reports] == [False] * (len(reports) - 1) + [True]
    assert len(reports) < 9
    trial = study_of(app).trials[2]
    assert (trial.state, trial.intermediate_values) == (
        TrialState.PRUNED, {report["step"]: report["value"] for report in reports},
    )  # fmt: skip
    assert trial.value == reports[-1]["value"], "a pruned trial has its last value"
    steps = (folder / "steps.txt").read_text().splitlines()
    assert len(steps) == len(reports), "it stopped there"
    assert f"trial 2 pruned: stopped after step {len(reports)} of 9" in capsys.readouterr().out


def test_several_objectives_give_a_front(app: Any) -> None:
    arguments = (
        *SEARCH, "adapter.rank=2,4,8,16", "sweep.sampler.name=nsga2", "sweep.n_trials=6",
        "sweep.objectives=[demo/accuracy,trainable_parameters]", "sweep.directions=[maximize,minimize]",
    )  # fmt: skip
    assert app(*arguments) == 0
    sweep = app.sweep()
    assert sweep["objectives"] == ["demo/accuracy", "trainable_parameters"]
    front = {row["number"] for row in sweep["pareto"]}
    best = max(trial["values"][0] for trial in sweep["trials"])
    assert front == {trial["number"] for trial in sweep["trials"] if trial["values"] == [best, 1.0]}


def test_repeats_are_one_trial_with_their_mean(app: Any) -> None:
    assert app(*SEARCH, "adapter.rank=4,8", "sweep.seeds=3", "sweep.n_trials=2", "seed=5") == 0
    sweep = app.sweep()
    for trial in sweep["trials"]:
        folder = app.sweep_dir / trial["run_dir"]
        assert sorted(path.name for path in folder.glob("seed_*")) == ["seed_5", "seed_6", "seed_7"]
        assert trial["values"] == [pytest.approx(trial["params"]["adapter.rank"] / 20)]
        assert trial["seconds"] == pytest.approx(1.5)
    assert app(*SEARCH, "adapter.rank=4,8", "sweep.seeds=3", "sweep.n_trials=2", "seed=5") == 0
    assert len((app.sweep_dir / "0" / "seed_6" / "calls.txt").read_text().splitlines()) == 1


def test_constraints_that_are_known_before_are_not_run_and_do_not_count(app: Any) -> None:
    assert (
        app(*SEARCH, RANKS, "sweep.n_trials=4", "sweep.constraints=['adapter.rank <= 8']", "sweep.sampler.seed=1") == 0
    )
    sweep = app.sweep()
    assert len(sweep["trials"]) == 4 == len(sweep["grid"])
    assert all(point["adapter.rank"] <= 8 for point in drawn(app))
    assert sweep["refused"] and all(row["params"]["adapter.rank"] > 8 for row in sweep["refused"])
    assert {int(path.name) for path in app.sweep_dir.iterdir() if path.name.isdigit()} == set(sweep["grid"])


def test_constraints_that_are_known_after_keep_a_trial_from_being_the_best(app: Any) -> None:
    """The small task trains rank 1 and has one trained parameter; 16 ranks have most accuracy."""
    arguments = (
        *SEARCH, "adapter.rank=4,16", "sweep.enqueue=[{adapter.rank: 4}, {adapter.rank: 16}]", "sweep.n_trials=2",
    )  # fmt: skip
    assert app(*arguments, "sweep.constraints=['wall_s * adapter.rank <= 4']") == 0
    sweep = app.sweep()
    assert [trial["feasible"] for trial in sweep["trials"]] == [True, False]
    assert sweep["best"]["number"] == 0


def test_points_that_are_predicted_to_need_too_much_are_not_run(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Known from the configuration alone, before any weights are read; the sampler learns by how much it was missed."""
    from mgm_exp.compose import compose
    from mgm_exp.plan import predicted_memory_gib

    batches = (1, 2, 4, 8, 16, 32)
    fixed = ["model=mgm_2b", "model.path=/nowhere", "eval=demo", "train.global_batch_size=32"]
    needs = {b: predicted_memory_gib(compose([*fixed, f"train.micro_batch_size={b}"])) for b in batches}
    limit = (needs[4] + needs[8]) / 2
    arguments = (*SEARCH, *fixed, f"train.micro_batch_size={','.join(map(str, batches))}", "sweep.sampler.name=random")
    assert app(*arguments, "sweep.n_trials=3", f"sweep.constraints=['predicted_memory_gib <= {limit}']") == 0
    sweep = app.sweep()
    assert len(sweep["trials"]) == 3 == len(sweep["grid"])
    assert all(point["train.micro_batch_size"] <= 4 for point in drawn(app))
    assert sweep["refused"] and all(row["params"]["train.micro_batch_size"] >= 8 for row in sweep["refused"])
    row = sweep["refused"][0]
    missed = study_of(app).trials[row["number"]].user_attrs["violations"][1]
    assert missed == pytest.approx(needs[row["params"]["train.micro_batch_size"]] - limit)
    assert "not run, misses predicted_memory_gib" in capsys.readouterr().out
    assert app(*arguments, "sweep.name=b", "sweep.constraints=['predicted_hours <= 1']") == 2
    assert "plan.device" in capsys.readouterr().err


def test_a_search_none_of_whose_points_fits_ends_with_3_and_says_what_would(
    app: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgm_exp.campaign import campaign

    monkeypatch.setattr(campaign, "MOST_TOO_LARGE", 3)
    fixed = ["model=mgm_2b", "model.path=/nowhere", "eval=demo", "adapter=full", "plan.device=rtx4090"]
    assert app(*SEARCH, *fixed, LR, "sweep.n_trials=9") == 3
    error = capsys.readouterr().err
    assert "3 points in a row were not run" in error and "predicted_memory_gib <= 22.7" in error
    assert "adapter=lora_r16" in error and not app.calls(0)


def test_a_plateau_and_a_budget_end_the_search(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    points = "[{adapter.rank: 16}, {adapter.rank: 8}, {adapter.rank: 4}]"
    arguments = (*SEARCH, "adapter.rank=4,8,16", f"sweep.enqueue={points}", "sweep.n_trials=9")
    assert app(*arguments, "sweep.plateau.trials=2") == 0
    assert len(app.sweep()["trials"]) == 3
    assert "nothing better" in app.sweep()["stopped_because"]
    assert app(*arguments, "sweep.budget.trials=4") == 0
    assert len(app.sweep()["trials"]) == 4
    assert app(*arguments, "sweep.budget.hours=0.000001") == 0
    assert len(app.sweep()["trials"]) == 4
    assert "budget.hours" in capsys.readouterr().out


@pytest.mark.parametrize("slots", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_hours_can_end_running_trials_with_their_state_kept(app: Any, slots: int) -> None:
    """An allocation that ends: the command is over in time with 0, and more hours continue what was running."""
    arguments = (
        *SEARCH, "adapter.rank=4,8", "sweep.enqueue=[{adapter.rank: 4}, {adapter.rank: 8}]", "sweep.n_trials=2",
        f"sweep.slots={slots}", "sweep.budget.interrupt=true",
    )  # fmt: skip
    hours = f"sweep.budget.hours={(10 if slots == 1 else 30) / 3600}"
    process = app.start(*arguments, hours, stop="4,8")  # both would wait for ever
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    sweep = app.sweep()
    assert states(sweep) == ["interrupted"] * slots and "budget.hours" in sweep["stopped_because"], output
    assert app(*arguments, hours) == 0
    assert app.calls(0) == 1, "its hours are over: nothing is taken up"
    assert app(*arguments, "sweep.budget.hours=1") == 0
    assert states(app.sweep()) == ["completed", "completed"]
    assert (app.calls(0), app.calls(1)) == (2, slots)


def test_the_settings_of_a_study_stay(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*SEARCH, RANKS, "sweep.n_trials=1", "sweep.name=mine")
    assert app(*arguments) == 0
    assert app(*arguments, "train.max_steps=7") == 2
    assert "what is not searched" in capsys.readouterr().err
    assert app(*arguments, "sweep.objective=demo/anls") == 2
    assert app(*arguments, "sweep.n_trials=2", "sweep.pruner.name=median", "sweep.sampler.name=random") == 0
    assert app("-m", "adapter.rank=1,2", "sweep.name=mine") == 2, "a grid in the folder of a search"
    assert "search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["adapter.rank=4"], "Nothing is searched"),
        ([RANKS, "train.lrr=1"], "train.lr"),
        ([RANKS, "sweep.enqueue=[{adapter.rank: 99}]"], "not what adapter.rank is chosen from"),
        ([RANKS, "sweep.enqueue=[{adapter.alpha: 1}]"], "not chosen in this search"),
        ([RANKS, "sweep.constraints=['import os']"], "not a formula"),
        ([RANKS, "sweep.sampler.name=grid", LR], "no end"),
        ([RANKS, "sweep.objectives=[a,b]"], "one entry for each"),
        ([RANKS, "sweep.storage=postgresqlx://h/d"], "no database URL"),
        ([RANKS, "sweep.storage=postgresql+nodriver://h/d"], "database"),
        ([RANKS, "sweep.rerun=all"], "sweep.rerun=all is for grids"),
        (["device=cpu,auto", RANKS], "has one value"),
        ([RANKS, "sweep.name=../x"], "not a folder name"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    app: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert app(*SEARCH, "sweep.n_trials=1", *arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err


def test_a_folder_without_its_study_is_not_written_over(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert app(*SEARCH, RANKS, "sweep.n_trials=1") == 0
    (app.sweep_dir / "study.journal").unlink()
    assert app(*SEARCH, RANKS, "sweep.n_trials=1") == 2
    assert "the study knows nothing of a trial 0" in capsys.readouterr().err
    assert app.calls(0) == 1


# -- slots -----------------------------------------------------------------------------------------------------------


def test_slots_run_trials_side_by_side_and_a_free_one_is_refilled_at_once(app: Any) -> None:
    """Rank 1 waits; the other slot does all the others meanwhile: no batch waits for its slowest."""
    points = "[{adapter.rank: 1}, {adapter.rank: 2}]"
    process = app.start(
        *SEARCH, "adapter.rank=1,2", f"sweep.enqueue={points}", "sweep.n_trials=4", "sweep.slots=2",
        "sweep.sampler.name=grid", stop="1",
    )  # fmt: skip
    folder = app.waits_in("sweeps/*/0", process)
    deadline = time.monotonic() + 300
    while not (app.sweep_dir / "1" / "result.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    assert not (folder / "result.json").exists()
    for waiting in [folder, *app.sweep_dir.glob("[0-9]*")]:
        (waiting / "go").touch()
    deadline = time.monotonic() + 300
    while process.poll() is None:
        for waiting in app.sweep_dir.glob("[0-9]*"):
            (waiting / "go").touch()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert process.returncode == 0, process.communicate()[0]
    sweep = app.sweep()
    assert states(sweep) == ["completed"] * 4
    assert "code: " in (app.sweep_dir / "1" / "log.txt").read_text()


def test_a_trial_that_is_killed_goes_on_from_its_checkpoint_under_its_number(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALL_STEPS", "6")
    monkeypatch.setenv("SMALL_HOLD", "4")
    process = app.start(
        *SEARCH, RANKS, "sweep.n_trials=1", "sweep.slots=1", "sweep.isolate=true", "sweep.pruner.name=none"
    )
    pid = child_in(app, process, "0", steps=3)
    (app.sweep_dir / "0" / "go").touch()
    os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "was killed by SIGKILL" in output and "goes on from its checkpoint" in output
    sweep = app.sweep()
    assert (states(sweep), app.calls(0)) == (["completed"], 2)
    steps = [int(line) for line in (app.sweep_dir / "0" / "steps.txt").read_text().split()]
    assert sorted(set(steps)) == list(range(1, 7)) and len(steps) <= 7, "at most the step that was cut off is repeated"


def test_a_trial_that_is_killed_again_and_again_fails_and_harms_no_other(app: Any) -> None:
    points = "[{adapter.rank: 4}, {adapter.rank: 8}]"
    arguments = (*SEARCH, "adapter.rank=4,8", f"sweep.enqueue={points}", "sweep.n_trials=2", "sweep.isolate=true")
    assert app(*arguments, "sweep.retries=1", fail="4:killed") == 1
    sweep = app.sweep()
    assert verdicts(sweep) == ["failed", "completed"]
    assert "2 times" in sweep["trials"][0]["error"]["message"]
    assert app.calls(0) == 2


def child_in(app: Any, process: subprocess.Popen[str], number: str, *, steps: int = 0, timeout_s: float = 300) -> int:
    """The pid of the process that runs a trial, once it has done some steps."""
    from mgm_exp.store import Lease

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for folder in app.root.glob(f"sweeps/*/{number}"):
            done = (folder / "steps.txt").read_text().split() if (folder / "steps.txt").exists() else []
            claim = Lease(folder / ".lease").holder() if (folder / ".lease").is_dir() else None
            if len(done) >= steps and claim is not None and claim.holder is not None:
                return claim.holder.pid
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("the trial did not come so far")


@pytest.mark.parametrize("slots", [1, 2])
def test_a_signal_stops_every_trial_with_its_state_saved(app: Any, monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    monkeypatch.setenv("SMALL_STEPS", "100000")
    monkeypatch.setenv("SMALL_STEP_S", "0.02")
    arguments = (*SEARCH, RANKS, "sweep.n_trials=2", f"sweep.slots={slots}", "sweep.pruner.name=none")
    process = app.start(*arguments)
    for number in range(slots):
        child_in(app, process, str(number), steps=2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    sweep = app.sweep()
    assert sweep["status"] == "interrupted"
    assert set(states(sweep)) == {"interrupted"} and len(sweep["trials"]) == slots
    monkeypatch.setenv("SMALL_STEPS", "4")
    done = app.start(*arguments)
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output
    assert states(app.sweep()) == ["completed"] * 2


def test_the_children_of_a_killed_sweeper_die_with_it(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_STEPS", "100000")
    monkeypatch.setenv("SMALL_STEP_S", "0.02")
    process = app.start(*SEARCH, RANKS, "sweep.n_trials=2", "sweep.slots=2", "sweep.pruner.name=none")
    pids = [child_in(app, process, number, steps=1) for number in ("0", "1")]
    process.kill()
    process.wait(timeout=30)
    deadline = time.monotonic() + 300
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_two_sweepers_share_one_study(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_STEPS", "3")
    monkeypatch.setenv("SMALL_HOLD", "2")
    arguments = (*SEARCH, RANKS, LR, "sweep.n_trials=6", "sweep.pruner.name=none", "sweep.name=both")
    first, second = app.start(*arguments), app.start(*arguments)
    while len(list(app.root.glob("sweeps/both/*/steps.txt"))) < 2:  # each of them has a trial in hand
        assert first.poll() is None and second.poll() is None
        time.sleep(0.05)
    while first.poll() is None or second.poll() is None:
        for folder in app.root.glob("sweeps/both/[0-9]*"):
            (folder / "go").touch()
        time.sleep(0.05)
    outputs = [process.communicate()[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    sweep = app.sweep()
    assert states(sweep) == ["completed"] * 6
    assert [app.calls(number) for number in range(6)] == [1] * 6, "each trial once"
    assert all("completed demo/accuracy" in output for output in outputs), "both have worked"
    assert len({json.dumps(point) for point in drawn(app)}) == 6, "equal seeds, different points"


def test_the_folders_keep_the_contract(app: Any) -> None:
    """With the checker that is published with the contract, where it is at hand."""
    checker = os.environ.get("MGM_CONTRACT_CHECKER")
    if checker is None:
        pytest.skip("MGM_CONTRACT_CHECKER does not name the contract's checker")
    points = "[{adapter.rank: 4}, {adapter.rank: 8}, {adapter.rank: 12}]"
    arguments = (*SEARCH, "adapter.rank=4,8,12", f"sweep.enqueue={points}", "sweep.n_trials=3", "sweep.isolate=true")
    assert app(*arguments, "sweep.retries=0", fail="8:killed,12:oom") == 1
    done = subprocess.run([sys.executable, checker, str(app.sweep_dir)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
