"""MGM on Llama against plain transformers: a LlamaForCausalLM that is fed what a loop puts together.

The towers, mining and projector are the same code as on Gemma, which the official numbers test; here the language
model, the merge around it, its head, its names and its generation are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llama_folders import llama_config, write_llama_mgm
from model_files import SEVEN, edit_json
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mgm_exp.errors import ModelError
from mgm_exp.model import (
    MGMForConditionalGeneration,
    apply_adapter,
    build_model,
    known_config,
    load_model,
    load_processor,
    meta_model,
    model_fingerprint,
    save_full,
    set_trainable,
)
from mgm_exp.model.tensors import tensor_map

ATOL = 2e-5


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_mgm(tmp_path_factory.mktemp("vicuna"))


@pytest.fixture(scope="module")
def still(vicuna: Path) -> MGMForConditionalGeneration:
    """For tests that change nothing."""
    return load_model(vicuna)


@pytest.fixture(scope="module")
def reference(still: MGMForConditionalGeneration) -> LlamaForCausalLM:
    """The language model alone, with its weights, by transformers."""
    names = LlamaConfig(**{k: v for k, v in llama_config(still.config.vocab_size).items() if k not in OTHER})
    plain = LlamaForCausalLM(names).eval()
    tensors = {n: t for n, t in still.state_dict().items() if "vision_tower" not in n}
    llm = {n: t for n, t in tensors.items() if "mm_projector" not in n and "vlm_uni" not in n}
    plain.load_state_dict(llm, strict=True)
    return plain


OTHER = ("model_type", "architectures")


def some_batch(vocabulary: int) -> dict[str, Tensor]:
    """Three rows: an image within text, none, one at the end; of different lengths, labels in places."""
    generator = torch.Generator().manual_seed(5)
    lengths, places = (9, 14, 6), (3, None, 5)
    ids = torch.randint(3, vocabulary, (3, max(lengths)), generator=generator)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    labels = ids.clone()
    for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
        mask[row, :length] = True
        if place is not None:
            ids[row, place] = -200
        labels[row, : length // 2] = -100
        labels[row, length:] = -100
    labels[ids == -200] = -100
    images = torch.randn(3, 3, 56, 56, generator=generator)
    images_aux = torch.randn(3, 3, 128, 128, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": images, "images_aux": images_aux}


def merged_by_a_loop(embed: Callable[[Tensor], Tensor], features: Tensor, batch: dict[str, Tensor], limit: int):
    """The official merge, row by row: text as it is, features at an image's place; a row without one uses one up."""
    rows, image = [], 0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        vectors, learnt = [], []
        found = False
        for token, label in zip(ids[mask].tolist(), labels[mask].tolist(), strict=True):
            if token == -200:
                vectors += list(features[image])
                learnt += [-100] * len(features[image])
                image, found = image + 1, True
            else:
                vectors.append(embed(torch.tensor([token]))[0])
                learnt.append(label)
        image += not found
        rows.append((torch.stack(vectors)[:limit], learnt[:limit]))
    longest = max(len(vectors) for vectors, _ in rows)
    embeds = torch.stack([F.pad(vectors, (0, 0, 0, longest - len(vectors))) for vectors, _ in rows])
    mask = torch.tensor([[i < len(vectors) for i in range(longest)] for vectors, _ in rows])
    labels = torch.tensor([learnt + [-100] * (longest - len(learnt)) for _, learnt in rows])
    return embeds, mask, labels


@torch.no_grad()
@pytest.mark.parametrize("limit", [256, 20])
def test_logits_loss_and_labels_equal_those_of_transformers_llama(still, reference, limit: int, monkeypatch) -> None:
    monkeypatch.setattr(still.config, "tokenizer_model_max_length", limit)
    batch = some_batch(still.config.vocab_size)
    features = still.model.encode_images(batch["images"], batch["images_aux"])
    embeds, mask, labels = merged_by_a_loop(reference.model.embed_tokens, features, batch, limit)
    out = still(**batch)
    mine, my_mask, my_labels = still.merge(
        batch["input_ids"], batch["attention_mask"], batch["labels"], visual_tokens=features
    )
    assert torch.equal(my_mask, mask) and torch.equal(my_labels, labels)
    torch.testing.assert_close(mine, embeds, atol=0, rtol=0)  # neither text nor images are scaled
    expected = reference(inputs_embeds=embeds, attention_mask=mask).logits
    torch.testing.assert_close(out.logits[mask], expected[mask], atol=ATOL, rtol=0)
    chosen = [
        -expected[row, place].log_softmax(-1)[labels[row, place + 1]]
        for row in range(len(labels))
        for place in range(labels.shape[1] - 1)
        if labels[row, place + 1] != -100
    ]
    assert float(out.loss) == pytest.approx(float(torch.stack(chosen).mean()), rel=1e-5)
    assert float(still.loss(batch)) == pytest.approx(float(out.loss), rel=1e-6)


@torch.no_grad()
def test_answers_equal_those_of_transformers_llama(still, reference) -> None:
    batch = some_batch(still.config.vocab_size)
    features = still.model.encode_images(batch["images"], batch["images_aux"])
    embeds, mask, _ = merged_by_a_loop(reference.model.embed_tokens, features, batch, 256)
    together = still.generate(
        batch["input_ids"], batch["attention_mask"], visual_tokens=features, max_new_tokens=8, eos_token_id=[2]
    )
    for row in range(3):
        alone = reference.generate(
            inputs_embeds=embeds[row : row + 1, mask[row]], max_new_tokens=8, do_sample=False, eos_token_id=2
        )
        kept = [t for t in together[row].tolist() if t != still.config.pad_token_id]
        assert kept == alone[0].tolist()


