"""Attention of several sequences in one row, without padding between them.

transformers' own flash attention takes the borders of the sequences (`cu_seq_lens_q`, ...) and needs nothing of this
file. Where the package flash-attn is not there, :data:`VARLEN` is the same for SDPA: torch's own variable-length flash
kernel on a GPU in half precision, one SDPA call a sequence elsewhere. A call without borders (generation, padded
batches) goes to SDPA as it is, mask and all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgm_exp.errors import ModelError

VARLEN = "mgm_varlen"
"""Name under which transformers finds it."""


def register() -> None:
    """Makes :data:`VARLEN` an attention implementation of transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(VARLEN, varlen_forward)
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


def varlen_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention implementation.

    Args:
        query: (1, heads, T, d); of several sequences, one after the other.
        key, value: (1, key heads, T, d).
        attention_mask: not read where borders are given.
        cu_seq_lens_q: (sequences + 1,) int32: where each begins, and T. None: one ordinary batch.
        max_length_q: tokens of the longest.

    Returns:
        (1, T, heads, d).

    Raises:
        ModelError: dropout with borders; a run is refused for it before it begins (:mod:`mgm_exp.preflight`).
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ModelError(
            f"This attention has no dropout for several sequences in one row, and attention_dropout={dropout} is asked "
            "for.",
            advice="Use train.padding_free=false, or model.attn_implementation=flash_attention_2.",
        )
    is_grouped = query.shape[1] != key.shape[1]
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        assert max_length_q is not None
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        out = varlen_attn(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1, 0),  # causal
            enable_gqa=is_grouped,
        )
        assert isinstance(out, Tensor)
        return out[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    found = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=is_grouped)
        for q, k, v in parts
    ]
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None
