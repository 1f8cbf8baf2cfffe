"""Model folders that Data-Juicer may be given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.data.data_juicer.models import check_mapper_model, check_model_folder
from mgm_exp.errors import ModelError


def folder_with(folder: Path, weights: str = "model.safetensors", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / weights).touch()
    return folder


def test_a_name_on_a_hub_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing is downloaded"):
        check_model_folder("watermark", tmp_path / "amrul-hzz" / "watermark_detector")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        check_model_folder("watermark", tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"architectures": []}', '{"architectures": null}'])
def test_a_config_that_names_no_architecture_is_refused(content: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m")
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match="architecture"):
        check_model_folder("watermark", folder)


def test_pickled_weights_and_code_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pickled weights"):
        check_model_folder("watermark", folder_with(tmp_path / "a", "pytorch_model.bin", architectures=["ViTModel"]))
    with pytest.raises(ModelError, match="brings code of its own"):
        check_model_folder(
            "watermark", folder_with(tmp_path / "b", architectures=["X"], auto_map={"AutoModel": "code.X"})
        )


@pytest.mark.parametrize(("architecture", "token"), [("Blip2ForConditionalGeneration", 32100), ("LlavaModel", 50265)])
def test_the_mapper_takes_blip2_with_opt_only(architecture: str, token: int, tmp_path: Path) -> None:
    """It overwrites the number of the image token."""
    folder = folder_with(tmp_path / "m", architectures=[architecture], image_token_index=token)
    with pytest.raises(ModelError, match=r"data\.captioner\.engine=mgm_exp"):
        check_mapper_model(folder)


def test_the_shipped_captioner_suits_the_mapper_and_a_prompt_needs_to_know_the_images_tokens(tmp_path: Path) -> None:
    from mgm_exp.data.captioner.demo_blip2 import FULL_IMAGE

    folder = folder_with(tmp_path, architectures=["Blip2ForConditionalGeneration"], image_token_index=FULL_IMAGE)
    check_mapper_model(folder)
    with pytest.raises(ModelError, match="it would leave the image out"):
        check_mapper_model(folder, prompt="a photo of")
    (folder / "processor_config.json").write_text('{"num_query_tokens": 20}', encoding="utf-8")
    check_mapper_model(folder, prompt="a photo of")
