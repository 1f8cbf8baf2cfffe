"""Trouble in a real stage: named, acted upon by policy, and the same to the last bit wherever it is killed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mgm_exp.config import GuardAction, GuardsConfig
from mgm_exp.errors import LossNotFinite, OutOfMemory, TrainingFailed
from mgm_exp.train import TrainJob, run_stage
from mgm_exp.train.metrics_file import read_rows
from tests.fault_table import met

from .conftest import job_in, lora
from .poison import loud
from .test_loop import losses, output_bytes

MakeJob = Callable[..., TrainJob]

# Every sample comes once in 40 steps.
SHORT: dict[str, Any] = {
    "steps": 22,
    "global_batch": 2,
    "micro_batch": 2,
    "n_records": 80,
    "every_steps": 5,
    "lr": 2e-3,
    "adapter": lora(dropout=0.1),
}


def guards(**settings: Any) -> GuardsConfig:
    return GuardsConfig(window=24, threshold=20.0, **settings)


def trouble_rows(job: TrainJob) -> list[dict[str, Any]]:
    return [row for row in read_rows(job.metrics) if "reason" in row]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    job = job_in(tmp_path_factory.mktemp("clean"), guards=guards(), statistics_every=10, **SHORT)
    run_stage(job)
    return job


@pytest.fixture(scope="module")
def victim(clean: TrainJob) -> list[str]:
    """The samples of step 18."""
    return _ids(clean, 17)


def _ids(job: TrainJob, *steps: int) -> list[str]:
    """The samples of these steps, from 0."""
    from mgm_exp.config import Device
    from mgm_exp.train.assemble import assemble
    from mgm_exp.train.ranks import Ranks

    stage = assemble(job, Ranks.alone(Device.cpu), lambda text: None)
    return [name for step in steps for name in stage.ids_of(step)]


def test_a_clean_run_has_no_trouble_and_gradients_by_layer(clean: TrainJob) -> None:
    assert trouble_rows(clean) == []
    rows = [row for row in read_rows(clean.metrics) if row.get("event") == "gradient_statistics"]
    assert [row["step"] for row in rows] == [10, 20]
    groups = rows[0]["groups"]
    assert {"layers.0.lora_A", "layers.1.lora_B", "mm_projector", "vlm_uni_query_projector"} <= set(groups)
    total = sum(group["norm"] ** 2 for group in groups.values()) ** 0.5
    step = next(row for row in read_rows(clean.metrics) if row["step"] == 10 and "event" not in row)
    assert total == pytest.approx(step["grad_norm"], rel=1e-4)


def test_a_spike_is_named_and_changes_nothing_by_itself(clean: TrainJob, make_job: MakeJob, victim: list[str]) -> None:
    job = make_job(guards=guards(), **SHORT)
    with loud(victim):
        summary = run_stage(job)
    (row,) = trouble_rows(job)
    assert (row["event"], row["step"], row["action"], row["batch"]) == ("spike", 18, "warn", 17)
    assert row["sample_ids"] == victim
    assert "robust standard deviations" in row["detail"]
    assert losses(job)[:17] == losses(clean)[:17]
    assert summary.guards["found"] == {"spike": 1}
    assert summary.skipped_steps == 0
    met("spike", 1)


def test_a_skipped_spike_leaves_the_weights_alone(make_job: MakeJob, victim: list[str]) -> None:
    job = make_job(guards=guards(on_spike=GuardAction.skip), **SHORT | {"every_steps": 1, "keep": 22})
    with loud(victim):
        summary = run_stage(job)
    (row,) = trouble_rows(job)
    assert (row["event"], row["step"], row["action"]) == ("spike", 18, "skip")
    before, after = (job.checkpoints / f"step-{n:06d}" / "trainable.safetensors" for n in (17, 18))
    assert before.read_bytes() == after.read_bytes()
    assert (summary.steps, summary.skipped_steps, summary.guards["actions"]) == (22, 1, 1)
    met("spike", 1)


def test_a_lowered_rate_stays_lowered(clean: TrainJob, make_job: MakeJob, victim: list[str]) -> None:
    job = make_job(guards=guards(on_spike=GuardAction.lower_lr, lr_factor=0.25), **SHORT)
    with loud(victim):
        run_stage(job)
    rates = [{row["step"]: row["lr"] for row in read_rows(j.metrics) if "event" not in row} for j in (clean, job)]
    assert [rates[1][n] / rates[0][n] for n in (17, 18, 19, 21)] == [1.0, 1.0, 0.25, 0.25]
    assert trouble_rows(job)[0]["action"] == "lower_lr"
    met("spike", 1)


def test_stop_ends_the_stage_with_the_samples_and_keeps_the_last_good_state(
    make_job: MakeJob, victim: list[str]
) -> None:
    job = make_job(guards=guards(on_spike=GuardAction.stop), **SHORT)
    with loud(victim), pytest.raises(LossNotFinite, match=rf"spike at step 18: loss.*{victim[0]}.*learning rate"):
        run_stage(job)
    assert sorted(path.name for path in job.checkpoints.iterdir())[-1] == "step-000015"
    assert trouble_rows(job)[0]["action"] == "stop"
    met("spike", 1)


ROLLBACK = guards(on_spike=GuardAction.rollback)


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory, victim: list[str]) -> TrainJob:
    job = job_in(tmp_path_factory.mktemp("rolled"), guards=ROLLBACK, **SHORT)
    with loud(victim):
        summary = run_stage(job)
    assert summary.guards["rollbacks"] == 1
    return job


def test_a_roll_back_leaves_out_the_batches_since_the_checkpoint(
    clean: TrainJob, rolled_back: TrainJob, victim: list[str]
) -> None:
    (row,) = trouble_rows(rolled_back)
    assert (row["event"], row["step"], row["from_step"], row["reason"]) == ("rollback", 15, 18, "spike")
    assert row["sample_ids"] == victim
    assert losses(rolled_back)[:15] == losses(clean)[:15]
    assert [step for step, _ in losses(rolled_back)] == list(range(1, 23))
    rows = [row for row in read_rows(rolled_back.metrics) if "event" not in row]
    assert rows[15]["epoch"] == pytest.approx((16 + 3) * 2 / 80)
    assert not [row for row in rows if row["loss"] > 100]
    state = json.loads((rolled_back.checkpoints / "step-000022" / "state.json").read_text())
    assert state["progress"]["guards"]["batches_skipped"] == 3
    met("spike", 1)


class Killed(BaseException):
    """Ends a stage at once, as SIGKILL does, but for what Python itself does on the way out (nothing here)."""


@pytest.mark.parametrize(
    "moment", ["row written", *(pytest.param(moment, marks=pytest.mark.slow) for moment in ("saved", "later"))]
)
def test_a_roll_back_that_is_killed_happens_again_to_the_last_bit(
    rolled_back: TrainJob, make_job: MakeJob, victim: list[str], moment: str
) -> None:
    job = make_job(guards=ROLLBACK, **SHORT)
    rows: list[dict[str, Any]] = []

    def on_row(row: dict[str, Any]) -> None:
        rows.append(row)
        is_rolled = any(row.get("event") == "rollback" for row in rows)
        if moment == "row written" and row.get("event") == "rollback":
            raise Killed
        if moment == "later" and is_rolled and row["step"] == 17:
            raise Killed

    def on_checkpoint(folder: Path) -> None:
        if moment == "saved" and any(row.get("event") == "rollback" for row in rows):
            raise Killed

    with loud(victim):
        with pytest.raises(Killed):
            run_stage(job, on_row=on_row, on_checkpoint=on_checkpoint)
        run_stage(job)
    assert losses(job) == losses(rolled_back)
    assert output_bytes(job) == output_bytes(rolled_back)
    assert [row["event"] for row in trouble_rows(job)] == ["rollback"]
    met("spike", 1)


def test_a_roll_back_without_a_checkpoint_that_old_says_so(make_job: MakeJob, clean: TrainJob) -> None:
    settings = SHORT | {"every_steps": 1, "keep": 1}
    job = make_job(guards=guards(on_spike=GuardAction.rollback, patience=2), **settings)
    with loud(_ids(clean, 17, 18)), pytest.raises(TrainingFailed, match=r"no checkpoint from step 17"):
        run_stage(job)


# -- a state that is not worth keeping ---------------------------------------------------------------------------------


def test_a_checkpoint_is_never_overwritten_by_a_poisoned_state(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgm_exp.train import loop

    stages: list[Any] = []
    assemble = loop.assemble
    monkeypatch.setattr(loop, "assemble", lambda *args: stages.append(assemble(*args)) or stages[-1])
    job = make_job(steps=4, every_steps=1)

    def poison(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            next(iter(stages[0].engine.trainable.values())).data.view(-1)[0] = float("inf")

    with pytest.raises(LossNotFinite, match=r"not finite after step 3.*last good checkpoint stays"):
        run_stage(job, on_row=poison)
    assert sorted(path.name for path in job.checkpoints.iterdir())[-1] == "step-000002"
    met("poisoned state", 1)


# -- memory ends -------------------------------------------------------------------------------------------------------


def memory_for(samples: int) -> Callable[..., Any]:
    """``PlainEngine.accumulate`` on a GPU that has memory for so many samples at once."""
    from mgm_exp.train.engine import PlainEngine

    accumulate = PlainEngine.accumulate

    @functools.wraps(accumulate)
    def limited(self: PlainEngine, batch: Any, normalizer: float, *, last: bool) -> Any:
        if len(batch["ids"]) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return accumulate(self, batch, normalizer, last=last)

    return limited


def test_a_micro_batch_that_does_not_fit_is_halved_until_it_does(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgm_exp.train.engine import PlainEngine

    small = make_job(name="small", steps=3, global_batch=4, micro_batch=1)
    run_stage(small)
    monkeypatch.setattr(PlainEngine, "accumulate", memory_for(1))
    job = make_job(steps=3, global_batch=4, micro_batch=4, auto_micro_batch=True)
    said: list[str] = []
    run_stage(job, say=said.append)
    assert losses(job) == losses(small)
    assert output_bytes(job) == output_bytes(small)
    assert [line.split("micro-batches of ")[2].split()[0] for line in said if "It goes on" in line] == ["2", "1"]
    assert json.loads((job.work / "micro_batch.json").read_text())["micro_batch_size"] == 1
    assert "CUDA out of memory" in (job.work / "out_of_memory-0.txt").read_text()
    met("memory", 2)


def test_memory_that_ends_without_leave_to_shrink_is_an_error_with_advice(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgm_exp.record import explain
    from mgm_exp.train.engine import PlainEngine

    job = make_job(steps=3, micro_batch=2)
    done: list[int] = []
    with pytest.raises(OutOfMemory, match="auto_micro_batch") as caught:

        def on_row(row: dict[str, Any]) -> None:
            done.append(row["step"])
            monkeypatch.setattr(PlainEngine, "accumulate", memory_for(1))

        run_stage(job, on_row=on_row)
    assert done == [1]
    assert [path.name for path in job.checkpoints.iterdir()] == ["step-000001"], "nothing is lost"
    assert explain(caught.value)["cause"] == "the GPU's memory is full"
    met("memory", 1)


# -- read late, as on a GPU --------------------------------------------------------------------------------------------


def test_steps_that_are_read_late_are_the_same_steps(
    make_job: MakeJob, victim: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgm_exp.train import loop
    from mgm_exp.train.engine import PlainEngine

    original = PlainEngine.__init__
    monkeypatch.setattr(PlainEngine, "__init__", functools.partialmethod(original, on_device=True))
    late = []
    real_read = loop._Run._read
    monkeypatch.setattr(loop._Run, "_read", lambda run, keep: late.append(len(run.launched)) or real_read(run, keep))
    jobs = {name: make_job(name=name, guards=ROLLBACK, **SHORT) for name in ("late", "early")}
    with loud(victim):
        run_stage(jobs["late"])
        assert max(late) == 2, "one was launched before the other was read"
        monkeypatch.setattr(PlainEngine, "reads_late", False)
        run_stage(jobs["early"])
    assert losses(jobs["late"]) == losses(jobs["early"])
    assert [row["event"] for row in trouble_rows(jobs["late"])] == ["rollback"]
    assert output_bytes(jobs["late"]) == output_bytes(jobs["early"])


@pytest.mark.slow
def test_a_stage_that_saves_in_the_background_is_the_same_stage(clean: TrainJob, make_job: MakeJob) -> None:
    job = make_job(guards=guards(), background=True, **SHORT | {"every_steps": 2})
    folders: list[str] = []
    run_stage(job, on_checkpoint=lambda folder: folders.append(folder.name))
    assert folders == [f"step-{step:06d}" for step in range(2, 23, 2)]
    assert losses(job) == losses(clean)
    assert output_bytes(job) == output_bytes(clean)
