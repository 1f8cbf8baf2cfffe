"""A run becomes one folder that needs nothing else, and that is what base and adapter are together."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_files import GOLDEN, edit_json
from safetensors.torch import load_file, save_file

from mgm_exp.cli import main
from mgm_exp.errors import ModelError
from mgm_exp.model import apply_adapter, load_model, load_processor, save_adapter, save_full
from mgm_exp.model.adapters import load_adapter
from mgm_exp.model.merged_tensors import MergedTensors
from mgm_exp.model.standalone import merge_run, source_of_run
from mgm_exp.model.tensors import read_pickled


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture
def trained(model, lora):
    """A model with an adapter that does something, and a connector of its own."""
    apply_adapter(model, lora, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            elif "mm_projector" in name or "vlm_uni" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model


@pytest.fixture
def run_folder(trained, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    save_adapter(trained, run / "adapter")
    (run / "config.yaml").write_text(f"model:\n  name: golden\n  path: {GOLDEN / 'model'}\n")
    (run / "manifest.json").write_text(json.dumps({"data": {"name": "a | b", "n_train": 7, "fingerprint": "f00d"}}))
    metrics = {"demo/accuracy": 0.625, "demo/anls": float("nan"), "demo/loss": 1.5}
    result = {"run_id": "golden-1", "status": "completed", "metrics": metrics, "steps": 2}
    (run / "result.json").write_text(json.dumps(result))
    return run


@pytest.fixture
def full_run(still_model, tmp_path: Path) -> Path:
    """A run of full training."""
    run = tmp_path / "full"
    save_full(still_model, run / "model")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "README.md").write_text("---\nlicense: mit\n---\n# Start\n")
    (tmp_path / "start" / "LICENSE").write_text("Do as you like.")
    (run / "config.yaml").write_text(f"model:\n  name: golden\n  path: {tmp_path / 'start'}\n")
    return run


def test_the_merged_model_answers_as_base_and_adapter_do(trained, run_folder: Path, batch, tmp_path: Path) -> None:
    merged = merge_run(run_folder, tmp_path / "out", shard_bytes=100_000)
    loaded = load_model(tmp_path / "out", dtype="float32")
    assert loaded.load_report.unexpected == () and loaded.load_report.missing == ()
    assert (logits(loaded, batch) - logits(trained, batch)).abs().max() < 2e-5
    assert merged.adapted == 14 and merged.shards > 2
    processor = load_processor(tmp_path / "out")
    assert processor.encode_prompt("Why?") == load_processor(GOLDEN / "model").encode_prompt("Why?")
    assert processor.settings == load_processor(GOLDEN / "model").settings
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]


def test_shards_have_an_index_and_the_vision_part_is_never_divided(run_folder: Path, tmp_path: Path) -> None:
    """The official code fills CLIP, strictly, from each file that holds mining tensors, and wants an index."""
    merge_run(run_folder, tmp_path / "out", shard_bytes=1)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = json.loads((GOLDEN / "state_dict_names.json").read_text())
    vision = {file for name, file in index["weight_map"].items() if "vision_tower" in name or "vlm_uni" in name}
    assert len(vision) == 1
    assert sorted(index["weight_map"]) == sorted(set(names) - {"lm_head.weight"})  # tied
    for file in set(index["weight_map"].values()):
        assert set(load_file(str(tmp_path / "out" / file))) == {n for n, f in index["weight_map"].items() if f == file}


def test_a_16_bit_base_gets_the_sum_in_fp32_rounded_once(run_folder: Path, tmp_path: Path) -> None:
    merge_run(run_folder, tmp_path / "out", dtype="bfloat16")
    name = "model.layers.1.mlp.down_proj.weight"
    [merged] = [t for f in (tmp_path / "out").glob("model-*") for n, t in load_file(str(f)).items() if n == name]
    [base] = [t for f in (GOLDEN / "model").glob("model-*") for n, t in load_file(str(f)).items() if n == name]
    factors = load_file(str(run_folder / "adapter" / "adapter_model.safetensors"))
    down, up = (factors[f"base_model.model.{name.replace('.weight', f'.lora_{half}.weight')}"] for half in "AB")
    exact = base.double() + 2.0 * (up.double() @ down.double())
    assert merged.dtype == torch.bfloat16
    assert torch.allclose(merged.double(), exact, rtol=2**-8, atol=1e-7)  # half a step


def test_the_configuration_speaks_to_the_official_code_too(run_folder: Path, tmp_path: Path) -> None:
    merge_run(run_folder, tmp_path / "out", dtype="bfloat16")
    official = json.loads((GOLDEN / "model" / "config.json").read_text())
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    own = {"torch_dtype", "transformers_version", "_name_or_path"}
    assert {k: ours.get(k) for k in official if k not in own} == {k: v for k, v in official.items() if k not in own}
    assert ours["torch_dtype"] == "bfloat16"
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


def test_a_run_of_full_training_keeps_every_bit(full_run: Path, tmp_path: Path) -> None:
    merge_run(full_run, tmp_path / "out", shard_bytes=50_000)
    kept = load_file(str(full_run / "model" / "model.safetensors"))
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(str(file)).items():
            assert torch.equal(tensor, kept.pop(name)), name
    assert kept == {}


def test_the_card_of_full_training_speaks_of_the_model_it_began_with(full_run: Path, tmp_path: Path) -> None:
    merge_run(full_run, tmp_path / "out")
    head = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert (head["base_model"], head["license"]) == ("start", "mit")
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do as you like."


def test_an_adapter_of_the_official_code_merges_and_loads(trained, run_folder: Path, batch, tmp_path: Path) -> None:
    """Pickled, its targets given as suffixes that also hit CLIP's attention."""
    old = tmp_path / "llava-lora"
    old.mkdir()
    for name in ("adapter_model", "non_lora_trainables"):
        torch.save(load_file(str(run_folder / "adapter" / f"{name}.safetensors")), old / f"{name}.bin")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj", "up_proj"]}
    (old / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    with pytest.raises(ModelError, match="--base"):
        merge_run(old, tmp_path / "out")
    merge_run(old, tmp_path / "out", base=GOLDEN / "model")
    wanted = logits(trained, batch)
    assert (logits(load_model(tmp_path / "out"), batch) - wanted).abs().max() < 2e-5
    assert (logits(load_adapter(load_model(GOLDEN / "model"), old), batch) - wanted).abs().max() < 2e-5


def legacy(run_folder: Path, folder: Path, prefix: str = "", **config: Any) -> Path:
    """A LoRA folder as LLaVA's and MGM's trainers leave it."""
    folder.mkdir()
    for name in ("adapter_model", "non_lora_trainables"):
        tensors = load_file(str(run_folder / "adapter" / f"{name}.safetensors"))
        torch.save({prefix + n: t for n, t in tensors.items()}, folder / f"{name}.bin")
    stated = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj", "up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**stated, "base_model_name_or_path": "./gone", **config}))
    return folder


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "base_model.model.module.", "_orig_mod."])
def test_wrapped_names_of_old_adapters_are_read(trained, run_folder: Path, batch, tmp_path: Path, prefix: str) -> None:
    old = legacy(run_folder, tmp_path / "old", prefix, base_model_name_or_path=str(GOLDEN / "model"))
    assert (logits(load_model(old), batch) - logits(trained, batch)).abs().max() < 2e-5


