"""Captions judged by a local CLIP folder: the scores are those of the scorer, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mgm_exp.cli import main
from mgm_exp.data.exploration import Options, explore
from mgm_exp.data.formats import find_source
from mgm_exp.data.images import open_image
from mgm_exp.data.scoring import open_scorer
from tests.data_room.conftest import pair, picture, write_lines
from tests.data_room.tiny_models import clip_folder

CAPTIONS = ["a red sign", "a blue label", "sign", "red red red", "a sign above a label"]


def dataset(folder: Path, number: int = 40) -> Path:
    rows = []
    for place in range(number):
        if place != 7:
            picture(30, 30, seed=place).save(folder / f"{place}.png")
        rows.append(pair(f"r{place}", f"{place}.png", CAPTIONS[place % 5]))
    return write_lines(folder / "rows.jsonl", rows)


def test_every_caption_with_a_usable_image_is_judged(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    scorer = open_scorer(folder)
    exploration = explore(find_source(dataset(tmp_path)), Options(workers=1, scorer=scorer))
    scores = exploration.values.similarity
    assert scores is not None and np.flatnonzero(np.isnan(scores)).tolist() == [7]
    for place in (0, 8, 39):
        image = open_image(tmp_path, f"{place}.png", 50)
        assert scores[place] == pytest.approx(scorer.score([image], [[CAPTIONS[place % 5]]])[0][0], abs=1e-5)
    found = exploration.content["similarity"]
    assert found["captions"] == 39 and found["scorer"] == "clip"
    assert found["mean"] == pytest.approx(float(np.nanmean(scores)), abs=1e-6)


def test_the_command_shows_the_worst_fitting_captions(tmp_path: Path) -> None:
    path = dataset(tmp_path)
    arguments = [str(path), "--clip", str(clip_folder(tmp_path / "clip")), "--out", str(tmp_path / "out")]
    assert main(["explore", *arguments, "--workers", "1"]) == 0
    found = json.loads((tmp_path / "out" / "explore.json").read_text(encoding="utf-8"))
    advice = {item["key"] for item in found["advice"]}
    assert "data.recipe.image_text_similarity.min" in advice
    assert (tmp_path / "out" / "plots" / "similarity.png").is_file()
    assert "fit their images worst" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
