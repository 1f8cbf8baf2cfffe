"""A trace is added up by part: on the host by what is innermost, on a device by what it computes."""

from __future__ import annotations

from typing import Any

import pytest

from mgm_exp.train.time_shares import PARTS, time_shares

MAIN, BACKWARD, DEVICE = 1, 2, 7


def event(
    name: str, start: float, end: float, *, cat: str = "user_annotation", tid: int = MAIN, **args: Any
) -> dict[str, Any]:
    named = {key.replace("_", " ").capitalize().replace("id", "id"): value for key, value in args.items()}
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": start, "dur": end - start, "args": named}


def op(name: str, start: float, end: float, *, tid: int = MAIN, **args: Any) -> dict[str, Any]:
    return event(name, start, end, cat="cpu_op", tid=tid, **args)


def kernel(name: str, start: float, end: float, launched_by: int, cat: str = "kernel") -> dict[str, Any]:
    return event(name, start, end, cat=cat, tid=DEVICE, external_id=launched_by)


def shares_of(*events: dict[str, Any]) -> dict[str, float]:
    found = time_shares(events)
    assert found is not None
    assert set(found.shares) == set(PARTS) and sum(found.shares.values()) == pytest.approx(1)
    return {part: round(share, 6) for part, share in found.shares.items() if share > 1e-9}


def test_the_innermost_range_has_the_time() -> None:
    assert shares_of(
        event("ProfilerStep#1", 0, 100),
        event("mgm_exp::data", 0, 10),
        event("mgm_exp::llm", 10, 80),
        event("mgm_exp::vision", 20, 50),
        event("mgm_exp::optimizer", 80, 95),
    ) == {"data": 0.1, "llm": 0.4, "vision": 0.3, "optimizer": 0.15, "other": 0.05}


def test_a_backward_pass_belongs_to_the_part_whose_forward_it_undoes() -> None:
    assert shares_of(
        event("ProfilerStep#1", 0, 100),
        event("mgm_exp::llm", 0, 100),
        event("mgm_exp::vision", 0, 10),
        op("aten::addmm", 0, 10, sequence_number=4, fwd_thread_id=0),
        op("aten::mm", 20, 30, sequence_number=5, fwd_thread_id=0),
        op("autograd::engine::evaluate_function: MmBackward0", 40, 60, sequence_number=5, fwd_thread_id=1),
        op("autograd::engine::evaluate_function: AddmmBackward0", 60, 90, sequence_number=4, fwd_thread_id=1),
        op("aten::mm", 65, 80),
    ) == {"vision": 0.4, "llm": 0.6}


def test_what_is_computed_again_on_autograds_own_thread_is_not_taken_for_a_forward_with_the_same_number() -> None:
    # Mining is checkpointed: its nodes are made on the backward thread, whose numbers begin at 0 again
    assert shares_of(
        event("ProfilerStep#1", 0, 100),
        event("mgm_exp::llm", 0, 20),
        event("mgm_exp::vision", 0, 10),
        op("CheckpointFunction", 0, 10, sequence_number=9, fwd_thread_id=0, external_id=1),
        op("aten::mm", 10, 20, sequence_number=0, fwd_thread_id=0, external_id=2),
        op(
            "autograd: CheckpointFunctionBackward",
            30,
            80,
            tid=BACKWARD,
            sequence_number=9,
            fwd_thread_id=1,
            external_id=3,
        ),
        op("aten::mm", 35, 40, tid=BACKWARD, sequence_number=0, fwd_thread_id=0, external_id=4),
        op("MmBackward0", 50, 70, tid=BACKWARD, sequence_number=0, fwd_thread_id=2, external_id=5),
        op("MmBackward0", 82, 90, tid=BACKWARD, sequence_number=0, fwd_thread_id=1, external_id=6),
        kernel("gemm", 40, 50, 4),
        kernel("gemm", 60, 80, 5),
        kernel("gemm", 85, 95, 6),
    ) == {"vision": 0.3, "llm": 0.1, "other": 0.6}


def test_a_device_is_asked_what_it_computes_and_an_exchange_behind_a_computation_costs_nothing() -> None:
    found = time_shares(
        [
            event("ProfilerStep#1", 0, 100),
            event("mgm_exp::data", 0, 30),  # for its first 10 the device still works on the step before
            event("mgm_exp::vision", 30, 32, external_id=8),
            op("aten::mm", 30, 31, external_id=1),
            event("mgm_exp::llm", 32, 35),
            op("aten::mm", 33, 34, external_id=2),
            event("mgm_exp::optimizer", 36, 40),
            op("aten::_fused_adamw_", 36, 40, external_id=3),
            kernel("adamw", 0, 10, 3),
            kernel("gemm", 31, 51, 1),
            kernel("gemm", 51, 81, 2),
            kernel("ncclDevKernel_AllReduce", 71, 91, 2),
            kernel("adamw", 91, 96, 3),
        ]
    )
    assert found is not None
    rounded = {part: round(share, 6) for part, share in found.shares.items()}
    assert rounded == {"vision": 0.2, "llm": 0.3, "communication": 0.1, "optimizer": 0.15, "data": 0.2, "other": 0.05}
    assert found.busy == pytest.approx(0.75)
    assert "GPU is busy for 75%" in found.in_words


def test_a_batch_on_its_way_to_the_device_is_data() -> None:
    assert shares_of(
        event("ProfilerStep#1", 0, 10),
        kernel("Memcpy HtoD (Pinned -> Device)", 0, 5, 99, cat="gpu_memcpy"),
        kernel("Memcpy DtoH (Device -> Pinned)", 5, 6, 99, cat="gpu_memcpy"),
    ) == {"data": 0.5, "other": 0.5}


def test_without_a_whole_step_there_is_nothing_to_say() -> None:
    assert time_shares([event("mgm_exp::llm", 0, 10)]) is None
