"""Asking a real (tiny, random) MGM: official answers, equal ones in any batch, one encoding an image, resuming."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mgm_exp.errors import DataError
from mgm_exp.evaluate.benchmarks import Settings, TextVqa
from mgm_exp.evaluate.generate import evaluate, plan_batches

MGM = Path(__file__).parents[1] / "data" / "mgm"
ANSWERS = [f"answer {k}" for k in range(10)]
CONTRACT = [
    "question_id",
    "image_id",
    "question",
    "question_type",
    "prompt_hash",
    "prediction",
    "answers",
    "score",
    "model_fingerprint",
]


def make_files(folder: Path) -> None:
    """Eleven questions of different length about five images, some images asked several times."""
    (folder / "images").mkdir(parents=True)
    data, asked = [], []
    for k in range(11):
        image = f"image{k * k % 5}"
        colour = (k * k % 5 * 50, 100, 200)
        Image.new("RGB", (40 + 7 * (k % 3), 40), colour).save(folder / "images" / f"{image}.png")
        question = f"question {k} " + "what is written on this sign " * (k % 4)
        data.append({"question_id": 100 + k, "image_id": image, "question": question, "answers": ANSWERS})
        prompt = f"{question}\nReference OCR token: stop\nAnswer the question using a single word or phrase."
        asked.append({"question_id": image, "image": f"{image}.png", "text": prompt})
    (folder / "annotations.json").write_text(json.dumps({"dataset_type": "val", "data": data}))
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


def open_files(folder: Path, **settings) -> TextVqa:
    defaults = {"batch_size": 4, "max_new_tokens": 5}
    return TextVqa(
        folder / "annotations.json",
        folder / "questions.jsonl",
        folder / "images",
        True,
        Settings(**(defaults | settings)),
    )


@pytest.fixture
def files(tmp_path):
    make_files(tmp_path / "files")
    return tmp_path / "files"


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_and_accuracy_of_the_official_scripts(model, processor, tmp_path, batch_size):
    benchmark = TextVqa(
        MGM / "eval" / "textvqa_annotations.json",
        MGM / "eval" / "textvqa_questions.jsonl",
        MGM / "images",
        True,
        Settings(batch_size=batch_size, max_new_tokens=16),
    )
    result = evaluate(model, processor, benchmark, tmp_path, model_fingerprint="golden")
    official = [json.loads(line) for line in (MGM / "eval" / "textvqa_answers.jsonl").open(encoding="utf-8")]
    assert [row["prediction"] for row in rows_of(tmp_path)] == [row["text"] for row in official]
    assert f"{100 * result.metrics['textvqa/accuracy']:.2f}" == "53.33"


def test_batches_give_the_answers_of_one_question_at_a_time(model, processor, files, tmp_path):
    alone = evaluate(model, processor, open_files(files, batch_size=1), tmp_path / "1", model_fingerprint="m")
    for batch_size in (4, 11):
        out = tmp_path / str(batch_size)
        together = evaluate(model, processor, open_files(files), out, model_fingerprint="m", batch_size=batch_size)
        assert rows_of(out) == rows_of(tmp_path / "1")
        assert together.metrics == alone.metrics
    assert len({row["prediction"] for row in rows_of(tmp_path / "1")}) > 1, "a model with one answer shows nothing"


def test_rows_keep_the_contract_and_the_order_of_the_benchmark(model, processor, files, tmp_path):
    progress: list[tuple[int, int]] = []
    result = evaluate(
        model,
        processor,
        open_files(files),
        tmp_path,
        model_fingerprint="f00d",
        on_progress=lambda done, total: progress.append((done, total)),
    )
    rows = rows_of(tmp_path)
    assert all(set(CONTRACT) <= set(row) for row in rows)
    assert [row["question_id"] for row in rows] == list(range(100, 111))
    assert {row["model_fingerprint"] for row in rows} == {"f00d"}
    assert result.metrics["textvqa/accuracy"] == pytest.approx(sum(row["score"] for row in rows) / len(rows))
    assert progress == [(0, 11), (4, 11), (8, 11), (11, 11)]
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["metrics"] == result.metrics and written["eval_key"] == result.eval_key and written["n"] == 11
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["metrics.json", "predictions.jsonl"]


def test_every_image_is_encoded_once(model, processor, files, tmp_path, monkeypatch):
    encoded = []
    encode_images = model.model.encode_images

    def counting(images, images_aux):
        encoded.append(len(images))
        return encode_images(images, images_aux)

    monkeypatch.setattr(model.model, "encode_images", counting)
    evaluate(model, processor, open_files(files, batch_size=2), tmp_path, model_fingerprint="m")
    assert encoded == [8] and len(list((files / "images").iterdir())) == 3, "three images, filled up to a group"


def test_the_model_is_left_as_it_was(model, processor, files, tmp_path):
    model.train()
    try:
        evaluate(model, processor, open_files(files, max_questions=1), tmp_path, model_fingerprint="m")
        assert model.training
    finally:
        model.eval()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{repository!r}, {tests!r}]
import torch
from test_generate import MGM, evaluate, open_files
from mgm_exp.model import load_model, load_processor
torch.set_num_threads(1)
def kill_after_two_batches(done, total):
    if done >= 8:
        os.kill(os.getpid(), signal.SIGKILL)
evaluate(load_model(MGM / "model"), load_processor(MGM / "model"), open_files(Path({files!r})), Path({out!r}),
         model_fingerprint="m", on_progress=kill_after_two_batches)
"""


