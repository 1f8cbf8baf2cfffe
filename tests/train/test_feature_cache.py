"""Features that are kept train as images that are seen in every step do, bit for bit: losses and weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mgm_exp.errors import DataError, Interrupted, UserError
from mgm_exp.store import Store
from mgm_exp.train import TrainJob, run_stage
from mgm_exp.train.metrics_file import read_rows

MakeJob = Callable[..., TrainJob]
# One of five images is square; rows 5 and 11 have none; micro-batches of 2 mix them
SETTINGS: dict[str, Any] = {"steps": 3, "micro_batch": 2, "global_batch": 4}


def with_cache(job: TrainJob, store: Path, mining: str = "native", **train: Any) -> TrainJob:
    config = json.loads(json.dumps(job.config))
    config["paths"]["store"] = str(store)
    config["model"]["mining"] = mining
    config["train"].update(train)
    return dataclasses.replace(job, config=config)


def result(job: TrainJob, **callbacks: Any) -> tuple[list[tuple[Any, ...]], dict[str, torch.Tensor]]:
    """Losses and gradient norms of all steps, and every tensor that the stage leaves."""
    run_stage(job, **callbacks)
    rows = [(row["loss"], row["grad_norm"], row["tokens"]) for row in read_rows(job.metrics) if "event" not in row]
    tensors = {
        f"{path.name}/{name}": tensor
        for path in sorted(job.out.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return rows, tensors


def assert_same(got: Any, expected: Any) -> None:
    assert got[0] == expected[0] and len(expected[0]) == 3
    assert got[1].keys() == expected[1].keys() and expected[1]
    assert [name for name in expected[1] if not got[1][name].equal(expected[1][name])] == []


def shards(store: Path, stage: str = "image_features") -> list[str]:
    return Store(store).keys(stage)


@pytest.fixture
def plain(make_job: MakeJob, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """The result without a cache."""
    yield lambda stage, mining="native", **settings: result(
        with_cache(make_job(stage, name="plain", **SETTINGS, **settings), tmp_path / "none", mining)
    )


@pytest.mark.parametrize(
    ("stage", "tier", "mining", "settings"),
    [
        ("align", "towers", "native", {}),
        ("align", "clip", "native", {}),
        ("instruct", "towers", "reference", {}),
        ("instruct", "clip", "reference", {}),
        ("instruct", "towers", "native", {"precision": "bf16"}),
        ("instruct", "tokens", "native", {"freeze_connector": True}),
    ],
)
def test_each_tier_gives_the_same_bits(
    plain: Callable[..., Any], make_job: MakeJob, tmp_path: Path,
    stage: str, tier: str, mining: str, settings: dict[str, Any],
) -> None:  # fmt: skip
    from mgm_exp.config import Precision

    settings = {key: Precision(value) if key == "precision" else value for key, value in settings.items()}
    expected = plain(stage, mining, **settings)
    heard: list[tuple[str, int, int]] = []
    job = with_cache(
        make_job(stage, name="cached", **SETTINGS, **settings), tmp_path / "store", mining, feature_cache=tier
    )
    assert_same(result(job, on_progress=lambda *told: heard.append(told)), expected)
    assert heard[-1][1:] == (6, 6), "five images, and the zeros of rows without one"


def test_only_images_that_the_steps_read_are_seen(plain: Callable[..., Any], make_job: MakeJob, tmp_path: Path) -> None:
    """An epoch of these rows has three steps; the first reads 4 of 12 rows."""
    few: list[tuple[str, int, int]] = []
    settings = {**SETTINGS, "steps": 1}
    store = tmp_path / "store"
    job = with_cache(make_job("align", name="few", **settings), store, feature_cache="towers")
    run_stage(job, on_progress=lambda *told: few.append(told))
    assert 1 <= few[-1][2] <= 4
    more: list[tuple[str, int, int]] = []
    longer = with_cache(make_job("align", name="longer", **SETTINGS), store, feature_cache="towers")
    assert_same(result(longer, on_progress=lambda *told: more.append(told)), plain("align"))
    assert few[-1][2] + more[-1][2] == 6, "what the first made is taken up, the rest is made"


def test_an_image_that_no_step_was_to_read_has_no_features(tmp_path: Path) -> None:
    """A roll-back leads beyond the plan: such an image is computed then."""
    from mgm_exp.data.feature_cache import IMAGE_FEATURES, FeatureCache, ImageFeatures

    cache = FeatureCache(Store(tmp_path), IMAGE_FEATURES, {"eyes": 1})
    cache.put(["known"], {"low": torch.ones(2)})
    cache.flush()
    features = ImageFeatures(cache, {"a.png": "known"})
    found = features.get("a.png")
    assert found is not None and torch.equal(found["low"], torch.ones(2))
    assert features.get("b.png") is None and features.get(None) is None


def test_towers_do_not_run_in_a_step(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mgm_exp.model.clip import ClipTower
    from mgm_exp.model.convnext import ConvNeXtTower

    first = with_cache(make_job(name="first", **SETTINGS), tmp_path / "store", feature_cache="towers")
    expected = result(first)
    for tower in (ClipTower, ConvNeXtTower):
        monkeypatch.setattr(tower, "forward", lambda *_, **__: pytest.fail("a tower runs"))
    monkeypatch.setattr("mgm_exp.data.dataset.open_image", lambda *_: pytest.fail("an image is decoded"))
    assert_same(
        result(with_cache(make_job(name="next", **SETTINGS), tmp_path / "store", feature_cache="towers")), expected
    )


def test_images_beyond_the_budget_are_computed_with_the_same_bits(
    plain: Callable[..., Any], make_job: MakeJob, tmp_path: Path
) -> None:
    expected = plain("align")
    for tier, budget_gb in (("towers", 0.0002), ("clip", 0.00001)):
        said: list[str] = []
        job = with_cache(
            make_job("align", name=tier, **SETTINGS), tmp_path / tier, feature_cache=tier, feature_cache_gb=budget_gb
        )
        assert_same(result(job, say=said.append), expected)
        told = [text for text in said if "of 6 images are kept" in text]
        assert told and "with the same bits" in told[0]
        folder = tmp_path / tier / "image_features"
        kept = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        assert 0 < kept <= budget_gb * 1e9 + 2000, "no more than the budget and a header"


def test_stages_share_what_their_aspects_agree_on(make_job: MakeJob, tmp_path: Path) -> None:
    store = tmp_path / "store"
    heard: list[int] = []
    for stage in ("align", "instruct"):
        job = with_cache(make_job(stage, name=stage, **SETTINGS), store, feature_cache="clip")
        assert (job.config["train"]["align"]["image_aspect"], job.config["train"]["image_aspect"]) == ("square", "pad")
        run_stage(job, on_progress=lambda what, done, total: heard.append(total))
    assert sorted(set(heard)) == [4, 6], "the second stage made what is not square"
    assert len({key.partition("-")[0] for key in shards(store)}) == 1


def test_a_stop_keeps_what_was_made(make_job: MakeJob, tmp_path: Path) -> None:
    store, asked = tmp_path / "store", [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > 2

    job = with_cache(make_job(**SETTINGS), store, feature_cache="towers")
    with pytest.raises(Interrupted, match="is kept"):
        run_stage(job, should_stop=stop)
    assert len(shards(store)) == 1
    heard: list[int] = []
    run_stage(job, on_progress=lambda what, done, total: heard.append(total))
    assert heard and heard[-1] in (2, 4), "it goes on where it stopped"


def test_features_that_depend_on_their_place_are_refused(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgm_exp.model.clip import ClipTower

    seen = ClipTower.forward

    def biased(tower: ClipTower, images: torch.Tensor) -> torch.Tensor:
        return seen(tower, images) + torch.arange(len(images))[:, None, None] * 1e-7

    monkeypatch.setattr(ClipTower, "forward", biased)
    job = with_cache(make_job(name="given", **SETTINGS), tmp_path / "store", feature_cache="clip")
    with pytest.raises(UserError, match="another place of a micro-batch"):
        run_stage(job)
    said: list[str] = []
    run_stage(with_cache(make_job(name="auto", **SETTINGS), tmp_path / "store", feature_cache="auto"), say=said.append)
    assert any("auto keeps nothing" in text for text in said)
    assert not shards(tmp_path / "store")


def test_auto_takes_what_fits_and_says_why(make_job: MakeJob, tmp_path: Path) -> None:
    for budget_gb, chosen in ((None, "towers"), (0.0002, "clip")):
        said: list[str] = []
        job = with_cache(
            make_job(name=chosen, **SETTINGS), tmp_path / chosen, feature_cache="auto", feature_cache_gb=budget_gb
        )
        run_stage(job, say=said.append)
        assert any(f"auto takes {chosen}, the most that fits" in text and "GB" in text for text in said)


def test_another_image_under_the_same_name_is_seen_anew(make_job: MakeJob, tmp_path: Path) -> None:
    import os
    import shutil

    job = with_cache(make_job(name="first", **SETTINGS), tmp_path / "store", feature_cache="clip")
    root = tmp_path / "images"
    shutil.copytree(job.image_root, root)
    run_stage(dataclasses.replace(job, image_root=root))
    shutil.copy(root / "wide.png", root / "tall.png")
    os.remove(root / "big.png")
    again = with_cache(make_job(name="again", **SETTINGS), tmp_path / "store", feature_cache="clip")
    with pytest.raises(DataError, match=r"big\.png cannot be read any more"):
        run_stage(dataclasses.replace(again, image_root=root))
    shutil.copy(root / "gray.png", root / "big.png")
    heard: list[int] = []
    run_stage(dataclasses.replace(again, image_root=root), on_progress=lambda *told: heard.append(told[2]))
    assert not heard, "both have the content of images that are there"


def test_resized_images_give_the_same_bits(
    plain: Callable[..., Any], make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, store = plain("align"), tmp_path / "store"
    for name, budget_gb in (("some", 0.0001), ("all", 1.0)):
        job = with_cache(make_job("align", name=name, **SETTINGS), store, resized_cache_gb=budget_gb)
        assert_same(result(job), expected)
    assert shards(store, "resized_images")
    monkeypatch.setattr("mgm_exp.data.dataset.open_image", lambda *_: pytest.fail("an image is decoded"))
    for name, tier in (("resized", "none"), ("both", "clip")):
        job = with_cache(make_job("align", name=name, **SETTINGS), store, resized_cache_gb=1.0, feature_cache=tier)
        assert_same(result(job), expected)
