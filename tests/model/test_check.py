"""A merged folder is proven, and each kind of damage is found and called by its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_files import GOLDEN, edit_json, lora_run
from PIL import Image
from safetensors.torch import load_file, save_file

from mgm_exp.cli import main
from mgm_exp.errors import ModelError
from mgm_exp.model.check import OFFICIAL_FIELDS, check_merged
from mgm_exp.model.finding import Finding
from mgm_exp.model.standalone import merge_run
from mgm_exp.store import file_sha256

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, and `out` merged from it."""
    place = tmp_path_factory.mktemp("merged")
    lora_run(place / "run")
    merge_run(place / "run", place / "out", shard_bytes=100_000, license_name="mit")
    return place


@pytest.fixture
def merged(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged; the record's paths are relative, so the run comes along."""
    shutil.copytree(whole, tmp_path / "copy")
    base = os.path.relpath(GOLDEN / "model", tmp_path / "copy" / "out")
    record = json.loads((tmp_path / "copy" / "out" / "merge.json").read_text())
    record["base"]["folder"] = base
    (tmp_path / "copy" / "out" / "merge.json").write_text(json.dumps(record))
    return tmp_path / "copy" / "out"


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def change(folder: Path, name: str, how: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Rewrites a tensor (None: drops it), and the record's SHA-256 with it, as a faulty merge would."""
    file = shard_of(folder, name)
    tensors = load_file(str(file))
    new = how(tensors.pop(name))
    save_file(tensors if new is None else {**tensors, name: new.contiguous()}, str(file), metadata={"format": "pt"})
    record = json.loads((folder / "merge.json").read_text())
    record["shards"][file.name] = file_sha256(file)
    (folder / "merge.json").write_text(json.dumps(record))


def wrong(findings: list[Finding]) -> dict[str, str]:
    return {f.name: f.says for f in findings if f.holds is False}


def advised(findings: list[Finding]) -> dict[str, str]:
    """What is wrong, each with something to do."""
    assert all(f.advice for f in findings if f.holds is False)
    return wrong(findings)


def test_a_merged_folder_is_proven(merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (90, 50), (10, 200, 30)).save(tmp_path / "mine.png")
    assert main(["check", str(merged), "--image", str(tmp_path / "mine.png")]) == 0
    shown = capsys.readouterr().out
    assert "WRONG" not in shown and "not checked" not in shown
    assert "LoRA is applied" in shown and "1 pictures: differ by at most" in shown and "is whole, and equal" in shown


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = float("nan")
    return tensor


def infinite(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[-1] = float("-inf")
    return tensor


# What somebody does to a tensor -> the check that says so, and its words
TENSORS = {
    "inf": (infinite, "values are finite", Q_PROJ),
    "missing": (lambda t: None, "no tensor missing", Q_PROJ),
    "nan": (nan, "values are finite", Q_PROJ),
    "wrong shape": (lambda t: t[:-1], "shapes", f"{Q_PROJ} is [127, 64], expected [128, 64]"),
    "wrong dtype": (lambda t: t.half(), "dtype", f"{Q_PROJ} is F16, expected float32"),
    "other values": (lambda t: t + 1e-3, "weights are base + adapter", Q_PROJ),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_a_damaged_tensor_is_named_although_the_checksums_agree(merged: Path, damage: str) -> None:
    how, check, says = TENSORS[damage]
    change(merged, Q_PROJ, how)
    found = advised(check_merged(merged, with_logits=False))
    assert says in found[check]
    assert "SHA-256 of shards" not in found


def base_tensors() -> dict[str, torch.Tensor]:
    return {n: t for f in (GOLDEN / "model").glob("model-*") for n, t in load_file(str(f)).items()}


def test_two_tensors_that_changed_places_are_both_named(merged: Path) -> None:
    other = Q_PROJ.replace("layers.0", "layers.1")
    kept = {name: load_file(str(shard_of(merged, name)))[name] for name in (Q_PROJ, other)}
    change(merged, Q_PROJ, lambda _: kept[other])
    change(merged, other, lambda _: kept[Q_PROJ])
    found = advised(check_merged(merged, with_logits=False))
    assert set(found) == {"weights are base + adapter"}
    assert Q_PROJ in found["weights are base + adapter"] and other in found["weights are base + adapter"]


def test_a_projector_of_the_base_is_named(merged: Path) -> None:
    base = base_tensors()
    name = "model.mm_projector.0.weight"
    change(merged, name, lambda _: base[name])
    found = advised(check_merged(merged, with_logits=False))
    assert found == {"projector and mining are the run's": f"1 of 16 are the base's: {name}"}


def test_an_adapter_that_learnt_nothing_is_named(merged: Path) -> None:
    """B is zero in the run: base and merged model are one, and nothing else is wrong."""
    base = base_tensors()
    file = merged.parent / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(str(file))
    save_file({n: t * 0 if ".lora_B." in n else t for n, t in tensors.items()}, str(file))
    for name in {n[len("base_model.model.") :].replace(".lora_A.", ".") for n in tensors if ".lora_A." in n}:
        change(merged, name, lambda _, name=name: base[name])  # type: ignore[misc]
    found = advised(check_merged(merged, with_logits=False))
    assert "a factor is zero in all 14 weights, first model.layers.0" in found["LoRA is applied"]
    assert set(found) == {"LoRA is applied", "run"}


def test_a_missing_shard_is_named(merged: Path) -> None:
    file = shard_of(merged, Q_PROJ)
    file.unlink()
    found = advised(check_merged(merged, with_logits=False))
    assert found["shards can be read"] == f"{file.name} is missing"
    assert f"{file.name} and lies in none" in found["index"]


def test_an_index_that_points_to_a_file_that_is_not_there_is_named(merged: Path) -> None:
    path = merged / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], Q_PROJ: "model-00009-of-00009.safetensors"}}))
    found = advised(check_merged(merged, with_logits=False))
    assert f"{Q_PROJ} is said to be in model-00009-of-00009.safetensors" in found["index"]