def test_a_killed_evaluation_continues_and_ends_with_the_same_bytes(model, processor, files, tmp_path):
    evaluate(model, processor, open_files(files), tmp_path / "whole", model_fingerprint="m")
    out = tmp_path / "killed"
    program = KILLED.format(
        repository=str(Path(__file__).parents[2]), tests=str(Path(__file__).parent), files=str(files), out=str(out)
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in out.iterdir()] == ["answers.partial.jsonl"]
    progress = []
    result = evaluate(
        model,
        processor,
        open_files(files),
        out,
        model_fingerprint="m",
        on_progress=lambda done, total: progress.append(done),
    )
    assert progress == [8, 11], "only the last batch may be asked again"
    assert (out / "predictions.jsonl").read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    assert result.n == 11


class Stopped(Exception):
    pass


def stop_after(n: int):
    def on_progress(done: int, total: int) -> None:
        if done >= n:
            raise Stopped

    return on_progress


def interrupted(model, processor, files, out, **kwargs) -> None:
    with pytest.raises(Stopped):
        evaluate(model, processor, open_files(files), out, on_progress=stop_after(4), **kwargs)


def continued(model, processor, files, out, **kwargs) -> int:
    """Answers that a second call found on disk."""
    progress: list[int] = []
    evaluate(model, processor, open_files(files), out, on_progress=lambda done, _: progress.append(done), **kwargs)
    return progress[0]


def test_a_torn_last_line_is_asked_again(model, processor, files, tmp_path):
    interrupted(model, processor, files, tmp_path, model_fingerprint="m")
    path = tmp_path / "answers.partial.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert continued(model, processor, files, tmp_path, model_fingerprint="m") == 0
    assert len(rows_of(tmp_path)) == 11


def test_answers_of_another_model_or_setting_are_not_continued(model, processor, files, tmp_path):
    interrupted(model, processor, files, tmp_path, model_fingerprint="m")
    assert continued(model, processor, files, tmp_path, model_fingerprint="other") == 0
    interrupted(model, processor, files, tmp_path / "b", model_fingerprint="m")
    assert continued(model, processor, files, tmp_path / "b", model_fingerprint="m", max_new_tokens=3) == 0
    interrupted(model, processor, files, tmp_path / "c", model_fingerprint="m")
    assert continued(model, processor, files, tmp_path / "c", model_fingerprint="m", batch_size=3) == 0


def test_a_finished_evaluation_is_asked_anew_by_a_second_call(model, processor, files, tmp_path):
    evaluate(model, processor, open_files(files), tmp_path, model_fingerprint="m")
    assert continued(model, processor, files, tmp_path, model_fingerprint="m") == 0


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_broken_image_stops_the_evaluation_and_is_named(model, processor, files, tmp_path, content):
    (files / "images" / "image4.png").write_bytes(content)
    with pytest.raises(DataError, match=r"image4\.png .* cannot be used: (zero_bytes|unreadable)"):
        evaluate(model, processor, open_files(files), tmp_path, model_fingerprint="m")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["a", "b", "c", "d"])), max_size=30),
    st.integers(1, 7),
)
def test_a_plan_asks_each_question_once_and_keeps_an_image_together(asked, batch_size):
    lengths, images = [length for length, _ in asked], [image for _, image in asked]
    plan = plan_batches(lengths, images, batch_size)
    order = [place for batch in plan for place in batch.questions]
    assert sorted(order) == list(range(len(asked)))
    assert all(len(batch.questions) == batch_size for batch in plan[:-1])
    new = [image for batch in plan for image in batch.new_images]
    assert sorted(new) == sorted(set(images))
    turns = [images[place] for place in order]
    assert sum(left != right for left, right in itertools.pairwise(turns)) == max(0, len(set(images)) - 1)
