"""Trials in a pack are what they are alone: in float64 to the last bits, in fp32 within rounding, whoever is there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mgm_exp.config import AdapterConfig, AdapterKind
from mgm_exp.errors import DataError, Interrupted, LossNotFinite, Pruned
from mgm_exp.train import TrainJob, run_stage
from mgm_exp.train.listener import Listener
from mgm_exp.train.metrics_file import read_rows
from mgm_exp.train.pack import trials as pack_trials
from mgm_exp.train.pack.trials import Pack, Trial
from mgm_exp.train.stop import StopRequest

from ..conftest import MGM, job_in

# Name -> rank, alpha, dropout, peak rate, seed: no two alike.
TRIALS: dict[str, tuple[int, float, float, float, int]] = {
    "a": (2, 4.0, 0.0, 1e-2, 3),
    "b": (4, 16.0, 0.1, 3e-3, 4),
    "c": (8, 8.0, 0.3, 1e-3, 5),
    "d": (3, 1.0, 0.05, 2e-2, 3),
}
STEPS = 6


def job_of(folder: Path, name: str, where: str, **settings: Any) -> TrainJob:
    rank, alpha, dropout, lr, seed = TRIALS[name]
    given = {
        "adapter": lora(rank, dropout, alpha),
        "lr": lr,
        "seed": seed,
        "steps": STEPS,
        "micro_batch": 2,
        "warmup_ratio": 0.2,
    }
    return job_in(folder, name=f"{where}-{name}", **{**given, **settings})


def lora(rank: int, dropout: float, alpha: float = 8.0) -> AdapterConfig:
    return AdapterConfig(f"lora_r{rank}", AdapterKind.lora, rank, alpha, dropout, ["q_proj", "v_proj", "up_proj"])


def packed(
    jobs: dict[str, TrainJob], listeners: dict[str, Listener] | None = None, **settings: Any
) -> dict[str, Trial]:
    trials = {name: Trial(job, (listeners or {}).get(name, Listener())) for name, job in jobs.items()}
    Pack(lambda line: None, **settings).train([*trials.values()], StopRequest())
    return trials


def losses(job: TrainJob) -> list[float]:
    return [row["loss"] for row in read_rows(job.metrics) if "event" not in row]


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    newest = sorted(job.checkpoints.glob("step-*"))[-1]
    return load_file(newest / "trainable.safetensors")


def farthest(a: TrainJob, b: TrainJob) -> float:
    mine, other = weights(a), weights(b)
    assert mine.keys() == other.keys()
    return max(float((mine[name].double() - other[name].double()).abs().max()) for name in mine)


@pytest.fixture(autouse=True)
def everything_goes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: whatever the lengths."""
    monkeypatch.setattr(pack_trials, "CPU_FILLED", math.inf)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All that is computed in fp32 is computed in float64, transformers' norms included."""
    from mgm_exp.train import assemble
    from mgm_exp.train.pack import base

    build = assemble.build_base

    def double(*args: Any) -> Any:
        model, report = build(*args)
        return model.double(), report

    for module in (assemble, base):
        monkeypatch.setattr(module, "build_base", double)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor.double())
    yield


def solo(folder: Path, name: str, **settings: Any) -> TrainJob:
    job = job_of(folder, name, "solo", **settings)
    run_stage(job)
    return job


def stops_after(step: int) -> Listener:
    """Prunes a trial when it has made so many steps."""

    def on_row(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Pruned("other trials do better")

    return Listener(on_row=on_row)


def test_in_float64_trials_are_what_they_are_alone(tmp_path: Path, in_float64: None) -> None:
    """Different ranks, scales, rates, dropout and orders; one is pruned in the middle, one ends early."""
    lengths = {"c": {"steps": STEPS - 2}}
    alone = {name: solo(tmp_path, name, **lengths.get(name, {})) for name in TRIALS}
    jobs = {name: job_of(tmp_path, name, "pack", **lengths.get(name, {})) for name in TRIALS}
    trials = packed(jobs, {"d": stops_after(3)})
    with pytest.raises(Pruned):
        trials["d"].result()
    assert losses(jobs["d"]) == pytest.approx(losses(alone["d"])[:3], abs=1e-12)
    for name in ("a", "b", "c"):
        assert trials[name].result().engine["name"] == "pack"
        assert len(losses(jobs[name])) == lengths.get(name, {}).get("steps", STEPS)
        assert losses(jobs[name]) == pytest.approx(losses(alone[name]), abs=1e-12)
        assert farthest(jobs[name], alone[name]) < 1e-12


@pytest.fixture(scope="module")
def in_fp32(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainJob]:
    """Two trials alone, 16 steps each."""
    folder = tmp_path_factory.mktemp("solo")
    return {name: solo(folder, name, steps=16) for name in ("b", "c")}


def test_in_fp32_losses_stay_within_rounding_over_16_steps(tmp_path: Path, in_fp32: dict[str, TrainJob]) -> None:
    """Begun in a pack, stopped, continued alone (and, for c, together again); the adapter loads with PEFT."""
    from peft import PeftModel

    from mgm_exp.model import load_model

    jobs = {name: job_of(tmp_path, name, "pack", steps=16) for name in ("b", "c")}
    heard: list[int] = []
    stop = StopRequest(lambda: len(heard) >= 10)
    trials = [Trial(job, Listener(on_row=lambda row: heard.append(row["step"]))) for job in jobs.values()]
    Pack(lambda line: None).train(trials, stop)
    for trial in trials:
        with pytest.raises(Interrupted):
            trial.result()
    steps = {name: len(losses(job)) for name, job in jobs.items()}
    assert run_stage(jobs["b"]).resumed_from == [steps["b"]]  # alone
    assert packed({"c": jobs["c"]})["c"].result().resumed_from == [steps["c"]]
    assert 4 <= min(steps.values()) <= max(steps.values()) <= 6
    for name, job in jobs.items():
        assert losses(job) == pytest.approx(losses(in_fp32[name]), abs=5e-6)
        (note,) = [row for row in read_rows(job.metrics) if row.get("event") == "resumed"]
        assert note.get("split_changed", {}) == ({"engine": ["pack", "pytorch"]} if name == "b" else {})
    PeftModel.from_pretrained(load_model(MGM / "model"), str(jobs["c"].out / "adapter"))


def test_a_trial_begun_alone_goes_on_in_a_pack(tmp_path: Path, in_fp32: dict[str, TrainJob]) -> None:
    job = job_of(tmp_path, "b", "pack", steps=16)
    with pytest.raises(Interrupted):
        run_stage(job, should_stop=lambda: len(losses(job)) >= 4)
    trials = packed({"b": job, "c": job_of(tmp_path, "c", "pack", steps=8)})
    assert trials["b"].result().resumed_from == [4]
    assert losses(job) == pytest.approx(losses(in_fp32["b"]), abs=5e-6)


def test_peers_of_the_same_sizes_change_no_bit(tmp_path: Path) -> None:
    """The same order of the same data, so that all passes have the same shapes; ranks up to the same largest one."""
    found = []
    for number, peer in enumerate(({"lr": 1e-3}, {"lr": 3e-2, "adapter": lora(8, 0.5)})):
        of_peer = job_of(tmp_path, "c", f"peer-{number}", seed=4, steps=3, **peer)
        job = job_of(tmp_path, "b", f"pack-{number}", steps=3)
        packed({"b": job, "c": of_peer})
        found.append((losses(job), {name: t.numpy().tobytes() for name, t in weights(job).items()}, losses(of_peer)))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] != found[1][2]


