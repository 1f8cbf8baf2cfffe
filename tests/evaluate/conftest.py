"""One small model for all tests of the room, and benchmarks made as the configuration makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.config import (
    AdapterConfig,
    AdapterKind,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    JudgeConfig,
    ModelConfig,
    PathsConfig,
    TrackerConfig,
    TrainConfig,
    ZeroConfig,
)
from mgm_exp.evaluate.benchmarks import Benchmark, load_benchmark

MGM = Path(__file__).parents[1] / "data" / "mgm"


@pytest.fixture(scope="session")
def model() -> Any:
    import torch

    from mgm_exp.model import load_model

    torch.set_num_threads(1)
    return load_model(MGM / "model")


@pytest.fixture(scope="session")
def processor() -> Any:
    from mgm_exp.model import load_processor

    return load_processor(MGM / "model")


@pytest.fixture
def benchmark_of(tmp_path: Path) -> Callable[..., Benchmark]:
    """``benchmark_of(name, questions=..., ...)``: a benchmark whose section has these keys."""

    def load(
        name: str, *, judge: JudgeConfig | None = None, max_questions: int | None = None, **keys: Any
    ) -> Benchmark:
        settings = EvalConfig(name=name, benchmarks=[name], max_questions=max_questions, judge=judge or JudgeConfig())
        section = replace(getattr(settings, name), **keys)
        config = ExperimentConfig(
            model=ModelConfig(name="tiny"),
            data=DataConfig(name="raw"),
            adapter=AdapterConfig("lora_r8", AdapterKind.lora, rank=8, alpha=16.0, target_modules=["q_proj"]),
            zero=ZeroConfig(),
            train=TrainConfig(name="demo", lr=1e-3, projector_lr=1e-3),
            eval=replace(settings, **{name: section}),
            tracker=TrackerConfig(),
            paths=PathsConfig(root=str(tmp_path / "outputs"), store=str(tmp_path / "outputs/store")),
            name="run",
        )
        return load_benchmark(name, config)

    return load
