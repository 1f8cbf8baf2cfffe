"""Parts of a dataset: what must hold whatever the rows are, and that every format is copied as it stands."""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.data import Row, find_source, read_rows
from mgm_exp.data.apportionment import apportion
from mgm_exp.data.formats import RowWriter
from mgm_exp.data.splits import split_rows
from mgm_exp.errors import DataError, UserError

from .conftest import chat, lines_of, pair, picture, write_lines

SHARES = [(0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (0.98, 0.01, 0.01)]


def parts_of(groups: list[int], strata: list[int], shares: tuple[float, ...], seed: int = 0) -> list[int]:
    return apportion(np.array(groups, np.uint64), np.array(strata, np.int64), shares, seed).tolist()


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=120),
    shares=st.sampled_from(SHARES),
    seed=st.integers(-5, 2**70),
    order=st.randoms(use_true_random=False),
)
def test_groups_stay_together_and_the_order_of_rows_does_not_matter(
    rows: list[tuple[int, int]], shares: tuple[float, ...], seed: int, order: random.Random
) -> None:
    parts = parts_of([group for group, _ in rows], [stratum for _, stratum in rows], shares, seed)
    homes = defaultdict(set)
    for (group, _), part in zip(rows, parts, strict=True):
        homes[group].add(part)
        assert shares[part] > 0
    assert all(len(home) == 1 for home in homes.values())
    places = list(range(len(rows)))
    order.shuffle(places)
    again = parts_of([rows[i][0] for i in places], [rows[i][1] for i in places], shares, seed)
    assert again == [parts[i] for i in places]
    # No part is further from its share than the largest group, and what rounding leaves.
    largest = max(Counter(group for group, _ in rows).values())
    n_strata = len({stratum for _, stratum in rows})
    for part, share in enumerate(shares):
        assert abs(parts.count(part) - share * len(rows)) <= largest * n_strata + 1


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12), shares=st.sampled_from(SHARES))
def test_single_rows_are_divided_exactly_in_every_stratum_and_in_all(
    sizes: list[int], shares: tuple[float, ...]
) -> None:
    strata = [stratum for stratum, size in enumerate(sizes) for _ in range(size)]
    parts = parts_of(list(range(len(strata))), strata, shares)
    counts = Counter(zip(strata, parts, strict=True))
    for stratum, size in enumerate(sizes):
        for part, share in enumerate(shares):
            assert abs(counts[stratum, part] - share * size) < 1
    for part, share in enumerate(shares):
        assert abs(parts.count(part) - share * len(parts)) <= 1 + 1e-9


def test_every_part_gets_its_share_of_large_groups_and_of_small_ones() -> None:
    groups = [group for group in range(300) for _ in range(1 + group % 3)]
    parts = parts_of(groups, [0] * len(groups), SHARES[0])
    sizes = Counter(groups)
    for size in (1, 2, 3):
        of_size = [part for group, part in dict(zip(groups, parts, strict=True)).items() if sizes[group] == size]
        assert of_size.count(0) == pytest.approx(80, abs=2) and of_size.count(1) == pytest.approx(10, abs=2)


def test_another_seed_is_another_division() -> None:
    one, same, two = (parts_of(list(range(200)), [0] * 200, SHARES[0], seed) for seed in (1, 1, 2))
    assert one == same != two


def test_rows_of_one_group_in_several_strata_go_by_the_most() -> None:
    # Group 0 has two rows in stratum 1: it is divided with the 98 others there, so stratum 0 is left exact.
    groups = [0, 0, 0, *range(1, 101), *range(101, 199)]
    strata = [1, 1, 0, *[0] * 100, *[1] * 98]
    parts = parts_of(groups, strata, SHARES[0])
    assert Counter(part for part, stratum in zip(parts[3:103], strata[3:103], strict=True) if stratum == 0) == {
        0: 80,
        1: 10,
        2: 10,
    }


@pytest.fixture
def rows(root: Path) -> list[dict[str, Any]]:
    """60 rows about 30 images, ten of which are also there under another name."""
    for i in range(30):
        picture(6, 6, seed=i).save(root / f"{i}.png")
        if i < 10:
            (root / f"copy-{i}.png").write_bytes((root / f"{i}.png").read_bytes())
    made = [{**pair(f"id {i}", f"{i % 30}.png", "word " * (1 + i % 7)), "kind": "ab"[i % 2]} for i in range(50)]
    return made + [{**chat(f"copy {i}", f"copy-{i}.png", "q", "a b c"), "kind": "b"} for i in range(10)]


def ids(folder: Path, *, images: Path) -> dict[str, set[str]]:
    """Ids by part, and a check that no image is in two of them, by bytes."""
    found: dict[str, set[str]] = {}
    homes: dict[str, set[str]] = defaultdict(set)
    for path in sorted(folder.glob("t*.jsonl")) + sorted(folder.glob("v*.jsonl")):
        found[path.stem] = set()
        for row in read_rows(path):
            assert isinstance(row, Row) and row.image is not None
            found[path.stem].add(row.id)
            homes[hashlib.sha256((images / row.image).read_bytes()).hexdigest()].add(path.stem)
    assert all(len(home) == 1 for home in homes.values())
    return found


