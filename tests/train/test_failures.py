"""Of many processes that ended, the one that failed first is shown, with its rank, its machine and what to do."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.errors import DataError, Interrupted, ProcessKilled, TrainingFailed
from mgm_exp.store import write_json_atomic
from mgm_exp.train.failures import Failure, failure_of, is_secondary, result_of
from mgm_exp.train.launch_folder import LaunchFacts, LaunchFolder
from mgm_exp.train.pulse import Hang

FACTS = LaunchFacts(("n1", "n2"), 2, ("n1", 2000), "instruct-1", 30.0)
LOST = "[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"


@pytest.fixture
def launch(tmp_path: Path, make_job: Callable[..., Any]) -> LaunchFolder:
    folder = LaunchFolder.attempt(tmp_path, 0)
    folder.begin(make_job(), FACTS)
    return folder


def raised(launch: LaunchFolder, rank: int, at: float, message: str, kind: str = "RuntimeError") -> None:
    write_json_atomic(
        launch.outcome(rank),
        {"kind": "error", "type": kind, "message": message, "advice": "", "traceback": f"tb {rank}", "time": at,
         "secondary": is_secondary(RuntimeError(message))},
    )  # fmt: skip


def ended(launch: LaunchFolder, *codes: dict[str, Any]) -> None:
    for machine, code in enumerate(codes):
        write_json_atomic(launch.agent(machine), code)


def failure(launch: LaunchFolder, hang: Hang | None = None, lost: dict[int, str] | None = None) -> Failure:
    assert result_of("instruct", launch, FACTS) is None
    return failure_of("instruct", launch, FACTS, hang, lost or {})


def test_the_earliest_error_is_shown_with_its_rank_and_machine(launch: LaunchFolder) -> None:
    raised(launch, 3, 10.0, "gone.png is not there", "DataError")
    raised(launch, 1, 11.0, "something else")
    ended(launch, {"1": 1}, {"3": 1})
    found = failure(launch)
    assert isinstance(found.error, DataError) and not found.may_restart
    assert found.error.message == "gone.png is not there (process 3 of 4 (on n2))"
    assert [who for who, _ in found.tracebacks] == ["process 3 of 4 (on n2)", "process 1 of 4 (on n1)"]


def test_a_lost_connection_is_never_the_reason_of_another_error(launch: LaunchFolder) -> None:
    raised(launch, 0, 9.0, LOST)  # its clock is ahead of the other's
    raised(launch, 2, 10.0, "expected 3 channels, got 4")
    ended(launch, {"0": 1}, {"2": 1})
    found = failure(launch)
    assert "process 2 of 4 (on n2)" in found.error.message and not found.may_restart
    assert [who for who, _ in found.tracebacks] == ["process 2 of 4 (on n2)"]


def test_a_process_that_was_killed_comes_before_those_that_lost_it(launch: LaunchFolder) -> None:
    for rank in (0, 1, 3):
        raised(launch, rank, 9.0, LOST)
    ended(launch, {"0": 1, "1": 1}, {"2": -signal.SIGKILL, "3": 1})
    found = failure(launch)
    assert isinstance(found.error, ProcessKilled) and found.may_restart and found.tracebacks == ()
    assert found.error.message.startswith("Process 2 of 4 (on n2) of the instruct stage was killed by SIGKILL")


def test_a_machine_that_ended_without_a_word_is_named(launch: LaunchFolder) -> None:
    raised(launch, 0, 9.0, LOST)
    ended(launch, {"0": 1})
    (launch.logs / "agents.txt").write_text("srun: error: n2: task 1: Killed\n")
    found = failure(launch, lost={1: "exit code 137"})
    assert found.may_restart
    assert "without a word on n2 (exit code 137)" in found.error.message and "task 1: Killed" not in str(launch)


def test_who_hangs_is_the_reason_whatever_was_killed_for_it(launch: LaunchFolder) -> None:
    raised(launch, 0, 9.0, LOST)
    ended(launch, {"1": -signal.SIGKILL}, {"2": -signal.SIGKILL, "3": -signal.SIGKILL})
    found = failure(launch, hang=Hang((1, 2), "lags behind (it is in batches.py:9 load)", 7))
    assert isinstance(found.error, ProcessKilled) and found.may_restart
    assert "30 s (launch.timeout_s) in step 7: process 1 of 4 (on n1), process 2 of 4 (on n2) lags" in str(found.error)


def test_agents_that_could_not_meet_begin_again(launch: LaunchFolder) -> None:
    ended(launch, {"launcher": "DistNetworkError: address already in use"}, {})
    found = failure(launch)
    assert found.may_restart and "could not be started: DistNetworkError" in found.error.message


def test_processes_that_only_lost_each_other_begin_again(launch: LaunchFolder) -> None:
    raised(launch, 1, 9.0, LOST)
    ended(launch, {"1": 1}, {})
    found = failure(launch)
    assert isinstance(found.error, TrainingFailed) and found.may_restart


def test_a_stop_that_all_took_part_in_is_no_failure(launch: LaunchFolder) -> None:
    write_json_atomic(launch.outcome(0), {"kind": "interrupted", "message": "stopped", "advice": "go on"})
    ended(launch, {}, {})
    with pytest.raises(Interrupted, match="stopped"):
        result_of("instruct", launch, FACTS)


@pytest.mark.parametrize("message", [LOST, "NCCL error: remote process exited", "Timed out waiting 1800000ms for recv"])
def test_what_a_lost_peer_looks_like(message: str) -> None:
    assert is_secondary(RuntimeError(message))
    assert not is_secondary(ValueError(message)) and not is_secondary(RuntimeError("shape mismatch"))
