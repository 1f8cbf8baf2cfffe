"""One process trains the real, tiny MGM: it survives every kind of end, and says what it skipped."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mgm_exp.config import LossNorm
from mgm_exp.errors import Interrupted, TrainingFailed
from mgm_exp.train import StageSummary, TrainJob, run_stage
from mgm_exp.train.metrics_file import read_rows
from tests.fault_table import met

from .conftest import MGM, full, job_in, lora
from .killed import train_until_killed
from .poison import poison_pixels

MakeJob = Callable[..., TrainJob]


def losses(job: TrainJob) -> list[tuple[int, str]]:
    """(step, loss to the last bit) of every optimizer step."""
    return [(row["step"], float(row["loss"]).hex()) for row in read_rows(job.metrics) if "event" not in row]


def events(job: TrainJob) -> list[tuple[str, int]]:
    return [(row["event"], row["step"]) for row in read_rows(job.metrics) if "event" in row]


def output_bytes(job: TrainJob) -> dict[str, bytes]:
    """Every tensor file that the stage left, and the last checkpoint's state of optimizer and generators."""
    newest = sorted(job.checkpoints.glob("step-*"))[-1]
    files = [*job.out.rglob("*.safetensors"), *newest.glob("*.safetensors"), *newest.glob("rng-*.json")]
    return {path.relative_to(job.work).as_posix(): path.read_bytes() for path in files}


# -- what a stage leaves ------------------------------------------------------------------------------------------


def test_align_trains_the_connector_and_leaves_it_under_official_names(make_job: MakeJob) -> None:
    from safetensors.torch import load_file

    from mgm_exp.model.trainable import connector_names

    job = make_job("align", steps=2)
    heard: dict[str, Any] = {"rows": []}
    summary = run_stage(
        job,
        on_start=lambda total, rows: heard.update(total=total, before=rows),
        on_row=heard["rows"].append,
        say=lambda text: heard.update(said=heard.get("said", "") + text),
    )
    assert set(load_file(job.out / "connector.safetensors")) == connector_names()
    assert (heard["total"], heard["before"]) == (2, [])
    assert heard["rows"] == read_rows(job.metrics) == read_rows(job.out / "metrics.jsonl")
    assert set(heard["rows"][0]) == {
        "stage", "step", "epoch", "loss", "lr", "grad_norm", "batch_name", "tokens", "tokens_per_s", "samples_per_s",
        "seconds", "data_wait_s", "peak_memory_gib",
    }  # fmt: skip
    assert "trains 11,536 parameters in 16 tensors" in heard["said"]
    assert "verified" in heard["said"]
    assert summary.to_dict() == json.loads((job.out / "summary.json").read_text())
    assert summary.trainable["verified"]["is_complete"]
    assert summary.trainable["n_total"] == summary.trainable["n_other"] == 11_536
    assert summary.n_train == 14
    assert summary.tokens == heard["rows"][-1]["tokens"] > 0
    assert 0 < summary.peak_memory_gib < 20


def test_instruct_leaves_an_adapter_that_gives_the_trained_loss_again(make_job: MakeJob) -> None:
    from mgm_exp.model import load_adapter, load_model

    job = make_job(steps=3, lr=3e-2)
    summary = run_stage(job)
    model = load_model(MGM / "model")
    base = model_loss(job, model)
    trained = model_loss(job, load_adapter(model, job.out / "adapter"))
    assert trained < base - 0.3
    assert summary.final_loss is not None
    assert summary.trainable["n_lora"] == 3840


def test_full_fine_tuning_leaves_a_whole_model(make_job: MakeJob) -> None:
    from mgm_exp.model import load_model

    job = make_job(steps=2, adapter=full())
    run_stage(job)
    assert model_loss(job, load_model(job.out / "model")) < model_loss(job, load_model(MGM / "model")) - 0.3


