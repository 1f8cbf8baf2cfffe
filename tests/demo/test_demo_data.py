"""The generated demo data: deterministic, disjoint splits, usable references."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgm_exp.data.demo import (
    QUESTION_TYPES,
    question_only_answers,
    questions_of,
    read_caption,
    render_scene,
    rich_caption,
    sample_scene,
    score_caption,
    write_demo,
)
from mgm_exp.data.demo.captions import raw_caption
from mgm_exp.data.demo.questions import references
from mgm_exp.data.demo.scenes import COLOURS, SPLIT_BUCKETS, scene_stream
from mgm_exp.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    write_demo(path, n_train=30, n_val=12, n_test=12, seed=0, workers=1)
    return path


def test_scene_does_not_depend_on_count_or_workers(tmp_path: Path, folder: Path) -> None:
    first = write_demo(tmp_path / "a", n_train=60, n_val=4, n_test=4, seed=0, workers=2)
    second = write_demo(tmp_path / "b", n_train=60, n_val=4, n_test=4, seed=0, workers=1)
    assert first.fingerprint == second.fingerprint
    for name in ("instruct.json", "captions_raw.jsonl", "val.json", "test.json", "specs.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for index in (0, 7, 29):
        name = f"images/train_{index:05d}.png"
        assert (folder / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_fingerprint_changes_with_seed_and_counts(tmp_path: Path) -> None:
    prints = {
        write_demo(tmp_path / str(k), n_train=n, n_val=1, n_test=1, seed=seed, workers=1).fingerprint
        for k, (n, seed) in enumerate(((4, 0), (4, 1), (5, 0)))
    }
    assert len(prints) == 3


def test_manifest_is_written_last_and_tells_the_counts(folder: Path) -> None:
    record = json.loads((folder / "demo.json").read_text())
    rows = json.loads((folder / "instruct.json").read_text())
    assert (record["n_train"], record["n_val"], record["n_test"]) == (30, 12, 12)
    assert record["n_rounds"] == sum(len(row["question_types"]) for row in rows)
    assert len(list((folder / "images").iterdir())) == 54
    assert not list(folder.glob("*.partial"))


def test_splits_are_disjoint_by_what_they_say() -> None:
    seen = {
        split: {sample_scene(0, split, i).signature() for i in range(400)}
        for split in ("train", "val", "test", "pretrain")
    }
    for a in seen:
        for b in seen:
            assert a == b or not seen[a] & seen[b], (a, b)
    buckets = [b for r in SPLIT_BUCKETS.values() for b in r]
    assert sorted(buckets) == list(range(16))


def test_glyphs_lie_where_the_ink_is() -> None:
    for index in range(8):
        scene = sample_scene(0, "train", index)
        drawn = render_scene(scene)
        assert drawn.pixels.shape == (128, 128, 3) and drawn.pixels.dtype == np.uint8
        for number, item in enumerate(scene.items):
            glyphs = [g for g in drawn.glyphs if g.item == number]
            assert "".join(g.character for g in glyphs) == item.text
            assert [g.is_last for g in glyphs] == [False] * (len(glyphs) - 1) + [True]
            x0, y0, x1, y1 = drawn.boxes[number]
            for g in glyphs:
                assert x0 <= g.box[0] < g.box[2] <= x1 + 1 and y0 <= g.box[1] < g.box[3] <= y1 + 1
                if g.character not in "$.":
                    patch = drawn.pixels[g.box[1] : g.box[3], g.box[0] : g.box[2]].astype(float).mean(-1)
                    assert patch.max() - patch.min() > 40


def test_object_has_the_colour_it_is_said_to_have() -> None:
    for index in range(20):
        scene = sample_scene(0, "val", index)
        drawn = render_scene(scene)
        for item, (x0, y0, x1, y1) in zip(scene.items, drawn.boxes, strict=True):
            # a strip between the text and the upper edge, inside every outline
            strip = drawn.pixels[y0 + (y1 - y0) // 5, x0 + (x1 - x0) * 4 // 10 : x0 + (x1 - x0) * 6 // 10]
            mean = np.median(strip.reshape(-1, 3), axis=0)
            scaled = {c: np.abs(np.minimum(255, np.array(rgb) * 1.0) - mean).sum() for c, rgb in COLOURS.items()}
            nearest = sorted(scaled, key=lambda c: scaled[c])[:3]
            assert item.colour in nearest


def test_questions_cover_all_types_and_fit_their_scene() -> None:
    seen: Counter[str] = Counter()
    for index in range(100):
        scene = sample_scene(0, "val", index)
        for question in questions_of(scene):
            seen[question.question_type] += 1
            texts = {v for i in scene.items for v in (i.text, i.colour, i.shape, i.text[0])}
            assert question.answer in texts
    assert set(seen) == set(QUESTION_TYPES)


def test_train_rows_are_llava_with_types_and_one_image_token(folder: Path) -> None:
    rows = json.loads((folder / "instruct.json").read_text())
    assert [row["id"] for row in rows] == [f"train_{i:05d}" for i in range(30)]
    for row in rows:
        turns = row["conversations"]
        assert len(turns) == 2 * len(row["question_types"]) and 4 <= len(row["question_types"]) <= 6
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert sum(t["value"].count("<image>") for t in turns) == 1 and turns[0]["value"].startswith("<image>\n")
        assert Image.open(folder / row["image"]).size == (128, 128)


def test_caption_rows_are_data_juicer(folder: Path) -> None:
    for line in (folder / "captions_raw.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["text"].startswith("<__dj__image>\n") and row["text"].endswith(" <|__dj__eoc|>")
        assert (folder / row["images"][0]).is_file()


def test_annotations_are_textvqa_with_ten_references(folder: Path) -> None:
    for split in ("val", "test"):
        file = json.loads((folder / f"{split}.json").read_text())
        assert file["dataset_version"] == "0.5.1" and file["dataset_type"] == split
        assert len({q["question_id"] for q in file["data"]}) == len(file["data"]) == 12
        for q in file["data"]:
            assert len(q["answers"]) == 10 and q["question_type"] in QUESTION_TYPES
            assert (folder / "images" / f"{q['image_id']}.png").is_file()


def test_right_answer_scores_one_under_the_textvqa_metric() -> None:
    """Leave-one-out TextVQA accuracy is 1.0 for every reference left out as soon as four references agree."""
    variants = set()
    for index in range(200):
        scene = sample_scene(0, "test", index)
        rng = scene_stream(0, "x", index)
        for question in questions_of(scene):
            ten = references(question, rng)
            assert len(ten) == 10 and ten.count(question.answer) >= 7
            variants |= {(question.question_type, r != question.answer) for r in ten}
    assert {kind for kind, differs in variants if differs} == set(QUESTION_TYPES)


def test_question_only_baseline_takes_the_most_frequent_answer() -> None:
    def row(*pairs: tuple[str, str]) -> dict:
        turns = []
        for k, (q, a) in enumerate(pairs):
            turns += [{"from": "human", "value": ("<image>\n" if k == 0 else "") + q}, {"from": "gpt", "value": a}]
        return {"conversations": turns}

    rows = [row(("q1", "b"), ("q2", "x")), row(("q2", "y"), ("q1", "a")), row(("q1", "b"))]
    assert question_only_answers(rows) == {"q1": "b", "q2": "x"}


def test_rich_caption_reads_back_whole() -> None:
    for index in range(200):
        scene = sample_scene(0, "pretrain", index, random_share=0.5)
        caption = rich_caption(scene, random.Random(index))
        assert all(right == asked for right, asked in score_caption(caption, scene).values()), caption
        assert len(read_caption(caption)) == 2


def test_wrong_caption_loses_the_wrong_field_only() -> None:
    scene = sample_scene(0, "pretrain", 3)
    caption = rich_caption(scene, random.Random(0)).replace(scene.items[0].text, "QQQ")
    score = score_caption(caption, scene)
    assert score["text"][0] < score["text"][1] and score["kind"] == (2, 2) and score["whole"] == (0, 1)
    assert score_caption("img 2034", scene)["kind"] == (0, 2)


def test_raw_captions_keep_their_mixture() -> None:
    captions = [raw_caption(sample_scene(0, "train", i), random.Random(i)) for i in range(1500)]
    words = Counter(len(c.split()) if c.split()[0] != "img" and "photo" not in c else 0 for c in captions)
    kinds_alone = sum(c in ("sign", "tag", "jersey", "label") for c in captions) / 1500
    assert 0.16 < kinds_alone < 0.24 and 0.2 < words[3] / 1500 < 0.35


def test_bad_counts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="n_val=-1"):
        write_demo(tmp_path, n_val=-1)
    with pytest.raises(UserError, match="workers=0"):
        write_demo(tmp_path, workers=0)
