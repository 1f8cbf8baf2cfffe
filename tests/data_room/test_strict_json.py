from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgm_exp.data import strict_json
from mgm_exp.data.strict_json import LineElements, ListElements

GOOD = {"id": "a", "text": 'quotes " and {brackets] and \\ and é and 🦊', "n": [1, 2.5, None, True]}

BAD_ROWS = {
    '{"id": "x", }': "not_json",
    '{"id": "x" "y": 1}': "not_json",
    "{'id': 'x'}": "not_json",
    '{"id": tru}': "not_json",
    '{"id": "a\nb"}': "not_json",
    '{"n": NaN}': "bad_number",
    '{"n": -Infinity}': "bad_number",
    '{"n": 1e999}': "bad_number",
    '{"n": ' + "7" * 5000 + "}": "bad_number",
    '{"id": 1, "id": 2}': "duplicate_key",
    '{"deep": ' + "[" * 100 + "]" * 100 + "}": "nested_too_deep",
    '{"deep": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested_too_deep",
}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def read_list(raw: bytes) -> list[Any]:
    return list(ListElements(io.BytesIO(raw)))


def read_lines(raw: bytes) -> list[Any]:
    return list(LineElements(io.BytesIO(raw)))


@pytest.fixture(params=[3, 64, 1 << 20])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "_BLOCK", request.param)
    monkeypatch.setattr(strict_json, "_LOOKAHEAD", min(request.param, 1 << 16))


@pytest.mark.usefixtures("block_size")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(json_values, max_size=5), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_a_list_is_read_as_the_whole_file_would_be(rows: list[Any], indent: int | None, ascii_only: bool) -> None:
    raw = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    elements = read_list(raw)
    assert [element.value for element in elements] == rows
    assert [element.index for element in elements] == list(range(len(rows)))
    assert not any(element.fault for element in elements)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(json_values, max_size=5))
def test_lines_are_read_as_json(rows: list[Any]) -> None:
    raw = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    assert [element.value for element in read_lines(raw)] == rows


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize(("bad", "kind"), BAD_ROWS.items(), ids=lambda value: str(value)[:24])
def test_a_bad_row_of_a_list_costs_itself_alone(bad: str, kind: str) -> None:
    good = json.dumps(GOOD, ensure_ascii=False)
    elements = read_list(f"[\n{good},\n{bad},\n{good}\n]\n".encode())
    assert [element.fault and element.fault.kind for element in elements] == [None, kind, None]
    assert elements[2].value == GOOD
    assert elements[1].line == 3 and elements[1].index == 1


@pytest.mark.parametrize(("bad", "kind"), [item for item in BAD_ROWS.items() if "\n" not in item[0]])
def test_a_bad_line_costs_itself_alone(bad: str, kind: str) -> None:
    good = json.dumps(GOOD)
    elements = read_lines(f"{good}\n\n{bad}\n{good}".encode())
    assert [element.fault and element.fault.kind for element in elements] == [None, kind, None]
    assert [element.line for element in elements] == [1, 3, 4]
    assert [element.index for element in elements] == [0, 1, 2]


def test_bytes_that_are_no_utf8_are_found_in_both_forms() -> None:
    raw = b'{"id": "caf\xe9"}'
    assert [e.fault and e.fault.kind for e in read_lines(b'{"a": 1}\n' + raw + b"\n")] == [None, "encoding"]
    assert [e.fault and e.fault.kind for e in read_list(b"[" + raw + b', {"a": 1}]')] == ["encoding", None]


def test_a_byte_order_mark_is_no_fault() -> None:
    assert read_lines(b'\xef\xbb\xbf{"a": 1}\n')[0].value == {"a": 1}
    assert read_list(b'\xef\xbb\xbf[{"a": 1}]')[0].value == {"a": 1}


@pytest.mark.usefixtures("block_size")
def test_a_row_beyond_the_limit_is_passed_over_without_being_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_ROW_BYTES", 2000)
    huge = json.dumps({"text": 'x"]}\\' * 2000})
    elements = read_list(f'[{{"a": 1}}, {huge}, {{"b": 2}}]'.encode())
    assert [element.fault and element.fault.kind for element in elements] == [None, "row_too_large", None]
    elements = read_lines(f'{{"a": 1}}\n{huge}\n{{"b": 2}}\n'.encode())
    assert [element.fault and element.fault.kind for element in elements] == [None, "row_too_large", None]
    assert elements[2].value == {"b": 2} and elements[2].line == 3


def test_a_list_cut_at_any_byte_says_so() -> None:
    raw = json.dumps([GOOD, {"b": [1, {"c": "]"}]}, GOOD], indent=1, ensure_ascii=False).encode()
    for cut in range(1, len(raw)):
        elements = read_list(raw[:cut])
        assert elements[-1].fault is not None, cut
        kinds = [element.fault.kind for element in elements if element.fault]
        assert "file_ends_early" in kinds, cut


def test_text_after_the_list_is_a_fault() -> None:
    assert [e.fault and e.fault.kind for e in read_list(b'[{"a": 1}] {"b": 2}')] == [None, "not_json"]


def test_rows_without_a_comma_between_them_are_a_fault() -> None:
    elements = read_list(b'[{"a": 1} {"b": 2}, {"c": 3}]')
    assert [element.fault and element.fault.kind for element in elements] == ["not_json", None]


@pytest.mark.usefixtures("block_size")
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.data())
def test_no_bytes_make_a_reader_raise_or_hang(noise: bytes, data: st.DataObject) -> None:
    raw = json.dumps([GOOD, GOOD]).encode()
    at = data.draw(st.integers(1, len(raw)))
    for element in [*read_list(raw[:at] + noise + raw[at:]), *read_lines(noise + raw)]:
        assert element.fault is None or element.fault.kind
