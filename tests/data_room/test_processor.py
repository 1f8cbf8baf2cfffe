from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgm_exp.data import IGNORE_INDEX, IMAGE_TOKEN_INDEX, supervised_tokens
from mgm_exp.data.processor import merged_length

from .conftest import GOLDEN

CASES = json.loads((GOLDEN / "conversations.json").read_text())


def merged_labels(ids: list[int], labels: list[int], n_visual: int, max_length: int) -> list[int]:
    """The labels of the sequence that the model sees, written down the long way."""
    merged: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        merged += [IGNORE_INDEX] * n_visual if token == IMAGE_TOKEN_INDEX else [label]
    return merged[:max_length]


@given(
    tokens=st.lists(st.sampled_from([IMAGE_TOKEN_INDEX, 5, 6]), max_size=30),
    learnt=st.lists(st.booleans(), min_size=30, max_size=30),
    n_visual=st.integers(1, 9),
    max_length=st.integers(1, 60),
)
def test_supervised_tokens_counts_what_the_merged_sequence_holds(
    tokens: list[int], learnt: list[bool], n_visual: int, max_length: int
) -> None:
    labels = [t if yes and t != IMAGE_TOKEN_INDEX else IGNORE_INDEX for t, yes in zip(tokens, learnt, strict=False)]
    merged = merged_labels(tokens, labels, n_visual, max_length)
    expected = sum(label != IGNORE_INDEX for label in merged[1:])
    assert supervised_tokens(tokens, labels, n_visual, max_length) == expected
    assert min(merged_length(tokens, n_visual), max_length) == len(merged)


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_supervised_tokens_of_golden_conversations(case: dict[str, Any]) -> None:
    expected = sum(label != IGNORE_INDEX for label in case["labels"])
    assert supervised_tokens(case["input_ids"], case["labels"], 16, 10_000) == expected
    assert (expected == 0) == (case["supervised_text"] == "")


def test_the_real_processor_has_what_the_data_room_asks_for(processor: Any) -> None:
    from mgm_exp.data.conversations import CAPTION_PROMPTS

    encoded = processor.encode(
        [{"from": "human", "value": f"<image>\n{CAPTION_PROMPTS[0]}"}, {"from": "gpt", "value": "x"}]
    )
    assert encoded["input_ids"].count(IMAGE_TOKEN_INDEX) == 1
    image, image_aux = processor.no_pixels()
    assert image.shape[0] == image_aux.shape[0] == 3
    assert processor.n_visual_tokens == 16 and processor.pad_token_id == 0 and processor.model_max_length == 128
