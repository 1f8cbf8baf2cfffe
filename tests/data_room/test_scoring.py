"""Image-text scores: those of the models themselves, whatever they are batched with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BlipForImageTextRetrieval, CLIPModel

from mgm_exp.data.scoring import BlipMatchingScorer, ClipScorer, open_scorer
from mgm_exp.errors import ModelError

from .conftest import picture
from .tiny_models import blip_folder, blip_matching_folder, clip_folder, llava_folder

LONG = "a red sign that reads open above a blue label that reads raw above a green sign"
TEXTS = [["a red sign", "a blue label that reads open"], ["raw 5"], [], [LONG, "a", "a red sign"]]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [picture(20 + 3 * i, 18 + 2 * i, seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blip_matching_folder(tmp_path_factory.mktemp("models") / "tiny-blip-itm")


def test_clip_gives_the_cosine_of_its_embeddings(clip: Path, images: list[Image.Image]) -> None:
    scorer = open_scorer(clip)
    model, processor = CLIPModel.from_pretrained(clip), AutoProcessor.from_pretrained(clip)
    assert isinstance(scorer, ClipScorer) and scorer.name == "tiny-clip" and len(scorer.fingerprint()) == 64
    for image, texts, scores in zip(images, TEXTS, scorer.score(images, TEXTS), strict=True):
        for text, score in zip(texts, scores, strict=True):
            inputs = processor(text=[text], images=image, return_tensors="pt", truncation=True, max_length=12)
            with torch.no_grad():
                logit = model(**inputs).logits_per_image.item()
            assert score == pytest.approx(logit / model.logit_scale.exp().item(), abs=1e-5)
            assert -1 <= score <= 1


def test_blip_gives_the_probability_of_its_matching_head(blip: Path, images: list[Image.Image]) -> None:
    scorer = open_scorer(blip)
    model, processor = BlipForImageTextRetrieval.from_pretrained(blip), AutoProcessor.from_pretrained(blip)
    assert isinstance(scorer, BlipMatchingScorer)
    for image, texts, scores in zip(images, TEXTS, scorer.score(images, TEXTS), strict=True):
        for text, score in zip(texts, scores, strict=True):
            inputs = processor(text=text, images=image, return_tensors="pt", truncation=True, max_length=96)
            with torch.no_grad():
                logits = model(**inputs).itm_score
            assert score == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-5)


@pytest.mark.parametrize("make", ["clip", "blip"])
def test_scores_do_not_depend_on_the_batch(
    make: str, images: list[Image.Image], request: pytest.FixtureRequest
) -> None:
    scorer = open_scorer(request.getfixturevalue(make))
    together = scorer.score(images, TEXTS)
    assert [len(scores) for scores in together] == [2, 1, 0, 3]
    alone = [scorer.score([image], [texts])[0] for image, texts in zip(images, TEXTS, strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert len({round(score, 4) for scores in together for score in scores}) == 6
    assert scorer.score([], []) == [] and scorer.score(images[:1], [[]]) == [[]]


def test_folders_that_cannot_judge_are_refused(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(ModelError, match=r"scorer folder .* has no config\.json"):
        open_scorer(tmp_path)
    with pytest.raises(ModelError, match="'llava'; allowed are 'clip' and 'blip'"):
        open_scorer(llava_folder(tmp_path / "llava"))
    # Of the same model type as a judge, but without its head: scores would be random.
    with pytest.raises(ModelError, match=r"lacks .* tensors of BlipForImageTextRetrieval"):
        open_scorer(blip_folder(tmp_path / "captioner"))


def test_a_score_that_is_no_number_is_an_error(tmp_path: Path, images: list[Image.Image]) -> None:
    folder = clip_folder(tmp_path / "broken")
    model = CLIPModel.from_pretrained(folder)
    torch.nn.init.constant_(model.text_projection.weight, torch.nan)
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match="no number"):
        open_scorer(folder).score(images[:1], [["a"]])