def model_loss(job: TrainJob, model: Any) -> float:
    """Mean loss over the first samples, without dropout."""
    from mgm_exp.data import collate
    from mgm_exp.model import load_processor
    from mgm_exp.train.assemble import open_dataset
    from mgm_exp.train.job import stage_settings

    config = job.experiment()
    settings = stage_settings(config, job.stage)
    processor = load_processor(MGM / "model", settings.max_length)
    dataset = open_dataset(job, config, settings, processor)
    model.config.tokenizer_model_max_length = settings.max_length
    with torch.no_grad():
        return float(model.loss(collate([dataset[i] for i in range(4)], processor.pad_token_id)))


# -- the loss is that of the global batch -------------------------------------------------------------------------


def test_the_split_of_the_global_batch_does_not_change_the_steps(make_job: MakeJob) -> None:
    runs = {}
    for micro in (1, 2, 4):
        job = make_job(name=f"micro-{micro}", steps=4, micro_batch=micro)
        run_stage(job)
        runs[micro] = [(row["loss"], row["grad_norm"], row["tokens"]) for row in read_rows(job.metrics)]
    for micro in (2, 4):
        assert runs[micro] == [pytest.approx(row, rel=1e-5) for row in runs[1]]


def test_the_official_norm_is_the_mean_of_micro_batch_means(make_job: MakeJob) -> None:
    from mgm_exp.config import Device
    from mgm_exp.model import build_model
    from mgm_exp.train.assemble import open_dataset, open_plan
    from mgm_exp.train.job import stage_settings
    from mgm_exp.train.ranks import Ranks

    official = make_job(name="official", steps=1, micro_batch=2, loss_norm=LossNorm.official)
    by_tokens = make_job(name="tokens", steps=1, micro_batch=2)
    run_stage(official)
    run_stage(by_tokens)

    from mgm_exp.data import collate
    from mgm_exp.model import load_processor

    config = official.experiment()
    settings = stage_settings(config, "instruct")
    processor = load_processor(MGM / "model", settings.max_length)
    dataset = open_dataset(official, config, settings, processor)
    model, _ = build_model(config.model)
    model.config.tokenizer_model_max_length = settings.max_length
    plan = open_plan(dataset, settings, Ranks.alone(Device.cpu))
    sums, counts = [], []
    with torch.no_grad():
        for indices in plan.step(0):
            batch = collate([dataset[i] for i in indices], processor.pad_token_id)
            sums.append(float(model.loss(batch, 1.0)))
            counts.append(sums[-1] / float(model.loss(batch)))
    assert counts[0] != pytest.approx(counts[1]), "equal counts would not tell the two norms apart"
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    assert read_rows(official.metrics)[0]["loss"] == pytest.approx(sum(means) / 2, rel=1e-5)
    assert read_rows(by_tokens.metrics)[0]["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)


def test_bf16_learns(make_job: MakeJob) -> None:
    from mgm_exp.config import Precision

    job = make_job(steps=3, precision=Precision.bf16)
    summary = run_stage(job)
    rows = read_rows(job.metrics)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert summary.engine["dtype"] == "bfloat16"
    assert summary.trainable["verified"]["is_complete"]


def test_an_aligned_connector_keeps_every_bit_in_half_precision(make_job: MakeJob) -> None:
    from safetensors.torch import load_file

    from mgm_exp.config import Device, Precision
    from mgm_exp.train.assemble import assemble
    from mgm_exp.train.ranks import Ranks

    align = make_job("align", name="align", steps=1)
    run_stage(align)
    aligned = load_file(align.out / "connector.safetensors")
    assert any(not tensor.bfloat16().float().equal(tensor) for tensor in aligned.values())
    job = dataclasses.replace(make_job(precision=Precision.bf16), connector=align.out / "connector.safetensors")
    stage = assemble(job, Ranks.alone(Device.cpu), lambda text: None)
    assert all(stage.engine.trainable[name].equal(tensor) for name, tensor in aligned.items())
    assert stage.model.model.embed_tokens.weight.dtype is torch.bfloat16


# -- interruptions ------------------------------------------------------------------------------------------------

DROPOUT: dict[str, Any] = {"steps": 6, "every_steps": 2, "keep": 2, "warmup_ratio": 0.2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    job = job_in(tmp_path_factory.mktemp("undisturbed"), adapter=lora(dropout=0.1), **DROPOUT)
    run_stage(job)
    return job


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        pytest.param("row written", 1, marks=pytest.mark.slow),
        ("row written", 4),
        ("tensors written", 4),
        ("all files written", 2),
        ("checkpoint published", 4),
        pytest.param("checkpoint published", 6, marks=pytest.mark.slow),
    ],
)
def test_resume_continues_bit_exact_after_kill(
    undisturbed: TrainJob, make_job: MakeJob, moment: str, step: int
) -> None:
    job = make_job(name="killed", adapter=lora(dropout=0.1), **DROPOUT)
    train_until_killed(job, moment, step)
    summary = run_stage(job)
    expected = step if moment == "checkpoint published" else (step - 1) // 2 * 2
    assert summary.resumed_from == ([expected] if expected else [])
    assert losses(job) == losses(undisturbed)
    assert output_bytes(job) == output_bytes(undisturbed)
    assert not list(job.checkpoints.glob("*.tmp"))
    met("kill: training", 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_resume_continues_bit_exact_after_many_random_kills(
    undisturbed: TrainJob, make_job: MakeJob, seed: int
) -> None:
    draw = random.Random(seed)
    job = make_job(name="killed", adapter=lora(dropout=0.1), **DROPOUT)
    done = kills = 0
    while done < 6:
        step = draw.randint(done + 1, 6)
        moment = draw.choice(["row written", "all files written", "checkpoint published"])
        if moment != "row written":
            step += step % 2
        train_until_killed(job, moment, step)
        kills += 1
        done = step if moment == "checkpoint published" else (step - 1) // 2 * 2
        if draw.random() < 0.3:
            break
    run_stage(job)
    assert losses(job) == losses(undisturbed)
    assert output_bytes(job) == output_bytes(undisturbed)
    met("kill: training", kills)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_the_same_call_continues(
    undisturbed: TrainJob, make_job: MakeJob, number: signal.Signals
) -> None:
    job = make_job(name="stopped", adapter=lora(dropout=0.1), **DROPOUT)
    with pytest.raises(Interrupted, match=rf"{number.name} after step 3 of 6"):
        run_stage(job, on_row=lambda row: row["step"] == 3 and os.kill(os.getpid(), number))
    assert [path.name for path in sorted(job.checkpoints.iterdir())] == ["step-000002", "step-000003"]
    assert run_stage(job).resumed_from == [3]
    assert losses(job) == losses(undisturbed)
    assert events(job) == [("resumed", 3)]
    met("signal", 1)


def test_a_request_to_stop_before_the_first_step_leaves_nothing_behind(make_job: MakeJob) -> None:
    job = make_job(steps=2)
    with pytest.raises(Interrupted, match="after step 0 of 2"):
        run_stage(job, should_stop=lambda: True)
    assert list(job.checkpoints.iterdir()) == []


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_continues(make_job: MakeJob) -> None:
    job = make_job(adapter=lora(dropout=0.1), **DROPOUT)
    run_stage(job)
    expected, files = losses(job), output_bytes(job)
    broken = job.checkpoints / "step-000006" / "optimizer.safetensors"
    raw = bytearray(broken.read_bytes())
    raw[-5] ^= 16
    broken.write_bytes(raw)
    said: list[str] = []
    summary = run_stage(job, say=said.append)
    assert summary.resumed_from == [4]
    assert any("step-000006" in line and "optimizer.safetensors" in line for line in said)
    assert ("damaged_checkpoint", 4) in events(job)
    assert losses(job) == expected
    assert output_bytes(job) == files
    met("damage", 1)


def test_a_finished_stage_is_not_trained_again(make_job: MakeJob) -> None:
    job = make_job(steps=2)
    run_stage(job)
    shutil.rmtree(job.out)
    rows: list[dict[str, Any]] = []
    summary = run_stage(job, on_row=rows.append)
    assert [row["event"] for row in rows] == ["resumed"]
    assert summary.steps == 2
    assert (job.out / "adapter" / "adapter_model.safetensors").exists()


# -- steps without an update --------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing_and_names_its_samples(make_job: MakeJob) -> None:
    job = make_job(steps=5, every_steps=1, keep=9)
    rows: list[dict[str, Any]] = []
    with poison_pixels(["sample-3"]):
        summary = run_stage(job, on_row=rows.append)
    bad = [row for row in rows if "event" in row]
    assert bad
    assert all(row["event"] == "not_finite" and "sample-3" in row["sample_ids"] for row in bad)
    assert all(len(row["sample_ids"]) == 4 and row["loss"] is None for row in bad)
    assert summary.skipped_steps == len(bad)
    assert all("event" in row or row["loss"] is not None for row in rows)
    step = bad[0]["step"]
    before, after = (job.checkpoints / f"step-{n:06d}" / "trainable.safetensors" for n in (step - 1, step))
    if before.exists():
        assert before.read_bytes() == after.read_bytes()
    assert read_rows(job.metrics) == rows
    met("not finite", len(bad))


def test_three_such_steps_in_a_row_end_the_stage_with_advice(make_job: MakeJob) -> None:
    job = make_job(steps=6)
    everything = [f"sample-{i}" for i in range(14)]
    with (
        poison_pixels(everything),
        pytest.raises(TrainingFailed, match=r"not finite in 3 steps in a row.*sample-\d+.*learning rate"),
    ):
        run_stage(job)
    assert [row["step"] for row in read_rows(job.metrics)] == [1, 2, 3]
    met("not finite", 3)


def test_a_batch_with_nothing_to_learn_is_skipped_and_named(make_job: MakeJob) -> None:
    job = make_job(steps=3, global_batch=1, micro_batch=1, n_records=3, max_length=64)
    rows = [json.loads(line) for line in job.records.read_text().splitlines()]
    rows[1]["conversations"][0]["value"] = "<image>\n" + "What? " * 100
    job.records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run_stage(job)
    skipped = [row for row in read_rows(job.metrics) if "event" in row]
    assert [(row["event"], row["sample_ids"]) for row in skipped] == [("nothing_to_learn", ["sample-1"])]
    assert (summary.steps, summary.skipped_steps) == (3, 1)


def test_summary_is_plain_data() -> None:
    fields = StageSummary.__dataclass_fields__
    assert {"steps", "tokens", "seconds", "train_tokens_per_s", "samples_per_s", "peak_memory_gib", "final_loss",
            "trainable", "engine", "resumed_from", "n_train"} <= set(fields)  # fmt: skip


def test_waiting_for_data_is_counted_and_said(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from mgm_exp.data import ImageTextDataset

    read = ImageTextDataset.__getitem__

    def slowly(dataset: ImageTextDataset, i: int) -> dict[str, Any]:
        time.sleep(0.05)
        return read(dataset, i)

    monkeypatch.setattr(ImageTextDataset, "__getitem__", slowly)
    monkeypatch.setattr("mgm_exp.train.loop.MUCH_WAITING", (0.0, 0.4))
    job = make_job("align", steps=2)
    said: list[str] = []
    summary = run_stage(job, say=said.append)
    assert all(row["data_wait_s"] >= 0.2 for row in read_rows(job.metrics)), "four samples a step"
    assert 0 < summary.data_wait_share < 1
    assert any("of the time went by waiting for data" in text for text in said)
