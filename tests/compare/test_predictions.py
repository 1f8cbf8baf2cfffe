"""Reading predictions: quick for repeated lines, and never different from parsing them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import write_run

from mgm_exp.compare import predictions as room
from mgm_exp.compare.predictions import PairingError, Predictions, read_many, read_predictions


def line(number: int, prediction: str = "a", score: object = 1.0, **more: object) -> str:
    row = {
        "question_id": number,
        "image_id": f"i{number}",
        "question": "what?",
        "question_type": "read",
        "prompt_hash": "00",
        "prediction": prediction,
        "answers": ["a", "b"],
        "score": score,
        "model_fingerprint": "ff",
    }
    return json.dumps(row | more)


def written(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{one}\n" for one in lines), encoding="utf-8")
    return path


def scores(read: Predictions | PairingError) -> list[float]:
    assert isinstance(read, Predictions), read
    return read.scores.tolist()


def test_files_of_the_same_questions_share_them(tmp_path):
    a = written(tmp_path / "a", line(2), line(1, score=0.3))
    b = written(tmp_path / "b", line(1, "other", 0.6, model_fingerprint="ee"), line(2, "y", 0.0))
    first, second = read_many([a, b])
    assert first.questions is second.questions and first.ids == ("1", "2")
    assert scores(first) == [0.3, 1.0] and scores(second) == [0.6, 0.0]


TEXTS = st.text(max_size=12) | st.sampled_from(
    ['", "score": 0.3, "x": "', '"prediction": "', '\\", "score": 1.0', '"score"', "\u2028", "a\\", '"', "{}"]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.sampled_from([0, 1, 0.0, 0.3, 1.0, 1e-5, 0.9])), min_size=2, max_size=6), st.data())
def test_a_second_file_is_read_as_if_it_were_the_first(tmp_path_factory, answers, data):
    folder = tmp_path_factory.mktemp("lines")
    ascii_only = data.draw(st.booleans())

    def text(prediction, score):
        row = json.loads(line(7, prediction, score))
        return json.dumps(row, ensure_ascii=ascii_only)

    paths = [written(folder / str(k), text(*answer)) for k, answer in enumerate(answers)]
    for path, (_, score), read in zip(paths, answers, read_many(paths), strict=True):
        assert scores(read) == [float(score)] == read_predictions(path).scores.tolist()


@pytest.mark.parametrize(
    "second",
    [
        '{"question_id": 1, "image_id": "i1", "prediction": "a", "meta": {"score": 0.9}, "score": 0.3}',
        '{"question_id": 1, "image_id": "i1", "score": 0.3, "prediction": "a"}',
        '{"question_id": 1, "image_id": "i1", "score": 0.3}',
        '{"question_id": 1, "image_id": "i1", "prediction": "a", "score": 0.3 }',
    ],
)
def test_unusual_lines_are_parsed(tmp_path, second):
    paths = [written(tmp_path / str(k), second) for k in range(3)]
    assert [scores(read) for read in read_many(paths)] == [[0.3]] * 3


@pytest.mark.parametrize(
    "bad",
    [
        line(1, score=2.0),
        line(1, score=float("nan")),
        line(1)[:-1],
        line(1).replace('"score": 1.0', '"score": 1_0'),
        line(1).replace('"score": 1.0', '"score": nan'),
        "[1]",
        line(1) + ", " + line(2),
        line(1).replace('"question_id": 1, ', ""),
    ],
)
def test_a_damaged_line_is_named_also_after_good_files(tmp_path, bad):
    good = written(tmp_path / "good", line(0), line(1))
    damaged = written(tmp_path / "damaged", line(0), bad)
    read = read_many([good, damaged, good])
    assert isinstance(read[1], PairingError) and "line 2 is damaged" in str(read[1])
    assert scores(read[0]) == scores(read[2]) == [1.0, 1.0]


def test_missing_empty_and_doubled_files_are_errors_in_their_place(tmp_path):
    empty, doubled = written(tmp_path / "empty"), written(tmp_path / "doubled", line(1), line(1))
    read = read_many([tmp_path / "none", empty, doubled])
    assert [type(one) for one in read] == [PairingError] * 3
    assert ["cannot be read" in str(read[0]), "is empty" in str(read[1]), "twice" in str(read[2])] == [True] * 3


def test_other_answers_are_other_questions(tmp_path):
    a = written(tmp_path / "a", line(1))
    b = written(tmp_path / "b", line(1, answers=["a", "c"]))
    first, second = read_many([a, b])
    assert first.questions.ids == second.questions.ids and first.questions.asked != second.questions.asked


def test_other_processes_read_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_WORTH_IT", 0)
    monkeypatch.setattr(room, "_FILES_A_TASK", 2)
    generator = np.random.default_rng(0)
    paths = [
        write_run(tmp_path / str(k), generator.random(20).round(1)) / "predictions" / "demo.jsonl" for k in range(5)
    ]
    paths[3].write_text("{")
    seen = []
    here, there = read_many(paths), read_many(paths, 2, lambda *moved: seen.append(moved))
    assert [str(a) if isinstance(a, PairingError) else scores(a) for a in here] == [
        str(b) if isinstance(b, PairingError) else scores(b) for b in there
    ]
    assert there[0].questions is there[4].questions
    assert seen[-1] == ("reading predictions", 5, 5)
