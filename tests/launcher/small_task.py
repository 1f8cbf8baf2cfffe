"""A task that is small and real: it takes the lease, writes every file of a run folder, and scores what its rank says.

As a program it is the command line of the package with this task: ``python small_task.py -m adapter.rank=1,2``. What
it is to do besides stands in the environment: ``SMALL_FAIL=13`` or ``13:oom`` (ranks that fail, and how: failed, oom,
nan, user, killed), ``SMALL_STOP=9`` (ranks that wait until ``go`` lies in their folder), ``SMALL_STEPS=5`` (steps of
"training", each noted in ``steps.txt``, checkpointed, and reported as a validation point), ``SMALL_STEP_S=0.1`` (how
long one takes), ``SMALL_HOLD=4`` (the step before which every rank waits until ``go`` lies in its folder).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import mgm_exp
from mgm_exp.config import ExperimentConfig, plain
from mgm_exp.errors import DataError, Interrupted, LossNotFinite, MgmError, Pruned, TrainingFailed
from mgm_exp.record import explain, write_manifest, write_result
from mgm_exp.search.reports import reporter_for
from mgm_exp.signals import stop_on_signals
from mgm_exp.stages import config_hash
from mgm_exp.store import Lease, write_atomic

QUESTIONS = 20


def small_task(
    config: ExperimentConfig, run_dir: Path, *, command: list[str], overrides: list[str], sweep: str | None = None
) -> dict[str, Any]:
    """See the module; the signature is that of ``run_experiment``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lease = Lease(run_dir / ".lease")
    lease.acquire(wait=False)
    try:
        with stop_on_signals():
            return _run(config, run_dir, command, overrides, sweep)
    finally:
        lease.release()


def _run(
    config: ExperimentConfig, run_dir: Path, command: list[str], overrides: list[str], sweep: str | None
) -> dict[str, Any]:
    rank = config.adapter.rank
    with open(run_dir / "calls.txt", "a", encoding="utf-8") as calls:
        calls.write(f"{sweep} {config.trial} {' '.join(overrides)}\n")
    write_atomic(run_dir / "config.yaml", json.dumps(plain(config)))
    write_atomic(run_dir / "log.txt", f"code: {mgm_exp.__file__}\n")
    row = dict.fromkeys("loss lr grad_norm tokens_per_s samples_per_s seconds peak_memory_gib".split(), 0.0)
    write_atomic(
        run_dir / "metrics.jsonl", json.dumps({"stage": "instruct", "step": 1, "epoch": 1, "tokens": 1, **row}) + "\n"
    )
    write_manifest(run_dir, _manifest(config, run_dir, command))
    try:
        _wait_if_told(rank, run_dir)
        _train(config, run_dir)
        _fail_if_told(rank)
        scores = [1.0 if number < rank else 0.0 for number in range(QUESTIONS)]
        _predictions(run_dir, scores)
        (run_dir / "adapter").mkdir(exist_ok=True)
        return _result(run_dir, "completed", {"demo/accuracy": sum(scores) / QUESTIONS}, None)
    except Pruned as error:
        return _result(run_dir, "pruned", {}, explain(error))
    except (MgmError, MemoryError) as error:
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        _result(run_dir, status, {}, explain(error))
        raise


def _train(config: ExperimentConfig, run_dir: Path) -> None:
    """Steps that are noted, checkpointed and reported; a killed run goes on after its checkpoint."""
    steps = int(os.environ.get("SMALL_STEPS", "0"))
    reporter, checkpoint = reporter_for(config, run_dir), run_dir / "checkpoint.txt"
    done = int(checkpoint.read_text(encoding="utf-8")) if checkpoint.exists() else 0
    hold = int(os.environ.get("SMALL_HOLD", "0"))
    for step in range(done + 1, steps + 1):
        while step == hold and not (run_dir / "go").exists():
            time.sleep(0.02)
        time.sleep(float(os.environ.get("SMALL_STEP_S", "0")))
        with open(run_dir / "steps.txt", "a", encoding="utf-8") as file:
            file.write(f"{step}\n")
        stop = step < steps and reporter.report(step, config.adapter.rank / QUESTIONS * step / steps)
        write_atomic(checkpoint, str(step))
        if stop:
            raise Pruned(f"stopped after step {step} of {steps}")


def _fail_if_told(rank: int) -> None:
    for item in os.environ.get("SMALL_FAIL", "").split(","):
        which, _, how = item.partition(":")
        if which != str(rank):
            continue
        if how == "oom":
            raise MemoryError(f"rank {rank} needs more memory than there is")
        if how == "nan":
            raise LossNotFinite(f"the loss of rank {rank} was not finite")
        if how == "user":
            raise DataError("the rows are not there")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise TrainingFailed(f"rank {rank} was told to fail")


def _wait_if_told(rank: int, run_dir: Path) -> None:
    if str(rank) in os.environ.get("SMALL_STOP", "").split(","):
        (run_dir / "waiting").touch()
        while not (run_dir / "go").exists():
            time.sleep(0.02)


def _predictions(run_dir: Path, scores: list[float]) -> None:
    rows = [
        {
            "question_id": number,
            "image_id": f"image{number // 2}",
            "question": "?",
            "question_type": "sign",
            "prompt_hash": "p",
            "prediction": "a",
            "answers": ["a"],
            "score": score,
            "model_fingerprint": "m",
        }
        for number, score in enumerate(scores)
    ]
    (run_dir / "predictions").mkdir(exist_ok=True)
    write_atomic(run_dir / "predictions" / "demo.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _manifest(config: ExperimentConfig, run_dir: Path, command: list[str]) -> dict[str, Any]:
    return {
        "run_id": run_dir.name,
        "config_hash": config_hash(config),
        "command": command,
        "git": {"commit": None, "dirty": None, "diff": None},
        "packages": {},
        "python": "",
        "platform": "",
        "device": {"type": "cpu"},
        "seed": config.seed,
        "stages": [{"name": "instruct", "key": "k", "reused": False, "seconds": 0.0}],
        "data": {"name": config.data.name, "fingerprint": "d", "n_train": 1},
        "model": {"name": config.model.name, "fingerprint": "m", "n_parameters": 1},
        "trainable": {"n_lora": config.adapter.rank, "n_other": 0, "n_total": config.adapter.rank, "patterns": []},
        "started_at": "2026-01-01T00:00:00+00:00",
        "ended_at": None,
    }


def _result(run_dir: Path, status: str, metrics: dict[str, float], error: dict[str, str] | None) -> dict[str, Any]:
    key = {"split": "test", "prompt_hash": "p", "n": QUESTIONS, "ocr_tokens": False, "metric_version": 1}
    result = {
        "run_id": run_dir.name,
        "status": status,
        "metrics": metrics,
        "eval_keys": {"demo": key} if metrics else {},
        "objective": metrics.get("demo/accuracy"),
        "steps": 1,
        "wall_s": 0.5,
        "train_tokens_per_s": 1.0,
        "peak_memory_gib": 0.1,
        "trainable_parameters": 1,
        "error": error,
    }
    return write_result(run_dir, result)


if __name__ == "__main__":
    from mgm_exp.command import main

    sys.exit(main(task=small_task, child=[sys.executable, __file__]))
