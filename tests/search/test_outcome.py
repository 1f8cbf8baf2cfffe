"""What the end of a trial means, from its record and from how its process ended."""

from __future__ import annotations

from typing import Any

import pytest

from mgm_exp.errors import ConfigError, DataError, LossNotFinite, MgmError, ProcessKilled, TrainingFailed
from mgm_exp.record import explain
from mgm_exp.search.outcome import Ending, Outcome, Verdict, judge, mean_of, oom_kills
from mgm_exp.store import LeaseHeld

ACCURACY = ["demo/accuracy"]


def failed(error: BaseException) -> dict[str, Any]:
    return {"status": "failed", "metrics": {}, "error": explain(error)}


def completed(**metrics: Any) -> dict[str, Any]:
    return {"status": "completed", "metrics": {key.replace("_", "/"): value for key, value in metrics.items()}}


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("result", "ending", "verdict"),
    [
        (completed(demo_accuracy=0.5), None, Verdict.completed),
        (completed(demo_accuracy=float("nan")), None, Verdict.not_finite),
        (completed(demo_accuracy=float("inf")), None, Verdict.not_finite),
        (completed(demo_anls=0.5), None, Verdict.user_error),
        ({"status": "pruned", "metrics": {}}, None, Verdict.pruned),
        ({"status": "interrupted", "metrics": {}}, Ending(130), Verdict.interrupted),
        (failed(OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), Ending(1), Verdict.infeasible),
        (failed(MemoryError("no more")), None, Verdict.infeasible),
        (failed(RuntimeError("DefaultCPUAllocator: can't allocate memory")), Ending(1), Verdict.infeasible),
        (failed(LossNotFinite("Loss or gradient was not finite")), Ending(1), Verdict.not_finite),
        (failed(ProcessKilled("Process 1 of 2 was killed by SIGKILL")), Ending(1), Verdict.lost),
        (failed(ProcessKilled("Process 1 of 2 was killed by SIGKILL")), Ending(1, True), Verdict.infeasible),
        (failed(LeaseHeld("in use")), Ending(2), Verdict.lost),
        (failed(DataError("no rows")), Ending(2), Verdict.user_error),
        (failed(ConfigError("no key")), Ending(2), Verdict.user_error),
        (failed(TrainingFailed("something else")), Ending(1), Verdict.failed),
        (failed(ZeroDivisionError("a bug")), Ending(1), Verdict.failed),
        ({}, Ending(-9), Verdict.lost),
        ({}, Ending(-9, True), Verdict.infeasible),
        ({}, None, Verdict.lost),
        ({}, Ending(130), Verdict.interrupted),
        ({}, Ending(2, output="train.lrr: there is no key"), Verdict.user_error),
        ({"status": "interrupted", "metrics": {}}, Ending(-9, True), Verdict.infeasible),
    ],
)
def test_each_end_has_its_verdict(result: dict[str, Any], ending: Ending | None, verdict: Verdict) -> None:
    outcome = judge(result, ACCURACY, ending)
    assert outcome.verdict is verdict
    assert (outcome.reason == "") is (verdict is Verdict.completed)
    assert (outcome.values == (0.5,)) is (verdict is Verdict.completed)


def test_a_field_of_the_result_may_be_an_objective() -> None:
    result = {**completed(demo_accuracy=0.5), "peak_memory_gib": 3.0, "wall_s": None}
    assert judge(result, ["demo/accuracy", "peak_memory_gib"]).values == (0.5, 3.0)
    wrong = judge(result, ["wall_s"])
    assert wrong.verdict is Verdict.user_error and "demo/accuracy" in wrong.reason


def test_statuses_are_those_of_the_contract() -> None:
    assert {verdict.status for verdict in Verdict} == {"completed", "failed", "paused", "pruned", "interrupted"}
    assert {verdict for verdict in Verdict if not verdict.is_final} == {
        Verdict.lost, Verdict.interrupted, Verdict.paused, Verdict.user_error,
    }  # fmt: skip


def test_a_trial_of_several_seeds_is_their_mean_or_what_stopped_it() -> None:
    first, second = (Outcome(Verdict.completed, (value, 1.0)) for value in (0.2, 0.6))
    assert mean_of([first, second]).values == (pytest.approx(0.4), 1.0)
    assert mean_of([first, Outcome(Verdict.infeasible)]).verdict is Verdict.infeasible


def test_the_kernels_count_of_kills_is_read_where_there_is_one() -> None:
    count = oom_kills()
    assert count is None or count >= 0


def test_own_errors_have_exit_codes_of_their_own() -> None:
    from mgm_exp.errors import Pruned

    assert (Pruned("x").exit_code, ProcessKilled("x").exit_code, MgmError("x").exit_code) == (0, 1, 1)
