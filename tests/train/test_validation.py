"""Validation points: they score, they may stop a run, and they change no bit of the training."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mgm_exp.config import EarlyStoppingConfig, plain
from mgm_exp.errors import Interrupted, Pruned
from mgm_exp.train import TrainJob, run_stage
from mgm_exp.train.metrics_file import read_rows
from mgm_exp.train.validation import EarlyStopping
from tests.fault_table import met

from .conftest import IMAGES, MGM, lora
from .killed import train_until_killed
from .test_loop import losses, output_bytes

MakeJob = Callable[..., TrainJob]


def validated(
    job: TrainJob, every: int = 1, *, questions: int = 4, patience: int | None = None, min_delta: float = 0.0
) -> TrainJob:
    """The job with validation on questions about the five images; "one" is right for all of them."""
    folder = job.work.parent / "demo"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for name in IMAGES:
        shutil.copyfile(MGM / "images" / f"{name}.png", folder / "images" / f"{name}.png")
        rows.append(
            {"question_id": name, "image_id": name, "question": "What?", "answers": ["one"] * 10, "question_type": "x"}
        )
    (folder / "val.json").write_text(json.dumps({"dataset_type": "val", "data": rows}), encoding="utf-8")
    config = json.loads(json.dumps(job.config))
    config["train"]["validation"] |= {"every_steps": every, "questions": questions}
    config["train"]["early_stopping"] = {"patience": patience, "min_delta": min_delta}
    return replace(job, config=config, demo=folder)


def points(job: TrainJob) -> list[tuple[int, float]]:
    return [(row["step"], row["value"]) for row in read_rows(job.metrics) if row.get("event") == "validation"]


@pytest.mark.parametrize("settings", [{}, {"adapter": lora(0.3)}, {"freeze_connector": True}], ids=str)
def test_validation_changes_no_bit_of_the_training(make_job: MakeJob, settings: dict[str, Any]) -> None:
    plain_job = make_job(name="plain", steps=4, every_steps=2, **settings)
    checked = validated(make_job(name="checked", steps=4, every_steps=2, **settings))
    run_stage(plain_job)
    before = torch.get_rng_state()
    run_stage(checked)
    assert torch.equal(torch.get_rng_state(), before)
    assert [step for step, _ in points(checked)] == [1, 2, 3], "the last step is left to the evaluation"
    assert losses(checked) == losses(plain_job)
    assert output_bytes(checked) == output_bytes(plain_job)


def test_the_scores_are_those_of_the_evaluation_on_the_same_model(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgm_exp.config import ExperimentConfig, FeatureTier
    from mgm_exp.evaluate import HeldOut, evaluate, load_benchmark
    from mgm_exp.evaluate.kept import Keeper
    from mgm_exp.model import load_model, load_processor
    from mgm_exp.model.clip import ClipTower
    from mgm_exp.train.validation import validation_benchmark

    job = validated(make_job())
    config: ExperimentConfig = job.experiment()
    model, processor = load_model(MGM / "model"), load_processor(MGM / "model", 128)
    model.config.tokenizer_model_max_length = 128

    def answers(folder: str) -> list[dict[str, Any]]:
        demo = replace(config.eval.demo, split="val")
        benchmark = load_benchmark("demo", replace(config, eval=replace(config.eval, demo=demo)), job.demo)
        evaluate(model, processor, benchmark, tmp_path / folder, model_fingerprint="m")
        return read_rows(tmp_path / folder / "predictions.jsonl")

    assert job.demo is not None
    file = job.demo / "val.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for number, row in enumerate(answers("first")):  # every second question gets the answer that the model gives
        if number % 2:
            content["data"][number]["answers"] = [row["prediction"]] * 10
    file.write_text(json.dumps(content), encoding="utf-8")
    expected = [row["score"] for row in answers("second")]
    assert set(expected) == {0.0, 1.0}
    benchmark = validation_benchmark(config, job)
    for keeps_images in (True, False):
        held_out = HeldOut(benchmark, benchmark.questions, processor, keeps_images)
        model.train()
        assert held_out.scores(model) == expected == held_out.scores(model)
        assert model.training
    paths = replace(config.paths, store=str(tmp_path / "store"))
    for tier in (FeatureTier.clip, FeatureTier.towers, FeatureTier.tokens):
        keeper = Keeper(replace(config, paths=paths, train=replace(config.train, feature_cache=tier)))
        for _ in ("made", "taken up"):
            assert HeldOut(benchmark, benchmark.questions, processor, False, keeper).scores(model) == expected
            monkeypatch.setattr(ClipTower, "forward", lambda *_: pytest.fail("what is in the store is seen again"))
        monkeypatch.undo()


def test_points_share_what_towers_see_with_other_trials_while_the_connector_trains(
    make_job: MakeJob, tmp_path: Path
) -> None:
    from mgm_exp.store import Store

    plain_job = validated(make_job(name="plain", steps=3))
    run_stage(plain_job)
    for name in ("first", "second"):
        job = validated(make_job(name=name, steps=3))
        job.config["paths"]["store"] = str(tmp_path / "store")
        job.config["train"]["feature_cache"] = "towers"
        run_stage(job)
        assert (points(job), losses(job)) == (points(plain_job), losses(plain_job))
        made = Store(tmp_path / "store").keys("image_features")
        assert len(made) == 2, "a shard of training's groups and one of evaluation's, once for both trials"


def test_a_run_that_is_told_to_stop_is_pruned_with_its_state_saved(make_job: MakeJob) -> None:
    job = validated(make_job(steps=6), 2)
    heard: list[tuple[int, float]] = []

    def answer(step: int, value: float) -> bool:
        heard.append((step, value))
        return step >= 4

    with pytest.raises(Pruned, match="after step 4 of 6"):
        run_stage(job, on_validation=answer)
    assert [step for step, _ in heard] == [2, 4]
    assert heard == points(job)
    assert sorted(path.name for path in job.checkpoints.glob("step-*"))[-1] == "step-000004"
    assert not (job.out / "summary.json").exists(), "it is not taken for a finished stage"
    undisturbed = make_job(name="undisturbed", steps=6)
    run_stage(undisturbed)
    run_stage(job)
    assert losses(job) == losses(undisturbed), "somebody who wants it after all goes on where it stopped"


def test_killed_between_two_points_it_goes_on_with_the_same_scores(make_job: MakeJob) -> None:
    whole = validated(make_job(name="whole", steps=6, every_steps=2))
    run_stage(whole)
    killed = validated(make_job(name="killed", steps=6, every_steps=2))
    train_until_killed(killed, "row written", 4)
    heard: list[int] = []
    run_stage(killed, on_validation=lambda step, value: bool(heard.append(step)))
    assert points(killed) == points(whole)
    assert losses(killed) == losses(whole)
    assert heard == [3, 4, 5], "what the checkpoint of step 2 has behind it is not validated again"


def test_early_stopping_ends_the_stage_with_a_whole_result(make_job: MakeJob) -> None:
    job = validated(make_job(steps=9, every_steps=3), 1, patience=3, min_delta=2.0)
    said: list[str] = []
    summary = run_stage(job, say=said.append)
    assert (summary.steps, summary.ended_early) == (4, True)
    assert (job.out / "adapter").is_dir()
    assert any("ends early after step 4 of 9" in line for line in said)
    again = validated(make_job(name="again", steps=9, every_steps=3), 1, patience=3, min_delta=2.0)
    train_until_killed(again, "checkpoint published", 3)
    assert run_stage(again).steps == 4, "a stage that is continued remembers how long it has waited"
    assert output_bytes(again) == output_bytes(job)


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "over_after"),
    [
        ([0.1, 0.2, 0.3], 1, 0.0, None),
        ([0.1, 0.1], 1, 0.0, 2),
        ([0.1, 0.2, 0.15, 0.18, 0.21], 3, 0.0, None),
        ([0.1, 0.2, 0.15, 0.18, 0.19], 3, 0.0, 5),
        ([0.1, 0.14, 0.19, 0.31], 2, 0.1, 3),
        ([0.1] * 50, None, 0.0, None),
    ],
)
def test_patience_counts_points_without_a_better_score(
    scores: list[float], patience: int | None, min_delta: float, over_after: int | None
) -> None:
    early, over = EarlyStopping(EarlyStoppingConfig(patience, min_delta)), None
    for number, score in enumerate(scores, 1):
        early.note(score)
        over = over or (number if early.is_over else None)
    assert over == over_after


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_two_processes_agree_and_one_parent_answers(make_job: MakeJob, zero: int) -> None:
    if zero:
        pytest.importorskip("deepspeed")
    settings: dict[str, Any] = {"steps": 5, "micro_batch": 2, "zero": zero}
    job = validated(make_job(name="pruned", devices=2, **settings), 2, questions=5)
    heard: list[tuple[int, float]] = []

    def answer(step: int, value: float) -> bool:
        heard.append((step, value))
        if not is_stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        return step == 4

    is_stopped = False
    with pytest.raises(Interrupted, match=r"SIGTERM after step [23] of 5"):
        run_stage(job, on_validation=answer)
    is_stopped = True
    with pytest.raises(Pruned, match="after step 4 of 5"):
        run_stage(job, on_validation=answer)
    assert [step for step, _ in heard] == [2, 4]
    assert heard == points(job)
    free = make_job(name="free", **settings | {"zero": 0})
    run_stage(free)
    mine, alone = ([float.fromhex(loss) for _, loss in losses(one)] for one in (job, free))
    assert mine == pytest.approx(alone[:4], rel=1e-5), "the same steps as alone and without validation"
    met("signal", 1)


def test_the_settings_of_validation_are_no_part_of_a_stage_unless_it_may_end_early(make_job: MakeJob) -> None:
    from mgm_exp import stages
    from tests.test_stages import SOURCES

    config = validated(make_job()).experiment()
    bare = make_job(name="bare").experiment()
    early = validated(make_job(name="early"), patience=2).experiment()
    sparse = validated(make_job(name="sparse"), 3, patience=2).experiment()

    def key(found: Any) -> str:
        return stages.key_of("instruct", stages.instruct_payload(found, SOURCES, "a", "c"))

    assert key(config) == key(bare)
    assert stages.config_hash(config) == stages.config_hash(bare)
    assert len({key(bare), key(early), key(sparse)}) == 3
    assert stages.config_hash(early) != stages.config_hash(sparse)
    assert plain(config) != plain(bare)
