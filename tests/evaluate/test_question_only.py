"""The guesser that never looks, and what may be asked by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mgm_exp.errors import ConfigError, DataError
from mgm_exp.evaluate.benchmarks import Demo, Settings, TextVqa, load_benchmark
from mgm_exp.evaluate.question_only import score_guesses


def conversation(*rounds: tuple[str, str]) -> dict:
    turns = [
        {"from": side, "value": text} for pair in rounds for side, text in zip(("human", "gpt"), pair, strict=True)
    ]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return {"id": "0", "image": "0.png", "conversations": turns}


ROWS = [
    conversation(("what colour is the sign?", "red"), ("what does it say?", "OPEN")),
    conversation(("What colour is the sign?", "red"), ("what does it say?", "STOP")),
    conversation(("what colour is the sign?", "blue")),
]


@pytest.fixture
def demo_folder(tmp_path):
    def annotation(k: int, question: str, answer: str) -> dict:
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"test_{k}.png")
        return {
            "question_id": k,
            "image_id": f"test_{k}",
            "question": question,
            "question_type": question.split()[1],
            "answers": [answer] * 10,
        }

    data = [
        annotation(0, "what colour is the sign?", "red"),
        annotation(1, "what colour is the sign?", "blue"),
        annotation(2, "what does it say?", "open"),
        annotation(3, "never asked before", "red"),
    ]
    (tmp_path / "test.json").write_text(json.dumps({"dataset_type": "test", "data": data}))
    return tmp_path


def test_the_most_frequent_answer_to_the_same_words_is_given_and_scored_by_the_benchmark(demo_folder):
    guessed = score_guesses(Demo(demo_folder, "test", Settings()), ROWS)
    assert guessed.metrics["demo/accuracy"] == 0.75  # red right, red wrong, OPEN (first in the alphabet), red
    assert guessed.metrics["demo/accuracy[colour]"] == 0.5
    assert (guessed.n, guessed.n_known) == (4, 3)


def test_prompts_of_real_training_data_are_matched_as_a_whole(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.jpg")
    data = [{"question_id": 1, "image_id": "a", "question": "what brand?", "answers": ["nokia"] * 10}]
    (tmp_path / "val.json").write_text(json.dumps({"dataset_type": "val", "data": data}))
    benchmark = TextVqa(tmp_path / "val.json", None, tmp_path / "images", False, Settings())
    prompt = "what brand?\nAnswer the question using a single word or phrase."
    rows = [conversation((prompt, "Nokia")), conversation(("what else?", "sony"), ("what else?", "sony"))]
    guessed = score_guesses(benchmark, rows)
    assert guessed.metrics["textvqa/accuracy"] == 1.0 and guessed.n_known == 1


def test_training_rows_without_an_answer_are_refused(demo_folder):
    with pytest.raises(DataError, match="no training answers"):
        score_guesses(Demo(demo_folder, "test", Settings()), [])


def test_demo_questions_keep_type_image_and_bare_prompt(demo_folder):
    benchmark = Demo(demo_folder, "test", Settings())
    question = benchmark.questions[2]
    assert question.prompt == question.question == "what does it say?"
    assert (question.image, question.question_type) == ("images/test_2.png", "does")
    assert benchmark.eval_key() == {
        "split": "test",
        "prompt_hash": benchmark.eval_key()["prompt_hash"],
        "n": 4,
        "ocr_tokens": False,
        "metric_version": "m4c-1",
        "max_new_tokens": 128,
    }


def test_generated_demo_data_are_a_benchmark(tmp_path):
    from mgm_exp.data.demo import write_demo

    write_demo(tmp_path, n_train=4, n_val=3, n_test=5, workers=1)
    test, val = Demo(tmp_path, "test", Settings()), Demo(tmp_path, "val", Settings())
    assert (len(test.questions), len(val.questions)) == (5, 3)
    assert test.fingerprint() != val.fingerprint()
    for question in test.questions:
        most_frequent = max(question.answers, key=question.answers.count)
        assert test.score(most_frequent, question) == 1.0
    rows = json.loads((tmp_path / "instruct.json").read_text())
    assert 0 <= score_guesses(test, rows).metrics["demo/accuracy"] <= 1


def test_benchmarks_are_found_by_name_with_the_configured_settings(compose, demo_folder):
    config = compose("eval.max_questions=2", "eval.demo.batch_size=7")
    benchmark = load_benchmark("demo", config, demo_folder)
    assert isinstance(benchmark, Demo) and len(benchmark.questions) == 2
    assert benchmark.settings == Settings(7, config.eval.demo.max_new_tokens, 2, config.data.max_megapixels)


def test_textvqa_is_found_by_name_with_its_files(compose):
    data = Path(__file__).parents[1] / "data" / "mgm"
    config = compose(
        "eval=textvqa",
        f"eval.textvqa.annotations={data}/eval/textvqa_annotations.json",
        f"eval.textvqa.questions={data}/eval/textvqa_questions.jsonl",
        f"eval.textvqa.images={data}/images",
        "eval.textvqa.batch_size=3",
    )
    benchmark = load_benchmark("textvqa", config)
    assert isinstance(benchmark, TextVqa) and benchmark.ocr_tokens and len(benchmark.questions) == 3
    assert benchmark.settings == Settings(3, 128, None, config.data.max_megapixels)


def test_what_a_benchmark_needs_is_said(compose, demo_folder):
    config = compose()
    with pytest.raises(ConfigError, match=r"allowed are demo, textvqa"):
        load_benchmark("vizwiz", config, demo_folder)
    with pytest.raises(ConfigError, match=r"eval\.textvqa\.annotations and eval\.textvqa\.images are not given"):
        load_benchmark("textvqa", config)
    with pytest.raises(ConfigError, match=r"no generated demo data"):
        load_benchmark("demo", config)
