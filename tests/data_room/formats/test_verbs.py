"""``mgm-exp convert`` and ``mgm-exp split``, as one types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mgm_exp.cli import main

from ..conftest import chat, lines_of, pair, write_lines


def test_pairs_survive_the_way_through_all_formats_byte_by_byte(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [pair(f"{i}", f"images/{i}.png", f"caption {i}") for i in range(9)])
    (tmp_path / "back").mkdir()
    steps = [("llava.json", "llava"), ("s.json", "sharegpt"), ("t.parquet", "parquet"), ("shards", "webdataset")]
    here = source
    for name, target in steps:
        assert main(["convert", str(here), str(tmp_path / name), "--to", target]) == 0
        here = tmp_path / name
    assert main(["convert", str(here), str(tmp_path / "back" / "rows.jsonl"), "--to", "datajuicer"]) == 0
    assert (tmp_path / "back" / "rows.jsonl").read_bytes() == source.read_bytes()
    for image in (tmp_path / "back" / "images").iterdir():
        assert image.read_bytes() == (root / image.name).read_bytes()
    assert "9 images unpacked" in capsys.readouterr().out


def test_rows_that_cannot_be_converted_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [pair("1", "a.jpg"), "{", pair("1", "b.jpg")])
    out = tmp_path / "rows.json"
    assert main(["convert", str(source), str(out), "--to", "llava"]) == 0
    said = capsys.readouterr()
    assert "1 of 3 rows" in said.out and "1 duplicate_id, 1 not_json" in said.err
    assert [row["kind"] for row in lines_of(tmp_path / "rows.json.rejected.jsonl")] == ["not_json", "duplicate_id"]
    assert main(["convert", str(source), str(out), "--to", "llava", "--overwrite", "--strict"]) == 2
    assert len(json.loads(out.read_text())) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rows.jsonl", "x.csv", "--to", "llava"], "no name for llava"),
        (["rows.jsonl", "x.json", "--to", "datajuicer"], "no name for datajuicer"),
        (["rows.jsonl", "rows.jsonl", "--to", "datajuicer"], "what is converted"),
        (["rows.jsonl", "there.json", "--to", "llava"], "there already"),
        (["rows.jsonl", "nowhere/x.json", "--to", "llava"], "not a folder"),
        (["gone.jsonl", "x.json", "--to", "llava"], "not there"),
        (["rows.jsonl", "x.tar", "--to", "webdataset"], "None of the 1 rows"),
        (["cut.json", "x.json", "--to", "llava"], "cannot be trusted"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("rows.jsonl"), [pair("1", "a.jpg")])
    Path("there.json").write_text("mine")
    Path("cut.json").write_text(json.dumps([chat("1", None, "q", "a")] * 2)[:-9])
    assert main(["convert", *arguments]) == 2
    assert says in capsys.readouterr().err
    left = {path.name for path in tmp_path.iterdir()} - {f"{arguments[1]}.rejected.jsonl"}
    assert left == {"rows.jsonl", "there.json", "cut.json"} and Path("there.json").read_text() == "mine"


def test_a_stopped_conversion_leaves_nothing_and_the_same_command_does_it_all(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    with open(source, "w") as file:
        file.writelines(json.dumps(pair(f"{i}", f"{i}.jpg")) + "\n" for i in range(60_000))
    out = tmp_path / "out" / "rows.json"
    out.parent.mkdir()
    command = [sys.executable, "-m", "mgm_exp.cli", "convert", str(source), str(out), "--to", "llava"]
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    deadline = time.monotonic() + 60
    while not any(out.parent.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [path.name for path in out.parent.iterdir()] == [".rows.json.partial"]
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert list(out.parent.iterdir()) == []


def test_split_says_how_many_rows_went_where(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [pair(f"{i}", f"{i}.png") for i in range(10)])
    arguments = ["split", str(source), "--images", str(root), "--out", str(tmp_path / "parts")]
    assert main([*arguments, "--shares", "60,20,20"]) == 0
    said = capsys.readouterr().out
    assert "6 rows" in said and "2 rows" in said and str(root) in said
    assert [len(lines_of(tmp_path / "parts" / f"{name}.jsonl")) for name in ("train", "validation", "test")] == [
        6,
        2,
        2,
    ]
    assert main(arguments) == 2
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--shares", "a,b"])
    assert end.value.code == 2
