"""What is found before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mgm_exp.compose import compose
from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model.known import KNOWN
from mgm_exp.preflight import TINY, check, check_scoring, model_folder


def model_of(tmp_path: Path, *overrides: str) -> str:
    return check_scoring(compose([f"paths.store={tmp_path}", "device=cpu", *overrides])).sources.model


def test_how_an_image_is_looked_at_is_part_of_what_a_model_is(tmp_path: Path) -> None:
    """Token counts, visual tokens and answers depend on it, and with them the keys of all stages."""
    plain = model_of(tmp_path)
    assert plain == model_of(tmp_path)
    others = {
        model_of(tmp_path, "model.image_grid=2"),
        model_of(tmp_path, "model.image_grid=2", "model.image_global=true"),
        model_of(tmp_path, "model.image_size_aux=256"),
    }
    assert len(others) == 3 and plain not in others


def test_a_missing_model_is_named_before_missing_benchmark_files() -> None:
    with pytest.raises(ModelError, match="Download YanweiLi/MGM-13B"):
        check(compose(["model=mgm_13b", "adapter=lora_r16", "device=cpu"]))


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_without_a_folder_says_what_to_download_and_where_to_put_it(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        model_folder(compose([f"model={name}"]))
    said = str(caught.value)
    repo, llm = KNOWN[name].repo, KNOWN[name].llm_repo
    for word in (repo, f"model.path=DIR/{repo.split('/')[1]}", llm, "openai/clip-vit-large-patch14-336", "laion/CLIP"):
        assert word in said
    assert "DIR/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup" in said


def test_a_preset_of_another_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mini_gemini"}')
    with pytest.raises(ModelError, match=r"MGM-2B, built on Gemma-2B.*'mini_gemini'.*built on Llama"):
        model_folder(compose(["model=mgm_2b", f"model.path={tmp_path}"]))
    assert model_folder(compose(["model=mgm_8b", f"model.path={tmp_path}"])) == tmp_path.resolve()


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_fused_blocks_are_for_gelu_by_tanh(tmp_path: Path, activation: str) -> None:
    """Found before captioning, say, and not when the model is built after it."""
    given = ["device=cpu", f"paths.store={tmp_path}/store", "train.block_kernel=fused"]
    check(compose(given))
    with pytest.raises(ModelError, match=rf"GELU by tanh, and this LLM has hidden_activation={activation}"):
        check(compose([*given, f"model.hidden_activation={activation}"]))


def test_rows_without_padding_have_no_attention_dropout(tmp_path: Path) -> None:
    """Found from config.json alone, before anything is loaded."""
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    given = ["device=cpu", f"model.path={tmp_path}", f"paths.store={tmp_path}/store", "train.padding_free=true"]
    with pytest.raises(ConfigError, match=r"has attention_dropout=0\.1.*train.padding_free=false"):
        check(compose(given))
