"""The table that an evaluation ends with, its sampling errors, and the published scores beside it."""

from __future__ import annotations

import json
import math

import pytest

from mgm_exp.evaluate.published import PUBLISHED, published, published_as
from mgm_exp.evaluate.scoreboard import as_json, lines_of, render, standard_error

KEY = {"split": "val", "n": 5000, "ocr_tokens": True}


def test_the_standard_error_of_independent_questions_is_the_usual_one():
    scores = [1.0, 0.0, 0.3, 0.9]
    mean = sum(scores) / 4
    usual = math.sqrt(sum((score - mean) ** 2 for score in scores)) / 4
    assert standard_error(scores, list("abcd")) == pytest.approx(usual)


def test_questions_about_one_image_are_taken_together():
    scores = [1.0, 1.0, 0.0, 0.0]
    assert standard_error(scores, list("aabb")) == pytest.approx(math.sqrt(2) * standard_error(scores, list("abcd")))
    assert standard_error(scores, list("aaaa")) is None


def test_the_published_scores_have_the_sampling_error_of_their_benchmark():
    errors = {one.metric: one.standard_error for one in PUBLISHED if one.model == "MGM-2B"}
    assert errors["textvqa/accuracy"] == pytest.approx(0.007, abs=1e-4)
    assert errors["mmbench/circular_accuracy"] == pytest.approx(0.0144, abs=1e-4)
    assert errors["mme/perception"] is None


@pytest.mark.parametrize("changed", [{"ocr_tokens": False}, {"n": 100}, {"split": "test"}])
def test_a_published_score_stands_only_beside_what_was_measured_the_same_way(changed):
    assert [one.value for one in published("textvqa", KEY)] == [0.562]
    assert published("textvqa", KEY | changed) == []


def test_each_model_stands_beside_its_own_published_scores():
    assert [one.value for one in published("textvqa", KEY, "MGM-13B")] == [0.659]
    assert published("mmbench", {"n_questions": 1164, "split": "dev"}, "MGM-8B-HD") == [], "it is not published"
    names = {("mgm_7b", False): "MGM-7B", ("mgm_7b", True): "MGM-7B-HD", ("mgm_2b_hd", True): "MGM-2B"}
    assert {key: published_as(key[0], is_hd=key[1]) for key in names} == names
    assert published_as("mine", is_hd=False) == "MGM-2B"
    text = render(lines_of("textvqa", {"textvqa/accuracy": 0.6}, KEY, 5000, 0.007, "MGM-8B")).splitlines()
    assert "MGM-8B, published" in text[0] and "0.6760" in text[1]


def test_the_table_shows_scores_with_errors_and_what_was_published():
    metrics = {"textvqa/accuracy": 0.55, "textvqa/accuracy[who]": 0.5, "textvqa/anls": 0.6}
    lines = lines_of("textvqa", metrics, KEY, 5000, 0.007)
    text = render(lines).splitlines()
    assert text[0].split() == ["benchmark", "metric", "value", "s.e.", "questions", "MGM-2B,", "published"]
    assert text[1].split() == ["textvqa", "accuracy", "0.5500", "0.0070", "5000", "0.5620", "(s.e.", "0.0070)"]
    assert text[2].split() == ["textvqa", "anls", "0.6000", "5000"] and len(text) == 3
    assert json.loads(json.dumps(as_json(lines)))["lines"][0]["published"] == 0.562


def test_variants_show_their_accuracy_and_what_the_change_costs():
    metrics = {"pope.blur3/accuracy": 0.5, "pope.blur3/f1": 0.4, "pope.blur3/drop": 0.1}
    assert [line.metric for line in lines_of("pope.blur3", metrics, {}, 9, None)] == ["accuracy", "drop"]
    assert "MGM-2B" not in render(lines_of("pope.blur3", metrics, {}, 9, None))
