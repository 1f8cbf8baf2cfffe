"""Run folders with a fault in their curves, made by formula: what a fault of that kind looks like in the rows."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def rows(
    n: int,
    loss: Callable[[int], float | None],
    *,
    stage: str = "instruct",
    seed: int = 0,
    noise: float = 0.04,
    batches: int = 0,
    **columns: Callable[[int], Any],
) -> Rows:
    """Steps 1 to ``n`` with log-normal noise on the loss.

    Args:
        loss: Of the step, without noise; None: not finite.
        batches: The batch names repeat after so many steps; 0: never.
        columns: Other values of the step.
    """
    generator, found = random.Random(seed), []
    for step in range(1, n + 1):
        level = loss(step)
        row: dict[str, Any] = {
            "stage": stage,
            "step": step,
            "epoch": step / n,
            "loss": None if level is None else level * math.exp(noise * generator.gauss(0, 1)),
            "lr": 1e-4 * min(1.0, step / max(1, n // 20)),
            "grad_norm": 0.5 * math.exp(0.1 * generator.gauss(0, 1)),
            "batch_name": f"{(step % batches) if batches else step:013x}",
            "tokens": 512 * step,
            "tokens_per_s": 1000.0 * math.exp(0.05 * generator.gauss(0, 1)),
            "peak_memory_gib": 17.0,
        }
        row.update({name: of(step) for name, of in columns.items()})
        found.append(row)
    return found


def falling(step: int) -> float:
    """A healthy loss."""
    return 0.8 + 1.4 * math.exp(-step / 40)


def write_run(
    folder: Path, found: Rows, *, status: str = "completed", config: dict[str, Any] | None = None, **files: Any
) -> Path:
    """A run's folder of these rows; ``files`` are JSON by their names without the ending, or JSON lines (a list)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    result = {"schema_version": 1, "status": status, "metrics": {}, "error": None}
    for name, content in {"result": result, "manifest": {}, **files}.items():
        are_lines = isinstance(content, list)
        path = folder / f"{name}.json{'l' if are_lines else ''}"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in content) if are_lines else json.dumps(content))
    tree = {"train": {"precision": "bf16", "workers": 4, "micro_batch_size": 4}, **(config or {})}
    (folder / "config.yaml").write_text(json.dumps(tree))
    return folder


def event(step: int, name: str, detail: str = "", **facts: Any) -> dict[str, Any]:
    return {"event": name, "stage": "instruct", "step": step, "detail": detail, **facts}


def _with(found: Rows, *events: dict[str, Any]) -> Rows:
    return found + list(events)


def _profile(busy: float | None = None, **shares: float) -> dict[str, Any]:
    """What ``train.profile`` leaves."""
    return {"profile/profile": {"stages": {"instruct": {"steps": 2, "shares": shares, "device_busy": busy}}}}


def _samples(*times: float, stages: Sequence[str | None] = ("instruct",)) -> dict[str, Any]:
    """What the sampler leaves; a stage for each sample, the last one for all that follow."""
    named = [*stages, *[stages[-1]] * (len(times) - len(stages))]
    return {"system": [{"t": 1e9 + t, "stage": stage} for t, stage in zip(times, named, strict=True)]}


def _at(steps: Sequence[int], factor: float) -> Callable[[int], float]:
    return lambda step: falling(step) * (factor if step in steps else 1.0)


def _validation(values: Sequence[float]) -> list[dict[str, Any]]:
    return [event(10 * place, "validation", value=value) for place, value in enumerate(values, 1)]


