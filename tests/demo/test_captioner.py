"""The shipped captioner: BLIP-2's architecture wired so that each image speaks for itself, and it sees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mgm_exp.data.captioner import Blip2Captioner
from mgm_exp.data.captioner.demo_blip2 import (
    COMPACT_IMAGE,
    FULL_IMAGE,
    FULL_ROWS,
    N_QUERIES,
    WEIGHTS,
    blip2_config,
    caption_tokenizer,
    compact_state,
    new_model,
    pieces,
    spread_table,
    write_folder,
)
from mgm_exp.data.demo import render_scene, rich_caption, sample_scene, score_caption
from mgm_exp.errors import ModelError


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Blip2Captioner:
    return Blip2Captioner(cache=tmp_path_factory.mktemp("cache"))


def test_shipped_captioner_sees_about_as_well_as_its_card_says(captioner: Blip2Captioner) -> None:
    scenes = [sample_scene(5, "probe", i) for i in range(40)]
    captions = captioner.caption([Image.fromarray(render_scene(s).pixels) for s in scenes], batch_size=20)
    totals: dict[str, np.ndarray] = {}
    for caption, scene in zip(captions, scenes, strict=True):
        for name, pair in score_caption(caption, scene).items():
            totals[name] = totals.get(name, np.zeros(2)) + np.array(pair)
    stated = json.loads((WEIGHTS.parent / "recipe.json").read_text())["measures"]["captions"]
    assert totals["kind"][0] / totals["kind"][1] > 0.93 and totals["colour"][0] / totals["colour"][1] > 0.9
    assert abs(totals["text"][0] / totals["text"][1] - stated["text"]) < 0.17


def test_captions_do_not_depend_on_the_batch_they_are_in(captioner: Blip2Captioner) -> None:
    images = [Image.fromarray(render_scene(sample_scene(6, "probe", i)).pixels) for i in range(5)]
    assert captioner.caption(images, batch_size=5) == captioner.caption(images, batch_size=2)
    assert captioner.caption(images[::-1], batch_size=5) == captioner.caption(images, batch_size=5)[::-1]
    assert captioner.caption([]) == []


def test_folder_is_written_once_and_kept(captioner: Blip2Captioner) -> None:
    before = (captioner.folder / "model.safetensors").stat().st_mtime_ns
    again = Blip2Captioner(cache=captioner.folder.parent)
    assert again.folder == captioner.folder
    assert (captioner.folder / "model.safetensors").stat().st_mtime_ns == before
    assert len(again.fingerprint()) == 64 and "synthetic" in again.name


def test_a_given_folder_takes_the_same_path(captioner: Blip2Captioner, tmp_path: Path) -> None:
    write_folder(tmp_path / "given")
    given = Blip2Captioner(tmp_path / "given")
    images = [Image.fromarray(render_scene(sample_scene(6, "probe", i)).pixels) for i in range(3)]
    assert given.caption(images) == captioner.caption(images)
    assert given.name == "given" and len(given.fingerprint()) == 64 and not given.is_demo


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        Blip2Captioner(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="'clip'"):
        Blip2Captioner(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    with pytest.raises(ModelError, match="safetensors"):
        Blip2Captioner(tmp_path)


def test_each_image_changes_its_own_row_only() -> None:
    torch.manual_seed(0)
    model = new_model().eval()
    assert model.config.text_config.word_embed_proj_dim == model.config.text_config.hidden_size
    ids = torch.tensor([[COMPACT_IMAGE] * N_QUERIES + [2, 10, 11]] * 3)
    pixels = torch.randn(3, 3, 128, 128)
    other = pixels.clone()
    other[1] += torch.randn(3, 128, 128)
    with torch.no_grad():
        a, b = (model(pixel_values=p, input_ids=ids).logits for p in (pixels, other))
    changed = (a - b).abs()[:, :N_QUERIES].amax((1, 2))
    assert changed[1] > 1e-4 and changed[0] < 1e-6 and changed[2] < 1e-6


def test_queries_and_positions_do_not_start_equal() -> None:
    torch.manual_seed(0)
    model = new_model()
    queries = model.query_tokens[0]
    assert torch.cdist(queries, queries).add(torch.eye(N_QUERIES) * 9).min() > 1
    positions = model.vision_model.embeddings.position_embedding[0, 1:]
    assert torch.cdist(positions, positions).add(torch.eye(256) * 9).min() > 0.01


def test_unused_rows_of_the_full_table_are_the_mean_of_trained_unused_rows() -> None:
    compact = torch.randn(256, 96)
    full = spread_table(compact)
    used = len(pieces())
    assert full.shape == (FULL_ROWS, 96) and used < COMPACT_IMAGE
    assert torch.equal(full[:used], compact[:used]) and torch.equal(full[FULL_IMAGE], compact[COMPACT_IMAGE])
    assert torch.allclose(full[used], compact[used:COMPACT_IMAGE].mean(0)) and torch.equal(
        full[used], full[FULL_ROWS - 1]
    )


def test_caption_words_are_single_tokens_and_captions_come_back() -> None:
    import random

    tokenizer = caption_tokenizer()
    for index in range(100):
        caption = rich_caption(sample_scene(0, "pretrain", index, random_share=0.5), random.Random(index))
        ids = tokenizer.encode(caption, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == caption and 3 not in ids
        words = [w for w in caption.replace(",", "").replace(";", "").split() if w.islower()]
        assert all(len(tokenizer.encode(f" {w}", add_special_tokens=False).ids) == 1 for w in words)


def test_sharpness_scales_the_last_norm_only(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_folder(tmp_path / "plain")
    write_folder(tmp_path / "sharp", sharpness=8.0)
    plain, sharp = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "sharp"))
    differ = {n for n in plain if not torch.equal(plain[n], sharp[n])}
    assert differ == {f"language_model.model.decoder.final_layer_norm.{n}" for n in ("weight", "bias")}


def test_script_runs_every_phase(tmp_path: Path) -> None:
    from mgm_exp.data.captioner.make_demo_blip2 import Recipe, make_captioner

    small = replace(
        Recipe(), n_pages=8, n_scenes=4, n_probe=2, page_steps=1, page_batch=2, scene_steps=1, scene_batch=2,
        mixed_steps=1, mixed_scenes=2, mixed_pages=1, caption_steps=1, caption_batch=2,
    )  # fmt: skip
    phases: list[str] = []
    measures = make_captioner(
        tmp_path / "out", small, work=tmp_path / "work", report=lambda phase, *_: phases.append(phase), workers=1
    )
    assert list(dict.fromkeys(phases)) == [
        "vision: glyph pages",
        "vision: scenes",
        "vision: both",
        "vision tokens",
        "captions",
    ]
    assert set(measures["captions"]) >= {"kind", "text"}
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "It is not Salesforce's BLIP-2" in card


def test_compact_state_leaves_the_tied_head_out() -> None:
    state = compact_state(new_model())
    assert "language_model.lm_head.weight" not in state and all(t.dtype == torch.bfloat16 for t in state.values())
    assert blip2_config(FULL_ROWS, FULL_IMAGE).text_config.vocab_size == FULL_ROWS