def test_a_config_that_the_official_code_cannot_use_is_named(merged: Path) -> None:
    edit_json(merged / "config.json", mm_projector_type=None, mm_vision_tower_aux=None)
    found = advised(check_merged(merged, with_logits=False))
    assert found["loads in the official code"] == (
        "config.json lacks mm_projector_type; config.json lacks mm_vision_tower_aux"
    )


def test_names_index_and_configuration_are_the_official_ones(merged: Path) -> None:
    golden = json.loads((GOLDEN / "state_dict_names.json").read_text())
    index = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
    shapes = {n: list(t.shape) for f in set(index.values()) for n, t in load_file(str(merged / f)).items()}
    assert shapes == {n: v["shape"] if isinstance(v, dict) else v for n, v in golden.items() if n != "lm_head.weight"}
    assert set(index) == set(shapes)
    official = json.loads((GOLDEN / "model" / "config.json").read_text())
    assert set(OFFICIAL_FIELDS) <= set(official)


def test_lora_that_was_not_applied_is_named(merged: Path) -> None:
    base = {n: t for f in (GOLDEN / "model").glob("model-*") for n, t in load_file(str(f)).items()}
    for name in [n for n in base if n.endswith("_proj.weight") and ".layers." in n and "vision" not in n]:
        change(merged, name, lambda _, name=name: base[name])  # type: ignore[misc]
    found = wrong(check_merged(merged))
    assert "not applied to 14 of 14 weights" in found["LoRA is applied"]
    assert "differ by at most" in found["logits of merged and base + adapter"]
    assert set(found) == {"LoRA is applied", "logits of merged and base + adapter"}


def test_a_tensor_too_many_is_named(merged: Path) -> None:
    file = shard_of(merged, Q_PROJ)
    save_file({**load_file(str(file)), "model.stray": torch.zeros(2)}, str(file))
    assert "model.stray" in advised(check_merged(merged, with_logits=False))["no tensor too many"]


def test_a_truncated_shard_is_named(merged: Path) -> None:
    file = shard_of(merged, Q_PROJ)
    os.truncate(file, file.stat().st_size - 100)
    found = advised(check_merged(merged, with_logits=False))
    assert f"{file.name} is truncated" in found["shards can be read"]
    assert f"bytes of {file.name} changed" in found["SHA-256 of shards"]
    assert "a shard cannot be read" in found["no tensor missing"]


