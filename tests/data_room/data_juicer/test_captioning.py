"""Data-Juicer's captioning mapper, with the demo captioner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mgm_exp.data.captioner.demo_blip2 import write_folder
from mgm_exp.data.data_juicer import Pair, caption_with_mapper
from mgm_exp.errors import ModelError

from ..conftest import picture


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioner") / "demo-blip2"
    write_folder(folder, sharpness=8)
    return folder


def scenes(folder: Path) -> tuple[Path, list[Pair]]:
    """Seven images that are no scenes, of which the third ends early; what they are said to show is drawn."""
    root = folder / "images"
    root.mkdir()
    for i in range(7):
        picture(64, 64, seed=i).save(root / f"{i}.png")
    (root / "2.png").write_bytes((root / "2.png").read_bytes()[:3000])
    return root, [Pair(f"id {i}", "", f"{i}.png") for i in range(7)]


def test_every_row_gets_a_caption_or_its_fault_and_a_lost_shard_the_same_again(demo: Path, tmp_path: Path) -> None:
    root, pairs = scenes(tmp_path)
    work = tmp_path / "work"

    def run() -> list[dict[str, Any]]:
        return list(caption_with_mapper(pairs, root, demo, work=work, batch_size=2, seed=3, shard_rows=3))

    first = run()
    assert [row["id"] for row in first] == [pair.id for pair in pairs]
    assert first[2] == {"id": "id 2", "kind": "truncated", "detail": "OSError: image file is truncated"}
    captions = [row["caption"] for row in first if "caption" in row]
    assert len(captions) == 6 and all(captions)
    assert len(set(captions)) > 1  # it looks at the images
    assert not any("<" in caption for caption in captions)
    shards = sorted((work / "shards").iterdir())
    assert len(shards) == 3
    shards[1].unlink()  # by itself: its seed does not depend on the shards before it
    assert run() == first
    # Nothing is left to do: Data-Juicer is not started.
    (work / "job.json").unlink()
    assert run() == first and not (work / "job.json").exists()


@pytest.mark.slow
def test_another_seed_gives_other_captions_and_a_prompt_begins_them(demo: Path, tmp_path: Path) -> None:
    root, pairs = scenes(tmp_path)

    def run(name: str, **settings: Any) -> list[str]:
        rows = caption_with_mapper(pairs, root, demo, work=tmp_path / name, batch_size=4, **settings)
        return [row["caption"] for row in rows if "caption" in row]

    assert run("a", seed=1) != run("b", seed=2)
    assert run("c", seed=1) == run("d", seed=1)
    assert run("e", seed=1, prompt="a red") != run("f", seed=1)


def test_a_model_that_the_mapper_would_break_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing is downloaded"):
        next(iter(caption_with_mapper([], tmp_path, tmp_path / "no", work=tmp_path / "w")))
    assert not (tmp_path / "w").exists()
