"""Language model, connector and the rest are found in each model; a folder that cannot be used is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model.hf.loading import build_hf, is_hf_folder
from mgm_exp.model.hf.preflight import parts_in

from .conftest import FAMILIES

CONNECTOR = {"llava": "model.multi_modal_projector.", "paligemma": "model.multi_modal_projector."}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found_without_weights_and_are_those_of_the_loaded_model(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    parts = parts_in(folder_of(family))
    assert parts.text == "model.language_model."
    assert parts.connectors == (CONNECTOR.get(family, "model.visual.merger."),)
    assert len(parts.targets(ALL)) == 2 * 7
    assert parts.head == (frozenset() if family == "paligemma" else {"lm_head.weight"})
    assert not parts.llm & parts.connector and parts.connector
    model, _ = build_hf({"path": str(folder_of(family))}, device="cpu", dtype=None)
    assert sum(parts.counts().values()) == sum(parameter.numel() for parameter in model.parameters())
    assert is_hf_folder(folder_of(family))


def test_layers_that_only_the_vision_tower_has_are_no_targets(folder_of: Callable[[str], Path]) -> None:
    parts = parts_in(folder_of("llava"))
    with pytest.raises(ConfigError, match=r"fc1, .*no such.*down_proj, gate_proj"):
        parts.targets(["q_proj", "fc1", "out_proj"])
    assert all(name.startswith("model.language_model.") for name in parts.targets(["q_proj"]))


def _copy(folder: Path, out: Path, **changes: object) -> Path:
    shutil.copytree(folder, out)
    values = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({**values, **changes}), encoding="utf-8")
    return out


def test_folders_that_cannot_be_used_are_refused_with_the_reason(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = folder_of("llava")
    with pytest.raises(ModelError, match=r"'bert'.*AutoModelForImageTextToText"):
        parts_in(_copy(base, tmp_path / "bert", model_type="bert"))
    with pytest.raises(ModelError, match=r"auto_map.*never run"):
        parts_in(_copy(base, tmp_path / "own", model_type="own", auto_map={"AutoModel": "code.Model"}))
    pickled = _copy(base, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="never loaded"):
        build_hf({"path": str(pickled)}, device="cpu", dtype=None)
    damaged = _copy(base, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:4000])
    with pytest.raises(ModelError, match="weights cannot be used"):
        build_hf({"path": str(damaged)}, device="cpu", dtype=None)


def test_tensors_that_are_missing_are_not_made_up(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = _copy(folder_of("llava"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "multi_modal_projector" in name)
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys, first .*multi_modal_projector"):
        build_hf({"path": str(folder)}, device="cpu", dtype=None)
