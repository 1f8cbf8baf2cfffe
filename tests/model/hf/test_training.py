"""The same loop that trains MGM trains other models: exactly the declared tensors, exactly resumed, exactly saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train.conftest import MGM, experiment, full, lora, write_records

from mgm_exp.config import AdapterConfig, AlignConfig, ExperimentConfig, ModelConfig, ModelFamily, plain
from mgm_exp.errors import Interrupted
from mgm_exp.model.hf.check import logits_of
from mgm_exp.model.hf.loading import build_hf
from mgm_exp.model.hf.loss import HfLossModule
from mgm_exp.model.hf.saving import load_hf_adapter, merge_hf_adapter
from mgm_exp.train import run_stage
from mgm_exp.train.job import TrainJob
from mgm_exp.train.metrics_file import read_rows

from .conftest import FAMILIES, TURNS, picture, turns_for


def config_of(family: str, folder: Path, adapter: AdapterConfig, **settings: Any) -> ExperimentConfig:
    """The train room's settings for another model; a full fine-tuning trains the connector too."""
    is_full = adapter.kind.value == "full"
    made = experiment(adapter=adapter, lr=3e-3 if is_full else 3e-2, max_length=256, **{"micro_batch": 2, **settings})
    model = ModelConfig(family, str(folder), family=ModelFamily.hf, train_connector=is_full)
    return replace(made, model=model, train=replace(made.train, align=AlignConfig()))


def job_of(work: Path, family: str, config: ExperimentConfig) -> TrainJob:
    """Mixed rows with and without images; with images only where the model takes no others."""
    work.mkdir(parents=True)
    records = write_records(work / "records.jsonl", 12, text_only=() if family == "paligemma" else (5, 11))
    return TrainJob("instruct", plain(config), records, MGM / "images", None, None, work)


def pictures() -> list[Any]:
    return [picture(), picture(40, 80, (20, 200, 30))]


@pytest.mark.parametrize("adapter", [lora(dropout=0.1), full()], ids=lambda adapter: adapter.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_declared_is_trained_and_what_is_saved_gives_the_same_logits(
    family: str, adapter: AdapterConfig, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    folder = folder_of(family)
    job = job_of(tmp_path / "work", family, config_of(family, folder, adapter, steps=5))
    said: list[str] = []
    summary = run_stage(job, say=said.append)
    losses = [row["loss"] for row in read_rows(job.metrics)]
    assert losses[-1] < losses[0]
    report = summary.trainable["verified"]
    assert report["is_complete"] and report["not_moved"] == []  # and no frozen tensor did: the check would have raised

    base, _ = build_hf({"path": str(folder)}, device="cpu", dtype=None)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    if adapter.kind.value == "full":
        trained, found = AutoModelForImageTextToText.from_pretrained(job.out / "model", output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"]
        moved = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, before[name])}
        assert all(not name.startswith(("model.vision_tower", "model.visual.blocks")) for name in moved)
        assert {"model.language_model.norm.weight", "lm_head.weight"} <= moved
        assert any("merger" in name or "multi_modal_projector" in name for name in moved)
        return
    from peft import PeftModel

    ours = base
    load_hf_adapter(ours, job.out / "adapter")
    here = logits_of(ours, folder, pictures())
    theirs = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), job.out / "adapter"
    )
    names = {name.split(".lora_")[0] for name, _ in theirs.named_parameters() if ".lora_" in name}
    assert len(names) == 2 * 3 and all(".language_model.layers." in name for name in names)
    assert torch.allclose(logits_of(theirs.base_model.model.eval(), folder, pictures()), here, atol=1e-6)
    plain_model, _ = build_hf({"path": str(folder)}, device="cpu", dtype=None)
    assert not torch.allclose(logits_of(plain_model, folder, pictures()), here, atol=1e-3)
    merge_hf_adapter(plain_model, job.out / "adapter")
    assert torch.allclose(logits_of(plain_model, folder, pictures()), here, atol=1e-5)
    assert plain_model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_model_itself(
    family: str, folder_of: Callable[[str], Path], processor_of: Callable[..., Any]
) -> None:
    model, _ = build_hf({"path": str(folder_of(family))}, device="cpu", dtype=None)
    processor = processor_of(family)
    short = [TURNS[0], {"from": "gpt", "value": "no"}]
    rows = [processor.inputs(turns_for(family), picture()), processor.inputs(short, picture(33, 90))]
    batch = processor.collate([{"id": str(i), **row} for i, row in enumerate(rows)])
    ours = HfLossModule(model)(batch)
    words = {key: value for key, value in batch.items() if key not in ("ids", "image_count")}
    assert ours.item() == pytest.approx(model(**words).loss.item(), rel=1e-5)
    each = [HfLossModule(model)(processor.collate([{"id": "x", **row}]), 1.0).item() for row in rows]
    assert sum(each) == pytest.approx(HfLossModule(model)(batch, 1.0).item(), rel=1e-5)


