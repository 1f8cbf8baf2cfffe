"""Greedy decoding of a batch with a KV cache, for nothing more than a row needs: one forward pass a token, logits of
the last position only, rows that have ended leave the batch, and the loop ends with the last of them.

transformers' ``generate`` gives the same tokens; for short answers of small batches most of its time goes into what
stands around the forward passes.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

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

    from mgm_exp.model.decoding import Decoder, can_decode
    from mgm_exp.model.execution import blocks_of
    from mgm_exp.model.last_block import answering

    said: list[list[int]] = [[] for _ in inputs_embeds]
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        is_padded = not bool(attention_mask.all())
        mask = attention_mask if is_padded else None
        positions = _positions(attention_mask)
        is_plain = can_decode(model)
        with answering(blocks_of(model)[-1]) if is_plain else nullcontext():
            logits = _forward(model, cache, positions, mask, inputs_embeds=inputs_embeds)
        # The quickest way that gives the model's own logits
        steps: _Steps = (Decoder if is_plain else _Forward)(model, cache, mask, positions[:, -1:] + 1)
        rows = list(range(len(said)))  # of the batch, those that still speak or have just ended
        speaks = [True] * len(rows)
        for n in range(1, max_new_tokens + 1):
            token = logits.argmax(-1)  # (rows,)
            for k, value in enumerate(token.tolist()):
                if speaks[k]:
                    said[rows[k]].append(value)
                    speaks[k] = value not in stop_ids
            if n == max_new_tokens or not any(speaks):
                break
            if sum(speaks) <= _LEAVES_AT * len(rows):
                kept = torch.tensor([k for k, s in enumerate(speaks) if s], device=token.device)
                steps.keep(kept)
                token = token[kept]
                rows = [row for row, s in zip(rows, speaks, strict=True) if s]
                speaks = [True] * len(rows)
            logits = steps.step(token)
    return said


class _Steps(Protocol):
    """A batch, a token at a time."""

    def step(self, token: Tensor) -> Tensor:
        """Token ids (rows,) -> logits of the next one (rows, vocabulary)."""

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows only."""


class _Forward:
    """By the model's own forward pass; arguments as of :class:`mgm_exp.model.decoding.Decoder`."""

    def __init__(self, model: Any, cache: Any, mask: Tensor | None, positions: Tensor) -> None:
        self._model, self._cache, self._mask, self._positions = model, cache, mask, positions

    def step(self, token: Tensor) -> Tensor:
        import torch

        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        logits = _forward(self._model, self._cache, self._positions, self._mask, input_ids=token[:, None])
        self._positions = self._positions + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._positions = self._positions[rows]
        self._mask = None if self._mask is None else self._mask[rows]


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
