"""A token at a time past transformers' forward pass: the same logits, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_folders import write_llama_mgm
from model_files import GOLDEN
from transformers import DynamicCache

from benchmarks.accounting import LiveMemory
from mgm_exp.evaluate.greedy import _Forward
from mgm_exp.model import apply_adapter, decoding, load_model
from mgm_exp.model.decoding import Decoder, can_decode

LENGTH, STEPS, LEAVES_AFTER = 7, 6, 3


def _with_lora(model: Any) -> Any:
    targets = ["q_proj", "k_proj", "up_proj"]
    apply_adapter(model, {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": targets}, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.uniform_(-0.1, 0.1)
    return model


def _llama(folder: Path) -> Any:
    return load_model(write_llama_mgm(folder), dtype="float32")


KINDS: dict[str, Callable[[Path], Any]] = {
    "gemma": lambda _: load_model(GOLDEN / "model", dtype="float32"),
    "lora": lambda _: _with_lora(load_model(GOLDEN / "model", dtype="float32")),
    "bf16": lambda _: load_model(GOLDEN / "model", dtype="bfloat16"),
    "llama": _llama,
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    return KINDS[request.param](tmp_path_factory.mktemp("llama")).eval()


@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("is_mixed", [True, False])
def test_logits_are_those_of_the_forward_pass(
    model: Any, is_padded: bool, is_mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "GROWS_BY", 2)
    assert can_decode(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        _compare(model, is_padded)


@torch.no_grad()
def _compare(model: Any, is_padded: bool) -> None:
    torch.manual_seed(1)
    tokens = torch.randint(5, 90, (STEPS, 4))
    rows = torch.tensor([0, 2, 3])
    found = []
    for way in (Decoder, _Forward):
        steps = way(model, *_prompted(model, is_padded))
        logits = [steps.step(token) for token in tokens[:LEAVES_AFTER]]
        steps.keep(rows)
        found.append(logits + [steps.step(token[rows]) for token in tokens[LEAVES_AFTER:]])
    ours, theirs = found
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[-1], ours[-2])


@torch.no_grad()
def _prompted(model: Any, is_padded: bool) -> tuple[Any, Any, Any]:
    """Cache, mask and next positions of four prompts, all of them padded but the longest."""
    torch.manual_seed(2)
    mask = torch.ones(4, LENGTH, dtype=torch.bool)
    if is_padded:
        for row in range(3):
            mask[row, : 1 + row] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    prompts = torch.randn(4, LENGTH, model.config.hidden_size, dtype=model.dtype)
    given = mask if is_padded else None
    model(inputs_embeds=prompts, attention_mask=given, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache, given, positions[:, -1:] + 1


@torch.no_grad()
def test_keys_and_values_are_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside them a part of one layer's, while they are taken over and lose rows; no second copy stays."""
    monkeypatch.setattr(decoding, "GROWS_BY", 8)
    model, batch, length = load_model(GOLDEN / "model", dtype="float32").eval(), 4, 400
    layers = model.config.num_hidden_layers
    cache, memory = DynamicCache(config=model.config), LiveMemory()
    for tensor in (*model.parameters(), *model.buffers()):
        memory.hold(tensor)
    others = memory.live
    with memory:
        shape = (batch, model.config.num_key_value_heads, length, model.config.head_dim)
        for layer in range(layers):
            cache.update(torch.randn(shape), torch.randn(shape), layer)
        once = memory.live - others
        at_most = others + once * (1 + 1 / layers / 2) * 1.1
        memory.mark()
        steps = Decoder(model, cache, None, torch.full((batch, 1), length))
        assert others + once < memory.mark() < at_most
        for token in torch.randint(5, 90, (9, batch)):
            steps.step(token)
        assert others + once < memory.live < at_most
        memory.mark()
        steps.keep(torch.tensor([0, 1, 2]))
        assert memory.mark() < at_most
    assert memory.live < others + 0.85 * once


def test_what_hangs_around_a_module_is_not_passed_by() -> None:
    model = load_model(GOLDEN / "model", dtype="float32").eval()
    assert can_decode(model)
    layer = model.model.layers[-1]
    for module in (model, model.model, layer, layer.self_attn, layer.input_layernorm, model.model.norm):
        hook = module.register_forward_hook(lambda *_: None)
        assert not can_decode(model)
        hook.remove()
    layer.forward = layer.forward
    assert not can_decode(model)
    del layer.forward
    assert can_decode(model)
    assert not can_decode(model.train())
    eager = load_model(GOLDEN / "model", dtype="float32", attn_implementation="eager").eval()
    assert not can_decode(eager) and not can_decode(torch.nn.Linear(1, 1))