def test_a_trial_that_fails_takes_nobody_with_it(tmp_path: Path, in_fp32: dict[str, TrainJob]) -> None:
    """One explodes, one cannot begin."""
    no_rows = job_of(tmp_path, "d", "empty")
    no_rows = dataclasses.replace(no_rows, records=tmp_path / "none.jsonl")
    no_rows.records.write_text("")
    jobs = {
        "b": job_of(tmp_path, "b", "pack"),
        "a": job_of(tmp_path, "a", "wild", lr=1e30),
        "d": no_rows,
    }
    trials = packed(jobs)
    with pytest.raises(LossNotFinite):
        trials["a"].result()
    with pytest.raises(DataError):
        trials["d"].result()
    alone = solo(tmp_path, "b")
    assert trials["b"].result().skipped_steps == 0
    assert losses(jobs["b"]) == pytest.approx(losses(alone), abs=5e-6)


def test_when_memory_ends_fewer_share_a_pass_and_what_is_computed_again_draws_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradient checkpointing: dropout is drawn again in the backward pass."""
    from mgm_exp.train.pack.passes import Body

    def checkpointed(where: str, name: str) -> TrainJob:
        job = job_of(tmp_path, name, where, steps=3)
        model = {**job.config["model"], "gradient_checkpointing": True}
        return dataclasses.replace(job, config={**job.config, "model": model})

    alone = {name: checkpointed("solo", name) for name in ("b", "c")}
    for job in alone.values():
        run_stage(job)
    take, sizes = Body.take, list[int]()

    def small(body: Body, trials: Any, passes: Any, states: Any) -> Any:
        sizes.append(len(passes))
        if len(passes) > 2:
            raise torch.OutOfMemoryError("no more of it")
        return take(body, trials, passes, states)

    monkeypatch.setattr(Body, "take", small)
    said: list[str] = []
    jobs = {name: checkpointed("pack", name) for name in ("b", "c", "a")}
    trials = [Trial(job, Listener()) for job in jobs.values()]
    Pack(said.append).train(trials, StopRequest())
    assert sizes[:3] == [3, 2, 2]
    assert set(sizes[1:]) == {2}
    assert said == ["pack: memory is full with 3 trials at once; from here they go 2 at a time"]
    for name in alone:
        assert losses(jobs[name]) == pytest.approx(losses(alone[name]), abs=5e-6)


def test_on_a_cpu_little_is_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials whose rows are much shorter take a pass of their own, and so do large ones; on a GPU all go together."""
    monkeypatch.undo()
    sizes = [(1, 61), (1, 20), (1, 57), (1, 40), (1, 37), (4, 181), (4, 178)]

    def groups(device: str) -> list[list[tuple[int, int]]]:
        ranks = SimpleNamespace(device=torch.device(device))
        due = SimpleNamespace(engine=SimpleNamespace(ranks=ranks))
        trials: Any = [SimpleNamespace(due=due, size=size) for size in sizes]
        with monkeypatch.context() as patch:
            patch.setattr(pack_trials, "_size", lambda trial: trial.size)
            return [[trial.size for trial in group] for group in Pack()._groups(trials)]

    assert groups("cpu") == [
        [(1, 20), (1, 37), (1, 40)],
        [(1, 57), (1, 61)],
        [(4, 178)],
        [(4, 181)],
    ]
    assert groups("cuda") == [sorted(sizes)[:5], sorted(sizes)[5:]]
