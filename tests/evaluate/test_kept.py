"""Features that evaluation keeps for other trials: the same predictions, and towers that run once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mgm_exp.compose import compose
from mgm_exp.evaluate import Candidate, Examiner
from mgm_exp.evaluate.benchmarks import Settings, TextVqa
from mgm_exp.store import Store


@pytest.fixture
def benchmark_here(tmp_path: Path) -> TextVqa:
    """Fourteen questions about ten images: more than a group, and not whole ones."""
    (tmp_path / "images").mkdir()
    data, asked = [], []
    for k in range(14):
        image = f"image{k % 10}"
        Image.new("RGB", (40 + 7 * (k % 3), 40), (k % 10 * 25, 100, 200)).save(tmp_path / "images" / f"{image}.png")
        answers = ["stop"] * 10
        data.append({"question_id": k, "image_id": image, "question": f"what is {k}?", "answers": answers})
        asked.append({"question_id": image, "image": f"{image}.png", "text": f"what is {k}?\nOne word."})
    (tmp_path / "annotations.json").write_text(json.dumps({"dataset_type": "val", "data": data}))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return TextVqa(
        tmp_path / "annotations.json",
        tmp_path / "questions.jsonl",
        tmp_path / "images",
        True,
        Settings(batch_size=4, max_new_tokens=4),
    )


def predictions(benchmark: Any, folder: Path, *overrides: str) -> bytes:
    given = ["debug=fast", "device=cpu", "train.cache_visual_tokens=false", f"paths.root={folder.parent / 'outputs'}"]
    config = compose([*given, *overrides])
    with Examiner(config, "cpu") as examiner:
        examiner.examine(benchmark, {Candidate("base", folder): None})
    return (folder / "predictions.jsonl").read_bytes()


def test_every_tier_answers_the_same_and_the_next_trial_runs_no_tower(
    benchmark_here: TextVqa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgm_exp.evaluate.corruptions import Corruption
    from mgm_exp.model.clip import ClipTower
    from mgm_exp.model.convnext import ConvNeXtTower

    expected = predictions(benchmark_here, tmp_path / "plain")
    tiers = ("clip", "towers", "tokens")
    for tier in tiers:
        assert predictions(benchmark_here, tmp_path / tier, f"train.feature_cache={tier}") == expected
    store = Store(tmp_path / "outputs" / "store")
    assert len(store.keys("image_features")) == 3
    monkeypatch.setattr(ClipTower, "forward", lambda *_: pytest.fail("CLIP runs"))
    assert predictions(benchmark_here, tmp_path / "clip again", "train.feature_cache=clip") == expected
    monkeypatch.setattr(ConvNeXtTower, "forward", lambda *_, **__: pytest.fail("ConvNeXt runs"))
    monkeypatch.setattr("mgm_exp.data.images.decode_image", lambda *_: pytest.fail("an image is decoded"))
    for tier in tiers[1:]:
        assert predictions(benchmark_here, tmp_path / f"{tier} again", f"train.feature_cache={tier}") == expected
    monkeypatch.undo()
    changed = benchmark_here.corrupted(Corruption("noise", 3))
    predictions(changed, tmp_path / "noisy", "train.feature_cache=towers")
    assert len(store.keys("image_features")) == 4, "a corrupted image is another one"


def test_what_does_not_fit_is_computed(benchmark_here: TextVqa, tmp_path: Path) -> None:
    expected = predictions(benchmark_here, tmp_path / "plain")
    budget = ["train.feature_cache=clip", "train.feature_cache_gb=0.0001"]
    for again in ("first", "second"):
        assert predictions(benchmark_here, tmp_path / again, *budget) == expected
    folder = tmp_path / "outputs" / "store" / "image_features"
    kept = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert 0 < kept < 110_000
