"""``mgm-exp validate`` as a user types it."""

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
from mgm_exp.data.kinds import ADVICE

from . import damage
from .conftest import pair, picture, write_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_good_data_ends_with_0(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(root.parent / "rows.jsonl", [pair("a", "images/0.png"), pair("b", "images/1.png")])
    assert main(["validate", str(tmp_path)]) == 0  # the folder: one file of rows, images beside it
    out = capsys.readouterr().out
    assert "2 rows, 2 images" in out and "All 2 rows can be used." in out
    assert "8 image files named by no row: images/2.png" in out


def test_damage_ends_with_2_a_table_a_report_and_a_clean_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    damage.images(folder / "images")
    damage.write_lines(folder / "rows.jsonl", damage.rows())
    report, clean = tmp_path / "report.json", tmp_path / "clean"
    command = ["validate", str(folder / "rows.jsonl"), "--images", str(folder / "images"), "--max-megapixels", "0.5"]
    assert main([*command, "--json", str(report), "--fix", str(clean), "--workers", "1"]) == 2
    out = capsys.readouterr().out
    content = json.loads(report.read_text(encoding="utf-8"))
    faults = {(fault["index"], fault["kind"]) for fault in content["broken"] if fault["kind"] != "byte_order_mark"}
    assert faults == damage.rows().faults()
    for kind in content["counts"]:
        assert kind in out and ADVICE[kind].split(";")[0][:20] in out
    assert "rows.jsonl:4" in out and f"{content['rows'] - content['ok']} of {content['rows']} rows have a fault." in out
    assert f"clean copy: {clean}: 8 rows (4 repaired)" in out
    assert main(["validate", str(clean), "--max-megapixels", "0.5"]) == 0


def test_what_the_data_says_cannot_steer_the_terminal(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [pair("\x1b]0;title\x07[red]x[/]", "\x1b[2J\u202e.png", "\x1b[31m"), {"\x9b31m": 1, "id": "\x1b[1m"}]
    write_lines(tmp_path / "rows.jsonl", rows)
    assert main(["validate", str(tmp_path / "rows.jsonl"), "--images", str(root)]) == 2
    out = capsys.readouterr().out
    assert not [character for character in out if ord(character) < 32 and character != "\n"]
    assert "\x9b" not in out and "\u202e" not in out
    assert "\\x1b]0;title\\x07[red]x[/]" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["rows.jsonl", "--images", "nowhere"], "nowhere is not a folder"),
        (["rows.jsonl", "--json", "nowhere/report.json"], "nowhere is not a folder"),
        (["rows.jsonl", "--json", "images"], "images is a folder"),
        (["rows.jsonl", "--fix", "images"], "images is not empty"),
        (["rows.jsonl", "--fix", "rows.jsonl"], "rows.jsonl is a file"),
        (["rows.jsonl", "--workers", "0"], "not a number of processes"),
        (["rows.jsonl", "--max-megapixels", "many"], "not a number of megapixels"),
        (["images"], "folder without rows"),
        ([], "PATH"),
    ],
)
def test_wrong_arguments_end_with_2_and_say_why(
    tmp_path: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    write_lines(tmp_path / "rows.jsonl", [pair("a", "images/0.png")])
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    try:
        code = main(["validate", *arguments])
    except SystemExit as error:  # argparse
        code = int(error.code or 0)
    assert code == 2 and says in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before


def test_ctrl_c_ends_with_130_and_leaves_no_process(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(4):
        picture(500, 500, seed=number).save(root / f"{number}.png", compress_level=1)
    for number in range(4, 1500):
        os.link(root / f"{number % 4}.png", root / f"{number}.png")
    write_lines(tmp_path / "rows.jsonl", [pair(f"{i}", f"{i}.png") for i in range(1500)])
    command = [sys.executable, "-m", "mgm_exp.cli", "validate", str(tmp_path / "rows.jsonl"), "--images", str(root)]
    process = subprocess.Popen(
        [*command, "--json", str(tmp_path / "report.json"), "--fix", str(tmp_path / "clean")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".clean.partial/*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = [int(pid) for pid in _children(process.pid)]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    deadline = time.monotonic() + 120
    while [pid for pid in children if os.path.exists(f"/proc/{pid}")] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children and not [pid for pid in children if os.path.exists(f"/proc/{pid}")]
    assert not (tmp_path / "clean").exists() and not (tmp_path / "report.json").exists()


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
