"""Every benchmark from files of its true shape: questions, prompts, scores, answers of a real (tiny, random) model."""

from __future__ import annotations

import inspect
import io
import json
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmark_files import MAKERS, mmbench_rows, mmmu_rows, picture, put, put_lines, put_parquet, put_tsv

from mgm_exp.config import BENCHMARKS, JudgeConfig, MmBenchRows
from mgm_exp.errors import ConfigError, DataError
from mgm_exp.evaluate.benchmarks import CLASSES, Benchmark, Demo, Settings
from mgm_exp.evaluate.generate import evaluate

DATA = Path(__file__).parents[1] / "data" / "eval"
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def scored(benchmark: Benchmark, answers: dict[Any, str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and metrics of given answers, by question id."""
    rows = []
    for question in benchmark.questions:
        said = answers[question.question_id]
        rows.append(
            {
                "question_id": question.question_id,
                "image_id": question.image_id,
                "question_type": question.question_type,
                "prediction": said,
                "answers": list(question.answers),
                "score": benchmark.score(said, question) if question.answers else None,
                **benchmark.reading(said, question),
            }
        )
    return rows, benchmark.summarise(rows)


def test_every_benchmark_of_the_configuration_is_made_by_a_class_and_by_a_test():
    assert {*CLASSES, "demo"} == set(BENCHMARKS)
    assert {*MAKERS, "textvqa", "demo"} == set(BENCHMARKS)


def test_a_benchmark_that_cannot_be_configured_is_none():
    assert not any(inspect.isabstract(kind) for kind in [*CLASSES.values(), Demo])

    class Half(Benchmark):
        def read(self):
            return []

    with pytest.raises(TypeError, match="configured"):
        Half(Path(), Settings())


@pytest.mark.parametrize("name", MAKERS)
def test_a_benchmark_runs_from_its_files_to_its_scores(name, model, processor, benchmark_of, tmp_path):
    benchmark = benchmark_of(name, **MAKERS[name](tmp_path / "files"), max_new_tokens=3)
    result = evaluate(model, processor, benchmark, tmp_path / "out", model_fingerprint="m")
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == result.n == benchmark.eval_key()["n"] > 0
    scores = [row["score"] for row in rows]
    assert result.metrics[f"{name}/accuracy"] == pytest.approx(sum(scores) / len(scores))
    assert all(key.startswith(f"{name}/") for key in result.metrics)
    assert all(isinstance(value, float) for value in result.metrics.values())
    assert all(row["answers"] and row["prompt_hash"] for row in rows)
    again = benchmark_of(name, **MAKERS[name](tmp_path / "files"), max_new_tokens=3)
    assert again.fingerprint() == benchmark.fingerprint()


@pytest.mark.parametrize("name", MAKERS)
def test_the_right_answers_score_full_marks(name, benchmark_of, tmp_path):
    benchmark = benchmark_of(name, **MAKERS[name](tmp_path))
    _, metrics = scored(benchmark, {q.question_id: q.answers[0] for q in benchmark.questions})
    assert metrics[f"{name}/accuracy"] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("name", MAKERS)
def test_a_benchmark_without_its_files_says_which_are_missing(name, benchmark_of, tmp_path):
    with pytest.raises(ConfigError, match=rf"eval\.{name}\.(questions|annotations)"):
        benchmark_of(name)
    keys = MAKERS[name](tmp_path)
    for key in ("questions", "annotations"):
        if key in keys:
            with pytest.raises(DataError, match=rf"eval\.{name}\.{key}=/no/such/place is not a"):
                benchmark_of(name, **keys | {key: "/no/such/place"})


@pytest.mark.parametrize(
    "name", [name for name in MAKERS if name not in ("mmbench", "mmbench_cn", "mmmu", "mathvista")]
)
def test_a_question_without_its_image_is_named(name, benchmark_of, tmp_path):
    keys = MAKERS[name](tmp_path)
    benchmark = benchmark_of(name, **keys)
    gone = benchmark.questions[0].image
    (benchmark.image_root / gone).unlink()
    with pytest.raises(DataError, match=Path(gone).stem):
        _ = benchmark_of(name, **keys).questions


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("mme", "pope")])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\x00", b'{"a": 1}\n', b"[" * 100_000])
def test_a_file_of_another_form_is_refused(name, content, benchmark_of, tmp_path):
    keys = MAKERS[name](tmp_path)
    key = "annotations" if name == "captions" else "questions"
    path = Path(keys[key])
    if path.is_dir():
        path = next(path.rglob("validation*.parquet"))
    path.write_bytes(content)
    with pytest.raises(DataError):
        _ = benchmark_of(name, **keys).questions


def test_the_first_questions_have_a_key_of_their_own(benchmark_of, tmp_path):
    keys = MAKERS["pope"](tmp_path)
    everything, first = benchmark_of("pope", **keys), benchmark_of("pope", **keys, max_questions=2)
    assert (everything.eval_key()["n"], first.eval_key()["n"]) == (4, 2)
    assert everything.eval_key()["prompt_hash"] != first.eval_key()["prompt_hash"]


# -- VQAv2, OK-VQA -----------------------------------------------------------------------------------------------------


def test_vqa_scores_what_was_said_and_also_what_the_server_will_see(benchmark_of, tmp_path):
    benchmark = benchmark_of("vqav2", **MAKERS["vqav2"](tmp_path))
    rows, metrics = scored(benchmark, {10: "Red.", 11: "green", 12: "no idea"})
    assert [row["score"] for row in rows] == [0.0, 1.0, 0.0]
    assert metrics["vqav2/accuracy"] == pytest.approx(1 / 3)
    assert metrics["vqav2/accuracy_normalized"] == pytest.approx(2 / 3)
    assert metrics["vqav2/accuracy[other]"] == metrics["vqav2/question[what color is the]"] == pytest.approx(1 / 3)
    submission = benchmark.submission(rows)
    assert submission.name == "vqav2_val2014_results.json"
    assert json.loads(submission.content)[0] == {"question_id": 10, "answer": "red"}


def test_okvqa_has_its_categories_by_name(benchmark_of, tmp_path):
    benchmark = benchmark_of("okvqa", **MAKERS["okvqa"](tmp_path))
    assert {q.question_type for q in benchmark.questions} == {"Vehicles and Transportation"}
    assert benchmark.questions[1].prompt == f"What colour is thing 1?\n{SHORT}"
    assert benchmark.questions[1].image == "COCO_val2014_000000000001.jpg"


def test_a_split_without_answers_makes_a_submission_and_no_score(model, processor, benchmark_of, tmp_path):
    keys = MAKERS["vqav2"](tmp_path / "files") | {"annotations": None}
    benchmark = benchmark_of("vqav2", **keys, max_new_tokens=2)
    result = evaluate(model, processor, benchmark, tmp_path / "out", model_fingerprint="m")
    assert result.metrics == {"vqav2/answered": 3.0} and result.standard_error is None
    answers = json.loads(result.submission.read_text())
    assert [answer["question_id"] for answer in answers] == [10, 11, 12]
    row = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert row["score"] is None and row["answers"] == []


@pytest.mark.parametrize("left_out", ["questions", "annotations"])
def test_vqa_questions_and_annotations_must_be_of_the_same_split(left_out, benchmark_of, tmp_path):
    keys = MAKERS["vqav2"](tmp_path)
    path = Path(keys[left_out])
    content = json.loads(path.read_text())
    content[left_out].pop()
    put(path, content)
    with pytest.raises(DataError, match=r": 1 \(.*12"):
        _ = benchmark_of("vqav2", **keys).questions


def test_test_dev_has_the_images_of_test(benchmark_of, tmp_path):
    keys = MAKERS["vqav2"](tmp_path) | {"annotations": None}
    path = Path(keys["questions"])
    put(path, json.loads(path.read_text()) | {"data_subtype": "test-dev2015"})
    for image in (tmp_path / "images").iterdir():
        image.rename(image.with_name(image.name.replace("val2014", "test2015")))
    assert benchmark_of("vqav2", **keys).questions[2].image == "COCO_test2015_000000000002.jpg"


# -- GQA ---------------------------------------------------------------------------------------------------------------


def golden_gqa(benchmark_of, tmp_path, consistency: bool) -> Benchmark:
    for image in {
        row["imageId"] for row in json.loads((DATA / "gqa_files/testdev_balanced_questions.json").read_text()).values()
    }:
        put(tmp_path / f"{image}.jpg", picture())
    return benchmark_of(
        "gqa",
        questions=str(DATA / "gqa_files/testdev_balanced_questions.json"),
        choices=str(DATA / "gqa_files/testdev_balanced_choices.json"),
        images=str(tmp_path),
        consistency=consistency,
    )


@pytest.mark.parametrize("consistency", [False, True])
def test_gqa_gives_the_official_scores(consistency, benchmark_of, tmp_path):
    official = json.loads((DATA / "gqa_exact.json").read_text())
    expected = official["scores_with_consistency" if consistency else "scores"]
    benchmark = golden_gqa(benchmark_of, tmp_path, consistency)
    lines = (DATA / "gqa_files/answers_merge.jsonl").read_text().splitlines()
    answers = {row["question_id"]: row["text"] for row in map(json.loads, lines)}
    rows, metrics = scored(benchmark, answers)
    for name in ("accuracy", "binary", "open", "validity", "plausibility"):
        assert 100 * metrics[f"gqa/{name}"] == pytest.approx(expected[name], abs=1e-9)
    assert metrics["gqa/distribution"] == pytest.approx(expected["distribution"], abs=1e-12)
    assert ("gqa/consistency" in metrics) is consistency
    if consistency:
        assert 100 * metrics["gqa/consistency"] == pytest.approx(expected["consistency"], abs=1e-9)
    for name, key in (
        ("structural", "accuracyPerStructuralType"),
        ("semantic", "accuracyPerSemanticType"),
        ("words", "accuracyPerLength"),
        ("steps", "accuracyPerSteps"),
    ):
        for part, value in expected[key].items():
            assert 100 * metrics[f"gqa/{name}[{part}]"] == pytest.approx(value["percent"], abs=1e-9)
    for row in rows:
        assert row["score"] == float(official["per_question"][row["question_id"]]["correct"])
    assert benchmark.eval_key()["n"] == 108


def test_entailed_questions_are_asked_but_do_not_count(model, processor, benchmark_of, tmp_path):
    keys = MAKERS["gqa"](tmp_path / "files")
    benchmark = benchmark_of("gqa", **keys, consistency=True, max_new_tokens=2)
    result = evaluate(model, processor, benchmark, tmp_path / "out", model_fingerprint="m")
    counted = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    others = (tmp_path / "out" / "uncounted.jsonl").read_text().splitlines()
    assert (len(counted), len(others), result.n) == (3, 1, 3)
    assert benchmark.eval_key() == benchmark_of("gqa", **keys, max_new_tokens=2).eval_key()


def test_consistency_needs_the_entailed_questions(benchmark_of, tmp_path):
    keys = MAKERS["gqa"](tmp_path)
    content = json.loads(Path(keys["questions"]).read_text())
    del content["09"]
    put(Path(keys["questions"]), content)
    assert len(benchmark_of("gqa", **keys).questions) == 3
    with pytest.raises(DataError, match=r"entail: 1 \(09\).*val_all_questions"):
        _ = benchmark_of("gqa", **keys, consistency=True).questions


def test_the_first_questions_of_gqa_bring_what_they_entail(benchmark_of, tmp_path):
    keys = MAKERS["gqa"](tmp_path)
    benchmark = benchmark_of("gqa", **keys, consistency=True, max_questions=1)
    assert [q.question_id for q in benchmark.questions] == ["00", "09"]
    _, metrics = scored(benchmark, {"00": "Red.", "09": "green"})
    assert (metrics["gqa/accuracy"], metrics["gqa/consistency"]) == (1.0, 0.0)


# -- MMBench -----------------------------------------------------------------------------------------------------------


def test_mmbench_gives_the_three_official_accuracies(benchmark_of):
    official = json.loads((DATA / "mmbench_circular.json").read_text())
    benchmark = benchmark_of("mmbench", questions=str(DATA / "mmbench_files/mmbench_dev_synthetic.tsv"))
    answers = {
        row["index"]: row["prediction"] for row in json.loads((DATA / "mmbench_files/predictions.json").read_text())
    }
    rows, metrics = scored(benchmark, answers)
    report = {name: values[0] for name, values in official["report"].items()}
    assert benchmark.split == report.pop("split")
    assert metrics["mmbench/circular_accuracy"] == pytest.approx(report.pop("Overall"), abs=1e-12)
    for category, value in report.items():
        assert metrics[f"mmbench/circular_accuracy[{category}]"] == pytest.approx(value, abs=1e-12)
    assert metrics["mmbench/first_pass_accuracy"] == official["vanilla_first_pass"]["accuracy"]
    assert metrics["mmbench/all_rows_accuracy"] == pytest.approx(official["vanilla_all_rows"]["accuracy"], abs=1e-12)
    assert metrics["mmbench/accuracy"] == pytest.approx(metrics["mmbench/all_rows_accuracy"])
    for row in rows:
        assert row["score"] == official["vanilla_all_rows"]["per_index"][str(row["question_id"])]
    assert metrics["mmbench/unreadable"] == sum(row["choice"] is None for row in rows) / 87


def test_the_first_pass_alone_has_no_circular_score(benchmark_of):
    official = json.loads((DATA / "mmbench_circular.json").read_text())
    file = str(DATA / "mmbench_files/mmbench_dev_synthetic.tsv")
    benchmark = benchmark_of("mmbench", questions=file, rows=MmBenchRows.first)
    answers = {
        row["index"]: row["prediction"] for row in json.loads((DATA / "mmbench_files/predictions.json").read_text())
    }
    _, metrics = scored(benchmark, answers)
    assert metrics["mmbench/accuracy"] == metrics["mmbench/first_pass_accuracy"] == 0.625
    assert not any("circular" in name for name in metrics)
    assert len(benchmark.questions) == official["n_questions"]


@pytest.mark.parametrize(("name", "answers"), [("mmbench", "mmbench_answers"), ("mmbench_cn", "mmbench_answers_cn")])
def test_mmbench_prompts_are_the_official_ones(name, answers, benchmark_of):
    folder = DATA.parent / "mgm" / "eval"
    benchmark = benchmark_of(name, questions=str(folder / "mmbench.tsv"), rows=MmBenchRows.first)
    asked = {q.question_id: q.prompt for q in benchmark.questions}
    rows = [json.loads(line) for line in (folder / f"{answers}.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["question_id"] in asked:
            wanted = row["full_prompt"].split("<image>\n")[1].split("<end_of_turn>")[0]
            assert asked[row["question_id"]] == wanted
    assert set(asked) == {10, 11}


def cells_of(workbook: bytes) -> list[list[str]]:
    """A sheet's cells by an XML parser of its own."""
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    with zipfile.ZipFile(io.BytesIO(workbook)) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    table: list[list[str]] = []
    for row in sheet.iter(f"{space}row"):
        cells = {cell.get("r").rstrip("0123456789"): "".join(cell.itertext()) for cell in row.iter(f"{space}c")}
        table.append([cells.get(chr(ord("A") + k), "") for k in range(9)])
    return table


def test_the_mmbench_workbook_has_the_columns_of_the_official_one(benchmark_of, tmp_path):
    import csv

    folder = DATA.parent / "mgm" / "eval"
    with (folder / "mmbench_submission.csv").open(encoding="utf-8", newline="") as file:
        official = list(csv.reader(file))
    rows = [line.split("\t") for line in (folder / "mmbench.tsv").read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if row[0] != "1000010"]
    put(tmp_path / "mmbench.tsv", "".join("\t".join(row) + "\n" for row in kept))
    benchmark = benchmark_of("mmbench", questions=str(tmp_path / "mmbench.tsv"))
    said = {int(row[0]): row[6] for row in official[1:]}
    answered, _ = scored(benchmark, said)
    table = cells_of(benchmark.submission(answered).content)
    wanted = [row for row in official if row[0] != "1000010"]
    assert table == wanted


def test_a_workbook_holds_no_formula_and_nothing_that_xml_refuses(benchmark_of, tmp_path):
    benchmark = benchmark_of("mmbench", **MAKERS["mmbench"](tmp_path))
    rows, _ = scored(benchmark, {q.question_id: "=1+1 \x15 <&> \ud800" for q in benchmark.questions})
    content = benchmark.submission(rows).content
    assert cells_of(content)[1][6] == "=1+1  <&> "
    assert content == benchmark.submission(rows).content
    sheet = zipfile.ZipFile(io.BytesIO(content)).read("xl/worksheets/sheet1.xml")
    assert b"<f>" not in sheet


def mmbench_with(benchmark_of, tmp_path, change) -> Benchmark:
    rows = mmbench_rows()
    change(rows)
    return benchmark_of("mmbench", questions=str(put_tsv(tmp_path / "changed.tsv", rows)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.pop(1), r"without one row for each rotation.*4 \(rows for \[0, 2\] of 3"),
        (lambda rows: rows[0].update(answer="D"), "'D' is none of the options A, B, C"),
        (lambda rows: rows[0].update(image=""), "index 4: no image"),
        (lambda rows: rows[0].update(image="!" * 100), "line 2: .*base64"),
        (lambda rows: rows[0].update(image="QUJD" * 30), "line 2: no image of a known format"),
        (lambda rows: rows[1].update(image=99), "index 1000004: no image"),
        (lambda rows: rows[0].update(index="x"), "line 2: invalid literal"),
        (lambda rows: rows[1].update(index=4), "stands there twice"),
        (lambda rows: [row.pop("B") for row in rows], r"lacks the columns \['b'\]"),
    ],
)
def test_a_damaged_mmbench_file_is_refused_with_the_place(change, says, benchmark_of, tmp_path):
    with pytest.raises(DataError, match=says):
        _ = mmbench_with(benchmark_of, tmp_path, change).questions


@pytest.mark.parametrize("empty", ["", "nan", "NA", "None", " "])
def test_options_end_at_the_first_empty_one(empty, benchmark_of, tmp_path):
    benchmark = mmbench_with(
        benchmark_of, tmp_path, lambda rows: [row.update(C=row["C"] or empty, hint=empty) for row in rows]
    )
    assert list(benchmark.by_id[7].choices) == ["A", "B"] and list(benchmark.by_id[4].choices) == ["A", "B", "C"]
    assert benchmark.by_id[7].prompt == f"What is in picture 7?\nA. one\nB. two\n{LETTER}"


def test_mmbench_images_are_kept_once_and_shared_by_rotations(benchmark_of, tmp_path):
    benchmark = benchmark_of("mmbench", **MAKERS["mmbench"](tmp_path / "files"))
    images = {q.question_id: q.image for q in benchmark.questions}
    assert images[4] == images[1000004] == images[2000004] != images[7]
    assert (benchmark.image_root / images[4]).read_bytes() == picture(4)
    assert len(list(benchmark.image_root.iterdir())) == 2


def test_the_first_questions_of_mmbench_bring_their_rotations(benchmark_of, tmp_path):
    benchmark = benchmark_of("mmbench", **MAKERS["mmbench"](tmp_path), max_questions=1)
    assert [q.question_id for q in benchmark.questions] == [4, 1000004, 2000004]


def test_a_mmbench_test_file_without_answers_is_not_scored(benchmark_of, tmp_path):
    benchmark = mmbench_with(benchmark_of, tmp_path, lambda rows: [row.pop("answer") for row in rows])
    rows, metrics = scored(benchmark, {q.question_id: "A" for q in benchmark.questions})
    assert metrics == {"mmbench/answered": 5.0}
    assert [row[6] for row in cells_of(benchmark.submission(rows).content)] == ["prediction", *"AAAAA"]


# -- captions ----------------------------------------------------------------------------------------------------------


def test_caption_scores_are_those_of_the_corpus(benchmark_of, tmp_path):
    benchmark = benchmark_of("captions", **MAKERS["captions"](tmp_path))
    said = {0: "a red square", 1: "A green square!", 2: "a yellow dog"}
    rows, metrics = scored(benchmark, said)
    assert metrics["captions/rouge_l"] == pytest.approx(metrics["captions/accuracy"])
    assert metrics["captions/cider"] > 1 and 0 < metrics["captions/bleu4"] < 1
    assert json.loads(benchmark.submission(rows).content)[1] == {"image_id": 1, "caption": "A green square!"}


def test_captions_without_references_make_a_submission(benchmark_of, tmp_path):
    keys = MAKERS["captions"](tmp_path)
    path = Path(keys["annotations"])
    content = json.loads(path.read_text())
    del content["annotations"]
    put(path, content)
    benchmark = benchmark_of("captions", **keys)
    assert not benchmark.is_scored and len(benchmark.questions) == 3


# -- MME, POPE ---------------------------------------------------------------------------------------------------------


def test_mme_counts_questions_and_images(benchmark_of, tmp_path):
    benchmark = benchmark_of("mme", **MAKERS["mme"](tmp_path))
    first = benchmark.questions[0]
    assert first.prompt == f"Is it red?\n{SHORT}" and first.question_type == "count"
    _, metrics = scored(
        benchmark,
        {
            q.question_id: "Yes, it is." if q.question_type == "count" else q.answers[0].upper()
            for q in benchmark.questions
        },
    )
    assert metrics["mme/score[count]"] == 50.0 and metrics["mme/score[artwork]"] == 200.0
    assert metrics["mme/accuracy"] == 0.75 and metrics["mme/accuracy_plus"] == 0.5
    assert "mme/perception" not in metrics, "the sum of two tasks is no perception score"
    assert metrics["mme/recall"] == 1.0 and metrics["mme/precision"] == pytest.approx(2 / 3)
    assert metrics["mme/confusion[no read as yes]"] == 1.0


def test_mme_sums_are_there_when_all_tasks_are(benchmark_of, tmp_path):
    from mgm_exp.evaluate.benchmarks.mme import COGNITION, PERCEPTION

    for task in (*PERCEPTION, *COGNITION):
        put(tmp_path / task / "1.jpg", picture())
        put(tmp_path / task / "1.txt", "Is it?\tYes\nIs it not?\tNo\n")
    benchmark = benchmark_of("mme", questions=str(tmp_path))
    _, metrics = scored(benchmark, {q.question_id: q.answers[0] for q in benchmark.questions})
    assert (metrics["mme/perception"], metrics["mme/cognition"]) == (2000.0, 800.0)


def test_mme_reads_parquet_files_too(benchmark_of, tmp_path):
    image = {"bytes": picture(), "path": None}
    rows = [
        {"question_id": "count/1.png", "image": image, "question": q, "answer": a, "category": "count"}
        for q, a in (("Two? Please answer yes or no.", "Yes"), ("Three? Please answer yes or no.", "No"))
    ]
    benchmark = benchmark_of("mme", questions=str(put_parquet(tmp_path / "data/test.parquet", rows).parent))
    _, metrics = scored(benchmark, {q.question_id: "no" for q in benchmark.questions})
    assert metrics["mme/score[count]"] == 50.0
    with pytest.raises(DataError, match="do not have exactly two questions"):
        put_parquet(tmp_path / "data/test.parquet", rows[:1])
        _ = benchmark_of("mme", questions=str(tmp_path / "data")).questions


def test_pope_ids_are_unique_across_its_files_and_f1_is_by_category(benchmark_of, tmp_path):
    benchmark = benchmark_of("pope", **MAKERS["pope"](tmp_path))
    assert [q.question_id for q in benchmark.questions] == ["adversarial/1", "adversarial/2", "random/1", "random/2"]
    _, metrics = scored(
        benchmark, {"adversarial/1": "No.", "adversarial/2": "Yes", "random/1": "A snowboard", "random/2": "yes, it is"}
    )
    assert metrics["pope/f1[adversarial]"] == 1.0 and metrics["pope/f1[random]"] == pytest.approx(2 / 3)
    assert metrics["pope/mean_f1"] == pytest.approx(5 / 6)
    assert metrics["pope/yes_share"] == 0.75 and metrics["pope/neither_share"] == 0.25


def test_a_pope_line_without_a_label_is_named(benchmark_of, tmp_path):
    keys = MAKERS["pope"](tmp_path)
    put_lines(Path(keys["questions"]) / "coco_pope_popular.json", [{"question_id": 1, "image": "x", "text": "?"}])
    with pytest.raises(DataError, match=r"coco_pope_popular\.json, line 1"):
        _ = benchmark_of("pope", **keys).questions


# -- ScienceQA, SEED-Bench, MMMU, MathVista ----------------------------------------------------------------------------


def test_scienceqa_asks_only_what_has_an_image(benchmark_of, tmp_path):
    benchmark = benchmark_of("scienceqa", **MAKERS["scienceqa"](tmp_path))
    assert [q.question_id for q in benchmark.questions] == ["1", "2"]
    assert benchmark.questions[0].prompt == (
        f"Context: N/A\nQuestion: Which is farthest north?\nOptions: (A) Maine (B) Texas\n{LETTER}"
    )
    assert [q.answers for q in benchmark.questions] == [("B",), ("A",)]


def test_scienceqa_reads_parquet_files_too(benchmark_of, tmp_path):
    row = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "Look.", "subject": "language science"}
    rows = [{"image": {"bytes": picture(), "path": "image.png"}, **row}, {"image": None, **row}]
    put_parquet(tmp_path / "data/test-00000-of-00001.parquet", rows)
    put_parquet(tmp_path / "data/train-00000-of-00001.parquet", rows * 2)
    benchmark = benchmark_of("scienceqa", questions=str(tmp_path / "data"))
    assert len(benchmark.questions) == 1 and benchmark.questions[0].answers == ("B",)
    assert len(benchmark_of("scienceqa", questions=str(tmp_path / "data"), split="train").questions) == 2