def test_a_flipped_byte_is_named(merged: Path) -> None:
    file = shard_of(merged, Q_PROJ)
    with open(file, "r+b") as opened:
        opened.seek(-8, os.SEEK_END)
        byte = opened.read(1)
        opened.seek(-8, os.SEEK_END)
        opened.write(bytes([byte[0] ^ 1]))
    found = advised(check_merged(merged, with_logits=False))
    assert f"bytes of {file.name} changed" in found["SHA-256 of shards"]


def test_an_index_that_points_elsewhere_is_named(merged: Path) -> None:
    path = merged / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = shard_of(merged, "model.mm_projector.0.weight").name
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], Q_PROJ: other}}))
    assert f"{Q_PROJ} is said to be in {other} and lies in" in advised(check_merged(merged, with_logits=False))["index"]


@pytest.mark.parametrize(
    ("file", "check"),
    [("tokenizer.json", "tokenizer"), ("generation_config.json", "generation config"), ("README.md", "model card")],
)
def test_a_missing_file_is_named(merged: Path, file: str, check: str, capsys: pytest.CaptureFixture[str]) -> None:
    (merged / file).unlink()
    assert main(["check", str(merged), "--no-logits"]) == 1
    shown = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert [line.partition("  ")[0] for line in shown] == ["SHA-256 of other files", "files beside the weights", check]
    assert all(file in line for line in shown)


def test_another_adapter_than_the_merged_one_is_named(merged: Path) -> None:
    file = merged.parent / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(str(file))
    save_file({n: t * 1.5 for n, t in tensors.items()}, str(file))
    found = advised(check_merged(merged, with_logits=False))
    assert "adapter_model.safetensors changed" in found["run"]
    assert "weights are base + adapter" in found


def test_a_run_that_moved_is_asked_for_and_taken(merged: Path, tmp_path: Path) -> None:
    (merged.parent / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="--run"):
        check_merged(merged)
    assert wrong(check_merged(merged, run=tmp_path / "elsewhere", with_logits=False)) == {}


def test_a_record_that_points_outside_is_refused(merged: Path) -> None:
    edit_json(merged / "merge.json", shards={"../run/adapter/adapter_model.safetensors": "0"})
    with pytest.raises(ModelError, match="points outside"):
        check_merged(merged)


def test_a_run_of_full_training_in_16_bits_is_proven(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "model", tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("model:\n  name: golden\n")
    shutil.copytree(GOLDEN / "towers", tmp_path / "run" / "towers")
    merge_run(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    assert [f.name for f in check_merged(tmp_path / "out") if f.holds is not True] == []


def test_a_license_that_was_lost_is_named(tmp_path: Path, merged: Path) -> None:
    (tmp_path / "base").mkdir()
    shutil.copytree(GOLDEN / "model", tmp_path / "base" / "model")
    shutil.copytree(GOLDEN / "towers", tmp_path / "base" / "towers")
    (tmp_path / "base" / "model" / "LICENSE").write_text("Do as you like.")
    adapter = merged.parent / "run" / "adapter"
    merge_run(adapter, tmp_path / "new", base=tmp_path / "base" / "model")
    (tmp_path / "new" / "LICENSE").unlink()
    found = advised(check_merged(tmp_path / "new", with_logits=False))
    assert found == {"SHA-256 of other files": "LICENSE is missing"}
    card = tmp_path / "new" / "README.md"
    card.write_text(card.read_text().replace("license: other", ""))
    assert "states no license" in advised(check_merged(tmp_path / "new", with_logits=False))["model card"]


def test_an_exported_adapter_that_was_changed_is_named(merged: Path, tmp_path: Path) -> None:
    out = tmp_path / "peft"
    merge_run(merged.parent / "run", out, export="peft", license_name="mit")
    assert wrong(check_merged(out)) == {}
    tensors = load_file(str(out / "adapter_model.safetensors"))
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, str(out / "adapter_model.safetensors"))
    found = advised(check_merged(out, with_logits=False))
    assert found["tensors are the run's"] == f"{name.removeprefix('base_model.model.')} is another"
    assert "bytes of adapter_model.safetensors changed" in found["SHA-256 of shards"]
