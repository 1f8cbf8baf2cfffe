"""Pages of wrong answers: what is on them, in which order, how much at most, and no markup out of an answer."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import MAKERS
from PIL import Image

from mgm_exp import page
from mgm_exp.cli import main
from mgm_exp.errors import DataError, UserError
from mgm_exp.evaluate.gallery import write_gallery

HOSTILE = '"><img src=x onerror=alert(1)></q><script>alert(2)</script>\u202e'


def row(number: int, score: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "question_id": number,
        "image_id": f"i{number}",
        "image": "1.png",
        "question": f"Q{number}?",
        "question_type": "colour",
        "prediction": f"said {number}",
        "answers": ["red"] * 9 + ["dark red"],
        "score": score,
    } | changes


def put(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / "predictions" / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return file


def shown(tmp_path: Path, rows: list[dict[str, Any]], name: str = "textvqa", **options: Any) -> str:
    out = tmp_path / "page.html"
    options = {"picture": lambda _: None, "benchmark": name, "label": "a run"} | options
    write_gallery(put(tmp_path, name, rows), out, **options)
    return out.read_text(encoding="utf-8")


def test_the_worst_answers_of_each_type_come_first_and_right_ones_not_at_all(tmp_path):
    rows = [row(1, 0.9), row(2, 0.0), row(3, 1.0), row(4, 0.3), row(5, 0.0, question_type="text")]
    text = shown(tmp_path, rows)
    places = [text.index(f"Q{number}?") for number in (2, 4, 1)]
    assert places == sorted(places)
    assert "Q3?" not in text
    assert "accepted: red ×9, dark red" in text
    assert text.index('id="type-0"') < text.index("colour</h2>") < text.index("text</h2>")  # it lost more points


def test_the_number_of_pictures_is_bounded_and_what_is_left_out_is_said(tmp_path):
    asked = []

    def picture(one: dict[str, Any]) -> bytes:
        asked.append(one["question_id"])
        return page.thumbnail(Image.new("RGB", (900, 300)), 184)

    rows = [row(n, 0.0, question_type=f"type {n % 40}") for n in range(400)]
    text = shown(tmp_path, rows, picture=picture, per_type=3)
    assert len(asked) == text.count("<img") == 24 * 3
    assert "10 of 10 lost points; the worst 3:" in text and "16 more types" in text


def test_memory_does_not_grow_with_the_number_of_answers(tmp_path):
    rows = [row(n, 0.0, prediction="x" * 2000, question_type=str(n % 5)) for n in range(1000)]
    file = put(tmp_path, "textvqa", rows)
    del rows
    tracemalloc.start()
    write_gallery(file, tmp_path / "page.html", lambda _: None, benchmark="textvqa", label="a run")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < file.stat().st_size / 4


def test_nothing_in_an_answer_becomes_markup(tmp_path):
    options = {"A": HOSTILE, "B": "b"}
    one = row(1, 0.0, question=HOSTILE, prediction=HOSTILE, answers=[HOSTILE], question_type=HOSTILE, image_id=HOSTILE)
    text = shown(tmp_path, [one, {**one, "question_id": HOSTILE, "choice": None, "options": options}])
    assert "<img src=x" not in text and "<script>alert" not in text and "\u202e" not in text
    assert "&lt;script&gt;alert(2)" in text and "no option can be read" in text


def circular(base: int, said: list[str]) -> list[dict[str, Any]]:
    """A question in four orders of its options; the right one is D, C, B, A in turn."""
    texts = ["cat", "dog", "cow", "horse"]
    found = []
    for turn, answer in enumerate(said):
        options = dict(zip("ABCD", texts[turn:] + texts[:turn], strict=True))
        right = "DCBA"[turn]
        found.append(
            row(
                base + 1_000_000 * turn,
                float(answer == right),
                image_id=str(base),
                question=f"Q{base}?",
                prediction=answer,
                answers=[right],
                choice=answer,
                options=options,
            )
        )
    return found


def test_a_circular_question_is_shown_once_with_all_its_passes(tmp_path):
    rows = circular(1, ["D", "C", "B", "A"]) + circular(2, ["D", "C", "B", "B"]) + circular(3, ["A", "A", "A", "A"])
    text = shown(tmp_path, sorted(rows, key=lambda one: one["question_id"]), name="mmbench_cn")
    assert "Q1?" not in text and text.count("Q2?") == text.count("Q3?") == 1
    assert text.index("Q3?") < text.index("Q2?")  # one pass right, and three
    card = text[text.index("Q2?") :].split("</ul>")[0]
    assert re.findall(r"right: (\w)\. horse", card) == list("DCBA")
    assert (card.count(">right<"), card.count(">wrong<")) == (3, 1)
    assert "33.3%" in text  # right in every order


def test_answers_that_a_server_scores_have_no_page(tmp_path):
    assert (
        write_gallery(
            put(tmp_path, "vqav2", [row(1, None)]), tmp_path / "x.html", lambda _: None, benchmark="vqav2", label=""
        )
        == 0
    )
    assert not (tmp_path / "x.html").exists()


def test_a_damaged_line_and_an_unknown_type_are_named(tmp_path):
    file = put(tmp_path, "textvqa", [row(1, 0.0)])
    with pytest.raises(UserError, match=r"no questions of type 'size'; there are colour"):
        shown(tmp_path, [row(1, 0.0)], only="size")
    file.write_text(file.read_text() + '{"question_id": 2}\n')
    with pytest.raises(DataError, match=r"textvqa\.jsonl, line 2 is damaged"):
        write_gallery(file, tmp_path / "x.html", lambda _: None, benchmark="textvqa", label="")


def test_the_verb_makes_pages_anew_from_the_files_of_a_run(tmp_path, capsys):
    run = tmp_path / "runs" / "mine" / "1"
    Image.new("RGB", (60, 40), (200, 0, 0)).save(put(run, "textvqa", [row(1, 0.0), row(2, 1.0)]).parent / "1.png")
    put(run, "textvqa.blur3", [row(1, 0.0, image="../2.png")])
    Image.new("RGB", (9, 9)).save(run / "2.png")
    (run / "config.yaml").write_text(f"eval:\n  textvqa:\n    images: {run / 'predictions'}\n")
    assert main(["gallery", str(run)]) == 0
    assert "textvqa: 1 questions lost points" in capsys.readouterr().out
    assert (run / "galleries" / "textvqa.html").read_text().count("data:image/jpeg") == 1
    assert "data:image" not in (run / "galleries" / "textvqa.blur3.html").read_text()  # it leads out of the folder
    assert main(["gallery", str(run), "--benchmark", "textvqa", "--type", "colour", "--max", "1"]) == 0
    assert (run / "galleries" / "textvqa-colour.html").is_file()
    assert main(["gallery", str(run), "--benchmark", "pope"]) == 2
    assert main(["gallery", str(run), "--type", "colour"]) == 2
    assert main(["gallery", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no answers to 'pope'; there are textvqa" in said and "--type needs --benchmark" in said
    assert "holds no predictions" in said


def test_options_stand_beside_the_letter_that_was_read(benchmark_of, tmp_path):
    benchmark = benchmark_of("mmbench", **MAKERS["mmbench"](tmp_path))
    question = benchmark.questions[0]
    assert benchmark.reading("B", question) == {"choice": "B", "options": dict(question.choices)}
