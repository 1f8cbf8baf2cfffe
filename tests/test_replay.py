"""``mgm-exp replay``: the same numbers again, or the first that is not, and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recorded_run import RecordedRun

from mgm_exp.cli import main
from mgm_exp.replay_findings import Difference, changed_inputs, changed_row, changed_surroundings, first_difference
from mgm_exp.store import tree_fingerprint

Replayed = tuple[int, dict[str, Any], str]


@pytest.fixture
def replay(
    hostile_run: RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Replayed]]:
    """Arguments -> exit code, findings, what was printed; afterwards the run and its store are as they were."""
    before = tree_fingerprint(hostile_run.folder)
    listing = sorted(hostile_run.root.rglob("*"))

    def call(*arguments: str, run: Path | None = None) -> Replayed:
        file = tmp_path / "findings.json"
        code = main(["replay", str(run or hostile_run.folder), "--json", str(file), *arguments])
        printed = capsys.readouterr()
        return code, json.loads(file.read_text()) if file.exists() else {}, printed.out + printed.err

    yield call
    assert tree_fingerprint(hostile_run.folder) == before
    assert sorted(hostile_run.root.rglob("*")) == listing


def test_an_equal_manifest_gives_an_equal_run(replay: Callable[..., Replayed]) -> None:
    code, found, printed = replay()
    assert (code, found["equal"], found["first"], found["sources"]) == (0, True, None, [])
    assert found["steps"] == {"align": 2, "instruct": 3}
    assert {"instruct/step-000002/optimizer.safetensors", "adapter/adapter_model.safetensors"} <= set(found["weights"])
    assert "equal: every loss" in printed


def test_a_run_is_continued_from_its_checkpoint(replay: Callable[..., Replayed]) -> None:
    code, found, _ = replay("--from", "2", "--stage", "instruct")
    assert (code, found["steps"]) == (0, {"instruct": 1})
    code, _, printed = replay("--from", "1", "--stage", "instruct")
    assert code == 2 and "step-000002, step-000003" in printed


def test_another_seed_differs_in_its_first_batch(replay: Callable[..., Replayed]) -> None:
    code, found, printed = replay("seed=1")
    assert (code, found["first"]["stage"], found["first"]["step"], found["first"]["field"]) == (
        1,
        "align",
        1,
        "batch_name",
    )
    assert found["sources"][0] == {"kind": "settings", "detail": "asked for seed=1"}
    assert "likely source: settings: asked for seed=1" in printed


def test_a_loss_that_is_one_bit_off_and_a_row_that_changed_are_found_in_their_step(
    replay: Callable[..., Replayed], hostile_run: RecordedRun, tmp_path: Path
) -> None:
    """The first step reads four rows of twelve, the second four others."""
    copy = tmp_path / "copy"
    shutil.copytree(hostile_run.folder, copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    exact, row["loss"] = row["loss"], row["loss"] * (1 + 2**-52)
    (copy / "metrics.jsonl").write_text("\n".join([lines[0], json.dumps(row), *lines[2:]]) + "\n")
    code, found, printed = replay("--steps", "2", f"paths.store={hostile_run.root}/store", run=copy)
    assert code == 1 and (found["first"]["step"], found["first"]["field"]) == (2, "loss")
    assert exact.hex() in found["first"]["replayed"] and found["first"]["recorded"] != found["first"]["replayed"]
    assert "none of data, model, settings, code" in printed
    second = found["first"]["samples"]
    data = tmp_path / "data"
    shutil.copytree(hostile_run.data, data)
    rows = [json.loads(line) for line in (data / "align.jsonl").read_text().splitlines()]
    number = next(n for n, row in enumerate(rows) if row["id"] == second[0])
    rows[number]["conversations"][1]["value"] = "something else"
    (data / "align.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, found, printed = replay(f"data.path={data}/align.jsonl", "--stage", "align")
    assert (code, found["first"]["stage"], found["first"]["step"]) == (1, "align", 2)
    assert second[0] in found["first"]["samples"]
    assert f"row {number + 1} of align.jsonl (id {second[0]}) reads otherwise" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "-1"], "0 or above"),
        (["--stage", "features"], "invalid choice"),
        (["train=official"], "train"),
        (["+train._target_=os.system"], "cannot name"),
        (["eval.benchmarks=1,2"], "one value each"),
    ],
)
def test_what_cannot_be_replayed_is_said(
    arguments: list[str], says: str, hostile_run: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["replay", str(hostile_run.folder), *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2 and says in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path)]) == 2
    assert "no config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["3\n", "{\n", "[" * 9000 + "\n"])
def test_damaged_metrics_are_named(
    text: str, hostile_run: RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("config.yaml", "manifest.json"):
        (tmp_path / part).write_bytes((hostile_run.folder / part).read_bytes())
    (tmp_path / "metrics.jsonl").write_text(text)
    assert main(["replay", str(tmp_path)]) == 2
    assert "metrics.jsonl is damaged" in capsys.readouterr().err


# -- what is compared, and why it differs ---------------------------------------------------------------------------


def row(step: int, **changes: Any) -> dict[str, Any]:
    found = {"stage": "align", "step": step, "batch_name": "0a", "tokens": 8, "lr": 0.1, "loss": 1.5, "grad_norm": 2.0}
    return {**found, "seconds": 9.0 * step, **changes}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"loss": 1.5000000000000002},
            ("loss", "1.5 (0x1.8000000000000p+0)", "1.5000000000000002 (0x1.8000000000001p+0)"),
        ),
        ({"loss": 1.4, "batch_name": "0b"}, ("batch_name", '"0a"', '"0b"')),
        ({"grad_norm": 3.0, "lr": 0.2}, ("lr", "0.1 (0x1.999999999999ap-4)", "0.2 (0x1.999999999999ap-3)")),
        ({"loss": None, "event": "not_finite"}, ("event", "null", '"not_finite"')),
        ({"seconds": 1.0, "tokens_per_s": 3}, None),
    ],
)  # fmt: skip
def test_the_first_difference_is_the_earliest_cause(change: dict[str, Any], expected: tuple[str, ...] | None) -> None:
    found = first_difference(
        "align", [row(1), row(2), row(3)], [row(1), row(2, **change), row(3, loss=7.0 if expected else 1.5)]
    )
    assert found == (None if expected is None else Difference("align", 2, *expected))


def test_a_step_that_is_missing_is_a_difference() -> None:
    found = first_difference("align", [row(1), row(2)], [row(1)])
    assert found == Difference("align", 2, "row", "a step after step 2", "none")


def test_rows_of_a_version_without_batches_are_compared_in_the_rest() -> None:
    old = row(1)
    del old["batch_name"]
    assert first_difference("align", [old], [row(1)]) is None


def test_surroundings_that_changed_are_named() -> None:
    before = {
        "git": {"commit": "a" * 40, "diff": ""}, "packages": {"Torch": "2.13.0", "rich": "1"}, "python": "3.11.7",
        "device": {"type": "cuda", "threads": 8, "cuda": "13.0"},
    }  # fmt: skip
    now = {
        **before,
        "packages": {"torch": "2.13.1", "rich": "2"},
        "device": {"type": "cpu", "threads": 2, "cuda": "13.0"},
    }
    found = [(source.kind, source.detail) for source in changed_surroundings(before, now)]
    assert found == [
        ("device", "type cuda -> cpu"), ("threads", "threads 8 -> 2"),
        ("packages", "torch 2.13.0 -> 2.13.1, rich 1 -> 2"),
    ]  # fmt: skip
    assert changed_surroundings(before, before) == []
    assert changed_surroundings({}, now) == [], "a run that was killed before its manifest says nothing of them"
    other = {**before, "git": {"commit": "b" * 40, "diff": ""}}
    assert [source.kind for source in changed_surroundings(before, other)] == ["code"]
    assert changed_surroundings(before, other, files=[]) == [], "another commit that changed no file of the package"
    (found_code,) = changed_surroundings(before, before, files=["mgm_exp/cli.py"])
    assert found_code.detail == f"1 file of the package since commit {'a' * 40}: mgm_exp/cli.py"


def test_inputs_and_rows_that_changed_are_named(tmp_path: Path) -> None:
    assert dict(changed_inputs({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})) == {"a.b": "1 -> 3"}
    one, other = tmp_path / "align.jsonl", tmp_path / "other" / "align.jsonl"
    other.parent.mkdir()
    one.write_text('{"id": "a"}\n{"id": "b"}\n')
    other.write_text('{"id": "a"}\n')
    assert changed_row(one, other) == "row 2 of align.jsonl (id b) is gone"
    assert changed_row(one, one) is None and changed_row(one, tmp_path / "none") is None