def test_no_image_is_in_two_parts_and_every_row_is_in_one(tmp_path: Path, root: Path, rows: list[Any]) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [*rows[:20], "{", *rows[20:]])
    report = split_rows(find_source(source, root), tmp_path / "out")
    found = ids(tmp_path / "out", images=root)
    assert sum(map(len, found.values())) == 60 and set.union(*found.values()) == {row["id"] for row in rows}
    assert {name: len(part) for name, part in found.items()} == {n: p.rows for n, p in report.parts.items()}
    assert abs(len(found["train"]) - 48) <= 3 and found["validation"] and found["test"]
    assert report.groups == 30 and report.rejected == {"not_json": 1}
    assert [row["kind"] for row in lines_of(tmp_path / "out" / "rejected.jsonl")] == ["not_json"]
    written = json.loads((tmp_path / "out" / "split.json").read_text())
    assert written == json.loads(json.dumps(report.to_json())) and written["schema_version"] == 1
    kept = [row for path in (tmp_path / "out").glob("[tv]*.jsonl") for row in lines_of(path)]
    assert sorted(kept, key=str) == sorted(rows, key=str)  # as they stood


def test_the_order_of_rows_and_threads_do_not_matter(tmp_path: Path, root: Path, rows: list[Any]) -> None:
    reports = []
    for number, threads in enumerate((1, 4)):
        random.Random(number).shuffle(rows)
        source = write_lines(tmp_path / f"{number}.jsonl", rows)
        report = split_rows(find_source(source, root), tmp_path / f"out {number}", threads=threads, seed=3)
        reports.append((ids(tmp_path / f"out {number}", images=root), report.parts))
    assert reports[0] == reports[1]
    other = split_rows(find_source(source, root), tmp_path / "other", seed=4)
    assert other.parts["test"].fingerprint != reports[0][1]["test"].fingerprint


def test_strata_can_be_values_of_a_key(tmp_path: Path, root: Path, rows: list[Any]) -> None:
    source = write_lines(
        tmp_path / "rows.jsonl", [chat(f"t {i}", None, "q", "a") | {"meta": {"l": i % 2}} for i in range(40)]
    )
    report = split_rows(find_source(source), tmp_path / "out", by="meta.l")
    assert report.parts["train"].strata == {"0": 16, "1": 16}
    assert report.parts["test"].strata == report.parts["validation"].strata == {"0": 2, "1": 2}
    with pytest.raises(UserError, match="meta"):
        split_rows(find_source(source), tmp_path / "none", by="lang")
    assert not (tmp_path / "none").exists()


def test_tables_are_split_with_all_their_columns(tmp_path: Path) -> None:
    n = 50
    table = pa.table(
        {"id": [f"{i}" for i in range(n)], "text": ["x"] * n, "raw": [bytes([i]) for i in range(n)], "score": range(n)}
    )
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    split_rows(find_source(tmp_path / "rows.parquet"), tmp_path / "out")
    parts = [pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in ("train", "validation", "test")]
    assert [part.num_rows for part in parts] == [40, 5, 5]
    assert all(part.schema.equals(table.schema) for part in parts)
    assert pa.concat_tables(parts).sort_by("score").equals(table.combine_chunks())


def test_shards_are_split_with_all_their_files(tmp_path: Path, root: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [pair(f"{i}", f"{i}.png") for i in range(10)])
    with RowWriter(tmp_path / "shards", "webdataset", image_root=root, shard_rows=4) as writer:
        for row in read_rows(source):
            assert isinstance(row, Row)
            writer.write(row)
    with tarfile.open(tmp_path / "shards" / "shard-000001.tar", "a") as archive:
        archive.add(source, "7.cls")  # a file that no reader here knows, of the last sample
    report = split_rows(find_source(tmp_path / "shards"), tmp_path / "out")
    assert [part.rows for part in report.parts.values()] == [8, 1, 1]
    names, contents = [], []
    for name in ("train", "validation", "test"):
        for path in (tmp_path / "out" / name).iterdir():
            with tarfile.open(path) as archive:
                names += archive.getnames()
        folder = tmp_path / "out" / name
        contents += [row.stored_image for row in read_rows(folder) if isinstance(row, Row)]
    assert len(names) == 31 and "7.cls" in names
    assert sorted(map(str, contents)) == [f"{i}.png" for i in range(10)]


def test_images_that_cannot_be_read_go_by_their_path(tmp_path: Path, root: Path) -> None:
    rows = [pair(f"{i}", "gone.png" if i < 5 else f"{i}.png") for i in range(10)]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    report = split_rows(find_source(source, root), tmp_path / "out")
    assert (report.unread_images, report.groups) == (1, 6)
    with pytest.raises(DataError, match="--by-path"):
        split_rows(find_source(source), tmp_path / "none")
    assert split_rows(find_source(source), tmp_path / "by path", reads_images=False).groups == 6


@pytest.mark.parametrize(
    "shares", [(1,), (80, 10, 5, 5), (-1, 2), (0, 1), (1, 0, 0), (float("nan"), 1), (float("inf"), 1)]
)
def test_shares_that_are_none_are_refused(tmp_path: Path, shares: tuple[float, ...]) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [chat("1", None, "q", "a")])
    with pytest.raises(UserError, match="shares"):
        split_rows(find_source(source), tmp_path / "out", shares=shares)


def test_what_is_there_is_not_overwritten_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [chat("1", None, "q", "a")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="not an empty folder"):
        split_rows(find_source(source), tmp_path / "out")
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps([chat("1", None, "q", "a"), chat("2", None, "q", "a")])[:-9])
    with pytest.raises(DataError, match="cannot be trusted"):
        split_rows(find_source(cut), tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.json", "out", "rows.jsonl"]
