"""Captioners that are model folders: what they are asked, what they write, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mgm_exp.config import CaptionEngine, CaptionerConfig, CaptionPrecision
from mgm_exp.data.captioner import Blip2Captioner, CaptionSettings, ImageTextCaptioner, open_captioner
from mgm_exp.data.captioner.demo_blip2 import write_folder
from mgm_exp.data.captioner.mapper import MapperCaptioner
from mgm_exp.errors import MissingDependencyError, ModelError

from .conftest import picture
from .tiny_models import blip_folder, clip_folder, llava_folder

SEEDS = [5, 6, 7, 8, 9, 10]
SHORT = CaptionSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [picture(20 + 3 * i, 18 + 2 * i, seed=i) for i in range(6)]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blip_folder(tmp_path_factory.mktemp("models") / "tiny-blip")


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's weights as a folder that somebody gives."""
    folder = tmp_path_factory.mktemp("models") / "given"
    write_folder(folder)
    return folder


def varied(texts: list[str]) -> bool:
    return len(set(texts)) > len(texts) // 2


def test_a_chat_model_is_asked_through_its_template(llava: Path, images: list[Image.Image]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    settings = CaptionSettings(prompt="what is it", max_new_tokens=12)
    captioner = ImageTextCaptioner(llava, settings=settings)
    captions = captioner.caption(images)

    processor = AutoProcessor.from_pretrained(llava)
    model = AutoModelForImageTextToText.from_pretrained(llava)
    expected = []
    for image in images:
        content = [{"type": "image", "image": image}, {"type": "text", "text": "what is it"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(" ".join(processor.decode(ids, skip_special_tokens=True).split()))
    assert captions == expected and varied(captions)
    assert captioner.name == "tiny-llava" and captioner.can_answer


def test_a_question_is_answered_for_its_own_image(llava: Path, images: list[Image.Image]) -> None:
    captioner = ImageTextCaptioner(llava, settings=SHORT)
    questions = ["what is it", "a red sign"] * 3
    answers = captioner.answer(images, questions)
    alone = [captioner.answer([image], [question])[0] for image, question in zip(images, questions, strict=True)]
    assert answers == alone and varied(answers)
    assert captioner.answer(images, ["what is it"] * 6) != captioner.answer(images, ["a red sign"] * 6)


def test_without_a_template_the_prompt_follows_the_image(tmp_path: Path, images: list[Image.Image]) -> None:
    folder = llava_folder(tmp_path / "plain", has_template=False)
    plain = ImageTextCaptioner(folder, settings=CaptionSettings(prompt="what is it", max_new_tokens=8))
    full = ImageTextCaptioner(folder, settings=CaptionSettings(prompt="<image>\nwhat is it", max_new_tokens=8))
    other = ImageTextCaptioner(folder, settings=CaptionSettings(prompt="USER: <image> ASSISTANT:", max_new_tokens=8))
    assert plain.caption(images) == full.caption(images) != other.caption(images)


def test_a_model_that_only_describes_continues_its_prompt_and_does_not_answer(
    blip: Path, images: list[Image.Image]
) -> None:
    captioner = ImageTextCaptioner(blip, settings=SHORT)
    assert not captioner.can_answer
    prompted = ImageTextCaptioner(blip, settings=CaptionSettings(prompt="a red sign", max_new_tokens=12))
    captions = prompted.caption(images)
    assert captions != captioner.caption(images)
    assert not any(caption.startswith("a red sign") for caption in captions)


@pytest.mark.parametrize("make", ["llava", "blip", "blip2"])
def test_sampled_captions_depend_on_image_and_seed_alone(
    make: str, images: list[Image.Image], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(make)
    settings = CaptionSettings(prompt="what is it" if make == "llava" else None, max_new_tokens=12, temperature=2.0)
    captioner: Any = (Blip2Captioner if make == "blip2" else ImageTextCaptioner)(folder, settings=settings)
    together = captioner.caption(images, seeds=SEEDS)
    assert captioner.caption(images, seeds=SEEDS) == together and varied(together)
    assert captioner.caption(images[::-1], seeds=SEEDS[::-1]) == together[::-1]
    assert captioner.caption(images, 2, seeds=SEEDS) == together
    assert captioner.caption(images[3:4], seeds=SEEDS[3:4]) == together[3:4]
    assert captioner.caption(images, seeds=[seed + 100 for seed in SEEDS]) != together
    assert captioner.caption(images) != together


def test_blip2_writes_what_transformers_writes_with_and_without_a_prompt(
    blip2: Path, images: list[Image.Image]
) -> None:
    from transformers import AddedToken, AutoProcessor, Blip2ForConditionalGeneration

    processor = AutoProcessor.from_pretrained(blip2)
    processor.image_token = AddedToken("<image>")  # transformers 5.23 takes a text from the tokenizer and fails on it
    model = Blip2ForConditionalGeneration.from_pretrained(blip2, dtype=torch.float32)

    def reference(text: str | None) -> list[str]:
        given = None if text is None else [text] * len(images)
        inputs = processor(images=images, text=given, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, num_beams=1)
        ids = ids[:, inputs["input_ids"].shape[1] :] if text is not None else ids
        return [" ".join(text.split()) for text in processor.batch_decode(ids, skip_special_tokens=True)]

    assert Blip2Captioner(blip2, settings=SHORT).caption(images) == reference(None)
    prompted = Blip2Captioner(blip2, settings=CaptionSettings(prompt="a red sign", max_new_tokens=12))
    assert prompted.caption(images) == reference("a red sign") != reference(None)
    assert prompted.answer(images, ["sign"] * 6) == reference("Question: sign Answer:")


def test_images_are_encoded_once_for_captions_and_questions(
    blip2: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = Blip2Captioner(blip2, settings=SHORT)
    calls: list[int] = []
    encode: Callable[..., Any] = captioner._model.get_image_features
    monkeypatch.setattr(
        captioner._model, "get_image_features", lambda pixels: calls.append(len(pixels)) or encode(pixels)
    )
    captioner.caption(images)
    captioner.caption(images, seeds=SEEDS)
    captioner.answer(images, ["sign"] * 6)
    assert calls == [6]
    captioner.caption(images[:2])
    assert calls == [6, 2]


def test_the_folder_decides_which_captioner_opens(llava: Path, blip: Path, blip2: Path, tmp_path: Path) -> None:
    kinds = {
        type(open_captioner(CaptionerConfig(path=str(path)), device="cpu", cache=tmp_path)): path
        for path in (llava, blip2)
    }
    assert set(kinds) == {ImageTextCaptioner, Blip2Captioner}
    mapper = open_captioner(
        CaptionerConfig(path=str(blip2), engine=CaptionEngine.data_juicer), device="cpu", cache=tmp_path
    )
    assert isinstance(mapper, MapperCaptioner) and not mapper.can_answer
    demo = open_captioner(CaptionerConfig(), device="cpu", cache=tmp_path)
    assert demo.name == "demo-blip2 (synthetic)" and not demo.can_answer
    assert (tmp_path / "captioners").is_dir()


def test_the_section_reaches_the_captioner(llava: Path, tmp_path: Path) -> None:
    section = CaptionerConfig(
        path=str(llava), prompt="a", max_new_tokens=3, batch_size=2, precision=CaptionPrecision.bf16, temperature=0.5,
        top_p=0.4,
    )  # fmt: skip
    captioner: Any = open_captioner(section, device="cpu", cache=tmp_path)
    assert captioner.settings == CaptionSettings("a", 3, 2, "bf16", 0.5, 0.4)
    assert next(captioner._model.parameters()).dtype == torch.bfloat16
    assert all(len(text.split()) <= 3 for text in captioner.caption([picture(seed=i) for i in range(5)]))


def damaged(folder: Path, to: Path, **config: Any) -> Path:
    shutil.copytree(folder, to)
    values = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**values, **config}))
    return to


def test_folders_that_cannot_describe_are_refused(tmp_path: Path, llava: Path, blip: Path) -> None:
    def opened(path: Path, **more: Any) -> Any:
        return open_captioner(CaptionerConfig(path=str(path), **more), device="cpu", cache=tmp_path)

    with pytest.raises(ModelError, match=r"no config\.json"):
        opened(tmp_path / "nothing")
    with pytest.raises(ModelError, match="'clip'"):
        opened(clip_folder(tmp_path / "clip"))
    with pytest.raises(ModelError, match="random weights"):
        opened(damaged(llava, tmp_path / "wrong", model_type="blip"))
    (damaged(blip, tmp_path / "cut") / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        opened(tmp_path / "cut")
    (damaged(blip, tmp_path / "pickled") / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        opened(tmp_path / "pickled")
    (damaged(blip, tmp_path / "blind") / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="does not say what model"):
        opened(tmp_path / "blind")
    with pytest.raises(MissingDependencyError, match="int8 needs a GPU"):
        opened(blip, precision=CaptionPrecision.int8)


def test_code_that_a_folder_brings_is_not_run(tmp_path: Path, llava: Path) -> None:
    folder = damaged(llava, tmp_path / "code", auto_map={"AutoModelForImageTextToText": "evil.Evil"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    open_captioner(CaptionerConfig(path=str(folder)), device="cpu", cache=tmp_path)
    assert not (tmp_path / "ran").exists()
