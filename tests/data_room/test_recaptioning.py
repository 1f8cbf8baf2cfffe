from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgm_exp.data import BadRow, Row, read_rows, recaption
from mgm_exp.errors import MgmError

from .conftest import chat, lines_of, pair, picture, write_lines


class MeanColour:
    """A captioner that sees one thing: the mean colour of a picture."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def caption(self, images: list[Image.Image]) -> list[str]:
        self.calls.append(len(images))
        return ["a  picture\nof colour " + " ".join(f"{v:.0f}" for v in np.asarray(i).mean((0, 1))) for i in images]


@pytest.fixture
def source(tmp_path: Path, root: Path) -> Path:
    """Rows of every fate."""
    (root / "3.png").write_bytes(b"")
    rows = [pair(f"r{i}", f"{i}.png", f"raw {i}") for i in range(10)]
    rows.insert(2, chat("text", None, "q", "a"))
    rows.insert(5, chat("many", "0.png", "<image>\nq", "a", "q", "a"))
    rows.insert(6, chat("asked", "1.png", "<image>\nwhat?", "raw answer"))
    rows.insert(7, "{")  # type: ignore[arg-type]
    return write_lines(tmp_path / "raw.jsonl", rows)


def folders(tmp_path: Path, name: str) -> dict[str, Path]:
    work = tmp_path / name
    (work / "out").mkdir(parents=True)
    return {"work": work, "out": work / "out"}


def test_captions_are_replaced_and_the_raw_ones_kept(tmp_path: Path, root: Path, source: Path) -> None:
    captioner = MeanColour()
    places = folders(tmp_path, "a")
    report = recaption(read_rows(source), captioner, image_root=root, batch_size=4, **places)
    assert report.to_json() == {
        "rows": 14,
        "recaptioned": 10,
        "kept_raw": 0,
        "unchanged": 2,
        "rejected": 2,
        "added": 0,
        "not_added": 0,
        "from_before": 0,
        "why_kept": {},
    }
    assert sum(captioner.calls) == 10 and max(captioner.calls) == 4

    rows = {row.id: row for row in read_rows(places["out"] / "captions.jsonl") if isinstance(row, Row)}
    assert list(rows) == ["r0", "r1", "text", "r2", "many", "asked", "r4", "r5", "r6", "r7", "r8", "r9"]
    mean = np.asarray(Image.open(root / "4.png")).mean((0, 1))
    assert rows["r4"].caption == "a picture of colour " + " ".join(f"{v:.0f}" for v in mean)
    assert rows["r4"].raw_caption == "raw 4"
    asked = rows["asked"].conversations
    assert asked is not None and asked[0].text == "<image>\nwhat?"
    assert asked[1].text.startswith("a picture") and rows["asked"].raw_caption == "raw answer"
    assert rows["text"].raw_caption is None and rows["many"].raw_caption is None

    rejected = [BadRow.from_json(row) for row in lines_of(places["out"] / "rejected.jsonl")]
    assert [(bad.line, bad.id, bad.kind) for bad in rejected] == [(5, "r3", "zero_bytes"), (8, None, "not_json")]


def test_captioning_a_recaptioned_file_keeps_the_first_caption(tmp_path: Path, root: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{**pair("a", "0.png", "second"), "raw_caption": "first"}])
    places = folders(tmp_path, "a")
    recaption(read_rows(path), MeanColour(), image_root=root, **places)
    assert lines_of(places["out"] / "captions.jsonl")[0]["raw_caption"] == "first"


def test_what_is_no_caption_is_rejected_and_not_trained_on(tmp_path: Path, root: Path) -> None:
    class Mute:
        def caption(self, images: list[Image.Image]) -> list[str]:
            return [" \n", "see <image>", "fine"]

    path = write_lines(tmp_path / "a.jsonl", [pair(str(i), f"{i}.png") for i in range(3)])
    places = folders(tmp_path, "a")
    recaption(read_rows(path), Mute(), image_root=root, **places)
    kinds = [row["kind"] for row in lines_of(places["out"] / "rejected.jsonl")]
    assert kinds == ["empty_caption", "image_token_in_answer"]
    assert len(lines_of(places["out"] / "captions.jsonl")) == 1


def test_a_captioner_that_loses_count_is_an_error(tmp_path: Path, root: Path) -> None:
    class Short:
        def caption(self, images: list[Image.Image]) -> list[str]:
            return ["one"]

    path = write_lines(tmp_path / "a.jsonl", [pair(str(i), f"{i}.png") for i in range(3)])
    with pytest.raises(MgmError, match="1 captions for 3 images"):
        recaption(read_rows(path), Short(), image_root=root, **folders(tmp_path, "a"))


@pytest.mark.parametrize("stop_after", range(4))
def test_an_interrupted_attempt_continues_with_the_batch_that_was_lost(
    tmp_path: Path, root: Path, source: Path, stop_after: int
) -> None:
    class Stops(MeanColour):
        def caption(self, images: list[Image.Image]) -> list[str]:
            if len(self.calls) == stop_after:
                raise KeyboardInterrupt
            return super().caption(images)

    whole = folders(tmp_path, "whole")
    undisturbed = MeanColour()
    recaption(read_rows(source), undisturbed, image_root=root, batch_size=3, **whole)
    places = folders(tmp_path, "stopped")
    first, second = Stops(), MeanColour()
    with pytest.raises(KeyboardInterrupt):
        recaption(read_rows(source), first, image_root=root, batch_size=3, **places)
    report = recaption(read_rows(source), second, image_root=root, batch_size=3, **places)
    assert first.calls + second.calls == undisturbed.calls
    assert report.from_before == min(11, 3 * stop_after)
    for name in RESULTS:
        assert (places["out"] / name).read_bytes() == (whole["out"] / name).read_bytes()


@pytest.mark.parametrize("damage", [b"", b"{", b'{"index": 0, "id": "other", "caption": "x"}\n'])
def test_a_damaged_shard_is_made_again(tmp_path: Path, root: Path, source: Path, damage: bytes) -> None:
    places = folders(tmp_path, "a")
    recaption(read_rows(source), MeanColour(), image_root=root, batch_size=4, **places)
    before = (places["out"] / "captions.jsonl").read_bytes()
    shard = sorted((places["work"] / "shards").rglob("*.jsonl"))[1]
    shard.write_bytes(damage)
    captioner = MeanColour()
    recaption(read_rows(source), captioner, image_root=root, batch_size=4, **places)
    assert len(captioner.calls) == 1
    assert (places["out"] / "captions.jsonl").read_bytes() == before


CHILD = """
import sys, time
from pathlib import Path
from mgm_exp.data import read_rows, recaption
from mgm_exp.data.caption_choice import CaptionChoice
class Slow:
    name, can_answer = "slow", True
    def caption(self, images, *, seeds=None):
        if seeds is None:
            with open(work / "calls", "a") as file:
                file.write("call\\n")
            time.sleep(0.05)
        seeds = seeds or [0] * len(images)
        return [f"size {image.width} first {image.getpixel((0, 0))} seed {seed}" for image, seed in zip(images, seeds)]
    def answer(self, images, questions):
        return [f"{question} {image.height}" for image, question in zip(images, questions)]
