from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.data import BadRow, ImageFault, Row, find_source, open_image, read_rows
from mgm_exp.data.formats import RowWriter
from mgm_exp.data.images import read_image_file
from mgm_exp.errors import DataError

from ..conftest import chat, pair, picture, write_lines


def png(seed: int = 0) -> bytes:
    content = io.BytesIO()
    picture(seed=seed).save(content, "PNG")
    return content.getvalue()


def shard(path: Path, files: dict[str, bytes | str | None], cut: int = 0) -> Path:
    """A tar archive as any tool might write it; None is a link."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(member)
                continue
            raw = content.encode() if isinstance(content, str) else content
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    return path


def packed(tmp_path: Path, root: Path, n: int = 5, shard_rows: int = 2) -> Path:
    rows: list[Any] = [pair(f"id {i}", f"{i}.png", f"caption {i}") for i in range(n - 1)]
    rows.append(chat("text", None, "q", "a"))
    source = write_lines(tmp_path / "rows.jsonl", rows)
    with RowWriter(tmp_path / "shards", "webdataset", image_root=root, shard_rows=shard_rows) as writer:
        for row in read_rows(source, keep_given=True):
            assert isinstance(row, Row) and writer.write(row) is None
    return tmp_path / "shards"


def test_shards_hold_rows_and_images(tmp_path: Path, root: Path) -> None:
    shards = packed(tmp_path, root)
    assert [path.name for path in sorted(shards.iterdir())] == [f"shard-{i:06d}.tar" for i in range(3)]
    location = find_source(shards)
    assert (location.path, location.image_root) == (shards, shards)
    rows = [row for row in read_rows(shards) if isinstance(row, Row)]
    assert [row.id for row in rows] == ["id 0", "id 1", "id 2", "id 3", "text"]
    assert [row.index for row in rows] == [0, 1, 2, 3, 4] and [row.line for row in rows] == [1, 2, 1, 2, 1]
    assert [row.file for row in rows][::2] == [f"shard-{i:06d}.tar" for i in range(3)]
    for number, row in enumerate(rows[:4]):
        assert row.image is not None and row.stored_image == f"{number}.png"
        assert read_image_file(shards, row.image) == (root / f"{number}.png").read_bytes()
        assert open_image(shards, row.image, max_megapixels=1).size == (20, 14)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, root: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = (packed(tmp_path / name, root) for name in ("one", "two"))
    assert [path.read_bytes() for path in sorted(one.iterdir())] == [
        path.read_bytes() for path in sorted(two.iterdir())
    ]


def test_any_reader_of_webdataset_finds_a_caption_beside_its_image(tmp_path: Path, root: Path) -> None:
    shards = packed(tmp_path, root)
    with tarfile.open(shards / "shard-000000.tar") as archive:
        names = archive.getnames()
        assert names == [f"_00000000{i}.{suffix}" for i in range(2) for suffix in ("json", "txt", "png")]
        text = archive.extractfile(names[1])
        assert text is not None and text.read() == b"caption 0"


def test_shards_of_others_are_read(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "00000.tar",
        {
            "dir/a.jpg": png(),
            "dir/a.txt": " a sign\n",
            "dir/a.json": json.dumps({"url": "x", "width": 3}),
            "._b.jpg": b"rubbish of a Mac",
            "b.png": png(),
            "b.txt": "two",
            "b.cls": "7",
            "c.json": json.dumps({"id": "mine", "caption": "three"}),
            "c.PNG": png(),
        },
    )
    rows = read_rows(path)
    a, b, c = rows
    assert isinstance(a, Row) and isinstance(b, Row) and isinstance(c, Row)
    assert (a.id, a.caption, a.image, a.extra) == ("dir/a", "a sign", "00000.tar::dir/a.jpg", {"url": "x", "width": 3})
    assert (b.id, b.caption, b.image) == ("b", "two", "00000.tar::b.png")
    assert (c.id, c.caption, c.image) == ("mine", "three", "00000.tar::c.PNG")
    assert rows.ignored == ("cls",)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"a.json": "{"}, "not_json"),
        ({"a.json": "[1]"}, "not_an_object"),
        ({"a.json": b"\xff\xfe"}, "encoding"),
        ({"a.txt": b"\xff\xfe"}, "encoding"),
        ({"a.json": None}, "not_json"),
        ({"a.json": json.dumps({"caption": "x" * (4 << 20)})}, "row_too_large"),
        ({"a.jpg": png()}, "no_conversations"),
        ({"a.jpg": png(), "a.png": png(), "a.txt": "x"}, "several_images"),
    ],
)
def test_a_damaged_sample_is_named_and_the_next_one_read(tmp_path: Path, files: dict[str, Any], kind: str) -> None:
    path = shard(tmp_path / "x.tar", {"0.txt": "zero", **files, "b.txt": "fine"})
    first, bad, last = read_rows(path)
    assert isinstance(first, Row) and isinstance(last, Row) and last.id == "b"
    assert isinstance(bad, BadRow) and (bad.kind, bad.id, bad.line, bad.index) == (kind, "a", 2, 1)


@pytest.mark.parametrize("cut", [10_240, 9_000, 11_500])
def test_a_cut_shard_is_called_cut_and_what_is_whole_is_read(tmp_path: Path, cut: int) -> None:
    path = shard(tmp_path / "x.tar", {f"{i}.txt": f"{i} " * 300 for i in range(30)}, cut=cut)
    *rows, last = read_rows(path)
    assert isinstance(last, BadRow) and last.kind == "file_ends_early"
    assert all(isinstance(row, Row) for row in rows) and len(rows) >= 20


def test_an_archive_behind_an_archive_is_not_passed_over(tmp_path: Path) -> None:
    one, two = (shard(tmp_path / f"{i}.tar", {f"{i}.txt": "x"}) for i in range(2))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    last = list(read_rows(one))[-1]
    assert isinstance(last, BadRow) and last.kind == "file_ends_early"


def test_a_lost_shard_is_one_bad_row_and_the_others_are_read(tmp_path: Path, root: Path) -> None:
    shards = packed(tmp_path, root)
    (shards / "shard-000001.tar").write_bytes(b"not a tar archive")
    rows = list(read_rows(shards))
    assert [type(row).__name__ for row in rows] == ["Row", "Row", "BadRow", "Row"]
    assert isinstance(rows[2], BadRow) and (rows[2].kind, rows[2].file) == ("file_ends_early", "shard-000001.tar")


@pytest.mark.parametrize("content", [b"", b"\x00" * 10_240, b"hello"])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_rows(path)


def test_images_in_shards_have_the_faults_of_images(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", {"a.png": png(), "zero.png": b"", "link.png": None, "half.png": png()[:200]})

    def fault(name: str) -> str:
        with pytest.raises(ImageFault) as found:
            open_image(tmp_path, name, max_megapixels=1)
        return found.value.kind

    assert open_image(tmp_path, "x.tar::a.png", max_megapixels=1).size == (20, 14)
    assert fault("x.tar::b.png") == "missing" and fault("y.tar::a.png") == "missing"
    assert fault("x.tar::link.png") == "missing"
    assert fault("x.tar::zero.png") == "zero_bytes"
    assert fault("x.tar::half.png") in ("truncated", "unreadable")
    assert fault("../x.tar::a.png") == "outside_root"
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    assert fault("bad.tar::a.png") == "unreadable"
    path.write_bytes(path.read_bytes()[: 512 + 100])
    assert fault("x.tar::a.png") in ("truncated", "unreadable")


def test_a_shard_that_was_replaced_is_indexed_again(tmp_path: Path) -> None:
    shard(tmp_path / "x.tar", {"a.png": png(1)})
    assert read_image_file(tmp_path, "x.tar::a.png") == png(1)
    shard(tmp_path / "x.tar", {"first.txt": "moves the others", "a.png": png(2)})
    assert read_image_file(tmp_path, "x.tar::a.png") == png(2)


def test_an_image_that_cannot_be_read_is_named_and_not_packed(tmp_path: Path, root: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [pair("a", "0.png"), pair("b", "gone.png"), pair("c", "../x.png")])
    with RowWriter(tmp_path / "x.tar", "webdataset", image_root=root) as writer:
        kinds = [bad and bad.kind for bad in (writer.write(row) for row in read_rows(source) if isinstance(row, Row))]
    assert kinds == [None, "missing", "outside_root"]
    assert [row.id for row in read_rows(tmp_path / "x.tar") if isinstance(row, Row)] == ["a"]
