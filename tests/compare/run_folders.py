"""Run folders as the experiment leaves them, with scores of our choice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora_r8": {"name": "lora_r8", "kind": "lora", "rank": 8, "alpha": 16.0},
    "lora_r16": {"name": "lora_r16", "kind": "lora", "rank": 16, "alpha": 32.0},
    "full": {"name": "full", "kind": "full", "rank": 0, "alpha": 0.0},
}


def config(adapter: str = "lora_r8", **changes: Any) -> dict[str, Any]:
    """A configuration; a dotted change is written ``train__lr=0.1``."""
    content = {
        "model": {"name": "tiny"},
        "data": {"name": "raw", "path": None},
        "adapter": dict(ADAPTERS[adapter]),
        "train": {"name": "demo", "lr": 0.0015 if adapter == "full" else 0.005, "max_steps": 60},
        "seed": 0,
        "name": "run",
        "paths": {"root": "outputs"},
        "tracker": {"mode": "auto"},
        "trial": None,
    }
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (content[section] if section else content)[name] = value
    return content


def write_run(
    folder: Path,
    scores: dict[str, Sequence[float]] | Sequence[float] | None = None,
    *,
    settings: dict[str, Any] | None = None,
    images: Sequence[Any] | None = None,
    types: Sequence[str] | None = None,
    key: dict[str, Any] | None = None,
    status: str = "completed",
    error: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    edit: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda row: row,
) -> Path:
    """Writes a run folder. ``edit`` changes (or with None drops) rows of its predictions."""
    by_benchmark = scores if isinstance(scores, dict) else {} if scores is None else {"demo": scores}
    folder.mkdir(parents=True)
    (folder / "predictions").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings or config()))
    found: dict[str, float] = {}
    keys = {}
    for benchmark, values in by_benchmark.items():
        rows = []
        for k, score in enumerate(values):
            row = {
                "question_id": k,
                "image_id": str(images[k] if images is not None else k),
                "question": f"what is {k}?",
                "question_type": types[k] if types is not None else "read",
                "prompt_hash": hashlib.sha256(str(k).encode()).hexdigest()[:16],
                "prediction": "x",
                "answers": ["x"] * 10,
                "score": float(score),
                "model_fingerprint": "f",
            }
            edited = edit(row)
            if edited is not None:
                rows.append(edited)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "predictions" / f"{benchmark}.jsonl").write_text(lines)
        found[f"{benchmark}/accuracy"] = float(np.mean([row["score"] for row in rows]))
        for kind in dict.fromkeys(row["question_type"] for row in rows):
            of_kind = [row["score"] for row in rows if row["question_type"] == kind]
            found[f"{benchmark}/accuracy[{kind}]"] = float(np.mean(of_kind))
        keys[benchmark] = {
            "split": "test",
            "prompt_hash": "0123",
            "n": len(rows),
            "ocr_tokens": False,
            "metric_version": "m4c-1",
            **(key or {}),
        }
    rank = (settings or config())["adapter"]["rank"]
    n_lora, n_other = (9472 * rank, 0) if rank else (0, 782_208)
    manifest = {
        "trainable": {"n_lora": n_lora, "n_other": n_other, "n_total": n_lora + n_other, "patterns": []},
        "git": {"commit": "abc", "dirty": False, "diff": ""},
        "packages": {"torch": "2.13.0"},
        "python": "3.11.7",
        "device": {"type": "cpu"},
        "seed": 0,
    }
    result = {
        "schema_version": 1,
        "run_id": folder.name,
        "status": status,
        "metrics": found | (metrics or {}),
        "eval_keys": keys,
        "objective": None,
        "steps": 60,
        "wall_s": 61.5,
        "train_tokens_per_s": 5210.4,
        "peak_memory_gib": 0.87,
        "trainable_parameters": n_lora + n_other,
        "error": error,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_sweep(folder: Path, trials: Sequence[dict[str, Any]]) -> Path:
    """``sweep.json`` of trial folders that are there; each trial: number, params, status."""
    content = {
        "schema_version": 1,
        "name": folder.name,
        "direction": "maximize",
        "objective": "demo/accuracy",
        "best": None,
        "trials": [
            {"overrides": [], "metrics": {}, "run_dir": str(trial["number"]), "seconds": 1.0, **trial}
            for trial in trials
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder


def write_demo_sweep(folder: Path) -> Path:
    """lora_r8, lora_r16 (tied), full (better), and a trial that failed; soft scores, baselines beside."""
    generator = np.random.default_rng(3)
    levels = np.array([0.0, 0.3, 0.6, 0.9, 1.0])
    hard = generator.random(600)

    def scores(skill: float) -> list[float]:
        noisy = skill - hard + generator.normal(0, 0.25, 600)
        return [float(levels[4] if x > 0 else levels[generator.integers(0, 2)] * (x > -0.3)) for x in noisy]

    types = [("read_sign", "colour", "shape")[k % 3] for k in range(600)]
    base = {"demo/baseline_question_only": 0.21, "demo/baseline_base": 0.0, "demo/baseline_aligned": 0.012}
    for number, (adapter, skill) in enumerate([("lora_r8", 0.6), ("lora_r16", 0.61), ("full", 0.9)]):
        write_run(
            folder / str(number), scores(skill), settings=config(adapter, trial=number), types=types, metrics=base
        )
    write_run(
        folder / "3",
        settings=config("full", train__lr=9.0),
        status="failed",
        error={
            "type": "TrainingFailed",
            "message": "loss is NaN",
            "cause": "the loss is not finite at step 12",
            "advice": "Give a lower train.lr.",
        },
    )
    return write_sweep(
        folder,
        [
            {"number": 0, "params": {"adapter": "lora_r8"}, "status": "completed"},
            {"number": 1, "params": {"adapter": "lora_r16"}, "status": "completed"},
            {"number": 2, "params": {"adapter": "full"}, "status": "completed"},
            {"number": 3, "params": {"adapter": "full", "train.lr": 9.0}, "status": "failed"},
        ],
    )
