"""The whole command on a small MGM-on-Vicuna folder: train, evaluate, merge, check; and HD from pixels to answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llama_folders import write_llama_mgm
from model_files import GOLDEN
from PIL import Image

from mgm_exp.cli import main
from mgm_exp.model import build_model, load_model, load_processor, processor_of, set_trainable, source_of_section

SHORT = ["train.align.max_steps=1", "train.max_steps=2", "train.global_batch_size=4", "train.align.global_batch_size=4"]
SMALL = ["data.demo_images=12", "data.demo_questions=4", "eval.max_questions=4", "eval.demo.baselines=false"]
HD = {"image_grid": 2, "image_global": True}


def test_an_mgm_on_vicuna_is_trained_evaluated_merged_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_llama_mgm(tmp_path / "base", pickled=True)
    root = tmp_path / "outputs"
    model = ["model.name=mgm_7b", f"model.path={folder}", "adapter=lora_r8"]
    assert main(["run", "debug=fast", "device=cpu", *SHORT, *SMALL, *model, "name=one", f"paths.root={root}"]) == 0
    (run,) = (root / "runs" / "one").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "completed" and "demo/accuracy" in result["metrics"]
    assert len((run / "predictions" / "demo.jsonl").read_text().splitlines()) == 4
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["trainable"]["n_lora"] == 8 * sum(
        rows + columns for rows, columns in [(48, 48), (24, 48), (24, 48), (48, 48), (80, 48), (80, 48), (48, 80)] * 2
    )

    out = tmp_path / "merged"
    assert main(["merge", str(run), "--out", str(out)]) == 0
    assert main(["check", str(out)]) == 0
    assert "no" not in [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line]
    stated = json.loads((out / "config.json").read_text())
    assert (stated["model_type"], stated["architectures"]) == ("mgm", ["MGMLlamaForCausalLM"])
    assert stated["rope_theta"] == 500000.0 and not stated["tie_word_embeddings"]
    assert "lm_head.weight" in json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert (out / "tokenizer.model").is_file() and (out / "tokenizer.json").is_file()

    # A folder whose SentencePiece file was lost still reads text in the same way.
    before = load_processor(out)
    (out / "tokenizer.model").unlink()
    after = load_processor(out)
    turns = [{"from": f, "value": v} for f, v in [("human", "<image>\nwhat?"), ("gpt", "an owl"), ("human", "USER?")]]
    assert before.encode([*turns, turns[1]]) == after.encode([*turns, turns[1]])


@pytest.fixture(scope="module", params=["gemma", "vicuna"])
def section(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    if request.param == "gemma":
        return {"path": str(GOLDEN / "model"), **HD}
    return {"path": str(write_llama_mgm(tmp_path_factory.mktemp("hd"))), **HD}


def test_hd_goes_from_pixels_through_training_to_an_answer(section: dict[str, object]) -> None:
    model, _ = build_model(section)
    processor = processor_of(source_of_section(section))
    assert processor.n_visual_tokens == model.config.visual_tokens_per_image == 16 * 5
    picture = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    image, image_aux = processor.pixels(picture)
    assert (image.shape, image_aux.shape) == ((5, 3, 56, 56), (3, 128, 128))
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a slope"}]
    encoded = processor.encode(turns)
    batch = {key: torch.tensor([encoded[key]]) for key in ("input_ids", "labels")}
    batch |= {"images": image[None], "images_aux": image_aux[None]}
    assert model.merge(**batch)[0].shape[1] == len(encoded["input_ids"]) - 1 + 80
    trained = set_trainable(model, "instruct", {"kind": "full"})
    before = {name: model.get_parameter(name).detach().clone() for name in trained.names}
    optimizer = torch.optim.AdamW([model.get_parameter(name) for name in trained.names], lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    still = {name for name in trained.names if torch.equal(before[name], model.get_parameter(name))}
    assert still <= trained.zero_gradient_by_construction
    answer = model.generate(
        torch.tensor([processor.encode_prompt("what is it?")]),
        images=image[None],
        images_aux=image_aux[None],
        max_new_tokens=3,
    )
    assert answer.shape[0] == 1 and isinstance(processor.decode(answer[0]), str)


def test_hd_of_a_run_is_the_hd_of_its_model(section: dict[str, object], tmp_path: Path) -> None:
    """What the section says holds for whoever loads the run."""
    from mgm_exp.model import apply_adapter, model_fingerprint, save_adapter
    from mgm_exp.model.standalone import merge_run

    lora = {"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj"]}
    model, _ = build_model(section)
    save_adapter(apply_adapter(model, lora, seed=0), tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"model": {"name": "x", **section}}))
    loaded = load_model(tmp_path / "run")
    assert (loaded.config.image_grid, loaded.config.image_global) == (2, True)
    merge_run(tmp_path / "run", tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert merged.config.visual_tokens_per_image == 80
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["base"]["image_grid"] == 2
    plain = {"path": section["path"]}
    assert model_fingerprint(build_model(plain)[0]) != model_fingerprint(build_model(section)[0])


def test_views_that_do_not_fit_are_refused(section: dict[str, object]) -> None:
    from mgm_exp.errors import ModelError

    for wrong in ({"image_grid": 3}, {"image_size_aux": 100}, {"image_grid": 0}):
        with pytest.raises(ModelError, match="do not fit"):
            build_model({**section, **wrong})
