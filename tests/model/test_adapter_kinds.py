"""Every kind of adapter: trains what it declares and nothing else, comes back, and merges to the same answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import GOLDEN, SEVEN

from mgm_exp.config import BOTTLENECK_PLACES, AdaLoraConfig, AdapterConfig, AdapterInit, AdapterKind
from mgm_exp.errors import ModelError
from mgm_exp.model import apply_adapter, load_adapter, load_model, official_name, save_adapter, set_trainable
from mgm_exp.model.adapters import adapter_of, layout_of
from mgm_exp.model.adapters.adalora import RankSharing
from mgm_exp.model.merged_tensors import MergedTensors
from mgm_exp.model.standalone import merge_run, source_of_run


def low_rank(name: str, kind: AdapterKind = AdapterKind.lora, **settings: Any) -> AdapterConfig:
    return AdapterConfig(name, kind, 4, 8.0, 0.0, ["q_proj", "v_proj", "down_proj"], **settings)


ADALORA = AdaLoraConfig(initial_rank=6, warmup_share=0.0, final_share=0.4, orthogonality=0.1)
KINDS = {
    "lora": low_rank("lora"),
    "lora_attention": replace(low_rank("lora_attention"), target_modules=SEVEN[:4]),
    "rslora": low_rank("rslora", use_rslora=True),
    "dora": low_rank("dora", use_dora=True),
    "lora_plus": low_rank("lora_plus", b_lr_ratio=16.0),
    "pissa": low_rank("pissa", init=AdapterInit.pissa),
    "pissa_fast": low_rank("pissa_fast", init=AdapterInit.pissa, pissa_iterations=16, use_rslora=True),
    "adalora": low_rank("adalora", AdapterKind.adalora, adalora=ADALORA),
    "loha": low_rank("loha", AdapterKind.loha),
    "vera": replace(low_rank("vera", AdapterKind.vera), rank=16, alpha=0),
    "prompt": AdapterConfig("prompt", AdapterKind.prompt, tokens=3),
    "prefix": AdapterConfig("prefix", AdapterKind.prefix, tokens=3),
    "bottleneck": AdapterConfig("bottleneck", AdapterKind.bottleneck, 4, target_modules=list(BOTTLENECK_PLACES)),
    "bitfit": AdapterConfig("bitfit", AdapterKind.bitfit, norms=True),
}
UNMERGED = ("prompt", "prefix", "bottleneck")
STEPS = 4


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {official_name(name): p.detach().clone() for name, p in model.named_parameters()}


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**batch).logits
    return found


@pytest.mark.parametrize("name", KINDS)
def test_it_trains_what_it_declares_comes_back_and_merges(
    name: str, golden: Path, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    section = KINDS[name]
    model = load_model(golden / "model")
    untouched = logits(model, batch)
    apply_adapter(model, section, seed=3)
    first = logits(model, batch)
    if section.kind not in (AdapterKind.prompt, AdapterKind.prefix):
        assert (first - untouched).abs().max() < 2e-5  # an adapter begins by changing nothing
    trainable = set_trainable(model, "instruct", section, freeze_connector=True)
    kind, llm = adapter_of(section), layout_of(model)
    assert trainable.counts()["n_total"] == kind.n_parameters(llm)
    before = snapshot(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    around = RankSharing(model, section.adalora, STEPS) if section.kind is AdapterKind.adalora else None
    moved: set[str] = set()
    for step in range(STEPS):
        model.loss(batch).backward()
        if around:
            around.before_update()
        optimizer.step()
        if around:
            around.after_update(applied=True)
        optimizer.zero_grad()
        now = snapshot(model)
        moved |= {n for n, value in now.items() if not torch.equal(value, before[n])}
        if step == 0:
            assert trainable.names - moved <= trainable.zero_gradient_by_construction
    assert moved == trainable.names
    answers = logits(model, batch)
    assert (answers - first).abs().max() > 1e-3

    run = tmp_path / "run"
    save_adapter(model, run / "adapter")
    (run / "config.yaml").write_text(f"model:\n  name: golden\n  path: {GOLDEN / 'model'}\n")
    again = load_adapter(load_model(golden / "model"), run / "adapter")
    tolerance = 2e-5 if section.init is AdapterInit.pissa else 0.0  # which is saved over the original base
    assert (logits(again, batch) - answers).abs().max() <= tolerance
    assert not any(p.requires_grad for p in again.parameters())

    if name in UNMERGED:
        with pytest.raises(ModelError, match=f"A {section.kind.value} adapter cannot be merged: "):
            MergedTensors(source_of_run(run))
        return
    merge_run(run, tmp_path / "out")
    assert (logits(load_model(tmp_path / "out"), batch) - answers).abs().max() < 2e-5