def test_an_old_adapter_is_loaded_by_itself_and_converted(
    trained, run_folder: Path, batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = legacy(run_folder, tmp_path / "llava-lora")
    (old / "config.json").write_text(json.dumps({"model_type": "mgm_gemma"}))  # the trainer saves one beside it
    with pytest.raises(ModelError, match=r"'\./gone', which is no folder here"):
        load_model(old)
    wanted = logits(trained, batch)
    assert (logits(load_model(old, base=GOLDEN / "model"), batch) - wanted).abs().max() < 2e-5
    out = tmp_path / "peft"
    say = ["--base", str(GOLDEN / "model"), "--license", "mit"]
    assert main(["merge", str(old), "--out", str(out), "--export", "peft", *say]) == 0
    assert main(["check", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "44 tensors (an adapter of 14 weights)" in shown and "differ by at most 0; allowed 0" in shown
    stated = json.loads((out / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == "model" and len(stated["target_modules"]) == 14
    from peft import LoraConfig

    assert LoraConfig.from_pretrained(str(out)).r == 8
    assert (logits(load_adapter(load_model(GOLDEN / "model"), out), batch) - wanted).abs().max() < 2e-5


def test_an_old_adapter_on_a_plain_gemma_finds_the_towers_that_its_config_names(
    run_folder: Path, trained, batch, tmp_path: Path
) -> None:
    base = tmp_path / "gemma"
    shutil.copytree(GOLDEN / "model", base)
    shutil.copytree(GOLDEN / "towers", tmp_path / "towers")
    tensors = {n: t for f in base.glob("*.safetensors") for n, t in load_file(str(f)).items()}
    for file in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
        file.unlink()
    for part, prefix in (("openclip", "model.vision_tower_aux."), ("clip-vit", "model.vision_tower.vision_tower.")):
        [tower] = [one for one in (tmp_path / "towers").iterdir() if part in one.name]
        inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        save_file(inside, str(tower / "model.safetensors"))
    plain = {n: t for n, t in tensors.items() if not re.search("vision|mm_projector|vlm_uni", n)}
    save_file(plain, str(base / "model.safetensors"))
    official = json.loads((base / "config.json").read_text())
    gemma = {k: v for k, v in official.items() if not k.startswith(("mm_", "image_", "optimize", "tune", "use_mm"))}
    (base / "config.json").write_text(json.dumps({**gemma, "model_type": "gemma", "image_size_aux": 128}))
    old = legacy(run_folder, tmp_path / "old", base_model_name_or_path=str(base))
    with pytest.raises(ModelError, match="CLIP tower"):
        load_model(old)
    shutil.copyfile(GOLDEN / "model" / "config.json", old / "config.json")
    assert (logits(load_model(old), batch) - logits(trained, batch)).abs().max() < 2e-5


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("owned",))


def test_a_refusal_does_not_say_how_to_load_a_pickle_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.bin"
    torch.save({"weight": _Payload()}, file)
    with pytest.raises(ModelError, match=r"other than tensors and was refused: \w+\.mkdir") as refused:
        read_pickled(file)
    file.write_text("garbage")
    with pytest.raises(ModelError, match="is no file of tensors") as damaged:
        read_pickled(file)
    assert not any("weights_only" in str(error.value) for error in (refused, damaged))


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(
    run_folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = legacy(run_folder, tmp_path / "old", base_model_name_or_path=str(GOLDEN / "model"))
    torch.save({"model.mm_projector.0.weight": _Payload()}, old / name)
    with pytest.raises(ModelError, match=rf"{name} holds objects other than tensors and was refused"):
        merge_run(old, tmp_path / "out")
    assert not (tmp_path / "owned").exists() and not (tmp_path / "out").exists()


def test_the_adapter_of_full_training_cannot_be_exported(full_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="trained the whole model, so it has no adapter"):
        merge_run(full_run, tmp_path / "out", export="peft")
    assert not (tmp_path / "out").exists()


def test_the_card_names_base_data_scores_and_license_and_no_place(run_folder: Path, tmp_path: Path) -> None:
    merge_run(run_folder, tmp_path / "out", license_name="cc-by-nc-4.0")
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "cc-by-nc-4.0" and head["base_model"] == "model"
    [result] = head["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "name": "demo/accuracy", "value": 0.625}]
    assert "| demo/accuracy | 0.625 |" in card and "nan" not in card and "a \\| b, 7 rows" in card
    for file in (tmp_path / "out").glob("*.[jm][sd]*"):
        assert str(tmp_path) not in file.read_text(), file


def test_a_folder_that_holds_something_is_left_alone(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="not empty"):
        merge_run(run_folder, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_killed_merge_is_replaced_by_the_same_run_and_by_no_other(run_folder: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.merging"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    (left / "unfinished.json").write_text(json.dumps({"run": "/another/run"}))
    with pytest.raises(ModelError, match="unfinished merge of /another/run"):
        merge_run(run_folder, tmp_path / "out")
    (left / "unfinished.json").write_text(json.dumps({"run": str(run_folder)}))
    merge_run(run_folder, tmp_path / "out")
    assert not left.exists() and not list((tmp_path / "out").glob("*00009*"))
    assert not {"lock", "unfinished.json"} & {p.name for p in (tmp_path / "out").iterdir()}


def test_what_fails_leaves_nothing(run_folder: Path, tmp_path: Path) -> None:
    file = run_folder / "adapter" / "non_lora_trainables.safetensors"
    tensors = load_file(str(file))
    tensors["base_model.model.model.mm_projector.0.bias"][0] = float("nan")
    save_file(tensors, str(file))
    with pytest.raises(ModelError, match=r"mm_projector\.0\.bias has values that are not finite"):
        merge_run(run_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.merging").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "does not fit its base"),
        ({"use_dora": False, "lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "LOHA"}, "no usable r and alpha"),
        ({"peft_type": "IA3"}, "IA3 adapter; known are ADALORA, .*LORA"),
        ({"r": 4}, "rank 4"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(run_folder: Path, tmp_path: Path, changes, says: str) -> None:
    edit_json(run_folder / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=says):
        merge_run(run_folder, tmp_path / "out")


def test_rank_stabilised_lora_is_scaled_by_the_root_of_the_rank(run_folder: Path) -> None:
    edit_json(run_folder / "adapter" / "adapter_config.json", use_rslora=True)
    assert MergedTensors(source_of_run(run_folder)).scale == pytest.approx(16 / 8**0.5)


def test_bad_input_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    assert main(["merge", str(GOLDEN / "model"), "--out", str(tmp_path / "out")]) == 2
    assert main(["check", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert re.search(r"does not exist.*stands alone already.*no merge\.json", shown, re.DOTALL)