class Widths:
    def score(self, images, texts):
        return [[len(text) % 7 + image.width / 1000 for text in of_image] for image, of_image in zip(images, texts)]
CHOICES = {
    "replace": CaptionChoice(),
    "everything": CaptionChoice("keep_if_better", captions_per_image=3, questions=("how high?",), margin=1.0, seed=3),
}
if __name__ == "__main__":
    source, root, work = map(Path, sys.argv[2:])
    choice = CHOICES[sys.argv[1]]
    recaption(
        read_rows(source), Slow(), image_root=root, work=work, out=work / "out", batch_size=2, choice=choice,
        scorer=Widths(), workers=len(choice.questions),
    )
"""
RESULTS = ("captions.jsonl", "rejected.jsonl", "fates.jsonl")


@pytest.mark.parametrize("choice", ["replace", "everything"])
def test_kill_9_costs_one_batch_and_changes_nothing(tmp_path: Path, choice: str) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for i in range(60):
        picture(5 + i, 6, seed=i).save(root / f"{i}.png")
    source = write_lines(tmp_path / "raw.jsonl", [pair(f"r{i}", f"{i}.png") for i in range(60)])
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}

    def start(name: str) -> subprocess.Popen[bytes]:
        (tmp_path / name / "out").mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(script), choice, str(source), str(root), str(tmp_path / name)]
        return subprocess.Popen(command, env=environment)

    assert start("whole").wait() == 0
    kills = 0
    for wanted in (3, 11, 20):
        child = start("killed")
        while len(list((tmp_path / "killed" / "shards").rglob("*.jsonl"))) < wanted and child.poll() is None:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert kills >= 2, "the killed processes were too fast to be killed"
    assert start("killed").wait() == 0
    for name in RESULTS:
        assert (tmp_path / "killed" / "out" / name).read_bytes() == (tmp_path / "whole" / "out" / name).read_bytes()
    calls = (tmp_path / "killed" / "calls").read_text().count("call")
    assert 30 <= calls <= 30 + kills
    assert json.loads((tmp_path / "whole" / "out" / "captions.jsonl").read_text().splitlines()[0])["raw_caption"]
