"""How long training stands still for a checkpoint: written in the background, and waited for.

A module with as many trained parameters as LoRA of rank 16 on MGM-2B takes real steps; every tenth one is followed by a
checkpoint (weights and both moments of AdamW, hashed and synced). What is measured is how much longer that step and the
nine after it take than ten steps without one: the copy to the host, and what the writing thread takes from the others.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measurement import Row

PARAMETERS, PARAMETERS_QUICK = 19_600_000, 400_000
EVERY, ROUNDS, ROUNDS_QUICK = 10, 4, 2
WIDTH = 1024


def run(work: Path, quick: bool = False) -> list[Row]:
    """Measures rounds of steps without a checkpoint, with one in the background, and with one that is waited for."""
    parameters, rounds = (PARAMETERS_QUICK, ROUNDS_QUICK) if quick else (PARAMETERS, ROUNDS)
    training = Training(parameters)
    found: dict[str, list[float]] = {"none": [], "background": [], "waited for": []}
    for number in range(rounds):
        for kind, times in found.items():
            times.append(training.round(work / f"{kind}-{number}".replace(" ", "-"), kind))
    step = median(found["none"]) / EVERY
    background, waited = (
        max(median(found[kind]) - median(found["none"]), 1e-4) for kind in ("background", "waited for")
    )
    size = 12 * parameters / 2**20
    print({kind: [round(seconds, 3) for seconds in times] for kind, times in found.items()}, flush=True)
    return [
        Row(
            f"a checkpoint of {size:,.0f} MiB: time that training loses to it",
            "ms",
            1000 * background,
            1000 * waited,
            None,
            "both write the same bytes",
            f"a step takes {1000 * step:.0f} ms; in the background every {EVERY} steps cost "
            f"{100 * background / (EVERY * step):.1f} % more, waited for {100 * waited / (EVERY * step):.1f} %",
        )
    ]


class Training:
    """A module that is trained on noise, with the product's engine and saver."""

    def __init__(self, parameters: int) -> None:
        import torch
        from torch import nn

        from mgm_exp.config import Device
        from mgm_exp.train.engine import PlainEngine
        from mgm_exp.train.ranks import Ranks

        class Regression(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                layers = max(1, parameters // WIDTH**2)
                self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))

            def forward(self, batch: dict[str, Any], normalizer: float) -> torch.Tensor:
                return (self.layers(batch["x"]) - batch["y"]).square().sum() / normalizer

        torch.manual_seed(0)
        module = Regression()
        named = dict(module.named_parameters())
        group = {"params": list(named.values()), "lr": 1e-4, "peak_lr": 1e-4, "group": "llm"}
        self.ranks = Ranks.alone(Device.cpu)
        self.engine = PlainEngine(module, named, torch.optim.AdamW([group]), _settings(), self.ranks)
        self.batch = {"x": torch.randn(64, WIDTH), "y": torch.randn(64, WIDTH)}
        self.step()

    def step(self) -> None:
        self.engine.accumulate(self.batch, 64.0, last=True)
        self.engine.update(1.0)

    def round(self, folder: Path, kind: str) -> float:
        """Seconds of ten steps, with a checkpoint after the first one where there is one."""
        from mgm_exp.train.checkpoint import Progress, Saver

        saver = Saver(folder, self.engine, {}, self.ranks, keep=1, in_background=kind == "background")
        started = time.perf_counter()
        for number in range(EVERY):
            self.step()
            if number == 0 and kind != "none":
                saver.save(Progress(step=1))
        seconds = time.perf_counter() - started
        saver.finish()
        return seconds


def _settings() -> Any:
    from mgm_exp.config import Aspect, GroupBy, LossNorm, Precision
    from mgm_exp.train.job import StageSettings

    return StageSettings(
        stage="instruct",
        lr=1e-4,
        connector_lr=1e-4,
        vision_tower_lr=1e-4,
        epochs=1.0,
        max_steps=None,
        global_batch_size=64,
        micro_batch_size=64,
        accumulation=1,
        warmup_ratio=0.0,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        max_grad_norm=1.0,
        max_length=16,
        precision=Precision.fp32,
        image_aspect=Aspect.pad,
        group_by=GroupBy.none,
        loss_norm=LossNorm.tokens,
        seed=0,
        zero_stage=0,
        world_size=1,
    )
