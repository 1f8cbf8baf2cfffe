"""Fingerprints name content, and only content."""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.store import file_sha256, fingerprint, stage_key, tree_fingerprint

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def reordered(value: object) -> object:
    """The same value with every mapping built in the opposite order and every list as a tuple."""
    if isinstance(value, dict):
        return OrderedDict((key, reordered(value[key])) for key in reversed(list(value)))
    if isinstance(value, list):
        return tuple(reordered(item) for item in value)
    return value


def typed(value: object) -> object:
    """A form in which == means the same JSON: 1, 1.0 and True, or 0.0 and -0.0, are different."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return (type(value).__name__, repr(value))


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_order_of_keys_and_kind_of_sequence_do_not_matter(value: object) -> None:
    assert fingerprint(value) == fingerprint(reordered(value))


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_a_round_trip_through_json_keeps_the_fingerprint(value: object) -> None:
    assert fingerprint(json.loads(json.dumps(value))) == fingerprint(value)


@given(VALUES, VALUES)
@settings(max_examples=200, deadline=None)
def test_fingerprints_are_equal_exactly_when_values_are(a: object, b: object) -> None:
    assert (fingerprint(a) == fingerprint(b)) == (typed(a) == typed(b))


def test_a_fingerprint_is_the_published_form_and_the_same_in_every_process() -> None:
    value = {"b": [1, 2.5, None, True], "a": "Größe"}
    canonical = '{"a":"Gr\\u00f6\\u00dfe","b":[1,2.5,null,true]}'
    assert fingerprint(value) == hashlib.sha256(canonical.encode()).hexdigest()
    code = "from mgm_exp.store import fingerprint; print(fingerprint({'a': 'Größe', 'b': (1, 2.5, None, True)}))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == fingerprint(value)


class Colour(enum.Enum):
    red = "red"


class Level(enum.IntEnum):
    one = 1


@pytest.mark.parametrize(
    "value",
    [Path("/data"), b"x", {1, 2}, Colour.red, Level.one, {1: 2}, {None: 1}, {Colour.red: 1}, object(), range(3)],
    ids=lambda value: type(value).__name__ if type(value) is object else repr(value),
)
def test_what_has_no_canonical_form_is_refused_with_its_place(value: object) -> None:
    with pytest.raises(TypeError, match=r"value\.train\[1\]"):
        fingerprint({"train": [0, value]})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"value\.lr"):
        fingerprint({"lr": value})


def test_a_circle_is_refused_instead_of_recursing_for_ever() -> None:
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises(ValueError, match="nested deeper"):
        fingerprint(circle)


def test_a_stage_key_depends_on_stage_version_and_payload() -> None:
    keys = {
        stage_key("align", 1, {"a": 1}),
        stage_key("instruct", 1, {"a": 1}),
        stage_key("align", 2, {"a": 1}),
        stage_key("align", 1, {"a": 2}),
    }
    assert len(keys) == 4
    assert all(len(key) == 20 and set(key) <= set("0123456789abcdef") for key in keys)
    assert stage_key("align", 1, {"a": 1}) in keys


def test_file_sha256_reads_all_of_a_file_longer_than_its_buffer(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 12345)
    (tmp_path / "f").write_bytes(content)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_a_tree_fingerprint_sees_names_and_bytes_but_not_times_or_modes(tmp_path: Path) -> None:
    tree = tmp_path / "a"
    (tree / "sub").mkdir(parents=True)
    (tree / "x").write_text("1")
    (tree / "sub" / "y").write_text("2")
    before = tree_fingerprint(tree)
    os.utime(tree / "x", (1, 1))
    (tree / "x").chmod(0o600)
    (tree / "empty").mkdir()
    assert tree_fingerprint(tree) == before
    (tree / "sub" / "y").write_text("3")
    changed = tree_fingerprint(tree)
    (tree / "sub" / "y").write_text("2")
    (tree / "sub" / "y").rename(tree / "sub" / "z")
    assert len({before, changed, tree_fingerprint(tree)}) == 3


def test_a_tree_of_links_has_the_fingerprint_of_what_a_reader_gets(tmp_path: Path) -> None:
    real, linked = tmp_path / "real", tmp_path / "linked"
    real.mkdir()
    linked.mkdir()
    (real / "model.safetensors").write_bytes(b"weights")
    (linked / "model.safetensors").symlink_to(real / "model.safetensors")
    assert tree_fingerprint(linked) == tree_fingerprint(real)
    (linked / "again").symlink_to(linked)
    with pytest.raises(ValueError, match="circle"):
        tree_fingerprint(linked)


def test_a_tree_fingerprint_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="nowhere"):
        tree_fingerprint(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is neither"):
        tree_fingerprint(tmp_path)