def test_gradients_reach_what_is_trained_and_are_those_of_transformers_llama(vicuna: Path, reference) -> None:
    model = load_model(vicuna)
    trained = set_trainable(model, "instruct", {"kind": "full"})
    assert "lm_head.weight" in trained.llm and len(trained.llm) == 2 + 1 + 2 * 9
    batch = some_batch(model.config.vocab_size)
    model.loss(batch).backward()
    with torch.no_grad():
        features = model.model.encode_images(batch["images"], batch["images_aux"])
    reference.zero_grad()
    embeds, mask, labels = merged_by_a_loop(reference.model.embed_tokens, features, batch, 256)
    reference(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss.backward()
    expected = dict(reference.named_parameters())
    for name in trained.llm:
        torch.testing.assert_close(model.get_parameter(name).grad, expected[name].grad, atol=1e-5, rtol=1e-4)
    assert all(model.get_parameter(name).grad is not None for name in trained.connector)
    reference.zero_grad()


def test_lora_hits_the_llm_alone(vicuna: Path) -> None:
    section = {"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": SEVEN}
    model = apply_adapter(load_model(vicuna), section, seed=0)
    trained = set_trainable(model, "instruct", section)
    assert len(trained.lora) == 2 * 7 * 2 and len(trained.connector) == 16


def test_names_and_places_of_tensors_are_the_official_ones(still, vicuna: Path, tmp_path: Path) -> None:
    """The folder's own names, and CLIP's from beside it; and all of them after saving."""
    report = still.load_report
    assert (report.missing, report.unexpected, report.activation) == ((), (), "silu")
    assert report.sources["vision_tower"].endswith("openai-clip-vit-tiny-patch14-56")
    assert "lm_head.weight" in tensor_map(vicuna)
    save_full(still, tmp_path / "saved")
    stated = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (stated["model_type"], stated["architectures"]) == ("mgm", ["MGMLlamaForCausalLM"])
    assert model_fingerprint(tmp_path / "saved") == model_fingerprint(still) == model_fingerprint(vicuna)
    batch = some_batch(still.config.vocab_size)
    for loader in (AutoModelForCausalLM, MGMForConditionalGeneration):
        again = loader.from_pretrained(tmp_path / "saved")
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, still(**batch).logits)


def test_shards_of_pickled_tensors_load_and_nothing_else_of_them(vicuna: Path, tmp_path: Path) -> None:
    folder = write_llama_mgm(tmp_path, pickled=True)
    assert model_fingerprint(load_model(folder)) == model_fingerprint(vicuna)
    torch.save({"model.norm.weight": Path("x")}, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(ModelError, match="refused"):
        load_model(folder)
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model-00001-of-00002\.bin, which pytorch_model\.bin\.index"):
        load_model(folder)


def test_older_releases_and_a_llama_alone_are_understood(vicuna: Path, tmp_path: Path) -> None:
    folder = write_llama_mgm(tmp_path, model_type="mini_gemini", architectures=["MiniGeminiLlamaForCausalLM"])
    assert model_fingerprint(folder) == model_fingerprint(vicuna)
    edit_json(folder / "config.json", model_type="llama", mm_hidden_size=None, mm_hidden_size_aux=None)
    aux = write_llama_mgm(tmp_path / "other")
    section = {"path": str(folder), "vision_tower": str(tmp_path / "openai-clip-vit-tiny-patch14-56")}
    model, report = build_model(section | {"vision_tower_aux": str(aux)})
    assert model.config.mm_hidden_size_aux == 60 and report.missing == ()


def test_a_gemma_activation_is_refused_on_a_llama(vicuna: Path) -> None:
    with pytest.raises(ModelError, match="hidden_activation=gelu_pytorch_tanh does not fit"):
        build_model({"path": str(vicuna), "hidden_activation": "gelu_pytorch_tanh"})


def test_llama_3_ends_a_turn_and_fills_rows_without_a_padding_token_in_its_config(tmp_path: Path) -> None:
    folder = write_llama_mgm(tmp_path, "llama_3")
    model, processor = load_model(folder), load_processor(folder)
    end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert model.config.pad_token_id is None
    assert model.generation_config.eos_token_id == processor.stop_token_ids == [1, end]
    prompt = torch.tensor([processor.encode_prompt("what is it?")])
    batch = some_batch(model.config.vocab_size)
    images = {"images": batch["images"][:1], "images_aux": batch["images_aux"][:1]}
    assert model.generate(prompt, **images, max_new_tokens=3).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "llm", "projector", "lora_16"),
    [
        ("mgm_2b", 2_506_172_416, 6_295_552, 19_611_648),
        ("mgm_7b", 6_738_415_616, 20_979_712, 39_976_960),
        ("mgm_8b", 8_030_261_248, 20_979_712, 41_943_040),
        ("mgm_13b", 13_015_864_320, 31_467_520, 62_586_880),
    ],
)
def test_the_known_models_have_their_published_sizes(name: str, llm: int, projector: int, lora_16: int) -> None:
    """LLMs as their authors count them; the rest is 506,698,176 everywhere."""
    model = meta_model(known_config(name))
    assert sum(p.numel() for p in model.parameters()) == llm + projector + 303_507_456 + 196_227_264 + 6_963_456
    assert set_trainable(model, "align").n_other == projector + 6_963_456
    if name == "mgm_7b":
        assert set_trainable(model, "instruct", {"kind": "full"}).n_other == llm + projector + 6_963_456
    sizes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    targets = [s for n, s in sizes.items() if n.startswith("model.layers.") and n.endswith("_proj.weight")]
    assert sum(16 * (rows + columns) for rows, columns in targets) == lora_16
