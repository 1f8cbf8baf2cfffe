"""Which folders load, what the report says, and how damaged or foreign ones are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from model_files import edit_json
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from mgm_exp.config import Attention, ModelConfig
from mgm_exp.errors import ConfigError, MissingDependencyError, ModelError
from mgm_exp.model import (
    MGMForConditionalGeneration,
    build_model,
    load_model,
    meta_model,
    mgm_2b_config,
    model_fingerprint,
    save_full,
    set_trainable,
)
from mgm_exp.model.trainable import connector_names

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(str(file)))
    return found


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Puts the tensors in place of the folder's weights, as one file."""
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink(missing_ok=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(p, theirs[n]) for n, p in a.named_parameters())


# --- what loads -------------------------------------------------------------------------------------------------


def test_an_official_folder_loads_whole_and_frozen(model: MGMForConditionalGeneration) -> None:
    report = model.load_report
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    assert set(report.sources) == {"llm", "vision_tower", "vision_tower_aux", "connector"}
    assert report.attention == "sdpa" and "FlashAttention 2 cannot run here" in report.attention_reason
    assert report.activation == "gelu"  # the folder's word: the erf form
    assert not model.training
    assert not any(p.requires_grad for n, p in model.named_parameters() if "vision_tower" in n)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_one_file_loads_as_two_shards_do(folder: Path, still_model) -> None:
    rewrite(folder, tensors_of(folder))
    assert same_weights(load_model(folder), still_model)


def test_our_own_saved_folder_loads_and_keeps_official_names(model, tmp_path: Path, golden: Path) -> None:
    save_full(model, tmp_path / "saved")
    names = set(load_file(str(tmp_path / "saved" / "model.safetensors")))
    official = set(json.loads((golden / "state_dict_names.json").read_text())) - {"lm_head.weight"}
    assert names == official
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    again = load_model(tmp_path / "saved")  # no towers beside it: the folder stands alone
    assert same_weights(again, model)
    save_full(again, tmp_path / "twice")
    assert set(load_file(str(tmp_path / "twice" / "model.safetensors"))) == official


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForCausalLM])
def test_save_pretrained_and_the_auto_classes_make_a_round_trip(model, tmp_path: Path, auto) -> None:
    model.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").hidden_act == "gelu"
    again = auto.from_pretrained(tmp_path / "saved")
    assert isinstance(again, MGMForConditionalGeneration)
    assert same_weights(again, model)
    assert again.model.layers[0].mlp.act_fn(torch.tensor(1.0)) == torch.nn.functional.gelu(torch.tensor(1.0))
    assert AutoModel.from_pretrained(tmp_path / "saved").config.model_type == "mgm_gemma"


def test_a_tower_without_its_inner_level_loads(folder: Path, still_model) -> None:
    level = "model.vision_tower.vision_tower.vision_model."
    rewrite(folder, {n.replace(level, level.removesuffix("vision_model.")): t for n, t in tensors_of(folder).items()})
    assert same_weights(load_model(folder), still_model)


def test_towers_beside_the_checkpoint_are_found_by_name(folder: Path, still_model) -> None:
    tensors = tensors_of(folder)
    aux = {n: t for n, t in tensors.items() if n.startswith("model.vision_tower_aux.")}
    rewrite(folder, {n: t for n, t in tensors.items() if not n.startswith("model.vision_tower")})
    open_clip = {n.replace("model.vision_tower_aux.vision_", "visual.trunk."): t for n, t in aux.items()} | {
        "visual.trunk.head.norm.weight": torch.ones(24),
        "text.token_embedding.weight": torch.ones(4, 4),
    }
    path = folder.parent / "towers" / "openclip-convnext-large-d-320-tiny" / "open_clip_pytorch_model.bin"
    torch.save(open_clip, path)

    model = load_model(folder)
    assert same_weights(model, still_model)
    report = model.load_report
    assert report.sources["vision_tower"].endswith("openai-clip-vit-tiny-patch14-56")
    assert report.sources["vision_tower_aux"].endswith("openclip-convnext-large-d-320-tiny")
    assert {"visual.trunk.head.norm.weight", "text.token_embedding.weight"} <= set(report.ignored)
    assert model_fingerprint(folder) == model_fingerprint(still_model)


def test_towers_may_be_given_by_path(folder: Path, tmp_path: Path, still_model) -> None:
    tensors = tensors_of(folder)
    rewrite(folder, {n: t for n, t in tensors.items() if not n.startswith("model.vision_tower.")})
    shutil.move(folder.parent / "towers" / "openai-clip-vit-tiny-patch14-56", tmp_path / "clip")
    with pytest.raises(ModelError, match="is not described"):
        load_model(folder)
    section = ModelConfig(name="x", path=str(folder), vision_tower=str(tmp_path / "clip"))
    assert same_weights(build_model(section)[0], still_model)


def test_a_shard_border_inside_a_tower_is_completed_from_its_folder(folder: Path, still_model) -> None:
    half = {n: t for n, t in tensors_of(folder).items() if "encoder.layers.1" not in n}
    rewrite(folder, half)
    model = load_model(folder)
    assert same_weights(model, still_model)
    assert " and " in model.load_report.sources["vision_tower"]


