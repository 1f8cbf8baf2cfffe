"""Benchmarks from the command line: a whole run with several of them, and mistakes that are found before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import MAKERS, put_lines

from mgm_exp.cli import main as verb
from mgm_exp.command import main

FAST = ["debug=fast", "device=cpu", "data.demo_images=8", "data.demo_questions=4", "train.align.max_steps=0"]


def keys_of(name: str, folder: Path) -> list[str]:
    return [f"eval.{name}.{key}={value}" for key, value in MAKERS[name](folder / name).items()]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_ends_with_a_table_of_its_benchmarks(tmp_path, capsys):
    put_lines(tmp_path / "words/vqav2.jsonl", [{"question_id": 10, "question": "Which shade is it?"}])
    put_lines(tmp_path / "words/mmbench.jsonl", [{"question_id": 7, "question": "What is that?"}])
    code = main(
        [
            *FAST,
            f"paths.root={tmp_path / 'outputs'}",
            "eval.benchmarks=[mmbench,vqav2]",
            "eval.robustness.corruptions=[blur]",
            "eval.robustness.severities=[5]",
            f"eval.robustness.rephrased={tmp_path / 'words'}",
            "eval.robustness.long_tail=true",
            "eval.mmbench.max_new_tokens=4",
            *keys_of("mmbench", tmp_path / "files"),
            *keys_of("vqav2", tmp_path / "files"),
        ]
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    (run,) = (tmp_path / "outputs" / "runs").glob("*/*")
    result = json.loads((run / "result.json").read_text())
    names = ["mmbench", "mmbench.blur5", "mmbench.rephrased", "vqav2", "vqav2.blur5", "vqav2.rephrased"]
    assert sorted(result["eval_keys"]) == sorted(names)
    for name in names:
        rows = lines(run / "predictions" / f"{name}.jsonl")
        assert result["eval_keys"][name]["n"] == len(rows) > 0
        assert result["metrics"][f"{name}/accuracy"] == pytest.approx(sum(row["score"] for row in rows) / len(rows))
    clean, blurred = (result["metrics"][f"{name}/accuracy"] for name in ("vqav2", "vqav2.blur5"))
    assert result["metrics"]["vqav2.blur5/drop"] == pytest.approx(clean - blurred)
    assert result["metrics"]["vqav2.blur5/drop_ci_low"] <= result["metrics"]["vqav2.blur5/drop"]
    assert sum(value for key, value in result["metrics"].items() if key.startswith("vqav2/answer_n[")) == 3
    assert result["objective"] == result["metrics"]["mmbench/accuracy"]
    submissions = sorted(path.name for path in (run / "submissions").iterdir())
    assert submissions == ["mmbench_dev_submission.xlsx", "vqav2_val2014_results.json"]
    pages = sorted(path.name for path in (run / "galleries").iterdir())
    assert pages == ["mmbench.html", "vqav2.html"]
    assert "data:image/jpeg" in (run / "galleries" / "vqav2.html").read_text()
    table = json.loads((run / "benchmarks.json").read_text())["lines"]
    assert list(dict.fromkeys(line["benchmark"] for line in table)) == names
    shown = captured.out[captured.out.index("benchmark  ") :]
    assert "circular_accuracy" in shown and "vqav2.rephrased" in shown


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["eval=vqav2"], ["eval.vqav2.questions and eval.vqav2.images are not given", "docs/evaluation.md"]),
        (["eval=custom", "eval.custom.questions={}/questions.jsonl"], ["images that cannot be found", "1.png"]),
        (["eval=mme", "eval.mme.questions={}"], ["holds no folder of a task"]),
    ],
)
def test_what_a_benchmark_lacks_is_said_before_anything_runs(overrides, says, tmp_path, capsys):
    folder = tmp_path / "files"
    MAKERS["custom"](folder)
    (folder / "1.png").unlink()
    code = main([*FAST, f"paths.root={tmp_path / 'outputs'}", *(text.format(folder) for text in overrides)])
    said = capsys.readouterr()
    assert code == 2 and "Traceback" not in said.err
    for phrase in says:
        assert phrase in said.err
    assert "== align" not in said.out and "== instruct" not in said.out


def test_an_adapter_of_the_official_code_is_asked_and_scored(tmp_path, capsys):
    """Pickled, without config.json, its base named by a path of another machine."""
    import torch

    from mgm_exp.model import apply_adapter, load_model
    from mgm_exp.model.adapters import adapter_state, connector_state

    base = Path(__file__).parents[1] / "data" / "mgm" / "model"
    adapter = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj"]}
    model = apply_adapter(load_model(base), adapter, seed=1)
    old = tmp_path / "llava-lora"
    old.mkdir()
    for name, tensors in (("adapter_model", adapter_state(model)), ("non_lora_trainables", connector_state(model))):
        torch.save({f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, old / f"{name}.bin")
    stated = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (old / "adapter_config.json").write_text(json.dumps({**stated, "base_model_name_or_path": "./their/mgm"}))
    keys = keys_of("pope", tmp_path / "files")
    command = ["evaluate", str(old), "--benchmarks", "pope", "--out", str(tmp_path / "scores"), *keys]
    command += [f"paths.root={tmp_path / 'outputs'}", "device=cpu", "eval.pope.max_new_tokens=2"]
    assert verb(command) == 2
    assert "'./their/mgm', which is no folder here" in capsys.readouterr().err
    assert verb([*command, "--base", str(base)]) == 0
    result = json.loads((tmp_path / "scores" / "result.json").read_text())
    assert 0 <= result["metrics"]["pope/accuracy"] <= 1
    assert (tmp_path / "scores" / "galleries" / "pope.html").is_file()
    image = next((tmp_path / "files").rglob("*.jpg"))
    capsys.readouterr()
    asked = ["ask", str(old), str(image), "What?", "--device", "cpu", "--max-new-tokens", "2", "--base", str(base)]
    assert verb(asked) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