# Entry -> rows (and other files) of a run that has this fault.
FAULTY: dict[str, Callable[[], tuple[Rows, dict[str, Any]]]] = {
    "memory-grows": lambda: (
        _with(
            rows(300, falling),
            event(250, "memory_growth", "host memory grows by 8.20 MiB a step: 30.1 of 62.0 GiB are used"),
        ),
        {},
    ),
    "nan-from-the-first-step": lambda: (rows(4, lambda step: None, grad_norm=lambda step: None), {"status": "failed"}),
    "nan-of-one-batch": lambda: (
        rows(120, lambda step: None if step % 30 == 7 else falling(step), batches=30),
        {"status": "failed"},
    ),
    "loss-not-finite": lambda: (
        rows(90, lambda step: None if step > 84 else falling(step)),
        {"status": "failed"},
    ),
    "nan-rate-too-high": lambda: (
        rows(40, lambda step: None if step > 12 else 2.0 + step, lr=lambda step: 0.5),
        {"status": "failed"},
    ),
    "diverged-rate-too-high": lambda: (rows(160, lambda step: falling(step) + max(0.0, (step - 80) / 8)), {}),
    "loss-spikes": lambda: (rows(200, _at((70, 101, 140, 171), 6.0)), {}),
    "spikes-of-one-batch": lambda: (rows(240, _at((67, 127, 187), 6.0), batches=60), {}),
    "warmup-too-short": lambda: (rows(200, _at((20, 23, 27), 5.0)), {}),
    "loss-does-not-fall": lambda: (rows(200, lambda step: 2.31), {}),
    "loss-is-zero": lambda: (rows(60, lambda step: 0.0 if step % 2 else falling(step)), {}),
    "gradient-is-zero": lambda: (rows(60, lambda step: 2.31, grad_norm=lambda step: 0.0), {}),
    "lora-trains-nothing": lambda: (
        _with(rows(60, falling), event(50, "lora_b_zero", "56 of 56 LoRA updates are still zero")),
        {},
    ),
    "vision-is-dead": lambda: (
        _with(rows(60, falling), event(50, "vision_dead", "the visual tokens of all images are the same")),
        {},
    ),
    "mining-not-finite": lambda: (_with(rows(60, falling), event(12, "mining_not_finite", "scores were replaced")), {}),
    "fp16-loss-scale-floor": lambda: (
        rows(60, falling, loss_scale=lambda step: max(1.0, 65536.0 / 2**step)),
        {"config": {"train": {"precision": "fp16"}}, "status": "failed"},
    ),
    "throughput-falls": lambda: (rows(200, falling, tokens_per_s=lambda step: 1000.0 if step < 120 else 410.0), {}),
    "loading-stalls": lambda: (rows(200, falling, tokens_per_s=lambda step: 90.0 if step % 20 == 0 else 1000.0), {}),
    "process-stood-still": lambda: (
        rows(200, falling, tokens_per_s=lambda step: 90.0 if step % 20 == 0 else 1000.0),
        _samples(0, 10, 20, 52, 60, 70),
    ),
    "killed-without-a-word": lambda: (
        rows(60, falling),
        {
            "result": {},
            "manifest": {"started_at": "2026-01-01T00:00:00+00:00", "ended_at": None},
            ".lease/nobody": {},
        },
    ),
    "profile-waits-for-data": lambda: (rows(60, falling), _profile(data=0.62, llm=0.2, vision=0.1)),
    "profile-vision-repeated": lambda: (
        rows(60, falling),
        {
            **_profile(data=0.02, vision=0.48, llm=0.4),
            "config": {
                "model": {"family": "mgm"},
                "train": {
                    "feature_cache": "none",
                    "optimize_vision_tower": False,
                    "optimize_vision_tower_aux": False,
                },
            },
        },
    ),
    "profile-device-idle": lambda: (rows(60, falling), _profile(busy=0.31, data=0.03, vision=0.1, llm=0.2)),
    "profile-exchange-dominates": lambda: (rows(60, falling), _profile(busy=0.95, communication=0.44, llm=0.4)),
    "overfits": lambda: (_with(rows(80, falling), *_validation((0.40, 0.52, 0.55, 0.51, 0.47))), {}),
    "validation-does-not-move": lambda: (_with(rows(80, falling), *_validation((0.0, 0.0, 0.0, 0.0))), {}),
    "most-rows-left-out": lambda: (
        rows(60, falling),
        {"data": {"instruct": {"rows": 12000, "kept": 2100}, "align": {"rows": 100, "kept": 99}}},
    ),
}

# Runs without a fault: nothing may be found in them.
HEALTHY: dict[str, Callable[[], tuple[Rows, dict[str, Any]]]] = {
    "falling": lambda: (rows(300, falling), {}),
    "noisy": lambda: (rows(400, falling, noise=0.25, seed=3), {}),
    "heavy tails": lambda: (rows(300, falling, noise=0.12, seed=8), {}),
    "three steps": lambda: (rows(3, falling), {}),
    "two stages": lambda: (rows(60, lambda s: 3 + 5 * math.exp(-s / 10), stage="align") + rows(120, falling), {}),
    "nearly learnt by heart": lambda: (rows(200, lambda step: 0.02 + 3 * math.exp(-step / 15), noise=0.1), {}),
    "one step of fp16 left out": lambda: (rows(200, lambda step: None if step == 3 else falling(step)), {}),
    "slow first steps": lambda: (rows(200, falling, tokens_per_s=lambda s: 150.0 if s < 4 else 1000.0), {}),
    "validation rises": lambda: (_with(rows(80, falling), *_validation((0.40, 0.52, 0.55, 0.545, 0.56))), {}),
    "a tenth of the rows dropped": lambda: (rows(60, falling), {"data": {"instruct": {"rows": 100, "kept": 91}}}),
    "lengths differ": lambda: (
        rows(200, falling, tokens_per_s=lambda s: 1000.0 * (0.7 + 0.6 * ((s * 7919) % 13) / 13)),
        {},
    ),
    "profiled": lambda: (rows(60, falling), _profile(busy=0.93, data=0.04, vision=0.2, llm=0.6, optimizer=0.05)),
    "sampled on time": lambda: (rows(60, falling), _samples(0, 10, 20.4, 31, 40, 50)),
    "interrupted, and given again an hour later": lambda: (
        _with(rows(60, falling), event(30, "resumed")),
        _samples(0, 10, 20, 30, 3600, 3610, 3620, stages=("instruct",) * 4 + (None, "instruct")),
    ),
    "sampled for days, thinned, then resumed at the full rhythm": lambda: (
        rows(60, falling),
        _samples(*range(0, 600, 20), *range(600, 1200, 10)),
    ),
    "sampled late once in hours": lambda: (rows(60, falling), _samples(*range(0, 2000, 10), *range(2020, 4000, 10))),
    "resumed": lambda: (_with(rows(200, falling), event(100, "resumed")), {}),
}


def build(folder: Path, made: tuple[Rows, dict[str, Any]]) -> Path:
    """The run folder of an entry of the tables."""
    found, files = made
    return write_run(folder, found, **files)
