"""One run from the command line: what it leaves behind, what a second one reuses, and how it survives being killed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from .command_line import Command, read, rows, steps

LONG = ["train.max_steps=14", "train.checkpoint.every_steps=2", "train.checkpoint.keep=2", "adapter.dropout=0.1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A run that nothing happened to."""
    command = Command(tmp_path_factory.mktemp("undisturbed") / "outputs")
    done = command.run(*LONG)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return command


def test_a_run_leaves_what_the_contract_says(undisturbed: Command) -> None:
    (run,) = undisturbed.runs()
    result, manifest = read(run / "result.json"), read(run / "manifest.json")
    assert result["status"] == "completed"
    assert result["error"] is None
    assert result["steps"] == 14
    assert result["trainable_parameters"] == manifest["trainable"]["n_total"] == manifest["trainable"]["n_lora"]
    predictions = rows(run / "predictions" / "demo.jsonl")
    assert result["metrics"]["demo/accuracy"] == pytest.approx(sum(r["score"] for r in predictions) / len(predictions))
    assert {"demo/baseline_base", "demo/baseline_aligned", "demo/baseline_question_only"} <= result["metrics"].keys()
    assert len({r["model_fingerprint"] for r in predictions}) == 1
    assert steps(run) == [("align", 1), ("align", 2), *(("instruct", n) for n in range(1, 15))]
    stages = ["demo", "check", "curate", "align", "features", "instruct"]
    assert [stage["name"] for stage in manifest["stages"]][:6] == stages
    data = read(run / "data.json")
    assert (data["name"], data["align"]["rows"], data["align"]["kept"]) == ("raw", 48, 48)
    assert (run / "data.html").read_text().startswith("<!doctype html>")
    for name in ("config.yaml", "log.txt", ".hydra/config.yaml", "adapter/adapter_model.safetensors"):
        assert (run / name).is_file(), name
    assert any((run / "checkpoints" / "instruct").glob("step-*/MANIFEST.json"))
    assert not [path for path in run.rglob("*") if path.is_symlink()]


def test_the_adapter_folder_loads_with_plain_peft_and_with_load_model(undisturbed: Command) -> None:
    import torch
    from peft import PeftModel

    from mgm_exp.model import load_connector, load_model
    from mgm_exp.preflight import TINY

    (run,) = undisturbed.runs()
    ours = load_model(run)
    base = load_model(TINY, dtype=ours.dtype)
    load_connector(base, run / "adapter" / "non_lora_trainables.safetensors")
    plain = PeftModel.from_pretrained(base, run / "adapter").eval()
    ids = torch.tensor([[2, 4, 5, 6, 7]])
    with torch.inference_mode():
        theirs = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.equal(ours(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, theirs)


def test_a_second_identical_run_reuses_every_stage_and_says_so(undisturbed: Command) -> None:
    done = undisturbed.run(*LONG)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = undisturbed.runs()
    stages = read(second / "manifest.json")["stages"]
    assert all(stage["reused"] for stage in stages)
    assert not any(stage["reused"] for stage in read(first / "manifest.json")["stages"])
    assert "instruct: reused" in done.stdout
    a, b = read(first / "result.json"), read(second / "result.json")
    for key in ("metrics", "steps", "train_tokens_per_s", "peak_memory_gib", "trainable_parameters"):
        assert a[key] == b[key]
    assert (second / "metrics.jsonl").read_bytes() == (first / "metrics.jsonl").read_bytes()
    assert (second / "adapter" / "adapter_model.safetensors").is_file()


def test_sigterm_then_kill_then_the_same_command_give_the_weights_of_an_undisturbed_run(
    undisturbed: Command, command: Command
) -> None:
    stopped = command.start(*LONG)
    wait_for_step(stopped, command, "instruct", 3)
    stopped.send_signal(signal.SIGTERM)
    output, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, output[-2000:]
    (run,) = command.runs()
    assert read(run / "result.json")["status"] == "interrupted"

    at = last_step(run)
    killed = command.start(*LONG)
    wait_for_step(killed, command, "instruct", at + 3)
    killed.kill()
    killed.communicate()

    done = command.run(*LONG)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert command.runs() == [run], "an interrupted run is continued in its own folder"
    (whole,) = undisturbed.runs()[:1]
    manifest = read(run / "manifest.json")
    assert not next(stage for stage in manifest["stages"] if stage["name"] == "instruct")["reused"]
    assert steps(run) == steps(whole)
    assert [row["loss"] for row in rows(run / "metrics.jsonl") if "event" not in row] == [
        row["loss"] for row in rows(whole / "metrics.jsonl") if "event" not in row
    ]
    assert weights(run) == weights(whole)
    assert read(run / "result.json")["metrics"] == read(whole / "result.json")["metrics"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_killed_zero_process_and_the_same_command_give_the_weights_of_an_undisturbed_run(
    stage: int, tmp_path: Path
) -> None:
    settings = [f"zero={stage}", "devices=2", "train.max_steps=10", "train.checkpoint.every_steps=2"]
    whole, broken = Command(tmp_path / "a" / "outputs"), Command(tmp_path / "b" / "outputs")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    done = whole.run(*settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    process = broken.start(*settings)
    wait_for_step(process, broken, "instruct", 5, limit_s=600)
    workers = children_running("mgm_exp.train.worker", process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output[-3000:]
    (run,) = broken.runs()
    error = read(run / "result.json")["error"]
    assert read(run / "result.json")["status"] == "failed"
    assert error["cause"] and error["advice"]
    assert not children_running("mgm_exp.train.worker", process.pid)

    done = broken.run(*settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert weights(run) == weights(whole.runs()[0])


def test_two_processes_that_need_the_same_stages_make_them_once(command: Command) -> None:
    """Both get through, and every stage was made by exactly one of them."""
    first = command.start("name=a")
    second = command.start("name=b")
    for process in (first, second):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    (a,), (b,) = command.runs("a"), command.runs("b")
    made: dict[str, list[bool]] = {}
    for run in (a, b):
        for stage in read(run / "manifest.json")["stages"]:
            made.setdefault(stage["name"], []).append(not stage["reused"])
    assert {name: sum(times) for name, times in made.items()} == dict.fromkeys(made, 1)
    assert weights(a) == weights(b)


def weights(run: Path) -> dict[str, str]:
    files = sorted((run / "adapter").glob("*.safetensors"))
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def last_step(run: Path) -> int:
    return max((number for stage, number in steps(run) if stage == "instruct"), default=0)


def wait_for_step(
    process: subprocess.Popen[str], command: Command, stage: str, step: int, limit_s: float = 240
) -> None:
    """Returns once the run's metrics show the step; the process has not ended by then."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            output, _ = process.communicate()
            pytest.fail(f"the run ended (exit {process.returncode}) before {stage} step {step}:\n{output[-3000:]}")
        for run in command.runs():
            found = _complete_rows(run / "metrics.jsonl")
            if any(row.get("stage") == stage and "event" not in row and row["step"] >= step for row in found):
                return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"{stage} step {step} did not come within {limit_s} s")


def _complete_rows(path: Path) -> list[dict[str, Any]]:
    import json

    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def children_running(what: str, parent: int) -> list[int]:
    """Descendants of a process whose command line holds ``what``, in the order they were started."""
    import psutil

    try:
        family = psutil.Process(parent).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child.pid for child in family if child.is_running() and what in " ".join(child.cmdline())]
