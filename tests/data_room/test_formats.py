from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.data import BadRow, Record, Row, Turn, dj_row, read_rows, source_fingerprint
from mgm_exp.data.conversations import CAPTION_PROMPTS, to_record
from mgm_exp.data.kinds import KINDS
from mgm_exp.errors import DataError

from .conftest import chat, pair, write_lines


def only(path: Path) -> Row | BadRow:
    (row,) = read_rows(path)
    return row


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda text: text.strip() and "<" not in text
)


@st.composite
def records(draw: st.DrawFn) -> list[Record]:
    made = []
    for number in range(draw(st.integers(1, 4))):
        image = draw(st.none() | texts.filter(lambda text: "\\" not in text))
        rounds = [(draw(texts), draw(texts)) for _ in range(draw(st.integers(1, 3)))]
        turns = [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(sum(rounds, ()))]
        if image is not None:
            turns[0] = Turn("human", "<image>\n" + turns[0].text)
        raw_caption = draw(st.none() | texts)
        made.append(Record(f"id {number}", image, tuple(turns), raw_caption))
    return made


@settings(max_examples=60, deadline=None)
@given(records(), st.booleans())
def test_records_survive_llava_json(
    tmp_path_factory: pytest.TempPathFactory, made: list[Record], as_list: bool
) -> None:
    path = tmp_path_factory.mktemp("llava") / "rows.json"
    rows = [record.to_json() for record in made]
    path.write_text(json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    read = [to_record(row) for row in read_rows(path) if isinstance(row, Row)]
    assert read == [(record, []) for record in made]


@settings(max_examples=60, deadline=None)
@given(caption=texts.map(str.strip), image=texts, raw=st.none() | texts)
def test_captions_survive_data_juicer_rows(
    tmp_path_factory: pytest.TempPathFactory, caption: str, image: str, raw: str | None
) -> None:
    record = Record("a", image, (Turn("human", "<image>\nwhat?"), Turn("gpt", caption)), raw)
    row = only(write_lines(tmp_path_factory.mktemp("dj") / "rows.jsonl", [dj_row(record)]))
    assert isinstance(row, Row)
    assert (row.id, row.image, row.caption, row.raw_caption) == ("a", image, caption, raw)


@pytest.mark.parametrize(
    "text",
    [
        "<__dj__image>\na red sign <|__dj__eoc|>",
        "<__dj__image> a red sign <|__dj__eoc|>",
        "<image>\na red sign",
        "a red sign <__dj__image>",
        "a red sign",
    ],
)
def test_special_tokens_of_data_juicer_are_no_part_of_a_caption(tmp_path: Path, text: str) -> None:
    row = only(write_lines(tmp_path / "a.jsonl", [{"id": "1", "text": text, "images": ["a.jpg"]}]))
    assert isinstance(row, Row) and row.caption == "a red sign"


def test_a_caption_row_gets_a_question_chosen_by_its_id(tmp_path: Path) -> None:
    rows = [pair(str(i), "a.jpg") for i in range(40)]
    read = list(read_rows(write_lines(tmp_path / "a.jsonl", rows)))
    made = [to_record(row) for row in read if isinstance(row, Row)]
    assert all(not isinstance(entry, BadRow) and entry[1] == ["caption_prompt_added"] for entry in made)
    questions = [entry[0].conversations[0].text for entry in made if not isinstance(entry, BadRow)]
    assert {question.removeprefix("<image>\n") for question in questions} == set(CAPTION_PROMPTS)
    again = [to_record(row) for row in read if isinstance(row, Row)]
    assert again == made


BAD = {
    "no_conversations": [
        {"id": "1"},
        chat("1", "a.jpg"),
        {"id": "1", "conversations": "hello"},
        {"id": "1", "text": 3},
    ],
    "not_an_object": ['"a"', "[1]", "7", "null"],
    "bad_id": [{**pair("", "a.jpg")}, {**pair("1", "a.jpg"), "id": True}, {**pair("1", "a.jpg"), "id": [1]}],
    "bad_turn": [
        {"id": "1", "conversations": ["hello"]},
        {"id": "1", "conversations": [{"from": "human"}]},
        {"id": "1", "conversations": [{"from": "human", "value": 3}]},
    ],
    "unknown_speaker": [{"id": "1", "conversations": [{"from": "user", "value": "hello"}]}],
    "turn_order": [
        {"id": "1", "conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]},
        {"id": "1", "conversations": [{"from": "human", "value": "x"}, {"from": "human", "value": "y"}]},
    ],
    "ends_with_human": [chat("1", None, "q", "a", "q")],
    "empty_answer": [chat("1", None, "q", " \n"), chat("1", "a.jpg", "<image>\nq", "")],
    "empty_question": [chat("1", None, "", "a"), chat("1", "a.jpg", "<image>\nq", "a", " ", "b")],
    "empty_caption": [pair("1", "a.jpg", ""), {"id": "1", "text": "<image>", "images": ["a.jpg"]}],
    "bad_image_field": [{**chat("1", None, "q", "a"), "image": image} for image in ("", 3, [3], {"path": "x"})],
    "several_images": [
        {**chat("1", None, "q", "a"), "image": ["a.jpg", "b.jpg"]},
        {**pair("1", ""), "images": ["a", "b"]},
    ],
    "two_images_in_a_turn": [
        chat("1", "a.jpg", "<image> and <image>", "a"),
        {"id": "1", "text": "<__dj__image> <__dj__image> x", "images": ["a"]},
    ],
    "image_token_repeated": [chat("1", "a.jpg", "<image>\nq", "a", "<image>\nq", "a")],
    "image_token_in_answer": [chat("1", "a.jpg", "<image>\nq", "look: <image>")],
    "image_token_without_image": [chat("1", None, "<image>\nq", "a"), {"id": "1", "text": "<image> x", "images": []}],
    "no_image": [{"id": "1", "text": "only words"}],
    "unsupported_media": [{"id": "1", "text": "<__dj__video> x"}, {**pair("1", "a.jpg"), "audios": ["a.wav"]}],
    "lone_surrogate": ['{"id": "1", "text": "<image> \\ud800", "images": ["a.jpg"]}'],
}


@pytest.mark.parametrize(("kind", "row"), [(kind, row) for kind, rows in BAD.items() for row in rows])
def test_each_malformed_row_has_its_kind_and_place(tmp_path: Path, kind: str, row: Any) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [pair("first", "a.jpg"), row])
    read = list(read_rows(path))[1]
    bad = to_record(read) if isinstance(read, Row) else read
    assert isinstance(bad, BadRow)
    assert bad.kind == kind and kind in KINDS
    assert (bad.file, bad.line, bad.index) == ("rows.jsonl", 2, 1)
    assert bad.detail
    json.dumps(bad.to_json()).encode()


def test_the_second_row_with_an_id_is_bad(tmp_path: Path) -> None:
    rows = list(read_rows(write_lines(tmp_path / "a.jsonl", [pair("1", "a"), pair("2", "b"), pair("1", "c")])))
    assert [isinstance(row, BadRow) for row in rows] == [False, False, True]
    assert isinstance(rows[2], BadRow) and rows[2].kind == "duplicate_id" and rows[2].id == "1"


def test_a_row_without_an_id_is_called_by_its_number_and_counted(tmp_path: Path) -> None:
    row = list(read_rows(write_lines(tmp_path / "a.jsonl", [pair("1", "a"), {"text": "x", "images": ["a.jpg"]}])))[1]
    assert isinstance(row, Row) and row.id == "row-000001"
    entry = to_record(row)
    assert not isinstance(entry, BadRow) and "id_added" in entry[1]


def test_a_number_is_an_id_and_a_list_of_one_image_is_an_image(tmp_path: Path) -> None:
    row = only(write_lines(tmp_path / "a.jsonl", [{**chat("1", None, "q", "a"), "id": 7, "image": ["a.jpg"]}]))
    assert isinstance(row, Row) and (row.id, row.image) == ("7", "a.jpg")


def test_an_image_without_its_token_gets_one_in_front_of_the_first_turn(tmp_path: Path) -> None:
    row = only(write_lines(tmp_path / "a.jsonl", [chat("1", "a.jpg", "what?", "a", "and?", "b")]))
    assert isinstance(row, Row)
    entry = to_record(row)
    assert not isinstance(entry, BadRow)
    assert entry[0].conversations[0].text == "<image>\nwhat?" and entry[1] == ["image_token_added"]


def test_a_cut_list_is_reported_as_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([chat("1", None, "q", "a"), chat("2", None, "q", "a")])[:-30])
    rows = list(read_rows(path))
    assert isinstance(rows[0], Row) and isinstance(rows[1], BadRow) and rows[1].kind == "file_ends_early"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no rows"),
        (b" \n\n", "no rows"),
        (b"PAR1....", "Parquet"),
        (b"PK\x03\x04...", "zip"),
        (b"\x1f\x8b...", "gzip"),
        ('{"id": 1}'.encode("utf-16"), "UTF-16"),
        (b'{\n "data": []\n}', "no known format"),
        (b"id,caption\n1,a dog\n", "no known format"),
    ],
)
def test_another_format_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_rows(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not there"):
        read_rows(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="folder"):
        read_rows(tmp_path)


def test_the_source_fingerprint_follows_rows_and_images(tmp_path: Path, root: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [pair("1", "0.png"), pair("2", "gone.png"), "{", pair("3", "../0.png")])
    before = source_fingerprint(path, root)
    assert source_fingerprint(path, root) == before
    os.utime(root / "1.png", ns=(1, 1))  # not named by a row
    assert source_fingerprint(path, root) == before
    os.utime(root / "0.png", ns=(1, 1))
    touched = source_fingerprint(path, root)
    assert touched != before
    (root / "gone.png").write_bytes(b"x")
    assert source_fingerprint(path, root) != touched
