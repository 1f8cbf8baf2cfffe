"""Plans of models that are no MGM: exact counts, and a reason where nothing can be said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.plan.cell import plan_cell
from tests.model.hf.tiny_models import llava, qwen2_vl

Compose = Callable[..., ExperimentConfig]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.mark.parametrize(
    ("adapter", "more"), [("lora_r8", ()), ("full", ()), ("full", ("model.train_connector=true",))]
)
def test_what_is_planned_is_what_is_trained(
    adapter: str, more: tuple[str, ...], folder: Path, compose: Compose, tmp_path: Path
) -> None:
    from mgm_exp.model import family_of

    config = compose("model=hf", f"model.path={folder}", f"adapter={adapter}", "plan.rows=1000", *more)
    (folder / "model.safetensors").rename(tmp_path / "kept")  # a plan needs no weights
    cell = plan_cell(config)
    (tmp_path / "kept").rename(folder / "model.safetensors")
    family = family_of(config.model)
    model, _ = family.build(config.model, device="cpu", dtype=None)
    trained = family.make_trainable(model, "instruct", config, 0)
    planned = cell.stages[0].parameters
    assert [stage.name for stage in cell.stages] == ["instruct"]
    assert planned.trainable == trained.counts()["n_total"]
    assert planned.total == sum(parameter.numel() for parameter in model.parameters())
    assert cell.stages[0].steps == 8
    assert any("16 tokens for an image" in note for note in cell.notes)


def test_more_learnt_tokens_need_more_logits(folder: Path, compose: Compose) -> None:
    cells = [
        plan_cell(compose("model=hf", f"model.path={folder}", "adapter=lora_r8", f"train.micro_batch_size={size}"))
        for size in (1, 4)
    ]
    logits = [max(moment.logits for moment in cell.stages[0].moments) for cell in cells]
    assert logits[1] == pytest.approx(4 * logits[0])


def test_what_cannot_be_planned_is_refused_with_the_reason(folder: Path, compose: Compose, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path is not set"):
        plan_cell(compose("model=hf"))
    with pytest.raises(ModelError, match="holds none"):
        plan_cell(compose("model=hf", f"model.path={tmp_path}"))
    layers = "adapter.target_modules=[qkv_proj]"
    with pytest.raises(ConfigError, match="qkv_proj"):
        plan_cell(compose("model=hf", f"model.path={folder}", "adapter=lora_r8", layers))
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copyfile(qwen2_vl(tmp_path / "qwen") / "config.json", alone / "config.json")
    with pytest.raises(ModelError, match="How many tokens an image becomes"):
        plan_cell(compose("model=hf", f"model.path={alone}"))
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (alone / "config.json").write_text(json.dumps(values), encoding="utf-8")
    notes = plan_cell(compose("model=hf", f"model.path={alone}")).notes
    assert any("as config.json says" in note for note in notes)