def test_a_plain_gemma_base_gets_a_seeded_connector(folder: Path, still_model) -> None:
    tensors = {
        n: t for n, t in tensors_of(folder).items() if not n.startswith(("model.vision", "model.mm", "model.vlm"))
    }
    aux = {n: t for n, t in tensors_of(folder).items() if n.startswith("model.vision_tower_aux.")}
    towers = folder.parent / "towers"
    save_file(
        {n.removeprefix("model.vision_tower_aux."): t for n, t in aux.items()},
        str(towers / "openclip-convnext-large-d-320-tiny" / "model.safetensors"),
    )
    rewrite(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in config.items() if not k.startswith(("mm_", "image_", "tokenizer_", "optimize_", "use_mm"))}
    (folder / "config.json").write_text(json.dumps({**kept, "model_type": "gemma"}))
    section = {
        "path": str(folder),
        "vision_tower": str(towers / "openai-clip-vit-tiny-patch14-56"),
        "vision_tower_aux": str(towers / "openclip-convnext-large-d-320-tiny"),
    }
    a, report = build_model(section, seed=1)
    assert set(report.initialised) == connector_names()
    assert report.sources["connector"] == "seeded values"
    assert same_weights(a, build_model(section, seed=1)[0])
    other, _ = build_model(section, seed=2)
    assert not torch.equal(a.model.mm_projector[0].weight, other.model.mm_projector[0].weight)
    assert torch.equal(a.model.embed_tokens.weight, still_model.model.embed_tokens.weight)
    bound = 1 / a.model.mm_projector[0].in_features ** 0.5
    assert 0.9 * bound < a.model.mm_projector[0].weight.abs().max() <= bound


def test_a_missing_projector_alone_is_seeded_independently_of_the_rest(folder: Path, still_model) -> None:
    rewrite(folder, {n: t for n, t in tensors_of(folder).items() if "mm_projector" not in n})
    model, report = build_model({"path": str(folder)}, seed=1)
    assert set(report.missing) == {n for n in connector_names() if "mm_projector" in n}
    assert torch.equal(model.model.vlm_uni_aux_projector[1].weight, still_model.model.vlm_uni_aux_projector[1].weight)


def test_unexpected_tensors_are_reported(folder: Path) -> None:
    rewrite(folder, {**tensors_of(folder), "model.layers.7.extra.weight": torch.ones(2)})
    assert load_model(folder).load_report.unexpected == ("model.layers.7.extra.weight",)


def test_the_folders_activation_is_obeyed(folder: Path) -> None:
    x = torch.tensor(1.0)
    edit_json(folder / "config.json", hidden_activation="gelu_pytorch_tanh")
    assert load_model(folder).model.layers[0].mlp.act_fn(x) == torch.nn.functional.gelu(x, approximate="tanh")
    section = {"path": str(folder), "hidden_activation": "gelu"}
    assert build_model(section)[0].model.layers[0].mlp.act_fn(x) == torch.nn.functional.gelu(x)


def test_dtype_and_checkpointing_are_what_was_asked_for(folder: Path) -> None:
    model, report = build_model(
        ModelConfig(name="x", path=str(folder), gradient_checkpointing=True), dtype=torch.bfloat16
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and report.dtype == "bfloat16"
    assert model.model.layers[0].gradient_checkpointing
    assert model.float().model.embed_tokens.embed_scale.item() == 8.0
    assert load_model(folder).config.dtype == torch.float32  # the folder's


# --- what is refused --------------------------------------------------------------------------------------------


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message  # one paragraph


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist", "nowhere")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is not a folder")
    refused(tmp_path, "no config.json")


def test_another_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="mgm_mixtral")
    refused(folder, "'mgm_mixtral'", "'mgm_gemma', 'mini_gemini_gemma', 'gemma', 'mgm', 'mini_gemini', 'llama'")
    edit_json(folder / "config.json", model_type=None)
    refused(folder, "architecture None")


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"], ids=["cut", "list", "bytes"])
def test_a_damaged_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(folder, "config.json")


def test_fields_that_do_not_fit(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers="two")
    refused(folder, "does not fit")


def test_an_unknown_activation_projector_or_padding_side(folder: Path) -> None:
    original = (folder / "config.json").read_text()
    for field, value in (("hidden_act", "snake"), ("mm_projector_type", "qformer"), ("tokenizer_padding_side", "up")):
        edit_json(folder / "config.json", **{field: value})
        refused(folder, repr(value))
        (folder / "config.json").write_text(original)


def test_missing_tensors_of_the_llm(folder: Path) -> None:
    rewrite(folder, {n: t for n, t in tensors_of(folder).items() if "layers.1.mlp" not in n})
    refused(folder, "lacks 3 tensors", "model.layers.1.mlp.down_proj.weight")


