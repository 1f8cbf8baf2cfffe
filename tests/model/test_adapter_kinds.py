"""Every kind of adapter: trains what it declares and nothing else, comes back, and merges to the same answers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import GOLDEN, SEVEN
from peft import PeftModel

from mgm_exp.bootstrap import CONF
from mgm_exp.compose import checked, compose_tree, session
from mgm_exp.config import BOTTLENECK_PLACES, AdaLoraConfig, AdapterConfig, AdapterInit, AdapterKind
from mgm_exp.errors import ConfigError, MissingDependencyError, ModelError
from mgm_exp.model import (
    apply_adapter,
    load_adapter,
    load_model,
    mgm_2b_config,
    official_name,
    save_adapter,
    set_trainable,
)
from mgm_exp.model.adapters import adapter_of, layout_of, merge_adapter
from mgm_exp.model.adapters.adalora import RankSharing
from mgm_exp.model.adapters.quantized import check_quantization
from mgm_exp.model.layout import LlmLayout
from mgm_exp.model.merged_tensors import MergedTensors
from mgm_exp.model.standalone import merge_run, source_of_run
from mgm_exp.model.trainable import connector_names


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
KNOWN_TO_PEFT = ("dora", "pissa_fast", "adalora", "loha", "vera")
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
    if name in KNOWN_TO_PEFT:
        plain = PeftModel.from_pretrained(load_model(golden / "model"), str(run / "adapter"))
        unlabelled = {key: value for key, value in batch.items() if key != "labels"}
        assert (logits(plain, unlabelled) - answers).abs().max() <= max(tolerance, 1e-6)

    if name in UNMERGED:
        refusal = f"A {section.kind.value} adapter cannot be merged: "
        with pytest.raises(ModelError, match=refusal):
            MergedTensors(source_of_run(run))
        with pytest.raises(ModelError, match=refusal):
            merge_adapter(load_model(golden / "model"), run / "adapter")
        return
    base = load_model(golden / "model").eval()
    before = {n: (p, p.detach().clone()) for n, p in base.named_parameters()}
    merged = merge_adapter(base, run / "adapter")
    assert (logits(merged, batch) - answers).abs().max() < 2e-5
    assert {n for n, _ in merged.named_parameters()} == set(before), "no module of an adapter"
    if section.kind is not AdapterKind.bitfit:  # whose own tensors are the base's
        own = connector_names()
        written = [n for n, (p, was) in before.items() if official_name(n) not in own and not torch.equal(p, was)]
        assert not written, "the base's own tensors stay as they are"
    merge_run(run, tmp_path / "out")
    assert (logits(load_model(tmp_path / "out"), batch) - answers).abs().max() < 2e-5


def test_answers_are_the_same_with_and_without_a_cache(golden: Path, batch: dict[str, torch.Tensor]) -> None:
    """Learnt tokens stand in front of padded rows, in the first pass and in those that follow."""
    asked = {key: batch[key] for key in ("input_ids", "attention_mask", "images", "images_aux")}
    for name in ("prompt", "prefix"):
        model = apply_adapter(load_model(golden / "model"), KINDS[name], seed=1).eval()
        [own] = [p for n, p in model.named_parameters() if "learnt_" in n]
        with torch.no_grad():
            own.add_(torch.randn(own.shape, generator=torch.Generator().manual_seed(2)))
        new = {"max_new_tokens": 6, "eos_token_id": None}
        with_cache, without = (model.generate(**asked, use_cache=bool(c), **new) for c in (1, 0))
        assert torch.equal(with_cache, without)
        one = {key: value[1:] for key, value in asked.items()}
        kept = one["attention_mask"][0].bool()
        alone = one | {key: one[key][:, kept] for key in ("input_ids", "attention_mask")}
        assert torch.equal(model.generate(**alone, max_new_tokens=6, eos_token_id=None), with_cache[1:])


def test_adalora_ends_with_the_rank_that_was_asked_for(golden: Path, batch: dict[str, torch.Tensor]) -> None:
    section = KINDS["adalora"]
    model = apply_adapter(load_model(golden / "model"), section, seed=3)
    set_trainable(model, "instruct", section, freeze_connector=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    around, left = RankSharing(model, section.adalora, 10), []
    for step in range(10):
        model.loss(batch).backward()
        around.before_update()
        optimizer.step()
        around.after_update(applied=step != 4)  # a step that was skipped is a step
        optimizer.zero_grad()
        left.append(sum(around.ranks.values()))
    layers = 3 * 2
    assert left[0] < layers * section.adalora.initial_rank and left == sorted(left, reverse=True)
    assert left[5:] == [layers * section.rank] * 5  # final_share of the steps with the last ranks
    values = [p for n, p in model.named_parameters() if ".lora_E." in n]
    assert sum(int((p != 0).sum()) for p in values) == layers * section.rank
    with pytest.raises(ConfigError, match="there are none"):
        RankSharing(model, AdaLoraConfig(6, 0.5, 0.45), 3)


def test_the_towers_are_trained_by_the_official_switches_saved_and_merged(
    golden: Path, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    section = KINDS["lora"]
    official = json.loads((golden / "trainable_and_lora_names.json").read_text())
    model = apply_adapter(load_model(golden / "model"), section, seed=3)
    trainable = set_trainable(model, "instruct", section, vision_tower=True, vision_tower_aux=True)
    # The official code also sets CLIP's last layer, which is never run
    never_run = {n for n in official["trainable_stage2_optimize_towers"] if ".encoder.layers.2." in n}
    wanted = set(official["trainable_stage2_optimize_towers"]) - set(official["trainable_stage2"]) - never_run
    assert trainable.towers == wanted and len(wanted) == 16 + 36
    model.train()
    before = snapshot(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    for _ in range(2):
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, value in snapshot(model).items() if not torch.equal(value, before[n])}
    assert moved <= trainable.names and trainable.names - moved <= trainable.zero_gradient_by_construction
    answers = logits(model, batch)
    run = tmp_path / "run"
    save_adapter(model, run / "adapter")
    (run / "config.yaml").write_text(f"model:\n  name: golden\n  path: {GOLDEN / 'model'}\n")
    assert torch.equal(logits(load_adapter(load_model(golden / "model"), run / "adapter"), batch), answers)
    merge_run(run, tmp_path / "out")
    assert (logits(load_model(tmp_path / "out"), batch) - answers).abs().max() < 2e-5


def test_bitfit_without_norms_says_that_it_would_train_nothing(golden: Path) -> None:
    section = replace(KINDS["bitfit"], norms=False)
    with pytest.raises(ConfigError, match="this LLM has no biases"):
        apply_adapter(load_model(golden / "model"), section, seed=0)


def test_names_are_those_of_the_models_layout() -> None:
    """A model with other names, and biases, needs another layout and nothing else."""
    layout = replace(LlmLayout.of(mgm_2b_config()), blocks="language_model.layers", biased=("q_proj",))
    lora = adapter_of(KINDS["lora"])
    assert {name.partition(".layers.")[0] for name in lora.added(layout)} == {"language_model"}
    assert all(re.fullmatch(lora.patterns(layout)[0], name) for name in lora.added(layout))
    biases = adapter_of(replace(KINDS["bitfit"], norms=False))
    assert biases.tuned(layout) == {f"language_model.layers.{i}.self_attn.q_proj.bias": (2048,) for i in range(18)}
    assert all(re.fullmatch(biases.patterns(layout)[0], name) for name in biases.tuned(layout))


def test_the_page_has_a_line_for_every_preset_with_its_number_of_parameters() -> None:
    page = (CONF.parent / "docs" / "adapters.md").read_text(encoding="utf-8")
    llm = LlmLayout.of(mgm_2b_config())
    with session() as hydra:
        for file in sorted((CONF / "adapter").glob("*.yaml")):
            section = checked(compose_tree(hydra, [f"adapter={file.stem}"])).adapter
            [line] = [line for line in page.splitlines() if line.startswith(f"| `{file.stem}` |")]
            assert f"| {adapter_of(section).n_parameters(llm):,} |" in line, file.stem


def test_four_bits_are_refused_where_they_cannot_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDependencyError, match="trains on a GPU only, and this run uses device cpu"):
        check_quantization("cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="bitsandbytes, which is not installed"):
        check_quantization("cuda")
