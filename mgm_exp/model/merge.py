"""Image-token merge: where each embedding of the merged sequence comes from.

Follows the official `prepare_inputs_labels_for_multimodal` (mgm/model/mgm_arch.py): padding is dropped by the
attention mask, each `IMAGE_TOKEN_INDEX` is replaced by the next image's visual tokens, a row without an image still
consumes one image, the result is cut to the maximal length and filled with zero embeddings on the padding side.

Indices are made on the CPU from three small integer tensors, so that the model does one embedding look-up and one
gather, whatever the batch holds (a varying number of calls would hang sharded training).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mgm_exp.errors import ModelError
from mgm_exp.model.configuration import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class MergePlan:
    """`index` (B, L) points into the rows of [text (B*T), visual (n_images*N), one zero row], in that order.

    `attention_mask` (B, L) bool, `labels` (B, L) int64; L is the longest merged row.
    """

    index: Tensor
    attention_mask: Tensor
    labels: Tensor


def images_consumed(input_ids: Tensor, attention_mask: Tensor | None = None) -> int:
    """How many images a batch takes: one a placeholder, and one for each row without a placeholder."""
    is_image = input_ids == IMAGE_TOKEN_INDEX
    if attention_mask is not None:
        is_image = is_image & attention_mask.bool()
    return int(is_image.sum(1).clamp(min=1).sum())


def plan_merge(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    *,
    n_images: int,
    tokens_per_image: int,
    max_length: int | None,
    padding_side: str,
) -> MergePlan:
    """Plans the merged sequences of a batch.

    Args:
        input_ids: (B, T) with `IMAGE_TOKEN_INDEX` once for each image.
        attention_mask: (B, T), True where a token is real; None: all are.
        labels: (B, T); None: nothing is learnt.
        n_images: images whose visual tokens are at hand, in the order of the rows.
        tokens_per_image: visual tokens of one image.
        max_length: merged rows are cut to this; None: never.
        padding_side: "left" or "right".

    Raises:
        ModelError: images do not match the placeholders, or an unknown padding side.
    """
    if padding_side not in ("left", "right"):
        raise ModelError(f"tokenizer_padding_side {padding_side!r}: allowed are 'left' and 'right'.")
    device = input_ids.device
    ids = input_ids.cpu()
    mask = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    targets = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels.cpu()
    needed = images_consumed(ids, mask)
    if needed != n_images:
        raise ModelError(
            f"{n_images} images were given, but the batch consumes {needed}: one for each {IMAGE_TOKEN_INDEX} in "
            "input_ids, and one (zeros) for each row that has none."
        )

    batch, length = ids.shape
    visual_start = batch * length
    zero_row = visual_start + n_images * tokens_per_image
    next_image = 0
    row_indices: list[Tensor] = []
    row_labels: list[Tensor] = []
    for row in range(batch):
        kept = mask[row].nonzero().squeeze(1)
        text = row * length + kept
        is_image = ids[row, kept] == IMAGE_TOKEN_INDEX
        places = is_image.nonzero().squeeze(1).tolist()
        pieces, piece_labels, start = [], [], 0
        for place in places:
            first = visual_start + next_image * tokens_per_image
            pieces += [text[start:place], torch.arange(first, first + tokens_per_image)]
            piece_labels += [targets[row, kept[start:place]], torch.full((tokens_per_image,), IGNORE_INDEX)]
            next_image, start = next_image + 1, place + 1
        if not places:
            next_image += 1  # the official code consumes an image here too, and inserts nothing
        pieces.append(text[start:])
        piece_labels.append(targets[row, kept[start:]])
        row_indices.append(torch.cat(pieces)[:max_length])
        row_labels.append(torch.cat(piece_labels)[:max_length])

    longest = max(len(index) for index in row_indices)
    index = torch.full((batch, longest), zero_row)
    merged_mask = torch.zeros((batch, longest), dtype=torch.bool)
    merged_labels = torch.full((batch, longest), IGNORE_INDEX)
    for row, (places_of_row, labels_of_row) in enumerate(zip(row_indices, row_labels, strict=True)):
        n = len(places_of_row)
        where = slice(longest - n, longest) if padding_side == "left" else slice(0, n)
        index[row, where] = places_of_row
        merged_mask[row, where] = True
        merged_labels[row, where] = labels_of_row
    return MergePlan(index.to(device), merged_mask.to(device), merged_labels.to(device))
