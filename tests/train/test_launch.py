"""Several real processes, real DeepSpeed: the same steps for any engine, and no process is lost without a word."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.config import GuardAction, GuardsConfig, Offload, Precision
from mgm_exp.errors import DataError, Interrupted, MissingDependencyError, ProcessKilled
from mgm_exp.store import Store
from mgm_exp.train import TrainJob, run_stage
from mgm_exp.train.launch import threads_each
from mgm_exp.train.launch_folder import LaunchFolder
from mgm_exp.train.metrics_file import read_rows
from tests.fault_table import met

from .conftest import experiment, full, job_in, lora, write_records
from .killed import train_until_killed
from .test_adapter_training import KINDS as ADAPTERS

MakeJob = Callable[..., TrainJob]
pytestmark = pytest.mark.timeout(900)


def train_together(folder: Path, jobs: dict[str, TrainJob], poisoned: dict[str, str] | None = None) -> None:
    """Trains the jobs in one group of two processes, one after the other."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from mgm_exp.train.launch import _environment, worker_environment
    from mgm_exp.train.machines import cluster_of

    # ZeRO-3 replaces torch's linear for the rest of the process, which may change last bits: it comes last
    in_order = sorted(jobs, key=lambda name: jobs[name].config["zero"]["stage"])
    for number, name in enumerate(in_order):
        (folder / f"{number:02}.job.json").write_text(jobs[name].to_json())
        (folder / f"{number:02}.job.json.poison").write_text((poisoned or {}).get(name, ""))
        (folder / f"{number:02}.job.json.loud").write_text("sample-3" if name.startswith("loud") else "")
        if name == "out-of-step":
            (folder / f"{number:02}.job.json.others").write_text(str(folder / "others.jsonl"))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="tests",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=5,
    )
    script = str(Path(__file__).with_name("group_worker.py"))
    # In a thread: in the main one the launcher would install signal handlers for good
    variables = worker_environment(experiment(devices=2), cluster_of(experiment(devices=2)))
    with _environment(variables), ThreadPoolExecutor(1) as pool:
        pool.submit(elastic_launch(settings, sys.executable), script, str(folder)).result()


def steps_of(job: TrainJob) -> list[tuple[float, float, int]]:
    return [(row["loss"], row["grad_norm"], row["tokens"]) for row in read_rows(job.metrics) if "event" not in row]


def weights_of(job: TrainJob) -> dict[str, bytes]:
    return {path.relative_to(job.out).as_posix(): path.read_bytes() for path in job.out.rglob("*.safetensors")}


# -- one recipe, the same steps -----------------------------------------------------------------------------------


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": lora(), "steps": 4},
    "full": {"adapter": full(), "steps": 4, "lr": 1e-3},
    "align": {"stage": "align", "steps": 3},
    "dropout": {"adapter": lora(dropout=0.2), "steps": 3},
    "adalora": {"adapter": ADAPTERS["adalora"], "steps": 3},
    "bottleneck": {"adapter": ADAPTERS["bottleneck"], "steps": 3},
}
# Global batch 4: one process x 4 micro-batches, two processes x 2
IN_TWO_PROCESSES: dict[str, dict[str, Any]] = {
    "lora-none": {},
    "full-none": {},
    "full-zero2offload": {"zero": 2, "offload": Offload.cpu},
    "full-zero3": {"zero": 3},
    "align-zero3": {"zero": 3},
    "dropout-zero2": {"zero": 2},
    "adalora-none": {},
}
# LoRA under ZeRO-3 is also the story of the processes that are killed.
MORE_IN_TWO_PROCESSES: dict[str, dict[str, Any]] = {
    "lora-zero2": {"zero": 2},
    "lora-zero3": {"zero": 3},
    "bottleneck-zero3": {"zero": 3},
}
# sample-3 comes when there is something to compare it with: of 40 samples each comes once in 20 steps
LOUD: dict[str, Any] = {
    "steps": 20,
    "global_batch": 2,
    "n_records": 40,
    "every_steps": 4,
    "seed": 5,
    "lr": 2e-3,
    "guards": GuardsConfig(on_spike=GuardAction.rollback, window=16, threshold=20.0),
}
# Enough steps that a process is still at work when its starter has heard of a row and acts on it
STORY: dict[str, Any] = {"steps": 10, "every_steps": 2, "devices": 2, "adapter": lora(dropout=0.1)}


