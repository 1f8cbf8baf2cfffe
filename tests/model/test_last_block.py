"""The last block where prompts are read: the last position of each row, and all keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from mgm_exp.model.decoding import can_decode
from mgm_exp.model.execution import Execution, blocks_of, run_as
from mgm_exp.model.last_block import answering


@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("is_narrow_in_training", [True, False])
def test_reading_a_prompt_gives_its_last_position_and_all_keys_and_values(
    model: Any, is_padded: bool, is_narrow_in_training: bool
) -> None:
    model = model.double().eval()
    if is_narrow_in_training:
        run_as(model, Execution(last_block="learnt"))
    torch.manual_seed(0)
    embeds = torch.randn(3, 7, model.config.hidden_size, dtype=torch.float64)
    mask = torch.ones(3, 7, dtype=torch.bool)
    if is_padded:
        mask[0, :3] = mask[2, :1] = False

    def read() -> tuple[torch.Tensor, Any, list[tuple[int, ...]]]:
        cache, seen = DynamicCache(config=model.config), []
        hook = blocks_of(model)[-1].mlp.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
        with torch.no_grad(), hook:
            found = model(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        return found.logits[:, -1], cache, seen

    whole, held, all_rows = read()
    with answering(blocks_of(model)[-1]):
        last, kept, rows = read()
    assert (last - whole).abs().max() <= 1e-12 * whole.abs().max()
    for ours, theirs in zip(kept.layers, held.layers, strict=True):
        assert ours.keys.equal(theirs.keys) and ours.values.equal(theirs.values)
    assert all_rows == [(3, 7, model.config.hidden_size)] and rows == [(3, 1, model.config.hidden_size)]
    assert can_decode(model), "the block is as it was"
    assert read()[0].equal(whole)


def test_a_block_is_as_it_was_after_an_error(model: Any) -> None:
    block = blocks_of(model.eval())[-1]
    with pytest.raises(RuntimeError, match="no memory"), answering(block):
        raise RuntimeError("no memory")
    assert "forward" not in vars(block) and not block.self_attn.o_proj._forward_pre_hooks
