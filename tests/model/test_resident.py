"""Bases that stay in memory: models share their tensors until they write to them, and a write that slips by is seen."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.tiny_models import MAKERS
from model_files import SEVEN, edit_json
from torch import Tensor

from mgm_exp.config import AdapterConfig, AdapterInit, AdapterKind
from mgm_exp.model import apply_adapter, features, load_model, resident, save_adapter
from mgm_exp.model.adapters import load_adapter, load_connector, reset_connector, save_connector
from mgm_exp.model.trainable import set_trainable


@pytest.fixture(autouse=True)
def _kept() -> Iterator[None]:
    resident.keep()
    yield
    resident.let_go()
    resident.check()
    resident.said()
    resident.stop_keeping()


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def towers(model: Any) -> list[torch.nn.Module]:
    return [model.model.vision_tower, model.model.vision_tower_aux]


def shared(one: torch.nn.Module, other: torch.nn.Module) -> set[str]:
    theirs = {name: tensor.data_ptr() for name, tensor in other.named_parameters()}
    return {name for name, tensor in one.named_parameters() if theirs.get(name) == tensor.data_ptr()}


def test_models_of_one_folder_share_their_tensors_and_nothing_else(folder: Path) -> None:
    first, second = load_model(folder), load_model(folder)
    assert shared(first, second) == {name for name, _ in first.named_parameters()}
    assert first.lm_head.weight is first.model.embed_tokens.weight
    first.model.mm_projector.requires_grad_(False)
    first.config.tokenizer_model_max_length = 7
    first.train()
    assert all(p.requires_grad for p in second.model.mm_projector.parameters())
    assert second.config.tokenizer_model_max_length != 7 and not second.training
    assert load_model(folder, dtype="bfloat16").model.embed_tokens.weight.dtype is torch.bfloat16
    host, gpu = resident.kept_gib()
    assert host > 0 and gpu == 0
    assert not resident.check() and resident.said() == []


def told(module: torch.nn.Module, of: dict[int, int]) -> list[Any]:
    """All that a tree of modules has, in words; tensors that are one are so in the words, too."""
    found: list[Any] = []
    for name, part in module.named_modules(remove_duplicate=False):
        own = {key: value for key, value in vars(part).items() if key != "_modules"}
        for kind in ("_parameters", "_buffers"):
            tensors = own.pop(kind)
            for key, tensor in tensors.items():
                number = None if tensor is None else of.setdefault(id(tensor), len(of))
                flags = None if tensor is None else (type(tensor), tensor.requires_grad, tensor.dtype, tensor.tolist())
                found.append((name, kind, key, number, flags))
        words = re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(own.items())))
        found.append((name, type(part), words, list(part._modules)))
    return found


@pytest.mark.parametrize("kind", ["mgm", "llava", "has a function without a name"])
def test_a_twin_is_what_a_deep_copy_is(kind: str, folder: Path, tmp_path: Path) -> None:
    if kind == "llava":
        from mgm_exp.model.hf.loading import build_hf

        path = str(MAKERS["llava"](tmp_path / "llava"))
        model: Any = build_hf({"path": path}, device="cpu", dtype="float32")[0]
    else:
        model = load_model(folder)
    (base,) = resident._BASES.values()
    original = base.loaded.model
    if kind.startswith("has"):
        original.in_passing = lambda: None
        base.structure = None
        model = load_model(folder)
        assert base.structure is not None and base.structure.pickled is None
    else:
        assert base.structure is not None and base.structure.pickled is not None
    assert told(model, {}) == told(copy.deepcopy(original), {})
    assert shared(model, original) == {name for name, _ in original.named_parameters()}
    theirs = {buffer.data_ptr() for buffer in original.buffers()}
    assert theirs and not theirs & {buffer.data_ptr() for buffer in model.buffers()}


def test_bytes_are_summed_once_between_two_owners(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[Any] = []
    real = resident.checksum
    monkeypatch.setattr(resident, "checksum", lambda model: summed.append(model) or real(model))
    load_model(folder)
    load_model(folder)
    assert len(summed) == 2, "when it was read, and before a run gets it for the second time"
    resident.check()
    load_model(folder)
    assert len(summed) == 3, "after the run; nobody has had it since"
    load_model(folder)
    assert len(summed) == 4


@pytest.mark.parametrize("what", ["connector", "reset", "adapter", "pissa", "bitfit", "connector is trained"])
def test_whoever_writes_has_a_copy(what: str, folder: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    resident.let_go()
    plain = state(load_model(folder))
    model = load_model(folder)
    if what == "connector":
        changed = {n: p.detach() + 1 for n, p in model.named_parameters() if "mm_projector" in n or "vlm_uni" in n}
        save_connector(model, tmp_path / "connector.safetensors", changed)
        load_connector(model, tmp_path / "connector.safetensors")
    elif what == "reset":
        reset_connector(model, "connector", 5)
    elif what == "adapter":
        apply_adapter(model, lora, seed=1)
        save_adapter(model, tmp_path / "adapter")
        model = load_adapter(load_model(folder), tmp_path / "adapter")
    elif what == "pissa":
        apply_adapter(
            model,
            AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=8, init=AdapterInit.pissa, target_modules=list(SEVEN)),
            seed=1,
        )
    else:
        kind = AdapterKind.bitfit if what == "bitfit" else AdapterKind.lora
        section = AdapterConfig(kind=kind, rank=4, alpha=8, norms=True, target_modules=list(SEVEN))
        apply_adapter(model, section, seed=1)
        set_trainable(model, "instruct", section)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        resident.own(trained)
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(1.0)
    resident.check()
    assert resident.said() == []
    assert equal(state(load_model(folder)), plain)


def test_a_model_that_trains_all_of_it_takes_the_base_unless_others_have_it(folder: Path) -> None:
    plain = state(load_model(folder))
    resident.let_go()
    model = load_model(folder)
    places = {parameter.data_ptr() for parameter in model.parameters()}
    resident.own(model.parameters())
    assert {parameter.data_ptr() for parameter in model.parameters()} == places
    assert resident.kept_gib() == (0.0, 0.0)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    one, other = load_model(folder), load_model(folder)
    resident.own(one.parameters())
    assert not shared(one, other)
    assert equal(state(other), plain)
    resident.check()
    assert resident.said() == []


def test_a_write_that_nobody_announced_is_seen_and_the_base_is_read_again(folder: Path) -> None:
    plain = state(load_model(folder))
    model = load_model(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert equal(state(load_model(folder)), plain), "also within a run"
    (said,) = resident.said()
    assert "written into the base model" in said
    rows = load_model(folder).model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        rows.copy_(rows[:, [1, 0, *range(2, rows.shape[1])]])
    assert resident.check() and len(resident.said()) == 1


def test_frozen_towers_are_hashed_once_for_all_runs_until_one_writes_to_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    whole = features.sha256_of
    monkeypatch.setattr(features, "sha256_of", lambda tensors: (hashed.append(len(tensors)), whole(tensors))[1])

    def names(model: Any) -> list[str]:
        return [features.tensors_sha256(tower) for tower in towers(model)]

    first = names(load_model(folder))
    assert names(load_model(folder)) == first == [whole(t.state_dict()) for t in towers(load_model(folder))]
    assert len(hashed) == 2
    written = load_model(folder)
    tower = written.model.vision_tower_aux
    with torch.no_grad():
        next(tower.parameters()).flatten()[0] += 1.0
    assert features.tensors_sha256(tower) == whole(tower.state_dict()) != first[1]
    resident.check()
    resident.said()
    trained = load_model(folder)
    resident.own(trained.model.vision_tower.parameters())
    with torch.no_grad():
        next(trained.model.vision_tower.parameters()).flatten()[0] += 1.0
    assert names(trained)[0] != first[0] and names(trained)[1] == first[1]
    assert names(load_model(folder)) == first
    assert resident.said() == []


def test_other_files_are_another_base(folder: Path) -> None:
    load_model(folder)
    edit_json(folder / "config.json", tokenizer_model_max_length=99)
    assert load_model(folder).config.tokenizer_model_max_length == 99


def test_a_base_that_a_run_does_not_use_is_let_go(folder: Path) -> None:
    load_model(folder)
    assert not resident.check()
    assert resident.check(), "the next run did not use it"
    assert resident.kept_gib() == (0.0, 0.0)


def test_nothing_is_kept_where_nobody_asked_for_it(folder: Path) -> None:
    resident.stop_keeping()
    assert not shared(load_model(folder), load_model(folder))
    assert resident.kept_gib() == (0.0, 0.0)


def test_models_of_transformers_share_their_tensors_too(tmp_path: Path) -> None:
    from mgm_exp.model.hf.loading import build_hf

    folder = MAKERS["llava"](tmp_path / "llava")
    first, second = (build_hf({"path": str(folder)}, device="cpu", dtype="float32")[0] for _ in range(2))
    assert shared(first, second) == {name for name, _ in first.named_parameters()}
    plain = state(second)
    resident.own(p for name, p in first.named_parameters() if "projector" in name)
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "projector" in name:
                parameter.zero_()
    resident.check()
    assert resident.said() == [] and equal(state(second), plain)