def test_seedbench_leaves_videos_out(benchmark_of, tmp_path):
    benchmark = benchmark_of("seedbench", **MAKERS["seedbench"](tmp_path))
    assert [q.question_id for q in benchmark.questions] == ["100", "101"]
    assert benchmark.questions[0].prompt == f"What is it?\nA. a thing\nB. b thing\nC. c thing\nD. d thing\n{LETTER}"
    assert {q.question_type for q in benchmark.questions} == {"Scene Understanding"}


def test_mmmu_has_choices_and_open_answers(benchmark_of, tmp_path):
    benchmark = benchmark_of("mmmu", **MAKERS["mmmu"](tmp_path))
    one, other = benchmark.questions[:2]
    assert one.prompt == f"<image 1> Who painted it?\n\n(A) Monet\n(B) Manet's\n\n\n{LETTER}"
    assert other.prompt.endswith(f"\n\n{SHORT}") and other.answers == ("4", "four")
    said = {q.question_id: "B" if q.choices else "There are four of them" for q in benchmark.questions}
    _, metrics = scored(benchmark, said | {"validation_Math_1": "hard to say"})
    assert metrics["mmmu/domain[Science]"] == 0.5 and metrics["mmmu/domain[Art and Design]"] == 1.0
    assert metrics["mmmu/open"] == 1.0 and metrics["mmmu/unreadable"] == 0.5
    assert metrics["mmmu/several_images"] == 1.0


