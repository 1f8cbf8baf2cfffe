from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.data import find_source
from mgm_exp.data.repair import LOG, RepairReport, check_target, repair
from mgm_exp.data.validation import validate
from mgm_exp.data.validation_report import ValidationReport
from mgm_exp.errors import Interrupted, UserError

from . import damage
from .conftest import chat, lines_of, pair, picture, write_lines

ROOT = Path(__file__).parents[2]


def snapshot(folder: Path) -> dict[str, Any]:
    """Content and time of change of every file below a folder."""
    return {
        os.path.relpath(path, folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in snapshot(folder).items()}


def repaired_to(source: Path, out: Path, images: Path | None = None) -> tuple[ValidationReport, RepairReport]:
    """A clean copy, whose cleanness is checked."""
    report, fixes = repair(find_source(source, images), out, max_megapixels=damage.MAX_MEGAPIXELS, workers=0)
    again = validate(find_source(out), max_megapixels=damage.MAX_MEGAPIXELS, workers=0)
    assert again.ok == again.rows == fixes.written and not list(again.broken)
    assert fixes.written + fixes.left_out == report.rows
    return report, fixes


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    damage.images(folder / "images")
    damage.write_lines(folder / "rows.jsonl", damage.rows())
    return folder


def test_the_copy_is_clean_and_the_original_untouched(damaged: Path, tmp_path: Path) -> None:
    before = snapshot(damaged)
    report, fixes = repaired_to(damaged / "rows.jsonl", tmp_path / "clean", damaged / "images")
    assert snapshot(damaged) == before
    assert fixes.written == report.ok + fixes.repaired
    copies = {path.name: path for path in (tmp_path / "clean").iterdir()}
    # 4 and 5 are named by a row that names both; rows that use 2 and 6 were repaired.
    assert set(copies) == {"rows.jsonl", LOG, "0.png", "1.png", "2.png", "6.png", "grey.png"}
    for name in ("0.png", "grey.png"):
        original = damaged / "images" / name
        assert copies[name].read_bytes() == original.read_bytes()
        assert not copies[name].is_symlink() and copies[name].stat().st_nlink == 1


def test_what_can_be_repaired_is_and_all_else_is_named(damaged: Path, tmp_path: Path) -> None:
    report, _ = repaired_to(damaged / "rows.jsonl", tmp_path / "clean", damaged / "images")
    rows = {row["id"]: row for row in lines_of(tmp_path / "clean" / "rows.jsonl")}
    given = damage.rows()
    untouched = [json.loads(row) for row, kinds in zip(given.rows, given.kinds, strict=True) if not kinds]
    assert [rows[row["id"]] for row in untouched] == untouched
    assert rows["bell"]["text"] == pair("", "", "a sign")["text"]
    assert rows["misread"]["text"] == pair("", "", "a café")["text"]
    assert rows["token"]["conversations"][1]["value"] == "a"
    assert rows["good-1#2"]["images"] == ["2.png"]
    assert set(rows) == {row["id"] for row in untouched} | {"bell", "misread", "token", "good-1#2"}
    log = lines_of(tmp_path / "clean" / LOG)
    in_log = [entry["index"] for entry in log if "index" in entry]
    assert in_log == [number for number, kinds in enumerate(given.kinds) if kinds]
    for entry in log:
        if "index" not in entry:
            assert entry["faults"][0]["kind"] == "byte_order_mark"
            continue
        faults = [(f.kind, f.detail) for f in report.broken if (f.index, f.line) == (entry["index"], entry["line"])]
        assert [(f["kind"], f["detail"]) for f in entry["faults"]] == faults
        assert ("changes" in entry) == (entry["action"] == "repaired")
    lost = next(entry for entry in log if entry["id"] == "lost")
    assert lost["action"] == "left_out" and lost["why"]


def test_a_repair_that_would_leave_nothing_leaves_the_row_out(tmp_path: Path, root: Path) -> None:
    rows = [pair("a", "0.png"), pair("b", "1.png", "\x1b[31m\x00"), {"text": "<image>\x07 a sign", "images": ["2.png"]}]
    write_lines(tmp_path / "rows.jsonl", rows)
    repaired_to(tmp_path / "rows.jsonl", tmp_path / "clean", root)
    kept = lines_of(tmp_path / "clean" / "rows.jsonl")
    # The row without an id keeps the one that the report calls it by, though a row before it is gone.
    assert kept == [rows[0], {"text": "<image> a sign", "images": ["2.png"], "id": "row-000002"}]


def test_an_absolute_path_leads_into_the_copy(tmp_path: Path, root: Path) -> None:
    (root / "deep").mkdir()
    picture().save(root / "deep" / "a.png")
    rows = [pair("a", str(root / "deep" / "a.png")), chat("b", "./deep/a.png", "q", "a")]
    write_lines(tmp_path / "rows.jsonl", rows)
    _, fixes = repaired_to(tmp_path / "rows.jsonl", tmp_path / "clean", root)
    kept = lines_of(tmp_path / "clean" / "rows.jsonl")
    assert kept == [{**rows[0], "images": ["deep/a.png"]}, rows[1]]
    assert fixes.images == 1 and fixes.repaired == 1


def test_a_list_stays_a_list_and_keys_of_others_stay(tmp_path: Path, root: Path) -> None:
    rows = [
        {**chat("a", "0.png", "q\x07", "a"), "score": 1.5, "tags": {"x": [1, None]}, "half": "\ud800"},
        {**chat("", None, "q", "a"), "id": 5, "image": ["1.png"]},
        {"id": "m", "messages": [{"role": "user", "content": "<image>cafÃ©"}, {"role": "assistant", "content": "b"}],
         "images": ["2.png"]},
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    repaired_to(tmp_path / "rows.json", tmp_path / "clean", root)
    rows[0]["conversations"][0]["value"] = "q"
    rows[2]["messages"][0]["content"] = "<image>café"
    assert json.loads((tmp_path / "clean" / "rows.json").read_text(encoding="utf-8")) == rows


def test_parquet_keeps_its_schema(tmp_path: Path, root: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    schema = pa.schema(
        [("id", pa.string()), ("text", pa.large_string()), ("images", pa.list_(pa.string())), ("n", pa.int8())]
    )
    rows = [{**pair(f"{i % 2990}", f"{i % 10}.png", f"sign {i}"), "n": i % 7 or None} for i in range(3000)]
    rows[7]["text"] = pair("", "", "a cafÃ©")["text"]
    rows[1500]["images"] = ["no.png"]
    parquet.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    _, fixes = repaired_to(tmp_path / "rows.parquet", tmp_path / "clean", root)
    table = parquet.read_table(tmp_path / "clean" / "rows.parquet")
    rows[7]["text"] = pair("", "", "a café")["text"]
    for number in range(2990, 3000):
        rows[number]["id"] += "#2"
    del rows[1500]
    assert table.schema.equals(schema) and table.to_pylist() == rows
    assert (fixes.repaired, fixes.left_out) == (11, 1)


def test_parquet_with_numbers_as_ids_loses_duplicates_and_says_so(tmp_path: Path, root: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"id": number, "image": "0.png", "caption": "a sign"} for number in (1, 2, 1)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    repaired_to(tmp_path / "rows.parquet", tmp_path / "clean", root)
    assert parquet.read_table(tmp_path / "clean" / "rows.parquet").to_pylist() == rows[:2]
    assert "numbers" in lines_of(tmp_path / "clean" / LOG)[0]["why"]


def test_tar_shards_keep_their_images_and_their_names(tmp_path: Path, root: Path) -> None:
    from mgm_exp.data.formats.webdataset import TarWriter

    shards = tmp_path / "shards"
    shards.mkdir()
    image = (root / "0.png").read_bytes()
    for number in range(2):
        writer = TarWriter(shards / f"shard-{number}.tar")
        for row in range(3):
            content = image[:50] if (number, row) == (0, 1) else image
            caption = "a cafÃ©" if (number, row) == (1, 2) else "a sign"
            writer.write({"id": f"{number}-{row}", "caption": caption}, f"{number}-{row}", caption, content, ".png")
        writer.close()
    before = snapshot(shards)
    report, fixes = repaired_to(shards, tmp_path / "clean")
    assert dict(report.counts) == {"truncated": 1, "mojibake": 1} and (fixes.written, fixes.images) == (5, 5)
    assert snapshot(shards) == before
    assert sorted(os.listdir(tmp_path / "clean")) == [LOG, "shard-0.tar", "shard-1.tar"]


def test_nothing_is_written_where_no_row_can_be_kept(tmp_path: Path, root: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [pair("a", "no.png")])
    _, fixes = repair(find_source(tmp_path / "rows.jsonl", root), tmp_path / "clean", workers=0)
    assert fixes.written == 0 and not (tmp_path / "clean").exists()
    assert sorted(os.listdir(tmp_path)) == ["images", "rows.jsonl"]


def test_a_folder_that_holds_something_is_refused(tmp_path: Path, root: Path) -> None:
    source = find_source(write_lines(tmp_path / "rows.jsonl", [pair("a", "0.png")]), root)
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    for folder in (full, full / "x", root, tmp_path):
        with pytest.raises(UserError, match="--fix"):
            repair(source, folder)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    repair(source, tmp_path / "empty", workers=0)
    assert (tmp_path / "empty" / "rows.jsonl").is_file()


@pytest.mark.parametrize("at", [1, 9, 20])
def test_interrupted_and_repeated_it_gives_the_same_copy(tmp_path: Path, root: Path, at: int) -> None:
    rows = [pair(f"{i % 790}", f"{i % 10}.png", "cafÃ©" if i % 3 else "a sign") for i in range(800)]
    write_lines(tmp_path / "rows.jsonl", rows)
    source = find_source(tmp_path / "rows.jsonl", root)
    repair(source, tmp_path / "undisturbed", workers=0)
    calls = 0

    def stop(what: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Interrupted("Stopped.")

    with pytest.raises(Interrupted):
        repair(source, tmp_path / "clean", workers=0, on_progress=stop)
    assert not (tmp_path / "clean").exists()
    partial = tmp_path / ".clean.partial"
    (partial / "stale.png").write_bytes(b"of a row that is gone now")
    (partial / "0.png").write_bytes(b"half")
    repair(source, tmp_path / "clean", workers=0)
    assert contents(tmp_path / "clean") == contents(tmp_path / "undisturbed")
    assert sorted(os.listdir(tmp_path)) == ["clean", "images", "rows.jsonl", "undisturbed"]


def test_an_attempt_on_other_data_is_not_continued(tmp_path: Path, root: Path) -> None:
    write_lines(tmp_path / "one.jsonl", [pair("a", "0.png")])
    write_lines(tmp_path / "two.jsonl", [pair("b", "1.png")])

    def stop(what: str, done: int, total: int) -> None:
        raise Interrupted("Stopped.")

    with pytest.raises(Interrupted):
        repair(find_source(tmp_path / "one.jsonl", root), tmp_path / "clean", workers=0, on_progress=stop)
    repair(find_source(tmp_path / "two.jsonl", root), tmp_path / "clean", workers=0)
    assert set(contents(tmp_path / "clean")) == {"two.jsonl", "1.png", LOG}


def test_killed_and_repeated_it_gives_the_same_copy(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(150):
        picture(200, 200, seed=number).save(root / f"{number}.png")
    write_lines(tmp_path / "rows.jsonl", [pair(f"{i}", f"{i}.png") for i in range(150)])
    rows = str(tmp_path / "rows.jsonl")
    command = [sys.executable, "-m", "mgm_exp.cli", "validate", rows, "--images", str(root)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = tmp_path / "clean"
    process = subprocess.Popen([*command, "--fix", str(out)], env=environment, stdout=subprocess.DEVNULL)
    partial = tmp_path / ".clean.partial"
    deadline = time.monotonic() + 60
    while not list(partial.glob("*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([*command, "--fix", str(out)], env=environment, capture_output=True, text=True, timeout=120)
    if process.returncode == -signal.SIGKILL:
        assert done.returncode == 0, done.stderr
    assert contents(out) == {
        "rows.jsonl": (tmp_path / "rows.jsonl").read_bytes(),
        LOG: b"",
        **contents(root),
    }
