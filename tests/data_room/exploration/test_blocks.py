"""A file of lines read in parts by several processes gives what reading it from end to end gives."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.data.exploration import Exploration, Options, explore, reading
from mgm_exp.data.exploration.blocks import spans_of
from mgm_exp.data.formats import find_source
from tests.data_room.conftest import chat, pair

TAIL = [
    "{broken",
    "",
    "   ",
    "[1, 2]",
    json.dumps(pair("r3", "3.png", "an id that was there")),
    json.dumps({"text": "no id of its own"}),
    json.dumps(pair("long", "3.png", "word " * 300)),
    json.dumps(chat("talk", None, "what?", "an answer", "and?", "another answer")),
    '{"id": "twice", "id": "twice", "text": "x"}',
    json.dumps({**pair("re", "5.png", "a new one"), "raw_caption": "an old one"}),
    "\ufeff" + json.dumps(pair("bom", "1.png", "a mark in the middle")),
    json.dumps(pair("r4", "4.png", "words that stand nowhere else")),
    json.dumps({"text": "no id either"}),
]


def content(exploration: Exploration) -> dict[str, object]:
    found = json.loads(json.dumps(exploration.content))
    found.pop("seconds")
    ids = [exploration.rows.ids[place] for place in range(len(exploration.rows))]
    images = [exploration.rows.images[place] for place in range(len(exploration.rows))]
    captions = [exploration.caption(place) for place in range(exploration.values.stream.captions)]
    return {**found, "ids": ids, "row_images": images, "captions": captions}


def test_parts_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for place in range(60):
        lines.append(json.dumps(pair(f"r{place}", f"{place % 20}.png", f"sign {place} {'and' * (place % 3)} more")))
        if place % 5 == 0:
            lines.append(TAIL[place // 5])
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    location = find_source(path)
    whole = content(explore(location, Options(workers=1, with_images=False)))
    monkeypatch.setattr(reading, "_MUCH", 0)
    monkeypatch.setattr(reading, "spans_of", partial(spans_of, size=500))
    assert len(list(spans_of(path, 500))) > 8
    parts = content(explore(location, Options(workers=2, with_images=False)))
    assert parts == whole
    assert whole["bad_rows"] == {"not_json": 2, "not_an_object": 1, "duplicate_id": 2, "duplicate_key": 1}
    assert whole["recaptioned_rows"] == 1 and "row-000029" in whole["ids"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=20).map(b"\n".join), st.integers(1, 60))
def test_spans_cover_a_file_and_end_with_lines(tmp_path_factory: pytest.TempPathFactory, raw: bytes, size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "spans.jsonl"
    path.write_bytes(raw)
    spans = list(spans_of(path, size))
    assert b"".join(raw[span.start : span.stop] for span in spans) == raw
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
    assert all(raw[span.stop - 1 : span.stop] == b"\n" for span in spans[:-1])