def test_the_mmmu_test_split_makes_a_submission(benchmark_of, tmp_path):
    benchmark = benchmark_of("mmmu", **MAKERS["mmmu"](tmp_path), split="test")
    rows, metrics = scored(benchmark, {"test_Art_1": "(B)"})
    assert metrics == {"mmmu/answered": 1.0}
    assert json.loads(benchmark.submission(rows).content) == {"test_Art_1": "B"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"options": "__import__('os').system('touch broken')"}, "Art_1: .*is no list of texts"),
        ({"options": "['a']"}, "1 options"),
        ({"answer": "E"}, "'E' is none of the options"),
        ({"image_1": None}, "image_1 is empty"),
    ],
)
def test_a_damaged_mmmu_row_is_named_and_nothing_in_it_is_run(change, says, benchmark_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = mmmu_rows()
    put_parquet(tmp_path / "Art/validation.parquet", [{**rows[0], **change}, rows[1]])
    with pytest.raises(DataError, match=says):
        _ = benchmark_of("mmmu", questions=str(tmp_path)).questions
    assert not (tmp_path / "broken").exists()


def test_mathvista_is_its_multiple_choice_part(benchmark_of, tmp_path):
    benchmark = benchmark_of("mathvista", **MAKERS["mathvista"](tmp_path))
    assert [q.question_id for q in benchmark.questions] == ["1", "2"]
    first = benchmark.questions[0]
    assert first.prompt == f"Which one is larger?\nChoices:\n(A) the left one\n(B) the right one\n{LETTER}"
    assert first.answers == ("B",) and first.question_type == "geometry problem solving"


def test_mathvista_reads_its_json_too(benchmark_of, tmp_path):
    put(tmp_path / "images/1.jpg", picture())
    row = {
        "question": "Which?",
        "image": "images/1.jpg",
        "choices": ["x", "y"],
        "answer": "x",
        "question_type": "multi_choice",
        "metadata": {"task": "vqa"},
        "query": "Hint: the letter.\nQuestion: Which?\nChoices:\n(A) x\n(B) y",
    }
    put(tmp_path / "testmini.json", {"7": row})
    benchmark = benchmark_of("mathvista", questions=str(tmp_path / "testmini.json"))
    assert benchmark.questions[0].prompt == row["query"] and benchmark.questions[0].answers == ("A",)


# -- questions of your own ---------------------------------------------------------------------------------------------


def own(benchmark_of, tmp_path, rows, **keys) -> Benchmark:
    put(tmp_path / "x.png", picture())
    put_lines(tmp_path / "own.jsonl", rows)
    return benchmark_of("custom", questions=str(tmp_path / "own.jsonl"), **keys)


def test_own_questions_take_several_metrics(benchmark_of, tmp_path):
    rows = [{"image": "x.png", "question": "Which?", "answers": ["red car", "car"], "question_id": "a"}]
    benchmark = own(benchmark_of, tmp_path, rows, metrics=["token_f1", "exact_match", "anls", "cider"])
    _, metrics = scored(benchmark, {"a": "a blue car"})
    assert metrics["custom/accuracy"] == metrics["custom/token_f1"] == pytest.approx(2 / 3)
    assert metrics["custom/exact_match"] == 0.0 and "custom/cider" in metrics


def test_own_classes_have_precision_recall_and_a_confusion_matrix(benchmark_of, tmp_path):
    rows = [{"image": "x.png", "question": "Is it?", "answer": a} for a in ("cat", "dog", "dog", "cat")]
    benchmark = own(benchmark_of, tmp_path, rows, metrics=["label", "macro_f1"], instruction=None)
    assert benchmark.questions[0].prompt == "Is it?"
    _, metrics = scored(benchmark, {1: "Cat.", 2: "It is a dog", 3: "a cat and a dog", 4: "dog"})
    assert metrics["custom/accuracy"] == 0.5
    assert metrics["custom/recall[dog]"] == metrics["custom/precision[dog]"] == 0.5
    assert metrics["custom/confusion[dog read as neither]"] == 1.0
    assert metrics["custom/macro_f1"] == pytest.approx((2 / 3 + 0.5) / 2)


def test_own_choices_may_be_answered_by_letter_or_text(benchmark_of, tmp_path):
    rows = [
        {"image": "x.png", "question": "Which?", "choices": ["cat", "dog"], "answer": "dog"},
        {"image": "x.png", "question": "Which?", "choices": {"X": "cat", "Y": "dog"}, "answer": "X"},
    ]
    benchmark = own(benchmark_of, tmp_path, rows, metrics=["choice"], instruction=LETTER)
    assert benchmark.questions[0].prompt == f"Which?\nA. cat\nB. dog\n{LETTER}"
    _, metrics = scored(benchmark, {1: "B", 2: "the dog"})
    assert metrics["custom/accuracy"] == 0.5 and metrics["custom/unreadable"] == 0.0


def test_own_questions_without_answers_are_answered_and_not_scored(benchmark_of, tmp_path):
    benchmark = own(benchmark_of, tmp_path, [{"image": "x.png", "question": "Which?"}])
    rows, metrics = scored(benchmark, {1: "This one"})
    assert metrics == {"custom/answered": 1.0}
    assert json.loads(benchmark.submission(rows).content) == [{"question_id": 1, "answer": "This one"}]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question": "?"}], "line 1: image must be a text"),
        ([{"image": "x.png", "question": "?", "answer": 3}], "answer must be a text"),
        ([{"image": "x.png", "question": "?", "answer": "a"}, {"image": "x.png", "question": "?"}], "all, or none"),
        ([{"image": "x.png", "question": "?", "answer": "z", "choices": ["a", "b"]}], "'z' is none of the choices"),
        ([{"image": "../x.png", "question": "?", "answer": "z"}], "outside_root"),
        ([{"image": "x.png", "question": "?", "answer": "z", "question_id": 1}] * 2, "not unique"),
    ],
)
def test_a_faulty_line_of_ones_own_is_named(rows, says, benchmark_of, tmp_path):
    with pytest.raises(DataError, match=says):
        _ = own(benchmark_of, tmp_path, rows).questions


def test_a_folder_without_the_files_of_a_benchmark_is_refused(benchmark_of, tmp_path):
    put(tmp_path / "x.txt", "nothing of use")
    for name, says in (("mmmu", r"validation\*\.parquet"), ("mme", "holds no folder of a task")):
        with pytest.raises(DataError, match=says):
            _ = benchmark_of(name, questions=str(tmp_path)).questions
    with pytest.raises(DataError, match=r"holds no coco_pope_\*\.json"):
        _ = benchmark_of("pope", questions=str(tmp_path), images=str(tmp_path)).questions


# -- the judge ---------------------------------------------------------------------------------------------------------


def test_a_judge_makes_another_metric(benchmark_of, tmp_path):
    keys = MAKERS["mmbench"](tmp_path)
    judged = benchmark_of("mmbench", **keys, judge=JudgeConfig("http://localhost:1/v1", "m"))
    assert judged.eval_key()["metric_version"] == "vlmevalkit-1+judge:m"
    assert judged.fingerprint() != benchmark_of("mmbench", **keys).fingerprint()
