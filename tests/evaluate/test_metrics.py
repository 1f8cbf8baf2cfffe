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


# -- choices in circles, GQA, classes, open answers --------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_circular_never_exceeds_the_other_two_accuracies(data):
    rows = []
    for question in data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True)):
        n = data.draw(st.integers(2, 4))
        for turn in range(n):
            choice = data.draw(st.sampled_from(["A", "B", None]))
            rows.append(metrics.CircularRow(question + turn * 1_000_000, choice, "A", n))
    circular = metrics.circular_accuracy(rows)
    assert 0 <= circular <= metrics.first_pass_accuracy(rows) <= 1
    assert circular <= sum(row.n_options * row.is_right for row in rows) / len(rows)
    assert metrics.circular_accuracy(rows[::-1]) == circular


def test_a_circular_score_needs_every_rotation():
    rows = [metrics.CircularRow(7, "A", "A", 3), metrics.CircularRow(1_000_007, "A", "A", 3)]
    with pytest.raises(ValueError, match=r"question 7 has 3 options, but rows for the rotations \[0, 1\]"):
        metrics.circular_accuracy(rows)
    with pytest.raises(ValueError, match="no row"):
        metrics.circular_accuracy([])


def gqa_question(answer: str, entailed: list[str], **changes) -> dict:
    return {
        "semantic": [{"operation": "exist", "argument": "?"}, {"operation": "filter color", "argument": "red"}],
        "entailed": entailed,
        "question": "is it",
        "isBalanced": True,
        "groups": {"global": None},
        "answer": answer,
        "types": {"structural": "verify", "semantic": "attr", "detailed": "x"},
        **changes,
    }


def test_gqa_consistency_looks_only_at_what_right_answers_entail():
    questions = {"1": gqa_question("yes", ["1", "2", "3"]), "2": gqa_question("no", ["1"]), "3": gqa_question("no", [])}
    scores = metrics.gqa({"1": "yes", "2": "no", "3": "yes"}, questions, consistency=True)
    # 1 is right and entails 2 (right) and 3 (wrong); 2 is right and entails 1 (right); 3 is wrong.
    assert scores["consistency"] == pytest.approx((0.5 + 1.0) / 2)
    assert scores["steps[1]"] == scores["binary"] == scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["distribution"] == 0.0 and "open" not in scores and "validity" not in scores


def test_gqa_counts_validity_of_common_attributes_as_the_official_code_does():
    types = {"structural": "query", "semantic": "attr", "detailed": "colorCommon"}
    questions = {"1": gqa_question("red", [], types=types)}
    choices = {"1": {"valid": ["red"], "plausible": ["red"]}}
    assert metrics.gqa({"1": "red"}, questions, choices)["validity"] == 0.0
    assert metrics.gqa({"1": "color"}, questions, choices)["validity"] == 1.0


def test_gqa_refuses_what_cannot_be_scored():
    with pytest.raises(ValueError, match="no prediction"):
        metrics.gqa({}, {"1": gqa_question("yes", [])})
    with pytest.raises(ValueError, match="entails 9"):
        metrics.gqa({"1": "yes"}, {"1": gqa_question("yes", ["9"])}, consistency=True)
    with pytest.raises(ValueError, match="balanced"):
        metrics.gqa({"1": "yes"}, {"1": gqa_question("yes", [], isBalanced=False)})


@pytest.mark.parametrize(
    ("text", "pope", "mme"),
    [
        ("Yes", "yes", "yes"),
        ("No.", "no", "no"),
        ("no, there is not", "no", "no"),
        ("There is no dog. Yes", "no", "neither"),
        ("Not at all", "yes", "no"),
        ("It is not. No", "no", "neither"),
        ("", "yes", "neither"),
        ("y", "yes", "yes"),
        ("NO", "yes", "no"),
        ("now", "yes", "no"),
        ("The answer is yes", "yes", "neither"),
    ],
)
def test_yes_and_no_are_read_as_each_benchmark_reads_them(text, pope, mme):
    assert metrics.pope_yes_no(text) == pope
    assert metrics.mme_yes_no(text) == mme


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abx")), min_size=1, max_size=20))
def test_class_scores_agree_with_counting(pairs):
    wanted, said = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    matrix = metrics.confusion_matrix(said, wanted)
    assert sum(matrix.values()) == len(pairs)
    for name, scores in metrics.class_scores(said, wanted).items():
        right = sum(w == s == name for w, s in pairs)
        assert scores.support == wanted.count(name)
        assert scores.recall == right / scores.support
        assert scores.precision == (right / said.count(name) if name in said else 0.0)
        total = scores.precision + scores.recall
        assert scores.f1 == pytest.approx(2 * scores.precision * scores.recall / total if total else 0.0)
    assert 0 <= metrics.macro_f1(said, wanted) <= 1


@pytest.mark.parametrize(
    ("said", "answers", "right"),
    [
        ("The answer is 4.", "4", True),
        ("so it is 1,000 dollars", "1000", True),
        ("0.333", "0.33", True),
        ("x = 3e2", "300", True),
        ("about 41", "4", False),
        ("It is Claude Monet", ["Monet", "C. Monet"], True),
        ("a cat", "a", True),
        ("cat", "a", False),
        ("", "4", False),
        ("therefore seven", "eight", False),
    ],
)
def test_open_answers_are_read_as_mmmu_reads_them(said, answers, right):
    assert metrics.open_answer_accuracy(said, answers) == float(right)


@settings(max_examples=60, deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=4))
def test_open_answers_never_fail_and_are_right_or_wrong(said, answers):
    assert metrics.open_answer_accuracy(said, answers) in (0.0, 1.0)


def test_caption_words_agree_with_the_penn_treebank_tokeniser():
    data = golden("caption_metrics.json")
    raw, tokens = data, data["ptb_tokenised"]
    for image, text in raw["hypotheses"].items():
        assert metrics.caption_tokens(text) == tokens["hypotheses"][image]
        for reference, expected in zip(raw["references"][image], tokens["references"][image], strict=True):
            assert metrics.caption_tokens(reference) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's dog can't run; it doesn't.", "a man 's dog ca n't run it does n't"),
        ("12:30 1,000 3.5 1/2 half-eaten black-and-white", "12:30 1,000 3.5 1/2 half-eaten black-and-white"),
        ("U.S. flag, Mr. Smith at 5 p.m. today", "u.s. flag mr. smith at 5 p.m. today"),
        ("a & b AT&T rock&roll $5 50% #1", "a & b at&t rock & roll $ 5 50 % # 1"),
        ("don’t “quote” ‘q’ -- dash", "do n't quote q dash"),
        ("gonna cannot o'clock e-mail T-shirt", "gon na can not o'clock e-mail t-shirt"),
        ("rock'n'roll vs. No. 5 on St. A", "rock 'n' roll vs. no. 5 on st. a"),
        ("(blurry) [right] no. street.", "-lrb- blurry -rrb- -lsb- right -rsb- no street"),
    ],
)
def test_caption_words_of_harder_texts(text, words):
    # Words as the Java tokeniser gave them.
    assert metrics.caption_tokens(text) == words


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=40))
def test_caption_words_never_fail_and_are_in_lower_case(text):
    words = metrics.caption_tokens(text)
    assert words == " ".join(words.split()) and words == words.lower()
