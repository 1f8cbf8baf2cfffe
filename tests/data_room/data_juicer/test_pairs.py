"""The rows that operators see, and how they are divided."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgm_exp.data.data_juicer.pairs import Pair, plan_shards, read_pairs, without_tokens
from mgm_exp.errors import DataError

from .conftest import write_pairs


@given(st.lists(st.sampled_from(["<__dj__image>", "<image>", "<|__dj__eoc|>", " ", "a", "é\n", "<im", "age>"])))
def test_special_tokens_are_taken_out_and_nothing_else_is(parts: list[str]) -> None:
    caption = without_tokens("".join(parts))
    kept = [part.strip() for part in parts if not part.startswith(("<_", "<|", "<image>"))]
    # What is put together by taking tokens out may be one; what was there as one is gone.
    if "<im" not in parts:
        assert "".join(caption.split()) == "".join("".join(kept).split())
        assert "dj__" not in caption


def test_a_caption_without_tokens_keeps_its_white_space() -> None:
    assert without_tokens("  two  words ") == "  two  words "


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "1"}', '{"id": "1", "caption": null, "image": null}'])
def test_a_line_that_is_no_row_is_named(line: str, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "rows.jsonl", [Pair("0", "a", None)])
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"Line 2 of .*rows\.jsonl"):
        list(read_pairs(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read"):
        list(read_pairs(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read"):
        plan_shards(tmp_path / "rows.jsonl", 10, {})


@pytest.mark.parametrize("number", [0, 1, 4, 5, 8, 9])
def test_shards_are_all_rows_once(number: int, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "rows.jsonl", [Pair(str(i), "a", None) for i in range(number)])
    plans = plan_shards(path, 4, {})
    assert [row for plan in plans for row in range(plan.first, plan.first + plan.rows)] == list(range(number))
    assert [plan.number for plan in plans] == list(range(len(plans)))


def test_a_shard_is_found_again_only_for_the_same_rows_and_settings(tmp_path: Path) -> None:
    pairs = [Pair(str(i), "a", None) for i in range(8)]
    path = write_pairs(tmp_path / "rows.jsonl", pairs)
    first = plan_shards(path, 4, {"ngram": 1})
    assert first == plan_shards(path, 4, {"ngram": 1})
    assert not {plan.name for plan in first} & {plan.name for plan in plan_shards(path, 4, {"ngram": 2})}
    write_pairs(path, [*pairs[:7], Pair("7", "another caption", None)])
    second = plan_shards(path, 4, {"ngram": 1})
    assert (first[0] == second[0], first[1] == second[1]) == (True, False)