def test_a_stopped_stage_continues_bit_exact(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    config = config_of("qwen2_vl", folder_of("qwen2_vl"), lora(dropout=0.1), steps=4, every_steps=2)
    whole, stopped = (job_of(tmp_path / name, "qwen2_vl", config) for name in ("whole", "stopped"))
    run_stage(whole)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        run_stage(stopped, on_row=stop)
    summary = run_stage(stopped)
    assert summary.resumed_from
    kept = ("step", "loss", "grad_norm", "tokens")
    steps = [
        [{key: row[key] for key in kept} for row in read_rows(job.metrics) if "event" not in row]
        for job in (whole, stopped)
    ]
    assert steps[0] == steps[1]
    first, second = ((job.out / "adapter" / "adapter_model.safetensors").read_bytes() for job in (whole, stopped))
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "adapter"), [(0, full()), (2, lora()), (2, full()), (3, lora()), (3, full())])
def test_two_processes_train_as_one_does(
    zero: int, adapter: AdapterConfig, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    family = "paligemma" if zero == 3 else "qwen2_vl"  # zero=3 takes rows of one kind
    losses = []
    for devices in (1, 2):
        config = config_of(
            family, folder_of(family), adapter, steps=3, devices=devices, zero=zero if devices == 2 else 0
        )
        job = job_of(tmp_path / str(devices), family, replace(config, train=replace(config.train, micro_batch_size=1)))
        run_stage(job)
        losses.append([row["loss"] for row in read_rows(job.metrics)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if adapter.kind.value == "full":  # whole, also where parameters were sharded
        model, _ = build_hf({"path": str(job.out / "model")}, device="cpu", dtype=None)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.slow
def test_sharded_parameters_and_mixed_rows_are_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from mgm_exp.errors import MgmError

    config = config_of("llava", folder_of("llava"), lora(), steps=2, devices=2, zero=3, micro_batch=1)
    with pytest.raises(MgmError, match="rows of one kind: 10 of 12"):
        run_stage(job_of(tmp_path / "work", "llava", config))


def test_a_merged_run_is_one_folder_that_transformers_loads_and_check_proves(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    import yaml
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText

    from mgm_exp.model import check_merged, merge_run
    from mgm_exp.model.opening import open_model

    folder = folder_of("paligemma")
    config = config_of("paligemma", folder, lora(), steps=2)
    job = job_of(tmp_path / "run", "paligemma", config)
    run_stage(job)
    run = tmp_path / "finished"
    run.mkdir()
    (job.out / "adapter").rename(run / "adapter")
    (run / "config.yaml").write_text(yaml.safe_dump(plain(config)), encoding="utf-8")
    merged = merge_run(run, tmp_path / "merged")
    assert merged.adapted == 6 and merged.dtype == "float32"
    model, found = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    ours, _ = open_model(run, "cpu")
    assert torch.allclose(logits_of(model.eval(), folder, pictures()), logits_of(ours, folder, pictures()), atol=1e-5)
    assert all(finding.holds for finding in check_merged(tmp_path / "merged"))
    *quick, left_out = check_merged(tmp_path / "merged", with_logits=False)
    assert all(finding.holds for finding in quick) and "--no-logits" in left_out.says and left_out.holds is None

    weights = tmp_path / "merged" / "model.safetensors"
    save_file({**load_file(weights), "foreign": torch.zeros(1)}, weights, metadata={"format": "pt"})
    wrong = {finding.name for finding in check_merged(tmp_path / "merged") if finding.holds is not True}
    assert wrong == {"SHA-256 of shards", "no tensor too many"}
    base_weights = (folder / "model.safetensors").read_bytes()
    weights.write_bytes(base_weights)  # whole and loadable, but without the adapter
    wrong = {finding.name for finding in check_merged(tmp_path / "merged") if finding.holds is not True}
    assert wrong == {"SHA-256 of shards", "logits of merged and base + adapter"}
    assert "PaliGemma" in json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"][0]


@pytest.mark.parametrize("family", ["paligemma", "qwen2_vl"])
def test_a_loss_without_all_its_logits_is_the_models_own(
    family: str, folder_of: Callable[[str], Path], processor_of: Callable[..., Any]
) -> None:
    from mgm_exp.model.execution import Execution, run_as
    from mgm_exp.model.hf.trainable import put_adapter_on, set_trainable, training_mode

    processor = processor_of(family)
    batch = processor.collate([{"id": str(i), **processor.inputs(TURNS[:2], picture())} for i in range(2)])
    model, _ = build_hf({"path": str(folder_of(family))}, device="cpu", dtype=None)
    set_trainable(model, put_adapter_on(model, full(), 0), full(), False)
    training_mode(model)
    module, found = HfLossModule(model), []
    for execution in (Execution(), Execution(loss_kernel="fused"), Execution(loss_chunk=3)):
        run_as(model, execution)
        model.zero_grad()
        loss = module(batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0], other, strict=True))


def test_a_model_that_changes_its_logits_keeps_its_own_loss(folder_of: Callable[[str], Path]) -> None:
    from mgm_exp.errors import ModelError
    from mgm_exp.model.hf.loss import plain_head

    model, _ = build_hf({"path": str(folder_of("llava"))}, device="cpu", dtype=None)
    plain_head(model)
    model.config.get_text_config().final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match=r"changes its logits \(final_logit_softcapping\)"):
        plain_head(model)


def test_activations_that_are_computed_again_give_the_same_gradients(
    folder_of: Callable[[str], Path], processor_of: Callable[..., Any]
) -> None:
    from mgm_exp.model.hf.trainable import put_adapter_on, set_trainable, training_mode

    processor = processor_of("llava")
    batch = processor.collate([{"id": "x", **processor.inputs(TURNS, picture())}])
    gradients = []
    for again in (False, True, 1):
        section = {"path": str(folder_of("llava")), "gradient_checkpointing": again}
        model, _ = build_hf(section, device="cpu", dtype=None)
        set_trainable(model, put_adapter_on(model, lora(), 0), lora(), False)
        training_mode(model)
        assert not any(module.training for module in model.model.vision_tower.modules())
        HfLossModule(model)(batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for found in gradients[1:]:
        assert all(torch.allclose(gradients[0][name], found[name], atol=1e-7) for name in gradients[0])
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0].values())
