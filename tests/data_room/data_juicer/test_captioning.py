"""Data-Juicer's captioning mapper, with the demo captioner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mgm_exp.data.captioner.demo_blip2 import write_folder
from mgm_exp.data.data_juicer import Pair, caption_with_mapper
from mgm_exp.data.demo import render_scene, sample_scene, score_caption
from mgm_exp.errors import ModelError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioner") / "demo-blip2"
    write_folder(folder, sharpness=8)
    return folder


def scenes(folder: Path) -> tuple[Path, list[Pair]]:
    """Seven scenes, of which the file of the third ends early."""
    root = folder / "images"
    root.mkdir()
    for i in range(7):
        Image.fromarray(render_scene(sample_scene(11, "probe", i)).pixels).save(root / f"{i}.png")
    (root / "2.png").write_bytes((root / "2.png").read_bytes()[:3000])
    return root, [Pair(f"id {i}", "", f"{i}.png") for i in range(7)]


def test_every_row_gets_a_caption_of_its_image_or_its_fault(demo: Path, tmp_path: Path) -> None:
    root, pairs = scenes(tmp_path)
    work = tmp_path / "work"

    def run() -> list[dict[str, Any]]:
        return list(caption_with_mapper(pairs, root, demo, work=work, batch_size=2, seed=3, shard_rows=4))

    first = run()
    assert [row["id"] for row in first] == [pair.id for pair in pairs]
    assert first[2] == {"id": "id 2", "kind": "truncated", "detail": "OSError: image file is truncated"}
    for i, row in enumerate(first):
        if i != 2:  # colours are seen nearly always; captions of other images, or of nothing, would miss them
            right, total = score_caption(row["caption"], sample_scene(11, "probe", i))["colour"]
            assert right >= total - 1, row
            assert "<" not in row["caption"]
    assert len(list((work / "shards").iterdir())) == 2
    # Nothing is left to do: Data-Juicer is not started.
    (work / "job.json").unlink()
    assert run() == first and not (work / "job.json").exists()


@pytest.mark.slow
def test_a_lost_shard_is_written_the_same_again(demo: Path, tmp_path: Path) -> None:
    """By itself: its seed does not depend on the shards before it."""
    root, pairs = scenes(tmp_path)

    def run(size: int) -> list[dict[str, Any]]:
        return list(caption_with_mapper(pairs, root, demo, work=tmp_path / "work", batch_size=size, shard_rows=3))

    first = run(2)
    shards = sorted((tmp_path / "work" / "shards").iterdir())
    assert len(shards) == 3
    kept = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    assert run(2) == first and shards[0].stat().st_mtime_ns == kept
    run(4)  # other batches draw other numbers: they have files of their own
    assert len(list((tmp_path / "work" / "shards").iterdir())) == 6


@pytest.mark.slow
def test_another_seed_gives_other_captions_and_a_prompt_begins_them(demo: Path, tmp_path: Path) -> None:
    root, pairs = scenes(tmp_path)

    def run(name: str, **settings: Any) -> list[str]:
        rows = caption_with_mapper(pairs, root, demo, work=tmp_path / name, batch_size=4, **settings)
        return [row["caption"] for row in rows if "caption" in row]

    first = run("a", seed=1)
    assert run("b", seed=2) != first
    prompted = run("c", seed=1, prompt="a red")
    assert all(caption.startswith("a red") for caption in prompted)
    assert len(set(prompted)) == len(prompted)  # the images are still looked at


def test_a_model_that_the_mapper_would_break_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing is downloaded"):
        next(iter(caption_with_mapper([], tmp_path, tmp_path / "no", work=tmp_path / "w")))
    assert not (tmp_path / "w").exists()
