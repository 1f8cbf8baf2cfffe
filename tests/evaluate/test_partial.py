"""Answers so far: continued batch by batch, sealed, and never taken for those of another evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgm_exp.evaluate.partial import PartialAnswers

OWNER = {"model": "m", "batch_size": 2}
QUESTIONS = [[1, 2], ["a", "b"], [5]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with two of three batches."""
    path = tmp_path / "answers.jsonl"
    with PartialAnswers(path, OWNER, QUESTIONS) as answers:
        answers.add(1, ["zwei\n", "„二“\u2028"])
        answers.add(0, ["red", ""])
    return path


def batches(path: Path, owner: dict = OWNER, questions: list = QUESTIONS) -> dict[int, list[str]]:
    with PartialAnswers(path, owner, questions) as answers:
        return dict(answers.batches)


def test_whole_batches_are_found_again_in_any_order(path: Path) -> None:
    assert batches(path) == {1: ["zwei\n", "„二“\u2028"], 0: ["red", ""]}
    with PartialAnswers(path, OWNER, QUESTIONS) as answers:
        answers.add(2, ["five"])
    assert batches(path)[2] == ["five"]


def test_a_kill_at_any_byte_keeps_every_batch_that_was_whole(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = path.read_bytes()
    ends = [place for place, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = max(0, sum(end < cut for end in ends) - 1)
        assert len(batches(path)) == whole
        with PartialAnswers(path, OWNER, QUESTIONS) as answers:
            answers.add(2, ["five"])
        assert len(batches(path)) == whole + 1, "what is appended behind a torn line is whole"
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_damaged_file_is_named_and_begun_anew(path: Path, line: int, caplog: pytest.LogCaptureFixture) -> None:
    lines = path.read_bytes().split(b"\n")
    for damage in (b"", b"\xff\x00", b"[]", lines[line - 1].replace(b"e", b"E", 1)):
        caplog.clear()
        path.write_bytes(b"\n".join([*lines[: line - 1], damage, *lines[line:]]))
        assert batches(path) == {}
        assert f"{path} is damaged in line {line}" in caplog.text
        caplog.clear()
        assert batches(path) == {} and not caplog.text, "begun anew, and whole"


def test_answers_of_another_model_or_other_settings_are_not_used(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = path.read_bytes()
    for owner in ({"model": "other", "batch_size": 2}, {"model": "m", "batch_size": 4}):
        path.write_bytes(content)
        caplog.clear()
        assert batches(path, owner) == {}
        assert f"({'model' if owner['model'] == 'other' else 'batch_size'} differ)" in caplog.text


def test_a_line_moved_from_another_owner_s_file_does_not_fit(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    with PartialAnswers(other, {"model": "other"}, QUESTIONS) as answers:
        answers.add(2, ["not ours"])
    path.write_bytes(path.read_bytes() + other.read_bytes().splitlines(keepends=True)[1])
    assert batches(path) == {}
