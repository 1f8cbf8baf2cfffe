"""The script of the tiny base: every phase runs, resumes and repeats itself, at a very small scale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mgm_exp.data.demo.corpus import CHARACTER_CLASS, KIND_CLASS, make_pages, make_scenes
from mgm_exp.data.demo.teaching import Sampler, dense_loss, optimise
from mgm_exp.errors import UserError
from mgm_exp.model import load_model
from mgm_exp.train.make_tiny import Recipe, make_base

SMALL = replace(
    Recipe(), n_pages=8, n_scenes=8, n_probe=2, page_steps=2, page_batch=4, scene_steps=2, scene_batch=4, joint_steps=2,
    joint_batch=4, rounds=2,
)  # fmt: skip


def test_script_runs_every_phase_resumes_and_repeats_itself(tmp_path: Path) -> None:
    seen: list[str] = []

    def report(phase: str, step: int, steps: int, measures: dict[str, float]) -> None:
        seen.append(phase)
        assert np.isfinite(measures["loss"]) and step <= steps

    make_base(tmp_path / "a", SMALL, work=tmp_path / "work", report=report, workers=1)
    assert seen == ["glyph pages"] * 2 + ["scenes, dense"] * 2 + ["joint"] * 2
    weights = load_file(tmp_path / "a" / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 for t in weights.values()) and "lm_head.weight" not in weights

    (tmp_path / "work" / "3_joint.safetensors").unlink()
    seen.clear()
    make_base(tmp_path / "b", SMALL, work=tmp_path / "work", report=report, workers=1)
    assert seen == ["joint"] * 2, "only the phase whose result is missing runs again"
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)

    model = load_model(tmp_path / "b")
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in weights.values())
    record = json.loads((tmp_path / "b" / "recipe.json").read_text())
    assert record["recipe"]["joint_steps"] == 2 and record["measures"]["n_probe"] == 2
    assert "It is a demo" in (tmp_path / "b" / "README.md").read_text()


def test_work_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match="another recipe"):
        make_base(tmp_path / "out", SMALL, work=tmp_path)


def test_scaled_recipe_keeps_a_full_batch_of_pictures() -> None:
    small = Recipe().scaled(0.001)
    assert small.page_steps == 2 and small.n_pages >= small.page_batch
    assert small.n_scenes >= max(small.scene_batch, small.joint_batch)


def test_pictures_do_not_depend_on_workers_or_count() -> None:
    one, two = make_scenes(300, seed=3, workers=2), make_scenes(4, seed=3, workers=1)
    assert (one.pixels[:4] == two.pixels).all() and (one.slots[:4] == two.slots).all() and one.items[:4] == two.items
    assert (make_pages(3, seed=3, workers=1).pixels[:2] == make_pages(2, seed=3, workers=1).pixels).all()


def test_labels_name_what_is_written() -> None:
    scenes = make_scenes(12, seed=5, workers=1)
    for k, items in enumerate(scenes.items):
        characters, index, last = scenes.positions[k]
        assert {CHARACTER_CLASS[c] for i in items for c in i.text} == set(characters[characters > 0].tolist())
        assert (index > 0).sum() == (characters > 0).sum() == (last > 0).sum()
        for position, item in enumerate(items):
            half = slice(0, 16) if position == 0 else slice(16, 32)
            for n, c in enumerate(item.text):
                here = characters[half][index[half] == n + 1]
                assert CHARACTER_CLASS[c] in here
        assert {KIND_CLASS[i.kind] for i in items} == set(scenes.cells[k][0][scenes.cells[k][0] > 0].tolist())


def test_sampler_gives_every_picture_once_an_epoch() -> None:
    sampler = Sampler(10, 5, seed=0)
    assert sorted([*sampler(), *sampler()]) == list(range(10))
    with pytest.raises(ValueError, match="cannot fill"):
        Sampler(3, 4, seed=0)


def test_optimise_learns_a_linear_map() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    target = (x[:, 0] > 0).to(torch.uint8) + 1
    head = torch.nn.Linear(4, 3)
    losses: list[float] = []
    optimise(
        "x", [head], lambda step: (dense_loss(head(x), target), {}), steps=60, lr=0.1,
        report=lambda phase, step, steps, measures: losses.append(measures["loss"]),
    )  # fmt: skip
    assert losses[-1] < 0.2 * losses[0]
