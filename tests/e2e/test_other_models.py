"""A sweep over adapters on a model that is no MGM: data, training, evaluation, record, comparison, merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import mgm_exp
from mgm_exp.errors import ConfigError
from tests.model.hf.tiny_models import llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def overrides(folder: Path, root: Path) -> Callable[..., list[str]]:
    return lambda *more: [
        *("model=hf", f"model.path={folder}", "eval=demo", "debug=fast", "train.align.max_steps=0"),
        *("data.demo_images=12", "eval.max_questions=4", "train.max_length=256", "train.workers=0"),
        *("train.precision=fp32", "device=cpu", f"paths.root={root}", *more),
    ]


def test_a_sweep_of_two_adapters_shares_its_data_and_is_compared(
    overrides: Callable[..., list[str]], root: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    from mgm_exp.model import check_merged, merge_run
    from mgm_exp.trained import find_trained

    sweep = mgm_exp.sweep(
        ["hydra/launcher=basic", *overrides("adapter=lora_r8,full", "train.validation.every_steps=2", "sweep.name=two")]
    )
    assert [trial["status"] for trial in sweep["trials"]] == ["completed", "completed"]
    folder = root / "sweeps" / "two"
    runs = [folder / trial["run_dir"] for trial in sweep["trials"]]
    manifests = [json.loads((run / "manifest.json").read_text(encoding="utf-8")) for run in runs]
    stages = [{stage["name"]: stage for stage in manifest["stages"]} for manifest in manifests]
    assert not any("align" in names for names in stages)
    assert stages[0]["curate"]["key"] == stages[1]["curate"]["key"] and stages[1]["curate"]["reused"]
    assert stages[0]["instruct"]["key"] != stages[1]["instruct"]["key"]
    assert manifests[0]["trainable"]["n_other"] == 0 < manifests[0]["trainable"]["n_lora"]
    assert manifests[1]["trainable"]["n_lora"] == 0 < manifests[1]["trainable"]["n_other"]
    assert (runs[0] / "adapter" / "adapter_config.json").is_file() and (runs[1] / "model" / "config.json").is_file()
    compared = mgm_exp.compare([folder])
    assert len(compared["runs"]) == 2 and compared["benchmarks"] == ["demo"]
    assert find_trained(runs[0], None, []).check().model_folder.name == "tiny-llava"
    merge_run(runs[1], tmp_path / "merged")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert all(finding.holds for finding in check_merged(tmp_path / "merged"))


def test_layers_that_the_model_has_not_are_refused_before_anything_is_made(
    overrides: Callable[..., list[str]], folder: Path
) -> None:
    with pytest.raises(ConfigError, match="no such linear layer"):
        mgm_exp.run(overrides("adapter=lora_r8", "adapter.target_modules=[qkv_proj]", "name=refused"))
