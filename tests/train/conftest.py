"""A real, tiny MGM and a few real images: what every test of the train room trains."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.config import (
    AdapterConfig,
    AdapterKind,
    AlignConfig,
    Attention,
    CheckpointConfig,
    DataConfig,
    Device,
    EvalConfig,
    ExperimentConfig,
    GroupBy,
    GuardsConfig,
    LossNorm,
    ModelConfig,
    Offload,
    PathsConfig,
    Precision,
    TrackerConfig,
    TrainConfig,
    ZeroConfig,
    plain,
)
from mgm_exp.train.job import TrainJob

MGM = Path(__file__).parent.parent / "data" / "mgm"
IMAGES = ("wide", "tall", "square", "gray", "big")
ANSWERS = ("red", "two red", "a sign", "blue and red", "one", "no")


def write_records(path: Path, n: int, *, text_only: tuple[int, ...] = (5, 11)) -> Path:
    """Rows over the five images, answers of different lengths, some without an image."""
    rows: list[dict[str, Any]] = []
    for i in range(n):
        has_image = i not in text_only
        question = f"What is {i}?" if i % 2 else "What?"
        row: dict[str, Any] = {
            "id": f"sample-{i}",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}" if has_image else question},
                {"from": "gpt", "value": ANSWERS[i % len(ANSWERS)]},
            ],
        }
        if has_image:
            row["image"] = f"{IMAGES[i % len(IMAGES)]}.png"
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lora(dropout: float = 0.0) -> AdapterConfig:
    return AdapterConfig("lora_r4", AdapterKind.lora, 4, 8.0, dropout, ["q_proj", "v_proj", "up_proj"])


def full() -> AdapterConfig:
    return AdapterConfig("full", AdapterKind.full)


def experiment(
    *,
    adapter: AdapterConfig | None = None,
    zero: int = 0,
    devices: int = 1,
    steps: int = 5,
    global_batch: int = 4,
    micro_batch: int = 1,
    precision: Precision = Precision.fp32,
    loss_norm: LossNorm = LossNorm.tokens,
    lr: float = 1e-2,
    every_steps: int | None = None,
    keep: int = 5,
    offload: Offload = Offload.none,
    freeze_connector: bool = False,
    warmup_ratio: float = 0.0,
    seed: int = 3,
    workers: int = 0,
    max_length: int = 128,
    guards: GuardsConfig | None = None,
    statistics_every: int | None = None,
    auto_micro_batch: bool = False,
    background: bool = False,
    profile: Any = False,
) -> ExperimentConfig:
    return ExperimentConfig(
        model=ModelConfig("golden", str(MGM / "model"), attn_implementation=Attention.sdpa),
        data=DataConfig("raw", path="rows.jsonl"),
        adapter=adapter or lora(),
        zero=ZeroConfig(zero, offload, 5_000_000, False),
        train=TrainConfig(
            "test",
            AlignConfig(
                lr=lr, max_steps=steps, global_batch_size=global_batch, micro_batch_size=micro_batch, warmup_ratio=0.0
            ),
            lr=lr,
            projector_lr=1e-3,
            max_steps=steps,
            global_batch_size=global_batch,
            micro_batch_size=micro_batch,
            warmup_ratio=warmup_ratio,
            precision=precision,
            max_length=max_length,
            group_by=GroupBy.none,
            loss_norm=loss_norm,
            freeze_connector=freeze_connector,
            workers=workers,
            guards=guards or GuardsConfig(),
            gradient_statistics_every=statistics_every,
            profile=profile,
            auto_micro_batch=auto_micro_batch,
            checkpoint=CheckpointConfig(every_steps, None, keep, background=background),
        ),
        eval=EvalConfig("demo", ["demo"]),
        tracker=TrackerConfig(),
        paths=PathsConfig("outputs", "outputs/store"),
        seed=seed,
        name="test",
        devices=devices,
        device=Device.cpu,
    )


def job_in(
    folder: Path, stage: str = "instruct", *, name: str = "work", n_records: int = 14, **settings: Any
) -> TrainJob:
    """A job with a work folder of its own; ``settings`` go to :func:`experiment`."""
    work = folder / name
    work.mkdir(exist_ok=True)
    return TrainJob(
        stage=stage,
        config=plain(experiment(**settings)),
        records=write_records(folder / "records.jsonl", n_records),
        image_root=MGM / "images",
        connector=None,
        visual_tokens=None,
        work=work,
    )


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., TrainJob]:
    """``make_job("instruct", name="a", zero=2, ...)``: see :func:`job_in`."""
    return functools.partial(job_in, tmp_path)
