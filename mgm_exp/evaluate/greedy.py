"""Greedy decoding of a batch with a KV cache, for nothing more than a row needs: one forward pass a token, logits of
the last position only, rows that have ended leave the batch, and the loop ends with the last of them.

transformers' ``generate`` gives the same tokens; for short answers of small batches most of its time goes into what
stands around the forward passes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_LEAVES_AT = 0.75
"""Rows leave once at most this share of the batch still speaks: each leaving copies the cache once."""


def greedy(
    model: Any, inputs_embeds: Tensor, attention_mask: Tensor, *, max_new_tokens: int, stop_ids: Collection[int]
) -> list[list[int]]:
    """The most probable next token, again and again.

    Args:
        model: A causal language model of transformers' form, with ``logits_to_keep`` in its forward; evaluation mode.
        inputs_embeds: (B, L, hidden), padded on the left.
        attention_mask: (B, L) bool.
        max_new_tokens: Longest answer.
        stop_ids: Tokens that end an answer; they are its last.

    Returns:
        The tokens of each row, without padding.
    """
    import torch
    from transformers import DynamicCache

    config = model.config
    ends = torch.tensor(sorted(stop_ids), device=inputs_embeds.device)
    said: list[list[int]] = [[] for _ in inputs_embeds]
    with torch.no_grad():
        cache = DynamicCache(config=config)
        is_padded = not bool(attention_mask.all())
        mask = attention_mask if is_padded else None
        positions = _positions(attention_mask)
        logits = _forward(model, cache, positions, mask, inputs_embeds=inputs_embeds)
        rows = list(range(len(said)))  # of the batch, those that still speak or have just ended
        speaks = [True] * len(rows)
        next_position = positions[:, -1:] + 1
        for n in range(1, max_new_tokens + 1):
            token = logits.argmax(-1)  # (rows,)
            has_ended = torch.isin(token, ends).tolist()
            for k, value in enumerate(token.tolist()):
                if speaks[k]:
                    said[rows[k]].append(value)
                    speaks[k] = not has_ended[k]
            if n == max_new_tokens or not any(speaks):
                break
            if sum(speaks) <= _LEAVES_AT * len(rows):
                kept = torch.tensor([k for k, s in enumerate(speaks) if s], device=token.device)
                cache.batch_select_indices(kept)
                token, next_position = token[kept], next_position[kept]
                mask = mask[kept] if mask is not None else None
                rows = [row for row, s in zip(rows, speaks, strict=True) if s]
                speaks = [True] * len(rows)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = _forward(model, cache, next_position, mask, input_ids=token[:, None])
            next_position = next_position + 1
    return said


def _positions(attention_mask: Tensor) -> Tensor:
    """(B, L): the place of each token among the real ones of its row."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def _forward(model: Any, cache: Any, positions: Tensor, mask: Tensor | None, **inputs: Tensor) -> Tensor:
    """(rows, vocabulary): logits of the last position."""
    from mgm_exp.model.varlen import VARLEN

    if mask is not None and positions.shape[1] == 1 and model.config._attn_implementation in ("sdpa", VARLEN):
        mask = mask[:, None, None]  # as the attention wants it: transformers would look through all of it for nothing
    found = model(
        attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs
    )
    logits: Tensor = found.logits[:, -1]
    return logits
