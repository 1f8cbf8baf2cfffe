"""One more token for each row of a batch: MGM's language model without what stands around its kernels.

A token is little work, and much of its time goes into what transformers does for any model and any call: wrappers,
masks, a cache that is copied to grow by one position, scales that are added up anew, queries and keys turned one after
the other. Here are the same operations on the same numbers in the same order, so that logits are bit-equal to the
model's own forward pass; only what does not change from token to token is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from mgm_exp.model.last_block import is_plain_in_evaluation
from mgm_exp.model.mgm import MGMForConditionalGeneration
from mgm_exp.model.varlen import VARLEN

GROWS_BY = 64
"""Positions that the cache is made longer by when it is full."""


class Decoder:
    """The state of a batch that is being answered: see the module.

    Args:
        model: For which :func:`can_decode` holds.
        cache: transformers' cache, after the prompts went through the model. What it holds is taken out of it: kept in
            both, keys and values would need twice their memory for as long as answers are written.
        mask: (B, L) bool, L positions in the cache; None: all are real.
        positions: (B, 1), of the next token.
    """

    def __init__(self, model: Any, cache: Any, mask: Tensor | None, positions: Tensor) -> None:
        self._model, self._body, self._positions = model, model.model, positions
        self._length: int = cache.get_seq_length()
        # (B, key heads, length and room, d) each; one after the other, here and below, so that one is there twice
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        for layer in cache.layers:
            self._keys.append(_longer(layer.keys))
            layer.keys = None
            self._values.append(_longer(layer.values))
            layer.values = None
        self._bias = None if mask is None else _longer(_bias(mask)[:, None, None], -1)
        self._norms = [(_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)) for layer in self._layers]
        self._last_norm = _norm(self._body.norm)

    @property
    def _layers(self) -> list[Any]:
        return list(self._body.layers[: self._body.config.num_hidden_layers])

    def step(self, token: Tensor) -> Tensor:
        """Token ids (B,) -> logits of the next one (B, vocabulary), fp32."""
        if self._length == self._keys[0].shape[2]:
            self._each(_longer)
            self._bias = None if self._bias is None else _longer(self._bias, -1)
        body = self._body
        x = body.embed_tokens(token[:, None])
        cos, sin = body.rotary_emb(x, position_ids=self._positions)
        cos, sin = cos[:, None], _signed(sin)[:, None]
        self._length += 1
        bias = None if self._bias is None else self._bias[..., : self._length]
        for number, (layer, (norm, norm_after)) in enumerate(zip(self._layers, self._norms, strict=True)):
            x = x + self._attention(number, layer.self_attn, norm(x), cos, sin, bias)
            x = x + layer.mlp(norm_after(x))
        self._positions = self._positions + 1
        logits: Tensor = self._model.lm_head(self._last_norm(x)).float()
        return logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows only."""
        self._positions = self._positions[rows]
        self._each(lambda kept: kept.index_select(0, rows))
        self._bias = None if self._bias is None else self._bias[rows]

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes the keys and the values of every layer."""
        for side in (self._keys, self._values):
            for number in range(len(side)):
                side[number] = change(side[number])

    def _attention(self, number: int, part: Any, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        shape = (len(x), 1, -1, part.head_dim)
        q, k, v = part.q_proj(x), part.k_proj(x), part.v_proj(x).view(shape).transpose(1, 2)
        heads = q.shape[-1] // part.head_dim
        both = torch.cat((q, k), -1).view(shape).transpose(1, 2)  # (B, heads and key heads, 1, d)
        both = both * cos + torch.cat(both.chunk(2, -1)[::-1], -1) * sin
        keys, values, at = self._keys[number], self._values[number], self._length - 1
        keys[:, :, at : at + 1] = both[:, heads:]
        values[:, :, at : at + 1] = v
        found, _ = sdpa_attention_forward(
            part,
            both[:, :heads],
            keys[:, :, : self._length],
            values[:, :, : self._length],
            None if bias is None else bias.to(both.dtype),
            scaling=part.scaling,
        )
        out: Tensor = part.o_proj(found.reshape(len(x), 1, -1))
        return out


def can_decode(model: Any) -> bool:
    """Whether :class:`Decoder` does what the model's forward does: an MGM that answers, with SDPA, and nothing hung
    around or compiled into the modules that are passed by."""
    return (
        isinstance(model, MGMForConditionalGeneration)
        and not model.training
        and model.config._attn_implementation in ("sdpa", VARLEN)
        and not any(_is_changed(module) for module in _passed_by(model))
    )


def _passed_by(model: Any) -> Iterator[nn.Module]:
    yield model
    yield model.model
    yield model.model.norm
    for layer in model.model.layers:
        yield from (layer, layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm)


def _is_changed(module: Any) -> bool:
    is_replaced = not is_plain_in_evaluation(module) or module._compiled_call_impl is not None
    return is_replaced or bool(module._forward_hooks or module._forward_pre_hooks)


def _longer(tensor: Tensor, dim: int = 2) -> Tensor:
    """The same with :data:`GROWS_BY` more positions, all zeros."""
    shape = list(tensor.shape)
    shape[dim] += GROWS_BY
    longer = tensor.new_zeros(shape)
    longer.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return longer


def _bias(mask: Tensor) -> Tensor:
    """What attention adds to its scores: 0 where the mask is True, else minus infinity."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def _signed(sin: Tensor) -> Tensor:
    """(B, 1, d): for halves that change places, where transformers also changes the first one's sign."""
    first, second = sin.chunk(2, -1)
    return torch.cat((-first, second), -1)


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """The same function; Gemma's adds one to its weight in every call."""
    if type(norm) is not GemmaRMSNorm:
        return norm  # type: ignore[no-any-return]
    scale = 1.0 + norm.weight.float()

    def normed(x: Tensor) -> Tensor:
        wide = x.float()
        rho = wide.pow(2).mean(-1, keepdim=True).add_(norm.eps).rsqrt_()
        return (wide * rho).mul_(scale).type_as(x)

    return normed