def test_missing_tensors_of_a_tower(folder: Path) -> None:
    rewrite(folder, {n: t for n, t in tensors_of(folder).items() if not n.endswith("vision_stem.0.weight")})
    (folder.parent / "towers" / "openclip-convnext-large-d-320-tiny" / "open_clip_config.json").unlink()
    os.rmdir(folder.parent / "towers" / "openclip-convnext-large-d-320-tiny")
    refused(folder, "vision_stem.0.weight", "model.vision_tower_aux")


def test_weights_of_another_size(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=96)
    refused(folder, "do not fit the configuration", "[128, 64]", "[96, 64]")


def test_a_clip_of_another_image_size(folder: Path) -> None:
    edit_json(folder.parent / "towers" / "openai-clip-vit-tiny-patch14-56" / "config.json", image_size=28)
    refused(folder, "28 px", "56 px")


def test_towers_that_do_not_fit_the_connector(folder: Path) -> None:
    edit_json(folder / "config.json", mm_hidden_size=48)
    refused(folder, "do not fit the connector", "48")


def test_a_missing_shard(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    refused(folder, SHARDS[1], "incomplete")


@pytest.mark.parametrize("damage", ["empty", "half", "one byte more", "zeros"])
def test_a_damaged_shard(folder: Path, damage: str) -> None:
    path = folder / SHARDS[0]
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "half": content[: len(content) // 2], "one byte more": content + b"\0", "zeros": bytes(512)}[
            damage
        ]
    )
    refused(folder, SHARDS[0], "damaged")


def test_an_index_that_points_out_of_the_folder(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../towers/x.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "points outside")


def test_a_folder_without_weights(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    refused(folder, "holds no weights")


class Payload:
    """Unpickled without restriction, it would make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


def test_a_tower_that_is_a_hostile_pickle_is_refused_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, {n: t for n, t in tensors_of(folder).items() if not n.startswith("model.vision_tower_aux.")})
    tower = folder.parent / "towers" / "openclip-convnext-large-d-320-tiny"
    torch.save({"visual.trunk.stem.0.weight": Payload(tmp_path / "ran")}, tower / "open_clip_pytorch_model.bin")
    refused(folder, "refused", "open_clip_pytorch_model.bin")
    assert not (tmp_path / "ran").exists()
    (tower / "open_clip_pytorch_model.bin").write_bytes(b"\x80\x04nonsense")
    refused(folder, "open_clip_pytorch_model.bin")


def test_kernels_and_devices_that_are_not_there(golden: Path) -> None:
    with pytest.raises(MissingDependencyError, match="flash_attention_2 cannot run here"):
        load_model(golden / "model", attn_implementation="flash_attention_2")
    with pytest.raises(ConfigError, match="allowed are auto"):
        load_model(golden / "model", attn_implementation="flash")
    with pytest.raises(ModelError, match="float32, bfloat16 or float16"):
        load_model(golden / "model", dtype="int8")
    with pytest.raises(ModelError, match="not known"):
        load_model(golden / "model", device="tpu9")
    section = ModelConfig(name="x", path=str(golden / "model"), attn_implementation=Attention.flash_attention_2)
    with pytest.raises(MissingDependencyError):
        build_model(section)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_cuda_asked_for_and_not_there(golden: Path) -> None:
    with pytest.raises(MissingDependencyError, match="0 CUDA devices"):
        load_model(golden / "model", device="cuda")


# --- the real size ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mgm_2b() -> MGMForConditionalGeneration:
    return meta_model(mgm_2b_config())


def count(model: torch.nn.Module, *prefixes: str) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefixes))


def test_mgm_2b_has_the_exact_parameter_counts(mgm_2b) -> None:
    assert sum(p.numel() for p in mgm_2b.parameters()) == 3_019_166_144
    assert count(mgm_2b, "model.embed_tokens", "model.layers", "model.norm") == 2_506_172_416
    assert count(mgm_2b, "model.vision_tower.") == 303_507_456
    assert count(mgm_2b, "model.vision_tower_aux.") == 196_227_264
    assert count(mgm_2b, "model.vlm_uni_query") == 1_051_648
    assert count(mgm_2b, "model.vlm_uni_aux") == count(mgm_2b, "model.vlm_uni_val") == 2_955_904
    assert count(mgm_2b, "model.mm_projector") == 6_295_552
    assert mgm_2b.config.activation == "gelu_pytorch_tanh"
    assert mgm_2b.config.visual_tokens_per_image == 576


def test_mgm_2b_has_the_official_number_of_tensors(mgm_2b) -> None:
    names = [n for n, _ in mgm_2b.named_parameters()]
    assert sum(n.startswith("model.vision_tower.") for n in names) == 391
    assert sum(n.startswith("model.vision_tower_aux.") for n in names) == 340
    assert sum(n.startswith(("model.embed", "model.layers", "model.norm")) for n in names) == 164


def test_mgm_2b_trains_the_official_numbers_of_parameters(mgm_2b) -> None:
    assert set_trainable(mgm_2b, "align").counts() == {"n_lora": 0, "n_other": 13_259_008, "n_total": 13_259_008}
    full = set_trainable(mgm_2b, "instruct", {"kind": "full"})
    assert full.counts()["n_total"] == 2_519_431_424
