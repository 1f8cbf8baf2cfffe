"""The merge of text and visual tokens, against the official algorithm written out row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mgm_exp.errors import ModelError
from mgm_exp.model.merge import images_consumed, plan_merge


def official(ids, mask, labels, features, max_length, side):
    """`prepare_inputs_labels_for_multimodal` on token ids in place of embeddings."""
    rows, row_labels, image = [], [], 0
    for r in range(len(ids)):
        row = [int(x) for x, m in zip(ids[r], mask[r], strict=True) if m]
        lab = [int(x) for x, m in zip(labels[r], mask[r], strict=True) if m]
        out, out_labels = [], []
        if -200 not in row:
            image += 1
        for token, label in zip(row, lab, strict=True):
            if token == -200:
                out += features[image]
                out_labels += [-100] * len(features[image])
                image += 1
            else:
                out.append(token)
                out_labels.append(label)
        rows.append(out[:max_length])
        row_labels.append(out_labels[:max_length])
    longest = max(map(len, rows))
    fill = [longest - len(r) for r in rows]
    if side == "left":
        return (
            [[0] * f + r for f, r in zip(fill, rows, strict=True)],
            [[-100] * f + r for f, r in zip(fill, row_labels, strict=True)],
            [[False] * f + [True] * len(r) for f, r in zip(fill, rows, strict=True)],
        )
    return (
        [r + [0] * f for f, r in zip(fill, rows, strict=True)],
        [r + [-100] * f for f, r in zip(fill, row_labels, strict=True)],
        [[True] * len(r) + [False] * f for f, r in zip(fill, rows, strict=True)],
    )


@st.composite
def batches(draw):
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    ids = draw(
        st.lists(
            st.lists(st.one_of(st.just(-200), st.integers(1, 99)), min_size=length, max_size=length),
            min_size=rows,
            max_size=rows,
        )
    )
    # padding on either side, and holes, as an attention mask allows
    mask = draw(
        st.lists(st.lists(st.booleans(), min_size=length, max_size=length).filter(any), min_size=rows, max_size=rows)
    )
    n = draw(st.integers(0, 3))
    return (
        torch.tensor(ids),
        torch.tensor(mask),
        n,
        draw(st.sampled_from([None, 1, 3, 7])),
        draw(st.sampled_from(["left", "right"])),
    )


@settings(max_examples=150, deadline=None)
@given(batches())
def test_merge_equals_the_official_algorithm(example) -> None:
    ids, mask, n, max_length, side = example
    labels = torch.where(ids == -200, -100, ids + 500)
    n_images = images_consumed(ids, mask)
    features = [[1000 * (i + 1) + j for j in range(n)] for i in range(n_images)]
    expected, expected_labels, expected_mask = official(ids, mask, labels, features, max_length, side)

    plan = plan_merge(
        ids, mask, labels, n_images=n_images, tokens_per_image=n, max_length=max_length, padding_side=side
    )
    pool = torch.cat(
        [ids.flatten(), torch.tensor(features, dtype=torch.long).flatten(), torch.zeros(1, dtype=torch.long)]
    )
    assert pool[plan.index].tolist() == expected
    assert plan.labels.tolist() == expected_labels
    assert plan.attention_mask.tolist() == expected_mask


def test_a_text_only_row_consumes_one_image() -> None:
    ids = torch.tensor([[5, 6, 7], [5, -200, 7]])
    plan = plan_merge(ids, None, None, n_images=2, tokens_per_image=2, max_length=None, padding_side="right")
    visual = 6 + 2  # the second image's first token, not the first image's
    assert plan.index[1, 1:3].tolist() == [visual, visual + 1]


@pytest.mark.parametrize("n_images", [0, 1, 3])
def test_a_wrong_number_of_images_is_an_error(n_images: int) -> None:
    ids = torch.tensor([[5, -200], [5, -200]])
    with pytest.raises(ModelError, match="consumes 2"):
        plan_merge(ids, None, None, n_images=n_images, tokens_per_image=1, max_length=None, padding_side="right")


def test_an_unknown_padding_side_is_an_error() -> None:
    with pytest.raises(ModelError, match="allowed are 'left' and 'right'"):
        plan_merge(torch.tensor([[5]]), None, None, n_images=1, tokens_per_image=1, max_length=None, padding_side="up")


def test_an_image_without_pixels_is_an_error(still_model) -> None:
    with pytest.raises(ModelError, match="no images were given"):
        still_model(torch.tensor([[2, -200, 5]]))
    with pytest.raises(ModelError, match="both resolutions"):
        still_model(torch.tensor([[2, -200, 5]]), images=torch.zeros(1, 3, 56, 56))


def test_length_and_side_are_read_from_the_config_at_call_time(model, case) -> None:
    t = case("row_without_image")  # rows of different merged lengths
    args = {"images": t["images"], "images_aux": t["images_aux"]}
    with torch.no_grad():
        _, right, _ = model.merge(t["input_ids"], t["attention_mask"], **args)
        model.config.tokenizer_padding_side = "left"
        _, left, _ = model.merge(t["input_ids"], t["attention_mask"], **args)
        model.config.tokenizer_model_max_length = 20
        assert model(t["input_ids"], t["attention_mask"], **args).logits.shape[1] == 20
    short = int(right.sum(1).argmin())
    assert right[short].tolist() == sorted(right[short].tolist(), reverse=True) != left[short].tolist()
    assert torch.equal(left, right.flip(1))


def test_cached_visual_tokens_give_the_same_bits_as_pixels(still_model, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        tokens = still_model.model.encode_images(batch["images"], batch["images_aux"])
        text = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
        assert torch.equal(still_model(**text, visual_tokens=tokens).logits, still_model(**batch).logits)
        assert torch.equal(still_model.loss({**text, "visual_tokens": tokens}), still_model.loss(batch))


def test_images_may_come_as_a_list(still_model, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        listed = {**batch, "images": list(batch["images"]), "images_aux": list(batch["images_aux"])}
        assert torch.equal(still_model(**listed).logits, still_model(**batch).logits)
        with pytest.raises(ModelError, match="one shape"):
            still_model.model.encode_images([torch.zeros(3, 56, 56), torch.zeros(3, 28, 28)], batch["images_aux"])


def test_shapes_that_do_not_fit_the_grid_are_an_error(model, batch: dict[str, Tensor]) -> None:
    model.config.image_grid = 2
    with pytest.raises(ModelError, match="image_grid=2"):
        model(**batch)
