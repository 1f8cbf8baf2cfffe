"""TextVQA from files of the true shape: prompts and scores of the official scripts, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mgm_exp.errors import ConfigError, DataError
from mgm_exp.evaluate.benchmarks import Settings, TextVqa
from mgm_exp.evaluate.benchmarks.textvqa import question_in, question_type

GOLDEN = Path(__file__).parents[1] / "data" / "eval"
FILES = GOLDEN / "textvqa_files"
OFFICIAL = json.loads((GOLDEN / "textvqa_eval.json").read_text(encoding="utf-8"))
ANNOTATIONS, QUESTIONS = "TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"


@pytest.fixture
def files(tmp_path):
    """A writable copy of the official-form files, with a small image for each question."""
    for name in (ANNOTATIONS, QUESTIONS, "merge.jsonl"):
        shutil.copy(FILES / name, tmp_path / name)
    (tmp_path / "images").mkdir()
    for row in jsonl(tmp_path / QUESTIONS):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / row["image"])
    return tmp_path


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def edit_annotations(folder: Path, edit) -> None:
    content = json.loads((folder / ANNOTATIONS).read_text(encoding="utf-8"))
    edit(content["data"])
    (folder / ANNOTATIONS).write_text(json.dumps(content), encoding="utf-8")


def textvqa(folder: Path, *, ocr_tokens: bool = True, questions: str | None = QUESTIONS, **settings) -> TextVqa:
    return TextVqa(
        folder / ANNOTATIONS,
        folder / questions if questions else None,
        folder / "images",
        ocr_tokens,
        Settings(**settings),
    )


def test_official_answers_score_the_official_accuracy(files):
    benchmark = textvqa(files)
    answers = benchmark.official_answers(files / "merge.jsonl")
    scores = {q.question_id: benchmark.score(answers[q.question_id], q) for q in benchmark.questions}
    assert len(scores) == 40
    assert 100 * sum(scores.values()) / 40 == pytest.approx(OFFICIAL["mean_percent"], abs=0.005)
    for row in OFFICIAL["per_question"]:
        assert answers[row["question_id"]] == row["prediction"]
        assert scores[row["question_id"]] == pytest.approx(row["accuracy"], abs=1e-9)


def test_mgms_own_run_scores_53_33_percent_with_its_prompts(tmp_path):
    folder = GOLDEN.parent / "mgm" / "eval"
    (tmp_path / "images").mkdir()
    for name in ("wide", "tall", "gray"):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{name}.png")
    benchmark = TextVqa(
        folder / "textvqa_annotations.json",
        folder / "textvqa_questions.jsonl",
        tmp_path / "images",
        True,
        Settings(),
    )
    answers = benchmark.official_answers(folder / "textvqa_answers.jsonl")
    scores = [benchmark.score(answers[q.question_id], q) for q in benchmark.questions]
    assert f"Accuracy: {100 * sum(scores) / 3:.2f}%" in (folder / "textvqa_report.txt").read_text()
    assert [q.prompt for q in benchmark.questions] == [r["prompt"] for r in jsonl(folder / "textvqa_answers.jsonl")]
    assert [q.image for q in benchmark.questions] == ["wide.png", "tall.png", "gray.png"]


def test_true_question_ids_are_carried_and_images_may_repeat(files):
    questions = textvqa(files).questions
    assert len({q.question_id for q in questions}) == 40 > len({q.image_id for q in questions})
    annotated = {row["question_id"]: row for row in json.loads((files / ANNOTATIONS).read_text())["data"]}
    for question in questions:
        row = annotated[question.question_id]
        assert (question.image_id, question.question.lower()) == (row["image_id"], row["question"].lower())
        assert list(question.answers) == row["answers"]


def test_prompts_with_ocr_tokens_are_the_files_own_and_without_lack_the_line(files):
    asked = jsonl(files / QUESTIONS)
    assert [q.prompt for q in textvqa(files).questions] == [row["text"] for row in asked]
    for question in textvqa(files, ocr_tokens=False).questions:
        assert question.prompt == f"{question.question}\nAnswer the question using a single word or phrase."


def test_results_with_and_without_ocr_tokens_have_different_keys(files):
    with_ocr, without = textvqa(files).eval_key(), textvqa(files, ocr_tokens=False).eval_key()
    assert with_ocr["ocr_tokens"] and not without["ocr_tokens"]
    assert with_ocr["prompt_hash"] != without["prompt_hash"]
    assert with_ocr["n"] == without["n"] == 40 and with_ocr["split"] == "val"


def test_without_a_question_file_prompts_come_from_the_annotations(files):
    for image in (files / "images").iterdir():
        assert image.suffix == ".jpg"
    from_annotations = textvqa(files, questions=None, ocr_tokens=False)
    from_questions = textvqa(files, ocr_tokens=False)
    assert [q.prompt for q in from_annotations.questions] == [q.prompt for q in from_questions.questions]
    assert from_annotations.eval_key() == from_questions.eval_key()


def test_ocr_tokens_without_a_question_file_are_refused(files):
    with pytest.raises(ConfigError, match=r"eval\.textvqa\.questions"):
        textvqa(files, questions=None)


def test_the_same_question_asked_twice_about_one_image_is_matched_in_order(files):
    rows = jsonl(files / QUESTIONS)
    write_jsonl(files / QUESTIONS, [*rows, rows[0]])
    edit_annotations(files, lambda data: data.append({**data[0], "question_id": 999999, "answers": ["other"] * 10}))
    questions = textvqa(files).questions
    assert (questions[0].question_id, questions[-1].question_id) == (34602, 999999)
    assert questions[-1].answers == ("other",) * 10


def test_first_questions_only(files):
    benchmark = textvqa(files, max_questions=5)
    assert len(benchmark.questions) == 5 == benchmark.eval_key()["n"]


def test_a_question_without_annotation_is_counted_and_named(files):
    edit_annotations(files, lambda data: data.pop(0))
    with pytest.raises(DataError, match=r"no annotation \(of 40\): 1 \(9cfbac6e7687a66e: 'what is Word number 0"):
        _ = textvqa(files).questions


def test_an_annotation_that_is_not_asked_is_counted_and_named(files):
    write_jsonl(files / QUESTIONS, jsonl(files / QUESTIONS)[:-2])
    with pytest.raises(DataError, match=r"does not hold: 2 \("):
        _ = textvqa(files).questions


def test_missing_images_are_counted_and_named(files):
    images = sorted((files / "images").iterdir())
    for image in images[:7]:
        image.unlink()
    with pytest.raises(DataError, match=rf"7 \({images[0].name}, .*and 2 more\)"):
        _ = textvqa(files).questions


@pytest.mark.parametrize("image", ["../secret.jpg", "/etc/hostname"])
def test_an_image_outside_the_folder_is_not_there(files, image):
    (files / "secret.jpg").write_bytes(b"x")
    rows = jsonl(files / QUESTIONS)
    rows[3]["image"] = image
    write_jsonl(files / QUESTIONS, rows)
    with pytest.raises(DataError, match=r"1 \(.*(secret|hostname).*outside_root"):
        _ = textvqa(files).questions


def test_repeated_question_ids_are_refused(files):
    edit_annotations(files, lambda data: data[1].update(question_id=data[0]["question_id"]))
    with pytest.raises(DataError, match=r"question_id is not unique: 1 \(34602\)"):
        _ = textvqa(files).questions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": None}, "test split are not public"),
        ({"answers": ["a"] * 9}, "9 answers where the metric needs 10"),
        ({"answers": [1] * 10}, "list of texts"),
        ({"question": None}, "question missing"),
        ({"question_id": 1.5}, "question_id must be"),
    ],
)
def test_a_faulty_annotation_is_named_with_its_row(files, change, message):
    edit_annotations(files, lambda data: data[2].update(change))
    with pytest.raises(DataError, match=rf"row 2: .*{message}"):
        _ = textvqa(files).questions


@pytest.mark.parametrize("content", ["", "[]", '{"data": 3}', "\x00"])
def test_a_file_that_is_no_annotation_file_is_refused(files, content):
    (files / ANNOTATIONS).write_text(content)
    with pytest.raises(DataError, match=r"TextVQA_0\.5\.1_val\.json"):
        _ = textvqa(files).questions


def test_missing_files_are_named(files):
    (files / QUESTIONS).unlink()
    with pytest.raises(DataError, match=r"llava_textvqa_val_v051_ocr\.jsonl"):
        _ = textvqa(files).questions
    (files / ANNOTATIONS).unlink()
    with pytest.raises(DataError, match="does not exist"):
        _ = textvqa(files).questions


def test_faulty_question_lines_are_counted_and_named(files):
    with (files / QUESTIONS).open("a") as file:
        file.write(
            '{"question_id": "x", "image": "x.jpg"}\nnot json\n{"question_id": "x", "image": 3, "text": "a\\nb"}\n'
        )
        file.write('{"question_id": "x", "image": "x.jpg", "text": "one line"}\n[1]\n')
    with pytest.raises(DataError, match=r"of 45\): 5 \(line 41: 'text' is missing, line 42: "):
        _ = textvqa(files).questions


def test_questions_are_found_in_prompts_as_the_official_scorer_finds_them():
    cases = json.loads((GOLDEN.parent / "mgm" / "textvqa_m4c.json").read_text(encoding="utf-8"))["prompt_processor"]
    assert len(cases) == 7
    for case in cases:
        if "raises" in case:
            with pytest.raises(ValueError, match="no TextVQA prompt"):
                question_in(case["in"])
        else:
            assert question_in(case["in"]).lower() == case["out"]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What brand is this camera?", "brand"),
        ("what is the number on the runner?", "number"),
        ("what number is on the jersey?", "number"),
        ("how much does it cost?", "number"),
        ("What time is it?", "time or date"),
        ("what does the sign say?", "what does it say"),
        ("who is the author?", "who"),
        ("is this a stop sign?", "yes or no"),
        ("what is this?", "what"),
        ("the sign reads?", "other"),
    ],
)
def test_question_types(question, expected):
    assert question_type(question) == expected


def test_the_fingerprint_changes_with_what_changes_the_result(files):
    seen = {textvqa(files).fingerprint()}
    assert textvqa(files).fingerprint() in seen
    others = [textvqa(files, ocr_tokens=False), textvqa(files, batch_size=3), textvqa(files, max_new_tokens=5)]
    seen |= {other.fingerprint() for other in others}
    edit_annotations(files, lambda data: data[0].update(answers=["something else"] * 10))
    seen.add(textvqa(files).fingerprint())
    Image.new("RGB", (8, 8), "blue").save(files / "images" / jsonl(files / QUESTIONS)[0]["image"])
    seen.add(textvqa(files).fingerprint())
    assert len(seen) == 6


def test_summary_has_the_mean_the_types_and_a_soft_measure(files):
    benchmark = textvqa(files)
    rows = [
        {"question_type": "who", "score": 1.0, "prediction": "ann", "answers": ["ann"] * 10},
        {"question_type": "who", "score": 0.0, "prediction": "bob", "answers": ["bobby"] * 10},
        {"question_type": "brand", "score": 0.3, "prediction": "nokia", "answers": ["nokia"] * 10},
    ]
    metrics = benchmark.summarise(rows)
    assert metrics["textvqa/accuracy"] == pytest.approx(1.3 / 3)
    assert metrics["textvqa/accuracy[who]"] == 0.5 and metrics["textvqa/accuracy[brand]"] == 0.3
    assert metrics["textvqa/anls"] == pytest.approx((1 + 0.6 + 1) / 3)


def test_the_test_split_has_no_score_and_makes_a_submission(files):
    content = json.loads((files / ANNOTATIONS).read_text(encoding="utf-8"))
    content["dataset_type"] = "test"
    for row in content["data"]:
        del row["answers"]
    (files / ANNOTATIONS).write_text(json.dumps(content), encoding="utf-8")
    benchmark = textvqa(files)
    rows = [
        {"question_id": q.question_id, "question_type": q.question_type, "prediction": "The Sign", "answers": []}
        for q in benchmark.questions
    ]
    assert not benchmark.is_scored and benchmark.summarise(rows) == {"textvqa/answered": 40.0}
    submission = benchmark.submission(rows)
    assert submission.name == "textvqa_test_results.json"
    assert json.loads(submission.content)[0] == {"question_id": rows[0]["question_id"], "answer": "sign"}


def test_a_split_with_answers_makes_no_submission(files):
    assert textvqa(files).submission([]) is None
