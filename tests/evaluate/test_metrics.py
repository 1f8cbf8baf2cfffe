"""Parity of the answer metrics with the published scorers, and the properties every metric keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.evaluate import metrics

GOLDEN = Path(__file__).parents[1] / "data" / "eval"


def golden(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def test_vqa_accuracy_agrees_with_the_official_code():
    cases = golden("vqa_accuracy.json")["cases"]
    assert len(cases) == 187
    wrong = [
        (case["id"], case["note"])
        for case in cases
        if abs(
            100 * metrics.vqa_accuracy(case["prediction"], case["gt_answers"])
            - case["official"]["accuracy_percent_12dp"]
        )
        > 1e-9
    ]
    assert wrong == []


def test_vqa_normal_form_agrees_with_the_official_code():
    for case in golden("vqa_accuracy.json")["cases"]:
        official = case["official"]
        if not official["unanimous_after_strip"]:
            assert metrics.normalize_vqa(case["prediction"]) == official["pred_normalised"]
            assert [metrics.normalize_vqa(answer) for answer in case["gt_answers"]] == official["gt_normalised"]


def test_textvqa_accuracy_and_normal_form_agree_with_m4c():
    for case in golden("vqa_accuracy.json")["cases"]:
        m4c = case["textvqa_m4c"]
        assert metrics.normalize_textvqa(case["prediction"]) == m4c["pred_normalised"]
        assert [metrics.normalize_textvqa(answer) for answer in case["gt_answers"]] == m4c["gt_normalised"]
        assert metrics.textvqa_accuracy(case["prediction"], case["gt_answers"]) == pytest.approx(
            m4c["accuracy"], abs=1e-9
        )


def test_textvqa_accuracy_agrees_with_mgms_own_evaluator():
    data = json.loads((GOLDEN.parent / "mgm" / "textvqa_m4c.json").read_text(encoding="utf-8"))
    assert len(data["normalise"]) == 100 and len(data["accuracy"]) == 153
    for case in data["normalise"]:
        assert metrics.normalize_textvqa(case["in"]) == case["out"]
    for case in data["accuracy"]:
        assert metrics.textvqa_accuracy(case["pred"], case["refs"]) == pytest.approx(case["score"], abs=1e-9)
        assert metrics.normalize_textvqa(case["pred"]) == case["norm_pred"]


def test_unanimous_answers_are_not_normalised_in_the_official_metric_but_are_in_m4c():
    assert metrics.vqa_accuracy("yes.", ["yes"] * 10) == 0.0
    assert metrics.textvqa_accuracy("yes.", ["yes"] * 10) == 1.0


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ladder_of_agreement(matches, expected):
    answers = ["red"] * matches + [f"other{k}" for k in range(10 - matches)]
    assert metrics.textvqa_accuracy("red", answers) == pytest.approx(expected, abs=1e-12)


def test_anls_agrees_with_mmf():
    data = golden("anls.json")
    scores = [metrics.anls(case["prediction"], case["gt_answers"]) for case in data["cases"]]
    assert scores == pytest.approx([case["anls_mmf"] for case in data["cases"]], abs=1e-9)
    assert sum(scores) / len(scores) == pytest.approx(data["mean"]["mmf"], abs=1e-9)


def test_anls_of_two_empty_texts_is_one():
    assert metrics.anls("", [""]) == 1.0
    assert metrics.anls("", ["x"]) == 0.0


def test_exact_match_and_token_f1_agree_with_squad():
    for case in golden("em_f1.json")["cases"]:
        assert 100 * metrics.exact_match(case["prediction"], case["gold"]) == case["em"]
        assert 100 * metrics.token_f1(case["prediction"], case["gold"]) == pytest.approx(case["f1"], abs=1e-3)


def test_extract_choice_agrees_with_vlmevalkit():
    for case in golden("mmbench_choice_extraction.json")["cases"]:
        expected = case["vlmevalkit"]["final"]
        expected = None if expected in (False, "Z") else expected
        assert metrics.extract_choice(case["prediction"], case["choices"]) == expected, case["prediction"]


@pytest.mark.parametrize(
    ("tokens", "n_references"),
    [
        ("pycocoevalcap_ptb_tokens", 5),
        ("pycocoevalcap_ptb_tokens_first_reference_only", 1),
        ("pycocoevalcap_lower_whitespace_tokens_no_java", 5),
    ],
)
def test_caption_metrics_agree_with_pycocoevalcap(tokens, n_references):
    data = golden("caption_metrics.json")
    expected = data["expected"][tokens]
    if "no_java" in tokens:
        source, form = data, str.lower
    else:
        source, form = data["ptb_tokenised"], str
    images = list(source["hypotheses"])
    predictions = [form(source["hypotheses"][image]) for image in images]
    references = [[form(text) for text in source["references"][image]][:n_references] for image in images]
    assert metrics.bleu4(predictions, references) == pytest.approx(expected["bleu"]["corpus"]["Bleu_4"], abs=1e-9)
    assert metrics.rouge_l(predictions, references) == pytest.approx(expected["rouge_l"]["corpus"], abs=1e-9)
    assert metrics.cider(predictions, references) == pytest.approx(expected["cider"]["corpus"], abs=1e-9)


def test_caption_metrics_refuse_a_corpus_that_does_not_fit():
    with pytest.raises(ValueError, match="2 predictions and 1 lists"):
        metrics.cider(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="list of at least one text"):
        metrics.bleu4(["a"], ["a"])


def test_scoring_against_nothing_is_an_error():
    for metric in PER_ANSWER:
        with pytest.raises(ValueError, match="no reference answer"):
            metric("red", [])


def test_one_string_is_one_reference():
    assert metrics.exact_match("red", "red") == 1.0
    assert metrics.anls("r", "red") == 0.0


PER_ANSWER = (
    metrics.vqa_accuracy,
    metrics.textvqa_accuracy,
    metrics.exact_match,
    metrics.token_f1,
    metrics.anls,
)
TEXT = st.text(alphabet="aAn the3.,?'s$!-\n\tyesYES19", max_size=12)


@settings(max_examples=60, deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=10), st.randoms(use_true_random=False))
def test_every_metric_is_pure_bounded_and_blind_to_the_order_of_answers(prediction, answers, random):
    given_answers = list(answers)
    shuffled = list(answers)
    random.shuffle(shuffled)
    for metric in PER_ANSWER:
        once = metric(prediction, answers)
        assert 0.0 <= once <= 1.0
        assert metric(prediction, answers) == once
        assert metric(prediction, shuffled) == once
    assert answers == given_answers


@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_the_answer_itself_scores_full_marks(text):
    for metric in PER_ANSWER:
        assert metric(text, [text] * 10) == 1.0


@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_textvqa_score_does_not_change_when_the_prediction_is_normalised_twice(text):
    once = metrics.normalize_textvqa(text)
    answers = [text] * 5 + ["other"] * 5
    assert metrics.textvqa_accuracy(text, answers) == metrics.textvqa_accuracy(text, list(answers))
    assert metrics.normalize_textvqa(once.upper()) == metrics.normalize_textvqa(once.lower())