@pytest.fixture(scope="session")
def trained_together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, TrainJob]]:
    """Jobs that were trained in one group of two processes, once for all processes of the test run."""
    with shared_folder(tmp_path_factory, "trained-together") as folder:
        jobs = in_two_processes(folder, IN_TWO_PROCESSES)
        jobs["out-of-step"] = job_in(folder, name="out-of-step", devices=2, steps=3)
        write_records(folder / "others.jsonl", 13)
        jobs["undisturbed-zero3"] = job_in(folder, name="undisturbed-zero3", zero=3, **STORY)
        for zero in (0, 2, 3):
            jobs[f"poison-zero{zero}"] = job_in(folder, name=f"poison-zero{zero}", devices=2, steps=4, zero=zero)
        jobs["loud-zero0"] = job_in(folder / "loud", name="zero0", devices=2, **LOUD)
        train_once(folder, jobs)
    return folder, jobs


@pytest.fixture(scope="session")
def more_trained_together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainJob]:
    """Another group, of what takes longer."""
    with shared_folder(tmp_path_factory, "more-trained-together") as folder:
        jobs = in_two_processes(folder, MORE_IN_TWO_PROCESSES)
        for zero in (2, 3):
            bf16 = {"zero": zero, "precision": Precision.bf16, "steps": 3, "devices": 2}
            jobs[f"bf16-zero{zero}"] = job_in(folder, name=f"bf16-zero{zero}", **bf16)
        jobs["loud-zero3"] = job_in(folder / "loud", name="zero3", devices=2, zero=3, **LOUD)
        train_once(folder, jobs)
    return jobs


