"""One fingerprint for one model, however it is stored; another for any other model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_files import edit_json
from safetensors.torch import load_file, save_file

from mgm_exp.model import LossModule, apply_adapter, load_model, model_fingerprint, save_adapter, save_full
from mgm_exp.model.fingerprint import section_fingerprint


@pytest.fixture(scope="module")
def known(golden: Path) -> str:
    return model_fingerprint(golden / "model")


def test_folder_memory_and_saved_copy_agree(still_model, tmp_path: Path, known: str) -> None:
    assert len(known) == 64
    assert model_fingerprint(still_model) == known
    save_full(still_model, tmp_path / "ours")
    assert model_fingerprint(tmp_path / "ours") == known
    still_model.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert model_fingerprint(tmp_path / "theirs") == known


def test_the_place_of_the_towers_does_not_matter(folder: Path, known: str) -> None:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(str(file)))
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    inner = {n: t for n, t in tensors.items() if not n.startswith("model.vision_tower.")}
    save_file(inner, str(folder / "model.safetensors"))
    assert model_fingerprint(folder) == known


def test_one_bit_one_setting_and_one_dtype_change_it(folder: Path, known: str, golden: Path) -> None:
    model = load_model(folder)
    with torch.no_grad():
        model.model.norm.weight.view(torch.int32)[0] ^= 1
    assert model_fingerprint(model) != known
    assert model_fingerprint(load_model(golden / "model", dtype="bfloat16")) != known
    edit_json(folder / "config.json", hidden_activation="gelu_pytorch_tanh")
    assert model_fingerprint(folder) != known


def test_what_does_not_change_answers_does_not_change_it(folder: Path, known: str) -> None:
    edit_json(folder / "config.json", transformers_version="9.9", use_cache=False, mm_projector_lr=1e-3)
    assert model_fingerprint(folder) == known


def test_a_run_folder_equals_its_model(model, lora, tmp_path: Path, golden: Path, known: str) -> None:
    apply_adapter(model, lora, seed=0)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"name": "x", "path": str(golden / "model")}}))
    found = model_fingerprint(tmp_path)
    assert found == model_fingerprint(model) == model_fingerprint(load_model(tmp_path)) != known


def test_a_config_section_is_fingerprinted_with_its_overrides(golden: Path, known: str) -> None:
    assert section_fingerprint({"path": str(golden / "model")}) == known
    assert section_fingerprint({"path": str(golden / "model"), "hidden_activation": "gelu_pytorch_tanh"}) != known


def test_wrappers_of_a_model_do_not_matter(still_model, known: str) -> None:
    wrapped = LossModule(still_model)
    wrapped.config = still_model.config
    assert model_fingerprint(wrapped) == known
