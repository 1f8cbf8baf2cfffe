from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.data import image_checks, image_table
from mgm_exp.data.image_checks import ImageChecks
from mgm_exp.data.image_table import ImageTable, write_image_tables
from mgm_exp.errors import DataError

from .conftest import chat, pair, picture, write_lines


@pytest.fixture
def rows(tmp_path: Path, root: Path) -> Path:
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("no image")
    names = [f"{n}.png" for n in range(10)] + ["empty.png", "text.png", "gone.png", "../out.png", "0.png"]
    lines = [pair(f"r{n}", name) for n, name in enumerate(names)]
    return write_lines(tmp_path / "rows.jsonl", [*lines, chat("text", None, "q", "a"), "{damaged"])


def test_a_table_says_what_checking_the_image_says(tmp_path: Path, rows: Path, root: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    meta = write_image_tables({"align": (rows, root)}, out, max_megapixels=50, workers=0)
    assert meta["align"] == {
        "images": 14,
        "usable": 10,
        "unusable": {"missing": 1, "outside_root": 1, "unreadable": 1, "zero_bytes": 1},
    }
    table = ImageTable(out, "align", root)
    assert len(table) == 10
    with ImageChecks(root, 50, workers=0) as checks:
        for name in ["0.png", "9.png", "empty.png", "text.png", "gone.png", "../out.png"]:
            expected = checks.verdict(name)
            found = table.verdict(name)
            assert (found.kind, found.detail, found.sha256) == (expected.kind, expected.detail, expected.sha256)


def test_stages_with_one_root_share_a_table_and_each_image_is_decoded_once(
    tmp_path: Path, rows: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(seed=77).save(root / "more.png")
    more = write_lines(tmp_path / "more.jsonl", [pair("m", "more.png"), pair("n", "0.png")])
    decoded: list[str] = []
    probe = image_checks.probe_image

    def counting(root: Any, image: str, *args: Any, **options: Any) -> Any:
        decoded.append(image)
        return probe(root, image, *args, **options)

    monkeypatch.setattr(image_checks, "probe_image", counting)
    out = tmp_path / "out"
    out.mkdir()
    write_image_tables({"align": (rows, root), "instruct": (more, root)}, out, max_megapixels=50, workers=0)
    assert len(decoded) == len(set(decoded)) == 15
    assert ImageTable(out, "instruct", root).verdict("more.png").kind is None
    assert ImageTable(out, "align", root).verdict("more.png").kind is None


def test_stages_with_other_roots_have_tables_of_their_own(tmp_path: Path, rows: Path, root: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    picture(seed=5).save(other / "0.png")
    second = write_lines(tmp_path / "second.jsonl", [pair("m", "0.png")])
    out = tmp_path / "out"
    out.mkdir()
    write_image_tables({"align": (rows, root), "instruct": (second, other)}, out, max_megapixels=50, workers=0)
    verdicts = [ImageTable(out, name, where).verdict("0.png") for name, where in (("align", root), ("instruct", other))]
    assert verdicts[0].sha256 != verdicts[1].sha256
    with pytest.raises(DataError, match="was not there when images were checked"):
        ImageTable(out, "instruct", other).verdict("1.png")


def test_only_the_first_rows_are_looked_at_where_asked(tmp_path: Path, rows: Path, root: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    meta = write_image_tables({"align": (rows, root)}, out, max_megapixels=50, max_samples=3, workers=0)
    assert meta["align"]["images"] == 3


def test_tables_do_not_depend_on_processes(tmp_path: Path, rows: Path, root: Path) -> None:
    contents = []
    for workers in (0, 2):
        out = tmp_path / f"out-{workers}"
        out.mkdir()
        write_image_tables({"align": (rows, root)}, out, max_megapixels=50, workers=workers)
        contents.append({name: (out / name).read_bytes() for name in sorted(os.listdir(out))})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == ["align-bad.jsonl", "align.npy", image_table.TABLES]
