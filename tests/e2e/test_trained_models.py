"""``mgm-exp evaluate`` and ``mgm-exp ask``: what one does with a run that has ended, and with a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.cli import main
from mgm_exp.errors import Interrupted
from mgm_exp.store import Lease

from .command_line import FAST, read, rows

TINY = Path(__file__).resolve().parents[2] / "mgm_exp" / "model" / "tiny"
SHORT = ["train.align.max_steps=0", "train.max_steps=1", "eval.demo.baselines=false", "eval.max_questions=4"]
SMALL = ["data.demo_images=12", "data.demo_questions=4", "train.global_batch_size=4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``paths.root`` with one run that ended."""
    root = tmp_path_factory.mktemp("trained") / "outputs"
    assert main(["run", *FAST, *SHORT, *SMALL, "name=one", f"paths.root={root}"]) == 0
    return root


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Path:
    """A copy of the run, which lies elsewhere than its store."""
    (folder,) = (root / "runs" / "one").iterdir()
    return Path(shutil.copytree(folder, tmp_path / "moved"))


@pytest.fixture
def own_questions(root: Path, tmp_path: Path) -> list[str]:
    """Overrides that name three questions about two images of the demo."""
    (images,) = (root / "store" / "demo").glob("*/images")
    first, second = sorted(path.name for path in images.iterdir())[:2]
    lines = [
        {"image": first, "question": "what colour is it?", "answer": "red", "type": "colour"},
        {"image": first, "question": "what shape is it?", "answer": "square", "type": "shape"},
        {"image": second, "question": "what colour is it?", "answer": "blue", "type": "colour"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return [
        f"eval.custom.questions={file}",
        f"eval.custom.images={images}",
        "eval.custom.batch_size=1",
        "eval.custom.max_new_tokens=4",
    ]


def test_what_the_run_has_scored_is_not_scored_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read(run / "result.json")
    assert main(["evaluate", str(run)]) == 0
    output = capsys.readouterr()
    assert "evaluate[demo] the trained model: reused" in output.err
    assert output.out.splitlines()[0].split() == ["benchmark", "metric", "value", "s.e.", "questions"]
    assert read(run / "result.json") == before


def test_a_run_that_was_moved_without_its_store_gets_another_benchmark(
    root: Path, run: Path, own_questions: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, table = read(run / "result.json"), read(run / "benchmarks.json")
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config.replace(str(root), str(run.parent / "gone")), encoding="utf-8")
    assert main(["evaluate", str(run), "--benchmarks", "custom", *own_questions]) == 0
    assert "evaluate[custom] the trained model: made" in capsys.readouterr().err
    result, answers = read(run / "result.json"), rows(run / "predictions" / "custom.jsonl")
    assert [row["answers"] for row in answers] == [["red"], ["square"], ["blue"]]
    assert result["metrics"]["custom/accuracy"] == pytest.approx(sum(row["score"] for row in answers) / 3)
    assert set(result["eval_keys"]) == {"demo", "custom"}
    same = {key: value for key, value in result.items() if key not in ("metrics", "eval_keys")}
    assert same == {key: before[key] for key in same}
    assert result["metrics"].items() >= before["metrics"].items()
    lines = read(run / "benchmarks.json")["lines"]
    assert lines[: len(table["lines"])] == table["lines"] and lines[-1]["benchmark"] == "custom"

    monkeypatch.setattr("mgm_exp.evaluate.answerer.MgmAnswerer.answer", None)  # nobody is asked again
    assert main(["evaluate", str(run), "--benchmarks", "custom", *own_questions]) == 0
    assert read(run / "result.json") == result and read(run / "benchmarks.json")["lines"] == lines


def test_a_stopped_evaluation_continues_and_keeps_the_benchmarks_that_were_done(
    run: Path, own_questions: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mgm_exp.evaluate.answerer import MgmAnswerer

    asked: list[int] = []
    real = MgmAnswerer.answer

    def counted(answerer: Any, prompts: Any, *rest: Any) -> list[str]:
        asked.append(len(prompts))
        return real(answerer, prompts, *rest)

    @contextmanager
    def stops_after_one(unit: str) -> Iterator[Any]:
        def move(what: str, done: int, total: int) -> None:
            if "custom" in what and done == 1:
                raise Interrupted("Stopped by SIGINT.")

        yield move

    monkeypatch.setattr(MgmAnswerer, "answer", counted)
    # A key of its own, so that no other test has made it
    command = ["evaluate", str(run), "--benchmarks", "demo,custom", *own_questions, "eval.custom.max_new_tokens=3"]
    before = (run / "benchmarks.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("mgm_exp.verbs.evaluate.progress_bar", stops_after_one)
        assert main(command) == 130
    assert f"Go on with: mgm-exp evaluate {run} --benchmarks demo,custom" in capsys.readouterr().err
    assert asked == [1]
    assert (run / "benchmarks.json").read_bytes() == before
    assert not Lease(run / ".lease").holder()
    assert main(command) == 0
    assert asked == [1, 1, 1]
    assert "evaluate[demo] the trained model: reused" in capsys.readouterr().err


def test_other_settings_replace_a_score_and_its_baselines_but_not_the_objective(run: Path) -> None:
    result = read(run / "result.json")
    stale = {"demo/baseline_base": 0.5, "demo/validation": 0.25, "demo/accuracy[gone]": 0.1, "other/accuracy": 1.0}
    stale |= {"demo.blur3/accuracy": 0.5, "demo.blur3/drop_ci_low": 0.1}
    (run / "result.json").write_text(json.dumps({**result, "metrics": {**result["metrics"], **stale}, "objective": 7}))
    assert main(["evaluate", str(run), "--benchmarks=demo", "eval.demo.split=val", "eval.max_questions=2"]) == 0
    after = read(run / "result.json")
    assert after["eval_keys"]["demo"]["split"] == "val" and after["eval_keys"]["demo"]["n"] == 2
    assert len(rows(run / "predictions" / "demo.jsonl")) == 2
    assert after["objective"] == 7 and after["status"] == "completed"
    kept = stale.keys() & after["metrics"].keys()
    assert kept == {"demo/validation", "other/accuracy", "demo.blur3/accuracy"}
    assert len([line for line in read(run / "benchmarks.json")["lines"] if line["metric"] == "accuracy"]) == 1


def test_a_run_that_is_running_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "result.json").read_bytes()
    with Lease(run / ".lease"):
        assert main(["evaluate", str(run)]) == 2
        assert main(["evaluate", str(run), "--out", str(run.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("by a run or an evaluation that has not ended. Wait for it to end") == 2
    assert (run / "result.json").read_bytes() == before and not (run.parent / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--benchmarks", "demo,textvqaa"], "--benchmarks holds 'textvqaa'; allowed are demo, textvqa"),
        (["--benchmarks", "demo,demo"], "names 'demo' twice"),
        (["--benchmarks", "textvqa"], "eval.textvqa.annotations and eval.textvqa.images are not given"),
        (["--benchmarks", "custom", "eval.custom.questions=/nowhere.jsonl"], "=/nowhere.jsonl is not a file"),
        (["train.lr=1"], "train.lr cannot be given here"),
        (["eval.benchmarks=[demo]"], "eval.benchmarks cannot be given here"),
        (["eval.max_questions=1,2"], "eval.max_questions cannot be given here"),
        (["eval.demo.splitt=val"], "Did you mean eval.demo.split?"),
        (["eval.demo.split=train"], "allowed are 'val', 'test'"),
        (["eval.robustness.long_tail=true", "paths.store=nowhere"], "the store does not hold them"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_sentence(
    arguments: list[str], says: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    before = (run / "result.json").read_bytes()
    assert main(["evaluate", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
    assert (run / "result.json").read_bytes() == before


def test_an_adapter_is_not_scored_on_another_base(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read(run / "manifest.json")
    manifest["model"]["fingerprint"] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert main(["evaluate", str(run)]) == 2
    assert "was trained on another base" in capsys.readouterr().err


def test_a_changed_adapter_does_not_take_the_scores_of_the_one_before(run: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from mgm_exp.trained import find_trained

    def key() -> str:
        weights = find_trained(run, None, []).weights()
        assert weights is not None
        return weights.key

    stages = {stage["name"]: stage["key"] for stage in read(run / "manifest.json")["stages"]}
    assert key() == stages["instruct"]
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    assert key() != stages["instruct"]


def test_a_damaged_result_is_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "result.json").write_text('{"metrics": ')
    assert main(["evaluate", str(run)]) == 2
    assert "result.json is damaged" in capsys.readouterr().err
    assert (run / "result.json").read_text() == '{"metrics": '


def test_a_checkpoint_is_scored_into_a_folder_of_its_own(
    root: Path, run: Path, own_questions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, where = run.parent / "scores", f"paths.root={root}"
    command = ["evaluate", str(TINY), "--benchmarks", "custom", *own_questions, where, "device=cpu"]
    assert main(command) == 2
    assert "Say with --out where to write" in capsys.readouterr().err
    assert main([*command, "--out", str(out)]) == 0
    result = read(out / "result.json")
    assert result["status"] == "completed" and result["eval_keys"]["custom"]["n"] == 3
    assert len(rows(out / "predictions" / "custom.jsonl")) == 3
    assert main(["evaluate", str(TINY), "--out", str(out), where]) == 2
    assert "names no benchmarks" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--out", str(out), "--benchmarks", "demo"]) == 2
    assert "results of another model" in capsys.readouterr().err
    assert read(out / "result.json") == result


def test_a_question_gets_the_answer_of_the_evaluation_and_nothing_else(
    root: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images,) = (root / "store" / "demo").glob("*/images")
    row = rows(run / "predictions" / "demo.jsonl")[0]
    command = ["ask", str(run), str(images.parent / row["image"]), row["question"], "--device", "cpu"]
    capsys.readouterr()
    assert main([*command, "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == row["prediction"] + "\n"
    assert main([*command, "--max-new-tokens", "2"]) == 0
    short = capsys.readouterr().out.strip()
    assert len(short) < len(row["prediction"]) and row["prediction"].startswith(short)


@pytest.mark.parametrize(
    ("image", "says"),
    [("gone.png", "gone.png is not there"), ("text.png", "not an image"), ("large.png", "megapixels"), (".", "file")],
)
def test_an_image_that_cannot_be_used_is_refused_before_the_model_is_loaded(
    image: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (200, 200)).save(tmp_path / "large.png")
    command = ["ask", str(tmp_path / "no_model"), str(tmp_path / image), "what is it?", "--max-megapixels", "0.01"]
    assert main(command) == 2
    output = capsys.readouterr()
    assert output.out == "" and f"The image {tmp_path / image} cannot be used" in output.err and says in output.err


def test_a_model_or_a_question_that_is_not_there_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(sorted((root / "store" / "demo").glob("*/images/*.png"))[0])
    capsys.readouterr()
    assert main(["ask", str(tmp_path), image, "what is it?"]) == 2
    assert main(["ask", str(TINY), image, "  "]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "is not a model folder" in output.err and "The question is empty" in output.err
