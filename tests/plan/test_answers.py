"""Evaluation in the plan: memory of answering beside PyTorch's count, questions, passes and hours."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.plan_memory import answer_cases, compared_answers, compared_captions
from mgm_exp.plan import CellPlan, plan_cell
from tests.plan.settings import config_of

MGM = ("model=mgm_2b", "adapter=lora_r16", "plan.device=rtx4090", "plan.rows=17500", "plan.align_rows=17500")
CASES = answer_cases()


@pytest.mark.parametrize(
    "settings", [pytest.param(s, id=name, marks=[pytest.mark.slow] * (k > 0)) for k, (name, s) in enumerate(CASES)]
)
def test_answering_is_near_what_pytorch_counts(settings: tuple[Any, ...]) -> None:
    predicted, counted = compared_answers(*settings)
    assert predicted == pytest.approx(counted, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [32, 128])
def test_captioning_is_near_what_pytorch_counts(batch: int) -> None:
    predicted, counted = compared_captions(batch)
    assert predicted == pytest.approx(counted, rel=0.05)


def planned(*overrides: str) -> CellPlan:
    return plan_cell(config_of(*MGM, *overrides), with_advice=False)


def phase(plan: CellPlan, name: str) -> Any:
    return next(one for one in plan.phases if one.name == name)


def test_a_benchmark_has_memory_hours_and_a_share_of_the_whole() -> None:
    plan = planned()
    (answers,) = plan.phases
    assert (answers.name, answers.count) == ("evaluate[textvqa]", 5000)
    assert [moment.name for moment in answers.moments] == [
        "encoding images", "reading the prompts", "writing the answers",
    ]  # fmt: skip
    hours = plan.hours_of
    assert plan.hours == pytest.approx(sum(value or 0 for value in hours.values()), abs=1e-3)
    assert 0 < (hours["evaluate[textvqa]"] or 0) < (hours["instruct"] or 0)
    assert plan.gpu_hours == plan.hours
    shared = planned("devices=2")
    assert shared.hours_of["evaluate[textvqa]"] == pytest.approx((hours["evaluate[textvqa]"] or 0) / 2)
    # Fewer questions share an image less often
    few = planned("eval.max_questions=500").hours_of["evaluate[textvqa]"] or 0
    assert 1.0 < few / ((hours["evaluate[textvqa]"] or 0) / 10) < 1.2


def test_larger_batches_and_longer_answers_need_more_memory() -> None:
    def gib(*overrides: str) -> float:
        return float(phase(planned(*overrides), "evaluate[textvqa]").moments[-1].total)

    plain = gib()
    # Keys and values of a token: 2 x 18 layers x 256 x 2 bytes, and a layer's once more as it grows
    longer = gib("eval.textvqa.max_new_tokens=1128") - plain
    assert longer == pytest.approx(1000 * 16 * 2 * 18 * 256 * 2 * (1 + 1 / 18))
    assert gib("eval.textvqa.batch_size=64") > plain


def test_a_batch_that_is_too_large_is_halved_and_does_not_make_the_run_unfit() -> None:
    plan = planned("eval.textvqa.batch_size=2048", "train.micro_batch_size=1", "train.align.micro_batch_size=1")
    assert plan.largest.name == "evaluate[textvqa]" and plan.peak_gib > 40
    assert plan.verdict == "fits" and any("halved until it fits" in note for note in plan.notes)


def test_validation_points_variants_and_baselines_are_counted() -> None:
    plan = planned(
        "train.validation.every_steps=10", "train.validation.questions=50", "eval.robustness.corruptions=[blur]"
    )
    assert phase(plan, "validation").count == 136 // 10 * 50
    assert phase(plan, "validation").moments[0].weights > phase(plan, "evaluate[textvqa]").moments[0].weights
    assert phase(plan, "evaluate[textvqa]").count == 4 * 5000
    demo = plan_cell(config_of(), with_advice=False)
    assert [one.count for one in demo.phases] == [600, 1200]


def test_questions_of_ones_own_are_not_guessed() -> None:
    plan = planned("eval=custom", "eval.custom.questions=mine.jsonl")
    assert plan.phases[0].count is None and plan.hours_of["evaluate[custom]"] is None
    assert any("eval.max_questions" in note for note in plan.notes)
    assert plan.hours == pytest.approx(sum(plan.hours_of[stage.name] or 0 for stage in plan.stages), abs=1e-3)
