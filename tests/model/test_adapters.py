"""Adapters: where LoRA goes, what is saved, and that it comes back bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from model_files import GOLDEN, SEVEN, edit_json
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mgm_exp.config import AdapterConfig, AdapterKind
from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model import (
    apply_adapter,
    load_adapter,
    load_connector,
    load_model,
    load_processor,
    lora_targets,
    meta_model,
    mgm_2b_config,
    model_fingerprint,
    reset_connector,
    save_adapter,
    save_connector,
    save_full,
    set_trainable,
)
from mgm_exp.model.trainable import connector_names


@pytest.fixture
def trained(model, batch, lora):
    """A model whose adapter and connector have taken two steps."""
    apply_adapter(model, lora, seed=3)
    set_trainable(model, "instruct", lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(2):
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture
def run_folder(trained, tmp_path: Path, golden: Path) -> Path:
    save_adapter(trained, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text(f"model:\n  name: golden\n  path: {golden / 'model'}\n")
    return tmp_path / "run"


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def test_lora_sits_on_the_llm_alone(model, lora, golden: Path) -> None:
    apply_adapter(model, lora, seed=0)
    expected = json.loads((golden / "trainable_and_lora_names.json").read_text())["lora_state"]
    actual = {f"base_model.model.{n}": list(p.shape) for n, p in model.named_parameters() if "lora_" in n}
    assert actual == expected
    assert not any("lora" in n for n, _ in model.model.vision_tower.named_modules())


def test_suffix_targets_would_have_hit_clip_and_the_pattern_does_not(model, golden: Path) -> None:
    trap = json.loads((golden / "trainable_and_lora_names.json").read_text())["TRAP_suffix_targets_also_hit_clip"]
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    by_suffix = [n for n in linears if n.endswith(tuple(SEVEN))]
    hit = [n for n in linears if re.fullmatch(lora_targets(SEVEN, model.config), n)]
    assert len(by_suffix) == len(hit) + len(trap)
    assert len(hit) == 14 and not any("vision" in n for n in hit)


@pytest.mark.parametrize(("rank", "n_lora"), [(8, 9_805_824), (16, 19_611_648), (64, 78_446_592)])
def test_mgm_2b_has_the_exact_number_of_lora_parameters(rank: int, n_lora: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = meta_model(mgm_2b_config())
    with torch.device("meta"):
        config = LoraConfig(r=rank, target_modules=lora_targets(SEVEN, model.config), init_lora_weights=False)
        inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    trainable = set_trainable(model, "instruct", {"kind": "lora", "target_modules": SEVEN})
    assert trainable.counts() == {"n_lora": n_lora, "n_other": 13_259_008, "n_total": n_lora + 13_259_008}


def test_an_adapter_starts_from_its_seed_and_changes_nothing_yet(golden: Path, batch, lora) -> None:
    models = [apply_adapter(load_model(golden / "model"), lora, seed=s) for s in (5, 5, 6)]
    a, b, c = (dict(m.named_parameters())["model.layers.0.mlp.up_proj.lora_A.default.weight"] for m in models)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.abs().max() <= 1 / 64**0.5
    assert torch.equal(logits(models[0], batch), logits(load_model(golden / "model"), batch))


def test_fewer_targets_leave_the_others_values_as_they_were(golden: Path, lora) -> None:
    all_seven = apply_adapter(load_model(golden / "model"), lora, seed=5)
    one = apply_adapter(load_model(golden / "model"), {**lora, "target_modules": ["up_proj"]}, seed=5)
    name = "model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(dict(all_seven.named_parameters())[name], dict(one.named_parameters())[name])


def test_the_config_dataclass_is_taken_as_it_is(model) -> None:
    section = AdapterConfig(
        name="lora_r8", kind=AdapterKind.lora, rank=4, alpha=8.0, dropout=0.1, target_modules=["q_proj"]
    )
    apply_adapter(model, section, seed=0)
    assert set_trainable(model, "instruct", section).n_lora == 2 * 4 * (64 + 128)
    full = AdapterConfig(name="full", kind=AdapterKind.full)
    assert apply_adapter(model, full, seed=0) is model


def test_an_adapter_on_bf16_weights_stays_fp32(golden: Path, lora, batch) -> None:
    model = apply_adapter(load_model(golden / "model", dtype="bfloat16"), lora, seed=0)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert torch.isfinite(model.loss(batch))


@pytest.mark.parametrize("is_training", [False, True])
def test_a_new_adapter_takes_the_models_mode(model, lora, is_training: bool) -> None:
    model.train(is_training)
    apply_adapter(model, {**lora, "dropout": 0.5}, seed=0)
    assert {m.training for n, m in model.named_modules() if "lora_dropout" in n} == {is_training}


def test_unknown_targets_and_a_second_adapter_are_refused(model, lora) -> None:
    with pytest.raises(ConfigError, match="fc1_proj"):
        apply_adapter(model, {**lora, "target_modules": ["q_proj", "fc1"]}, seed=0)
    apply_adapter(model, lora, seed=0)
    with pytest.raises(ModelError, match="already"):
        apply_adapter(model, lora, seed=0)


def test_a_run_folder_loads_as_the_trained_model(run_folder: Path, trained, batch) -> None:
    again = load_model(run_folder)
    assert type(again) is type(trained)
    assert torch.equal(logits(again, batch), logits(trained.eval(), batch))
    assert again.load_report.adapter == str(run_folder / "adapter")
    assert load_processor(run_folder).n_visual_tokens == 16


def test_plain_peft_loads_the_adapter_on_the_base_model(run_folder: Path, trained, batch, golden: Path) -> None:
    base = load_model(golden / "model")
    load_connector(base, run_folder / "adapter" / "non_lora_trainables.safetensors")
    wrapped = PeftModel.from_pretrained(base, str(run_folder / "adapter"))
    assert torch.equal(logits(wrapped, batch), logits(trained.eval(), batch))
    answer = wrapped.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        images=batch["images"],
        images_aux=batch["images_aux"],
        max_new_tokens=3,
    )
    assert answer.shape[0] == 2


def test_the_adapter_folder_has_official_and_portable_names(run_folder: Path, golden: Path) -> None:
    adapter = run_folder / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "model"
    assert str(golden) not in (adapter / "adapter_config.json").read_text()
    expected = json.loads((golden / "trainable_and_lora_names.json").read_text())
    saved = load_file(str(adapter / "adapter_model.safetensors"))
    assert set(saved) == {n.replace(".default.", ".") for n in expected["lora_state"]}
    assert set(load_file(str(adapter / "non_lora_trainables.safetensors"))) == set(expected["non_lora_trainables"])
    assert sum(t.numel() for t in saved.values()) == 18_432
    assert not list(adapter.glob("*.tmp")) and not list(adapter.glob(".*"))


def test_a_frozen_connector_is_saved_all_the_same(model, lora, tmp_path: Path) -> None:
    apply_adapter(model, lora, seed=0)
    set_trainable(model, "instruct", lora, freeze_connector=True)
    save_adapter(model, tmp_path)
    assert len(load_file(str(tmp_path / "non_lora_trainables.safetensors"))) == 16


def test_a_rescaled_adapter_is_applied_with_its_own_alpha(run_folder: Path, trained, batch) -> None:
    edit_json(run_folder / "adapter" / "adapter_config.json", lora_alpha=32)
    assert not torch.equal(logits(load_model(run_folder), batch), logits(trained.eval(), batch))


def test_foreign_and_damaged_adapters_are_refused(run_folder: Path, golden: Path, tmp_path: Path) -> None:
    adapter = run_folder / "adapter"
    weights = adapter / "adapter_model.safetensors"
    good = load_file(str(weights))

    def refused(words: str) -> None:
        with pytest.raises(ModelError, match=words):
            load_adapter(load_model(golden / "model"), adapter)

    first = sorted(good)[0]
    save_file({n: t for n, t in good.items() if n != first}, str(weights))
    refused("1 tensors missing")
    save_file({**good, first: torch.ones(3, 3)}, str(weights))
    refused("expected")
    weights.write_bytes(weights.read_bytes()[:100])
    refused("damaged")
    weights.unlink()
    refused("is not an adapter folder")


def test_a_run_folder_without_a_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: tiny}\n")
    with pytest.raises(ModelError, match="neither model/ nor adapter/"):
        load_model(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("- not a config\n")
    with pytest.raises(ModelError, match="cannot be read as a run's config"):
        load_model(tmp_path)


def test_a_run_folder_with_a_full_model_loads(model, tmp_path: Path, batch) -> None:
    save_full(model, tmp_path / "model")
    (tmp_path / "config.yaml").write_text("model: {name: golden, path: /nowhere}\n")
    assert torch.equal(logits(load_model(tmp_path), batch), logits(model, batch))
    assert model_fingerprint(tmp_path) == model_fingerprint(model)


def test_full_saving_refuses_a_model_with_an_adapter_and_the_reverse(model, lora, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter to save") as caught:
        save_adapter(model, tmp_path)
    assert "save_full" in str(caught.value)
    apply_adapter(model, lora, seed=0)
    with pytest.raises(ModelError, match="save_adapter"):
        save_full(model, tmp_path)


def test_the_connector_makes_a_round_trip_alone(model, still_model, tmp_path: Path) -> None:
    changed = reset_connector(model, "connector", seed=9)
    assert set(changed) == connector_names()
    save_connector(model, tmp_path / "connector.safetensors")
    assert set(load_file(str(tmp_path / "connector.safetensors"))) == connector_names()
    again = load_model(GOLDEN / "model")
    load_connector(again, tmp_path / "connector.safetensors")
    assert model_fingerprint(again) == model_fingerprint(model) != model_fingerprint(still_model)


def test_resetting_the_projector_leaves_the_mining(model, still_model) -> None:
    assert set(reset_connector(model, "projector", seed=9)) == {n for n in connector_names() if "mm_projector" in n}
    assert torch.equal(model.model.vlm_uni_val_projector[1].weight, still_model.model.vlm_uni_val_projector[1].weight)
    assert not torch.equal(model.model.mm_projector[2].weight, still_model.model.mm_projector[2].weight)
    assert reset_connector(model, "none", seed=9) == []
    with pytest.raises(ModelError, match="allowed are none"):
        reset_connector(model, "towers", seed=9)


def test_the_official_mm_projector_bin_is_read(model, still_model, tmp_path: Path) -> None:
    # It is a pickle that holds the towers too; only the connector is taken, by the restricted unpickler
    state = {
        n: t.clone() for n, t in still_model.state_dict().items() if n.startswith(("model.mm", "model.vlm", "model.v"))
    }
    torch.save(state, tmp_path / "mm_projector.bin")
    reset_connector(model, "connector", seed=1)
    load_connector(model, tmp_path / "mm_projector.bin")
    assert model_fingerprint(model) == model_fingerprint(still_model)


def test_dropout_of_a_loaded_adapter_sleeps_in_an_eval_model(run_folder: Path) -> None:
    edit_json(run_folder / "adapter" / "adapter_config.json", lora_dropout=0.5)
    loaded = load_model(run_folder)
    assert not [name for name, module in loaded.named_modules() if module.training]


def test_a_run_folder_loads_in_the_precision_of_its_training(run_folder: Path) -> None:
    assert load_model(run_folder).dtype == torch.float32
    with (run_folder / "config.yaml").open("a") as file:
        file.write("train:\n  precision: bf16\n")
    assert load_model(run_folder).dtype == torch.bfloat16
    assert load_model(run_folder, dtype="float32").dtype == torch.float32
