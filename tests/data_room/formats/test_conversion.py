"""Whatever a row holds, it comes back from any other format as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgm_exp.data import BadRow, Row, read_rows
from mgm_exp.data.formats import TARGETS, RowWriter, Target, write_rows
from mgm_exp.data.formats.rows import Form
from mgm_exp.errors import DataError, UserError

from ..conftest import chat, lines_of, pair, picture, write_lines

NAMES = {
    "llava": "rows.json",
    "datajuicer": "rows.jsonl",
    "sharegpt": "rows.json",
    "parquet": "rows.parquet",
    "webdataset": "rows.tar",
}

# Texts that are hard on formats: their own markers, line ends, halves of tokens.
_HARD = [
    "[[human]]: ", "\n[[gpt]]: x", "<|__dj__eoc|>", " <|__dj__eoc|>", "<__dj__image>", "<image>", "\r\n", "\u2028",
    "describe the picture", "<image>\ndescribe the picture", '"', "\\", "\x00", "é", "🙂", " ", "",
]  # fmt: skip
texts = st.lists(
    st.sampled_from(_HARD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=3
).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
extras = st.dictionaries(
    st.sampled_from(["source", "text", "caption", "image", "messages", "system", "extra", "mgm_exp", "videos"]) | texts,
    values,
    max_size=2,
)
images = st.sampled_from(["a.png", "sub/b.png"])


@st.composite
def objects(draw: st.DrawFn, number: int) -> dict[str, Any]:
    """One JSON object in any form and spelling that the reader takes for a row."""
    form = draw(st.sampled_from(get_args(Form)))
    value: dict[str, Any] = draw(extras)
    for key in ("id", "conversations", "raw_caption"):
        value.pop(key, None)
    has_image = draw(st.booleans())
    image = draw(images) if has_image else None
    if form != "llava":
        value.pop("messages", None)
    if form in ("llava", "pairs"):
        value.pop("image", None)
        if image is not None:
            value["image"] = draw(st.sampled_from([image, [image]]))
    else:
        value["images"] = [] if image is None else [image]
    if form == "datajuicer":
        value["text"] = draw(st.sampled_from(["<image> ", "<__dj__image>\n", ""])) * has_image + draw(texts)
    elif form == "pairs":
        value.pop("text", None)
        value["caption"] = draw(texts)
    else:
        key, speakers, names = ("conversations", ("human", "gpt"), ("from", "value"))
        if form == "sharegpt":
            key, speakers, names = ("messages", ("user", "assistant"), ("role", "content"))
        turns = [
            {names[0]: speaker, names[1]: draw(texts)}
            for speaker in draw(st.sampled_from([speakers * 1, speakers * 2]))
        ]
        if draw(st.booleans()):
            turns[0]["weight"] = draw(values)
        if draw(st.booleans()) and "system" not in value:
            turns.insert(0, {names[0]: "system", names[1]: draw(texts)})
        value[key] = turns
    if draw(st.booleans()):
        value["raw_caption"] = draw(texts | st.none() | st.integers())
    row_id = draw(st.sampled_from(["name", "number", "none", "null"]))
    if row_id in ("name", "number"):
        value["id"] = number if row_id == "number" else f"{draw(texts)} {number}"
    elif row_id == "null":
        value["id"] = None
    return value


def same(one: Any, other: Any) -> bool:
    """Equality as JSON values; an id that is null is no id."""
    one, other = ({key: item for key, item in row.items() if (key, item) != ("id", None)} for row in (one, other))
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def convert(source: Path, target: Target, out: Path, root: Path) -> Path:
    out.mkdir(exist_ok=True)
    out = out / NAMES[target]
    root = source.parent if source.suffix == ".tar" else root
    with RowWriter(out, target, image_root=root, packed="original") as writer:
        for row in read_rows(source, keep_given=True):
            assert isinstance(row, Row), row
            assert writer.write(row) is None
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    (root / "sub").mkdir()
    picture(8, 8, seed=1).save(root / "a.png")
    picture(8, 8, seed=2).save(root / "sub" / "b.png")
    return root


def facts(row: Row | BadRow) -> Any:
    assert isinstance(row, Row), row
    extra = json.dumps(row.extra, sort_keys=True)
    return row.id, row.has_id, row.stored_image or row.image, row.conversations, row.caption, row.raw_caption, extra


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_rows_of_any_form_come_back_from_any_format_as_they_stood(
    tmp_path_factory: pytest.TempPathFactory, pictures: Path, target: Target, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    drawn = [data.draw(objects(number)) for number in range(data.draw(st.integers(1, 3)))]
    every = write_lines(folder / "every.jsonl", drawn)
    given_rows = [value for row, value in zip(read_rows(every), drawn, strict=True) if isinstance(row, Row)]
    if not given_rows:
        return
    source = write_lines(folder / "source.jsonl", given_rows)
    first = list(read_rows(source))
    other = convert(source, target, folder / "other", pictures)
    third = data.draw(st.sampled_from(TARGETS))
    between = convert(other, third, folder / "between", pictures)

    for place in (other, between):  # A -> B -> A and A -> B -> C -> A, as JSON values
        for form in {row.form for row in first if isinstance(row, Row)} - {"pairs"}:
            back = rows_in(convert(place, form, folder / f"{place.parent.name}-{form}", pictures))
            for row, was, now in zip(first, given_rows, back, strict=True):
                if isinstance(row, Row) and row.form == form:
                    assert same(now, was)
    for was_row, row in zip(first, read_rows(other), strict=True):
        # What a format says by itself: the same row, but that a caption may be a question and an answer in it.
        assert isinstance(was_row, Row) and isinstance(row, Row)
        wanted, found = facts(was_row), facts(row)
        assert found[:3] == wanted[:3] and found[5:] == wanted[5:]
        if was_row.caption is None or row.caption is not None:
            if row.caption is None or was_row.caption is not None:
                assert found == wanted
        else:
            assert row.conversations is not None and row.conversations[1].text == was_row.caption


def rows_in(path: Path) -> list[Any]:
    return lines_of(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))


def changed(path: Path, **changes: str) -> Path:
    """A file of JSON lines after another program has replaced texts in it."""
    rows = lines_of(path)
    for row in rows:
        for key, (old, new) in ((key, change.split("->")) for key, change in changes.items()):
            assert old in row[key]
            row[key] = row[key].replace(old, new)
    return write_lines(path, rows)


def test_what_another_program_changed_counts_and_the_rest_comes_back(tmp_path: Path) -> None:
    odd = {**chat("x", "a.jpg", "<image>\nq", "a\n[[human]]: b"), "id": 7, "text": "an extra key"}
    source = write_lines(tmp_path / "a.jsonl", [odd])
    back = convert(
        changed(convert(source, "datajuicer", tmp_path / "dj", tmp_path), text="q->Q"), "llava", tmp_path, tmp_path
    )
    (row,) = rows_in(back)
    assert row["conversations"][0]["value"] == "<image>\nQ" and row["text"] == "an extra key"


@pytest.mark.parametrize("caption", ["a dog", "a cat"])
def test_operators_see_the_answer_alone_and_the_question_comes_back(tmp_path: Path, caption: str) -> None:
    rows = [chat("1", "a.jpg", "Describe it.\n<image>", "a dog"), chat("2", "a.jpg", "<image>\nq", "a dog", "r", "b")]
    source = write_lines(tmp_path / "a.jsonl", rows)
    out = tmp_path / "dj.jsonl"
    with RowWriter(out, "datajuicer", answers_only=True) as writer:
        for row in read_rows(source, keep_given=True):
            assert isinstance(row, Row) and writer.write(row) is None
    texts = [row["text"] for row in lines_of(out)]
    assert texts[0] == "<__dj__image>\na dog <|__dj__eoc|>" and texts[1].startswith("[[human]]: <__dj__image>\nq\n")
    changed(out, text=f"a dog->{caption}")
    back = rows_in(convert(out, "llava", tmp_path, tmp_path))
    wanted = json.loads(json.dumps(rows).replace("a dog", caption))
    assert [row["conversations"] for row in back] == [row["conversations"] for row in wanted]


@pytest.mark.parametrize(
    "text",
    [
        "not json", "[]", "{}", "4", '{"is": 3}', '{"is": {"text": [["cat", "x"]]}, "of": {}}', '{"other": 1}',
        '{"is": {"id": ["a"]}, "of": {}}', '{"origin": {"form": "nothing", "keys": {}, "absent": []}}', 7, None,
    ],
)  # fmt: skip
def test_a_key_of_the_same_name_that_is_not_ours_is_an_extra_key(tmp_path: Path, text: Any) -> None:
    value = {**pair("1", "a.jpg"), "mgm_exp": text}
    source = write_lines(tmp_path / "a.jsonl", [value])
    (row,) = read_rows(source)
    assert isinstance(row, Row) and row.extra == {"mgm_exp": text}
    there = convert(source, "llava", tmp_path, tmp_path)
    assert rows_in(convert(there, "datajuicer", tmp_path / "back", tmp_path)) == [value]


def test_conversations_are_written_as_data_juicer_itself_writes_them(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [chat("1", "a.jpg", "<image>\nWhat?", "A bus.", "Colour?", "Red.")])
    (row,) = rows_in(convert(source, "datajuicer", tmp_path / "out", tmp_path))
    assert row == {
        "id": "1",
        "text": "[[human]]: <__dj__image>\nWhat?\n[[gpt]]: A bus.\n[[human]]: Colour?\n[[gpt]]: Red. <|__dj__eoc|>",
        "images": ["a.jpg"],
    }


def test_rows_too_long_with_what_is_kept_aside_are_named(tmp_path: Path) -> None:
    long = chat("1", None, "q", "x" * 2_200_000 + "\n[[human]]: y")
    source = write_lines(tmp_path / "a.jsonl", [{**long, "id": 1}, chat("2", None, "q", "a")])
    writer = RowWriter(tmp_path / "b.jsonl", "datajuicer")
    report = write_rows(read_rows(source, keep_given=True), writer)
    assert (report.rows, report.written, report.rejected) == (2, 1, {"row_too_large": 1})


def test_nothing_is_left_of_a_writer_that_failed(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["{", "["])
    for name, target in (("b.json", "llava"), ("c.parquet", "parquet"), ("d", "webdataset")):
        with pytest.raises(DataError, match="None of the 2 rows"):
            write_rows(read_rows(source), RowWriter(tmp_path / name, target, image_root=tmp_path))
        assert not (tmp_path / name).exists() and not (tmp_path / f".{name}.partial").exists()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not overwritten"):
        RowWriter(tmp_path / "d", "webdataset", overwrite=True)
