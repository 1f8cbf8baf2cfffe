"""Where two runs' curves part: found at its step, not where noise alone is, and related to what differs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.doctor import Comparison, compare_runs
from mgm_exp.errors import UserError
from tests.doctor.runs import event, falling, rows, write_run


def compared(tmp_path: Path, a: list[dict[str, Any]], b: list[dict[str, Any]], **files: Any) -> Comparison:
    other = files.pop("other", {})
    return compare_runs(write_run(tmp_path / "a", a, **files), write_run(tmp_path / "b", b, **{**files, **other}))


def test_equal_runs_do_not_part(tmp_path: Path) -> None:
    found = compared(tmp_path, rows(200, falling), rows(200, falling))
    (parting,) = found.partings
    assert parting.first_difference is None and parting.parts_at is None and not found.has_parted
    assert "is the same" in found.in_words()


@pytest.mark.parametrize("seed", range(1, 13))
def test_other_batches_of_the_same_kind_are_noise(tmp_path: Path, seed: int) -> None:
    """Twelve pairs of runs that differ by their noise only: none of them parts."""
    theirs = rows(300, falling, seed=seed, noise=0.1, batch_name=lambda step: f"{step}-{seed}")
    found = compared(tmp_path, rows(300, falling, seed=100 + seed, noise=0.1), theirs)
    (parting,) = found.partings
    assert parting.batches_differ_at == 1 and parting.share_of_equal_batches == 0
    assert parting.parts_at is None, parting
    assert parting.noise == pytest.approx(0.1 * math.sqrt(2), rel=0.35)


@pytest.mark.parametrize(("factor", "at"), [(1.5, 120), (0.7, 60), (1.25, 200)])
def test_a_step_in_the_loss_is_found_through_the_noise(tmp_path: Path, factor: float, at: int) -> None:
    def worse(step: int) -> float:
        return falling(step) * (factor if step >= at else 1.0)

    theirs = rows(300, worse, seed=2, noise=0.05, batch_name=lambda step: f"{step}-b")
    (parting,) = compared(tmp_path, rows(300, falling, seed=1, noise=0.05), theirs).partings
    assert parting.parts_at is not None and abs(parting.parts_at - at) <= 8
    assert math.copysign(1, parting.difference) == math.copysign(1, -math.log(factor))


def test_the_same_batches_with_rounding_part_where_something_happened(tmp_path: Path) -> None:
    """Rounding grows slowly; a jump at step 90 is found at step 90, with its batch, samples and event."""

    def nudged(step: int) -> float:
        return falling(step) * (1 + 1e-7 * step) * (1.04 if step >= 90 else 1.0)

    events = [event(90, "spike", "loss 9.1, usually 1.2", sample_ids=["row-7", "row-9"])]
    found = compared(tmp_path, rows(200, falling), rows(200, nudged) + events)
    (parting,) = found.partings
    assert parting.first_difference == 1 and parting.field == "loss"
    assert parting.parts_at == 90 and parting.batches_differ_at is None
    assert parting.batch == (f"{90:013x}",) * 2
    assert parting.sample_ids == ("row-7", "row-9") and "spike" in parting.events[0]
    assert any("arithmetic" in reason for reason in found.reasons)


def test_another_rate_is_the_reason_that_is_given(tmp_path: Path) -> None:
    theirs = rows(200, lambda step: falling(step) * (1 + step / 200), lr=lambda step: 3e-4)
    config = {"train": {"lr": 1e-4}}
    found = compared(
        tmp_path, rows(200, falling), theirs, config=config, other={"config": {"train": {"lr": 3e-4}, "name": "other"}}
    )
    assert found.partings[0].rates_differ_at == 1
    assert "the learning rate is another one from step 1 on" in found.reasons[0]
    assert found.settings == ("train.lr: 0.0001 -> 0.0003",)


def test_of_the_same_batches_the_first_step_that_grew_apart_is_named(tmp_path: Path) -> None:
    """Each step leads further away: the noise of the whole says little, the equal beginning much."""

    def faster(step: int) -> float:
        return falling(step) * math.exp(-0.09 * max(0, step - 6))

    (parting,) = compared(tmp_path, rows(60, falling), rows(60, faster)).partings
    assert parting.first_difference == parting.parts_at == 7


def test_other_rows_are_told_with_their_statistics(tmp_path: Path) -> None:
    def data(kept: int, words: float, fingerprint: str) -> dict[str, Any]:
        return {"fingerprint": fingerprint, "instruct": {"rows": 100, "kept": kept, "text": {"words_mean": words}}}

    theirs = rows(200, lambda step: 1.6 * falling(step), batch_name=lambda step: f"{step}-b")
    found = compared(
        tmp_path, rows(200, falling), theirs, data=data(100, 8.7, "f1"), other={"data": data(61, 12.25, "f2")}
    )
    assert found.data == (
        "fingerprint f1 -> f2: other rows, or other images",
        "instruct: kept 100 -> 61",
        "instruct: words_mean 8.70 -> 12.25",
    )
    assert "the data is not the same" in found.reasons[0]


def test_a_loss_that_is_finite_in_one_run_only_parts_them(tmp_path: Path) -> None:
    theirs = rows(100, lambda step: None if step >= 40 else falling(step))
    found = compared(tmp_path, rows(100, falling), theirs)
    assert found.partings[0].parts_at == 40 and "finite in one of them only" in found.in_words()
    json.dumps(found.as_json(), default=str)


def test_like_stages_only_are_compared(tmp_path: Path) -> None:
    align = rows(50, falling, stage="align")
    found = compared(tmp_path, align + rows(60, falling), align)
    assert [parting.stage for parting in found.partings] == ["align"] and found.only_one == ("instruct",)
    with pytest.raises(UserError, match="different stages are not compared"):
        compare_runs(write_run(tmp_path / "c", align), write_run(tmp_path / "d", rows(50, falling)))
    with pytest.raises(UserError, match="no row of training"):
        compare_runs(tmp_path / "c", write_run(tmp_path / "e", []))
    with pytest.raises(UserError, match="cannot be read"):
        compare_runs(tmp_path / "c", tmp_path / "not there")


def test_a_gradient_that_parts_before_the_loss_is_told(tmp_path: Path) -> None:
    def norm(at: int) -> Callable[[int], float]:
        return lambda step: 0.5 + (2.0 if step >= at else 0.0) + 0.01 * (step % 3)

    theirs = rows(200, lambda step: falling(step) * (1.3 if step >= 120 else 1.0), grad_norm=norm(80))
    (parting,) = compared(tmp_path, rows(200, falling, grad_norm=norm(999)), theirs).partings
    assert parting.quantity == "loss" and parting.parts_at == 120
    assert parting.events[0] == "the gradient norm parted before, at step 80"
