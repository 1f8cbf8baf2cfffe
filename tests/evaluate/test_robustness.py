"""Corrupted images, other words, rare answers: what is changed, what stays, and what is compared with what."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from benchmark_files import MAKERS, mmbench_rows, put_lines, put_tsv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mgm_exp.config import CorruptionKind, RobustnessConfig
from mgm_exp.errors import DataError
from mgm_exp.evaluate.corruptions import KINDS, Corruption
from mgm_exp.evaluate.generate import evaluate
from mgm_exp.evaluate.robustness import answer_counts, familiarity, long_tail, read_rephrased, variants


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """Bars and a gradient: edges for blur, shades for brightness."""
    across = np.linspace(0, 200, width)[None, :, None].repeat(height, axis=0).repeat(3, axis=2)
    across[:, ::8] = 250
    across[height // 3 : height // 2, :, 0] = 20
    return Image.fromarray(across.astype(np.uint8), "RGB")


def distance(image: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(image, dtype=float) - np.asarray(other, dtype=float)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_higher_severity_is_a_worse_picture_of_the_same_size(kind):
    image = scene()
    worse = [Corruption(kind, severity).apply(image, "a.jpg") for severity in range(1, 6)]
    assert {(picture.size, picture.mode) for picture in worse} == {(image.size, "RGB")}
    away = [distance(image, picture) for picture in worse]
    assert away[0] > 0 and away[4] > away[0]
    if kind != "rotation":  # a bar pattern that is turned far enough may come near itself again
        assert away == sorted(away)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_comes_from_the_name_alone(kind):
    corruption = Corruption(kind, 2)
    once, again = (corruption.apply(scene(), "a.jpg") for _ in range(2))
    assert once.tobytes() == again.tobytes()
    others = {corruption.apply(scene(), f"{k}.jpg").tobytes() for k in range(6)}
    assert len(others) == {"noise": 6, "rotation": 2}.get(kind, 1)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
def test_every_size_can_be_corrupted(kind, severity, width, height):
    assert Corruption(kind, severity).apply(scene(width, height), "x").size == (width, height)


def test_a_severity_means_the_same_for_a_small_and_a_large_image():
    small, large = scene(224, 224), scene(224, 224).resize((672, 672), Image.Resampling.NEAREST)
    for kind in ("blur", "noise"):
        of_small = distance(small, Corruption(kind, 3).apply(small, "x"))
        of_large = distance(large, Corruption(kind, 3).apply(large, "x"))
        assert of_large == pytest.approx(of_small, rel=0.2)


@pytest.mark.parametrize(("kind", "severity"), [("fog", 1), ("blur", 0), ("blur", 6)])
def test_an_unknown_corruption_is_refused(kind, severity):
    with pytest.raises(ValueError, match=r"corruption|severity"):
        Corruption(kind, severity)


def test_the_kinds_of_the_configuration_are_those_that_there_are():
    assert [kind.value for kind in CorruptionKind] == list(KINDS)


def test_a_corrupted_benchmark_is_one_of_its_own(benchmark_of, tmp_path):
    clean = benchmark_of("pope", **MAKERS["pope"](tmp_path))
    section = RobustnessConfig(corruptions=[CorruptionKind.noise, CorruptionKind.jpeg], severities=[1, 4])
    found = list(variants(clean, section))
    assert [variant.name for variant in found] == ["pope.noise1", "pope.noise4", "pope.jpeg1", "pope.jpeg4"]
    assert len({variant.fingerprint() for variant in [clean, *found]}) == 5
    assert [q.prompt for q in found[0].questions] == [q.prompt for q in clean.questions]
    assert found[1].eval_key() == clean.eval_key() | {"corruption": "noise4 v1"}
    image = clean.questions[0].image
    assert distance(clean.picture(image), found[1].picture(image)) > distance(
        clean.picture(image), found[0].picture(image)
    )
    assert clean.name == "pope" and clean.settings.corruption is None


def test_a_model_sees_the_corrupted_images(model, processor, benchmark_of, tmp_path):
    clean = benchmark_of("custom", **MAKERS["custom"](tmp_path / "files"), max_new_tokens=6)
    noisy = clean.corrupted(Corruption("noise", 5))
    seen = {}
    for benchmark in (clean, noisy):
        out = tmp_path / benchmark.name
        result = evaluate(model, processor, benchmark, out, model_fingerprint="m")
        assert f"{benchmark.name}/accuracy" in result.metrics
        rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        seen[benchmark.name] = [row["prediction"] for row in rows]
    assert seen["custom"] != seen["custom.noise5"]


def test_other_words_stand_where_the_question_stood(benchmark_of, tmp_path):
    clean = benchmark_of("vqav2", **MAKERS["vqav2"](tmp_path))
    put_lines(tmp_path / "other/vqav2.jsonl", [{"question_id": 11, "question": "Which shade has it?"}])
    (variant,) = variants(clean, RobustnessConfig(rephrased=str(tmp_path / "other")))
    assert variant.name == "vqav2.rephrased" and [q.question_id for q in variant.questions] == [11]
    assert variant.questions[0].prompt == clean.questions[1].prompt.replace(
        "What colour is thing 1?", "Which shade has it?"
    )
    assert variant.questions[0].answers == clean.questions[1].answers
    assert len(clean.questions) == 3 and variant.eval_key()["n"] == 1
    assert variant.with_settings(max_questions=2).questions == variant.questions


def test_words_for_an_unrotated_row_hold_for_its_rotations(benchmark_of, tmp_path):
    benchmark = benchmark_of("mmbench", questions=str(put_tsv(tmp_path / "x.tsv", mmbench_rows())))
    other = benchmark.rephrased({"4": "Say what this is."})
    assert [q.question_id for q in other.questions] == [4, 1000004, 2000004]
    assert all("Say what this is.\nA. " in q.prompt for q in other.questions)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question_id": 99, "question": "?"}], "none of the benchmark's: 1 \\(99\\)"),
        ([{"question_id": 10}], "line 1: question_id and question are needed"),
        ([{"question_id": 10, "question": "?"}] * 2, "question_id 10 comes twice"),
        ([], "holds no question"),
    ],
)
def test_faulty_other_words_are_named(rows, says, benchmark_of, tmp_path):
    clean = benchmark_of("vqav2", **MAKERS["vqav2"](tmp_path))
    put_lines(tmp_path / "other/vqav2.jsonl", rows)
    with pytest.raises(DataError, match=says):
        list(variants(clean, RobustnessConfig(rephrased=str(tmp_path / "other"))))
    with pytest.raises(DataError, match=r"holds no vqav2\.jsonl"):
        list(variants(clean, RobustnessConfig(rephrased=str(tmp_path))))


def test_half_a_pair_of_mme_is_not_rephrased(benchmark_of, tmp_path):
    benchmark = benchmark_of("mme", **MAKERS["mme"](tmp_path))
    with pytest.raises(DataError, match="only one is rephrased"):
        benchmark.rephrased({str(benchmark.questions[0].question_id): "Has it red?"})


def test_ids_may_be_numbers_or_texts(tmp_path):
    put_lines(tmp_path / "x.jsonl", [{"question_id": 1, "question": "a"}, {"question_id": "b", "question": "c"}])
    assert read_rephrased(tmp_path / "x.jsonl") == {"1": "a", "b": "c"}


# -- rare answers ------------------------------------------------------------------------------------------------------

TRAINING = [
    {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}]}
    for answer in ["Red."] * 11 + ["two"] * 2
]


def test_answers_are_counted_in_their_normal_form():
    assert answer_counts(TRAINING) == Counter({"red": 11, "2": 2})


@pytest.mark.parametrize(
    ("answers", "kind"),
    [(["red"] * 6 + ["rose"] * 4, "frequent"), (["Two", "2"], "rare"), (["green"], "unseen"), (["b", "a"], "unseen")],
)
def test_the_answer_that_most_people_gave_decides(answers, kind):
    assert familiarity(answers, answer_counts(TRAINING), 10) == kind


def test_accuracy_is_split_by_familiarity():
    rows = [
        {"answers": ["red"], "score": 1.0},
        {"answers": ["red"], "score": 0.0},
        {"answers": ["green"], "score": 0.3},
    ]
    assert long_tail(rows, answer_counts(TRAINING), 10) == {
        "answer[unseen]": 0.3,
        "answer_n[unseen]": 1.0,
        "answer[frequent]": 0.5,
        "answer_n[frequent]": 2.0,
    }
