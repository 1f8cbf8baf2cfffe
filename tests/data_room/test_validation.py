from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from mgm_exp.data import find_source
from mgm_exp.data.kinds import ADVICE, KINDS
from mgm_exp.data.validation import Validation, validate
from mgm_exp.data.validation_report import FaultList, ValidationReport
from mgm_exp.errors import DataError

from . import damage
from .conftest import pair, write_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``rows.json`` (a list that is cut), ``rows.jsonl`` and ``images/``, with every kind of damage."""
    path = tmp_path_factory.mktemp("damaged")
    damage.images(path / "images")
    damage.write_list(path / "rows.json", damage.rows(), is_cut=True)
    damage.write_lines(path / "rows.jsonl", damage.rows())
    return path


def validated(folder: Path, name: str = "rows.jsonl", workers: int = 0) -> ValidationReport:
    source = find_source(folder / name, folder / "images")
    return validate(source, max_megapixels=damage.MAX_MEGAPIXELS, workers=workers)


def found(report: ValidationReport) -> set[tuple[int, str]]:
    return {(fault.index, fault.kind) for fault in report.broken if fault.kind != "byte_order_mark"}


def test_every_kind_of_damage_is_found_and_nothing_else(folder: Path) -> None:
    data = damage.rows()
    report = validated(folder, "rows.json")
    cut = len(data.rows)
    assert found(report) == {*data.faults(), (cut, "file_ends_early")}
    assert set(report.counts) == set(KINDS) - damage.OF_A_MODEL
    assert report.rows == cut + 1 and report.ok == data.kinds.count(set())


def test_every_fault_says_where_it_stands_and_what_was_found(folder: Path) -> None:
    data = damage.rows()
    report = validated(folder)
    lines = damage.write_lines(folder / "again.jsonl", data)
    assert found(report) == data.faults()
    for fault in report.broken:
        assert fault.file == "rows.jsonl" and fault.detail
        if fault.kind != "byte_order_mark":
            assert fault.line == lines[fault.index]
            assert fault.id is None or fault.id.encode() in data.rows[fault.index]
    marks = [fault for fault in report.broken if fault.kind == "byte_order_mark"]
    assert [(mark.line, mark.id) for mark in marks] == [(1, None)]


def test_the_report_counts_rows_and_images(folder: Path) -> None:
    report = validated(folder)
    data = damage.rows()
    of_rows = Counter(kind for kinds in data.kinds for kind in kinds)
    assert report.counts == {**of_rows, "byte_order_mark": 1}
    assert list(report.counts.values()) == sorted(report.counts.values(), reverse=True)
    for kind, first in report.first.items():
        assert [fault for fault in report.broken if fault.kind == kind][: len(first)] == list(first)
    images = report.images
    # 0-6 and the grey one are used; 7-9, unused.png and the images of rows that could not be read are not.
    assert dict(images.formats) == {"PNG": 8} and dict(images.modes) == {"RGB": 7, "L": 1}
    used = [folder / "images" / name for name in (*(f"{i}.png" for i in range(7)), "grey.png")]
    assert images.bytes == sum(path.stat().st_size for path in used)
    assert images.checked - images.broken == 8
    assert list(images.unused_examples) == ["7.png", "8.png", "9.png", "unused.png"] and images.unused == 4


def test_the_report_does_not_depend_on_the_number_of_processes(tmp_path: Path, root: Path) -> None:
    rows = [pair(f"{i}", f"{i % 40}.png") for i in range(400)]  # images 10-39 are missing
    write_lines(tmp_path / "rows.jsonl", rows)
    alone, several = (validate(find_source(tmp_path / "rows.jsonl", root), workers=n) for n in (0, 2))
    assert list(alone.broken) == list(several.broken) and len(alone.broken) == 300
    assert alone.images == several.images


def test_the_json_report_holds_all_of_it(folder: Path, tmp_path: Path) -> None:
    report = validated(folder)
    report.write_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["rows"] == report.rows and content["ok"] == report.ok and content["schema_version"] == 1
    assert content["broken"] == [fault.to_json() for fault in report.broken]
    assert content["counts"] == dict(report.counts)
    assert content["images"]["checked"] == report.images.checked
    assert os.listdir(tmp_path) == ["report.json"]


def test_data_without_a_fault_has_an_empty_report(tmp_path: Path, root: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [pair(f"{i}", f"{i}.png") for i in range(10)])
    report = validate(find_source(tmp_path / "rows.jsonl", root))
    report.write_json(tmp_path / "report.json")
    assert (report.rows, report.ok, dict(report.counts), list(report.broken)) == (10, 10, {}, [])
    assert json.loads((tmp_path / "report.json").read_text())["broken"] == []


def test_an_image_of_many_rows_is_decoded_once(tmp_path: Path, root: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [pair(f"{i}", "0.png") for i in range(3000)])
    validation = Validation(find_source(tmp_path / "rows.jsonl", root), workers=0)
    for number, checked in enumerate(validation):
        if number == 0:
            (root / "0.png").unlink()
        assert checked.faults == ()
    assert validation.report().images.checked == 1


def test_a_missing_root_full_of_rows_is_reported_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "rows.jsonl", [pair(f"{i}", f"a/{i}.png") for i in range(700)])
    report = validate(find_source(tmp_path / "rows.jsonl", tmp_path / "empty"), workers=0)
    assert report.counts == {"missing": 700} and report.ok == 0
    assert [fault.line for fault in report.broken] == list(range(1, 701))


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b gzip", "[]".encode("utf-16")])
def test_a_file_that_is_no_rows_at_all_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        validate(find_source(tmp_path / "rows.jsonl"))


def test_a_list_of_faults_is_the_same_on_disk_as_in_memory(folder: Path) -> None:
    faults = list(validated(folder).broken) * 300  # beyond what is kept in memory
    spooled = FaultList()
    for number, fault in enumerate(faults):
        spooled.append(fault)
        if number == 3:
            assert len(list(spooled)) == 4
    assert len(spooled) == len(faults)
    assert all(one == other for one, other in zip(spooled, faults, strict=True))
    assert sum(1 for _ in zip(spooled, spooled, strict=True)) == len(faults)  # two readers at once


def test_every_kind_has_an_advice() -> None:
    assert set(ADVICE) == set(KINDS)


def test_progress_is_told_and_ends_at_the_number_of_rows(tmp_path: Path, root: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [pair(f"{i:05d}", "0.png") for i in range(2000)])
    told: list[tuple[int, int]] = []
    source = find_source(tmp_path / "rows.jsonl", root)
    validate(source, workers=0, on_progress=lambda what, done, total: told.append((done, total)))
    assert told[-1] == (2000, 2000) and len(told) > 20
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert all(abs(total - 2000) < 50 for _, total in told)