@contextmanager
def shared_folder(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """The same for all processes of the test run, one of them at a time."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    (folder / "loud").mkdir(parents=True, exist_ok=True)  # rows of their own
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def in_two_processes(folder: Path, engines: dict[str, dict[str, Any]]) -> dict[str, TrainJob]:
    return {
        name: job_in(folder, name=name, devices=2, **KINDS[name.split("-")[0]], **engine)
        for name, engine in engines.items()
    }


def train_once(folder: Path, jobs: dict[str, TrainJob]) -> None:
    if (folder / "done").exists():
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
        train_together(folder, jobs, {name: "sample-3" for name in jobs if name.startswith("poison")})
    (folder / "done").touch()


def assert_as_alone(
    jobs: dict[str, TrainJob], names: Iterable[str], folder: Path, subtests: pytest.Subtests
) -> dict[str, TrainJob]:
    """The steps of each are those of one process; returns the jobs of that."""
    kinds = {name.split("-")[0] for name in names}
    alone = {kind: job_in(folder, name=kind, **KINDS[kind]) for kind in sorted(kinds)}
    for job in alone.values():
        run_stage(job)
    for name in names:
        with subtests.test(name):
            expected = steps_of(alone[name.split("-")[0]])
            assert len(expected) >= 3
            assert steps_of(jobs[name]) == [pytest.approx(step, rel=1e-5) for step in expected]
    return alone


def test_engines_and_process_counts_agree_on_every_step(
    trained_together: tuple[Path, dict[str, TrainJob]], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    folder, jobs = trained_together
    alone = assert_as_alone(jobs, IN_TWO_PROCESSES, tmp_path, subtests)
    for name in ("full-zero3", "align-zero3"):
        with subtests.test(f"{name} leaves whole tensors"):
            assert_close_weights(jobs[name], alone[name.split("-")[0]])
    with subtests.test("nothing is compiled"):
        assert not [path for path in (folder / "extensions").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_more_engines_and_precisions_agree_on_every_step(
    more_trained_together: dict[str, TrainJob], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    jobs = more_trained_together
    alone = assert_as_alone(jobs, MORE_IN_TWO_PROCESSES, tmp_path, subtests)
    with subtests.test("lora-zero3 leaves whole tensors"):
        assert_close_weights(jobs["lora-zero3"], alone["lora"])
    with subtests.test("bf16 under ZeRO-2 and ZeRO-3"):
        a, b = (steps_of(jobs[f"bf16-zero{zero}"]) for zero in (2, 3))
        assert a[-1][0] < a[0][0]
        assert [loss for loss, *_ in a] == pytest.approx([loss for loss, *_ in b], rel=1e-3)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_all_processes_skip_a_step_that_is_not_finite_on_one(
    trained_together: tuple[Path, dict[str, TrainJob]], zero: int
) -> None:
    rows, plain = (read_rows(trained_together[1][f"poison-zero{stage}"].metrics) for stage in (zero, 0))
    skipped = [row for row in rows if "event" in row]
    assert skipped
    assert all(row["event"] == "not_finite" and "sample-3" in row["sample_ids"] for row in skipped)
    assert all(len(row["sample_ids"]) == 4 for row in skipped), "the samples of both processes are named"
    assert [row["step"] for row in skipped] == [row["step"] for row in plain if "event" in row]
    losses = [row["loss"] for row in rows if "event" not in row]
    assert losses
    assert losses == pytest.approx([row["loss"] for row in plain if "event" not in row], rel=1e-5)
    met("not finite", len(skipped))


def assert_rolled_back(job: TrainJob) -> None:
    rows = read_rows(job.metrics)
    (back,) = [row for row in rows if "event" in row]
    assert (back["event"], back["reason"]) == ("rollback", "spike")
    assert "sample-3" in back["sample_ids"]
    losses = [row["loss"] for row in rows if "event" not in row]
    assert len(losses) == 20
    assert max(losses) < 100
    met("spike", 1)


def test_all_processes_roll_back_together(trained_together: tuple[Path, dict[str, TrainJob]]) -> None:
    assert_rolled_back(trained_together[1]["loud-zero0"])


@pytest.mark.slow
def test_sharded_processes_roll_back_to_the_same_steps(
    trained_together: tuple[Path, dict[str, TrainJob]], more_trained_together: dict[str, TrainJob]
) -> None:
    assert_rolled_back(more_trained_together["loud-zero3"])
    rows, plain = (
        read_rows(job.metrics) for job in (more_trained_together["loud-zero3"], trained_together[1]["loud-zero0"])
    )
    (back,) = [row for row in rows if "event" in row]
    assert (back["step"], back["from_step"]) == (plain[back["step"]]["step"], plain[back["step"]]["from_step"])
    losses = [row["loss"] for row in rows if "event" not in row]
    assert losses == pytest.approx([row["loss"] for row in plain if "event" not in row], rel=1e-4)


def assert_close_weights(job: TrainJob, reference: TrainJob) -> None:
    """The same tensors, and the same values but for what Adam makes of last-bit differences in tiny gradients."""
    import torch
    from safetensors.torch import load_file

    for path in reference.out.rglob("*.safetensors"):
        theirs, ours = load_file(path), load_file(job.out / path.relative_to(reference.out))
        assert theirs.keys() == ours.keys()
        for name, tensor in theirs.items():
            assert tensor.shape == ours[name].shape
            if "vlm_uni_aux_projector" in name and name.endswith("bias"):
                continue  # its gradient is rounding noise: Adam walks at random there
            assert (
                float(torch.linalg.vector_norm(tensor - ours[name]))
                < 1e-3 * float(torch.linalg.vector_norm(tensor)) + 1e-4
            ), name


def test_a_stage_of_two_sharded_processes_is_continued_by_one_alone(
    trained_together: tuple[Path, dict[str, TrainJob]], tmp_path: Path
) -> None:
    begun = trained_together[1]["undisturbed-zero3"]
    job = job_in(tmp_path, name="alone", **STORY | {"devices": 1})
    shutil.copytree(begun.checkpoints / "step-000008", job.checkpoints / "step-000008")
    shutil.copyfile(begun.metrics, job.metrics)
    said: list[str] = []
    assert run_stage(job, say=said.append).resumed_from == [8]
    assert [line for line in said if "world_size 2 -> 1" in line and "not to the last bit" in line]
    assert steps_of(job) == [pytest.approx(step, rel=1e-5) for step in steps_of(begun)]
    assert_close_weights(job, begun)


# -- ends of every kind -------------------------------------------------------------------------------------------


def at_step(step: int, action: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    done: list[int] = []

    def on_row(row: dict[str, Any]) -> None:
        if row["step"] >= step and "event" not in row and not done:
            done.append(step)
            action()

    return on_row


def kill_worker(job: TrainJob, rank: int, number: int = signal.SIGKILL) -> None:
    os.kill(LaunchFolder.newest(job.work).pids()[rank], number)


def assert_no_worker_is_left(job: TrainJob, within_s: float = 0.0) -> None:
    pids = [int(LaunchFolder.newest(job.work).pid(rank).read_text()) for rank in range(2)]
    deadline = time.monotonic() + within_s
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_processes_that_hang_or_are_killed_are_replaced_and_the_stage_ends_as_an_undisturbed_one(
    trained_together: tuple[Path, dict[str, TrainJob]], tmp_path: Path
) -> None:
    """Two machines that are this one, under two names, reached by a shell that is not remote."""
    job, said, waiting, starts = job_in(tmp_path, name="story-3", zero=3, **STORY), [], [], []
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1  # the same\n")
    shell = ["sh", "-c", 'exec sh -c "$2"', "remote"]
    job.config["launch"] |= {"hostfile": str(hosts), "remote_shell": shell, "timeout_s": 20.0, "max_restarts": 2}
    hang = at_step(3, lambda: kill_worker(job, 1, signal.SIGSTOP))
    kill = at_step(7, lambda: kill_worker(job, 0))

    def say(line: str) -> None:
        said.append(line)
        if "does not answer" in line:
            waiting.append(LaunchFolder.newest(job.work).log(0, "err").read_text())

    summary = run_stage(
        job,
        on_row=lambda row: [act(row) for act in (hang, kill)],
        on_start=lambda total, rows: starts.append(len(rows)),
        say=say,
    )
    assert_no_worker_is_left(job, within_s=60)
    assert any("on 127.0.0.1, localhost" in line for line in said)
    hung, killed = [line for line in said if "begins again" in line]
    for words in ("20 s (launch.timeout_s)", "process 1 of 2 (on localhost) does not answer", "(restart 1 of 2)"):
        assert words in hung
    assert "most recent call first" in waiting[0] and "loop.py" in waiting[0], "where the other one waits"
    assert re.search(r"Process 0 of 2 .* was killed by SIGKILL.*\(restart 2 of 2\)", killed)
    assert starts[0] == 0 and 2 <= starts[1] < starts[2], "whoever listens hears what the checkpoint has"
    assert len(summary.resumed_from) == 2 and set(summary.resumed_from) <= {2, 4, 6, 8}
    assert_as_undisturbed(job, trained_together[1]["undisturbed-zero3"])
    met("hang", 1)
    met("kill: process", 1)


def test_processes_that_read_different_rows_are_named(trained_together: tuple[Path, dict[str, TrainJob]]) -> None:
    job = trained_together[1]["out-of-step"]
    words = [(job.work / f"out-of-step-{rank}.txt").read_text() for rank in range(2)]
    assert words[0] == words[1]
    assert "process 1 is at step 1 with batch" in words[0]


def assert_as_undisturbed(job: TrainJob, undisturbed: TrainJob) -> None:
    assert len(steps_of(undisturbed)) == 10
    assert steps_of(job) == steps_of(undisturbed)
    assert weights_of(job) == weights_of(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_memory_that_ends_on_one_process_halves_the_micro_batch_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: int
) -> None:
    settings: dict[str, Any] = {"steps": 4, "every_steps": 2, "global_batch": 8, "devices": 2, "zero": zero}
    alone = job_in(tmp_path, name="alone", **settings | {"devices": 1, "zero": 0, "micro_batch": 2})
    run_stage(alone)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from tests.train.poison import limit_memory\n"
        "    limit_memory(samples=2, from_call=3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    job, said = job_in(tmp_path, name="two", **settings, micro_batch=4, auto_micro_batch=True), []
    summary = run_stage(job, say=said.append)
    (shrunk,) = [line for line in said if "It goes on with micro-batches of 2" in line]
    assert re.search(r"CUDA out of memory in step 3 .*process 1 of 2", shrunk)
    assert json.loads((job.work / "micro_batch.json").read_text())["micro_batch_size"] == 2
    assert (job.work / "out_of_memory-1.txt").exists() and not (job.work / "out_of_memory-0.txt").exists()
    assert summary.resumed_from == [2], "no step beyond the last checkpoint is lost"
    assert steps_of(job) == [pytest.approx(step, rel=1e-5) for step in steps_of(alone)]
    met("memory", 1)


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "victim"), [(0, 1), (2, 1), (3, 0), (3, 1)])
def test_any_process_may_be_killed_with_any_engine(tmp_path: Path, zero: int, victim: int) -> None:
    undisturbed = job_in(tmp_path, name="undisturbed", zero=zero, **STORY)
    run_stage(undisturbed)
    job = job_in(tmp_path, name="story", zero=zero, **STORY)
    job.config["launch"]["max_restarts"] = 0
    with pytest.raises(ProcessKilled, match=rf"Process {victim} of 2 .* was killed by SIGKILL"):
        run_stage(job, on_row=at_step(3, lambda: kill_worker(job, victim)))
    assert_no_worker_is_left(job)
    with pytest.raises(Interrupted):
        run_stage(job, on_row=at_step(5, lambda: os.kill(os.getpid(), signal.SIGINT)))
    train_until_killed(job, "row written", 7)
    assert_no_worker_is_left(job, within_s=60)
    assert len(run_stage(job).resumed_from) >= 2
    assert steps_of(job) == steps_of(undisturbed)
    assert weights_of(job) == weights_of(undisturbed)
    met("kill: process", 2)
    met("signal", 1)


def test_the_error_of_a_worker_is_shown_with_its_process_and_its_kind(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    jobs: list[TrainJob] = []

    def make(work: Path) -> dict[str, Any]:
        job = dataclasses.replace(job_in(tmp_path, devices=2), work=work)
        job.records.write_text(job.records.read_text().replace("wide.png", "gone.png"))
        jobs.append(job)
        return run_stage(job).to_dict()

    with pytest.raises(DataError, match=r"gone\.png.*process [01] of 2"):
        store.produce("instruct", "0123456789", make, inputs={})
    assert_no_worker_is_left(jobs[0])
    assert len(list(store.lease("instruct", "0123456789").path.glob("worker-*.json"))) == 2, "both held the lease"


# -- before anything is loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_without_deepspeed_says_what_to_install(
    make_job: MakeJob, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingDependencyError, match=rf"zero={stage}.*not installed.*zero=none"):
        run_stage(make_job(zero=stage))


def test_a_gpu_that_is_not_there_is_missed_before_anything_is_loaded(make_job: MakeJob) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    job = make_job()
    job.config["device"] = "cuda"
    job.config["model"]["path"] = "/nowhere"
    with pytest.raises(MissingDependencyError, match=r"device=cuda needs a GPU.*sees 0"):
        run_stage(job)


def test_half_precision_without_a_gpu_is_refused(make_job: MakeJob) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    job = make_job()
    job.config["device"], job.config["train"]["precision"] = "auto", "fp16"
    with pytest.raises(MissingDependencyError, match="fp16 needs a GPU"):
        run_stage(job)


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_each(n) for n in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [threads_each(n) for n in (1, 2, 4)] == [2, 1, 1]
