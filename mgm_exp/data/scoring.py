"""How well a text fits an image, by a local model: the judge of `keep_if_better`.

    scorer = open_scorer(Path("/models/clip-vit-base-patch32"))
    scorer.score([image], [["a red sign", "a cat"]])        # [[0.29, 0.17]]

CLIP (Radford et al., 2021, arXiv 2103.00020): the cosine of the two embeddings, -1..1. BLIP (Li et al., 2022, arXiv
2201.12086): its image-text matching head's probability of a match, 0..1. An image is encoded once for all its texts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.data.captioner import folders
from mgm_exp.errors import ModelError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

CLIP, BLIP = "clip", "blip"


def open_scorer(path: Path, device: str = "cpu", *, precision: str = "auto") -> ImageTextScorer:
    """The scorer of a folder.

    Args:
        path: A CLIP folder, or a BLIP folder with an image-text matching head, as `save_pretrained` writes it.
        device: "cpu", "cuda", ...
        precision: auto (bf16 on a GPU, fp32 on the CPU), fp32, bf16 or fp16.

    Raises:
        ModelError: the folder is missing, holds another kind of model, or cannot be loaded.
    """
    folder = Path(path)
    kind = folders.model_type(folder, "scorer")
    kinds: dict[str, type[ClipScorer] | type[BlipMatchingScorer]] = {CLIP: ClipScorer, BLIP: BlipMatchingScorer}
    if kind not in kinds:
        raise ModelError(
            f"The scorer folder {folder} holds a model of type {kind!r}; allowed are {CLIP!r} and {BLIP!r} (with an "
            "image-text matching head).",
            advice="Give a local copy of a CLIP model or of BLIP-ITM (such as blip-itm-base-coco).",
        )
    folders.check_weights(folder, "scorer")
    return kinds[kind](folder, device, precision)


class ImageTextScorer(ABC):
    """Base of the scorers.

    Attributes:
        name: For provenance records.
    """

    def __init__(self, folder: Path, device: str, precision: str, model_class: Any) -> None:
        self.folder, self.name = folder, folder.name
        self._device, self._dtype = device, folders.compute_type(device, precision)
        self._model, self._processor = folders.load(model_class, folder, "scorer", device=device, precision=precision)
        limit = self._model.config.text_config.max_position_embeddings
        self._tokens = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}

    def fingerprint(self) -> str:
        """SHA-256 over the folder's config and safetensors files."""
        return folders.fingerprint(self.folder)

    def score(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """A score for each text of each image; more is better.

        Args:
            images: Any size and mode.
            texts: For each image, its texts; those longer than the model reads are cut.

        Raises:
            ModelError: a score is not a finite number.
        """
        import torch

        flat = [text for of_image in texts for text in of_image]
        if not flat:
            return [[] for _ in texts]
        owner = torch.tensor([k for k, of_image in enumerate(texts) for _ in of_image])
        pixels = self._processor.image_processor(images=[i.convert("RGB") for i in images], return_tensors="pt")
        tokens = self._processor.tokenizer(flat, **self._tokens).to(self._device)
        with torch.inference_mode():
            values = self._scores(
                pixels["pixel_values"].to(self._device, self._dtype), dict(tokens), owner.to(self._device)
            )
        scores = iter(values.float().cpu().tolist())
        result = [[next(scores) for _ in of_image] for of_image in texts]
        if not all(math.isfinite(score) for of_image in result for score in of_image):
            raise ModelError(f"The scorer {self.folder} gave a score that is no number.", advice="Check its weights.")
        return result

    @abstractmethod
    def _scores(self, pixels: Tensor, tokens: dict[str, Tensor], owner: Tensor) -> Tensor:
        """(texts,) scores of texts; `owner` (texts,) says which row of `pixels` each belongs to."""


class ClipScorer(ImageTextScorer):
    """Cosine of CLIP's image and text embeddings."""

    def __init__(self, folder: Path, device: str = "cpu", precision: str = "auto") -> None:
        from transformers import CLIPModel

        super().__init__(folder, device, precision, CLIPModel)

    def _scores(self, pixels: Tensor, tokens: dict[str, Tensor], owner: Tensor) -> Tensor:
        from torch.nn.functional import cosine_similarity

        model = self._model
        seen = model.get_image_features(pixel_values=pixels).pooler_output
        read = model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return cosine_similarity(seen.float()[owner], read.float(), dim=-1)


class BlipMatchingScorer(ImageTextScorer):
    """Probability that BLIP's matching head gives to a text being of the image."""

    def __init__(self, folder: Path, device: str = "cpu", precision: str = "auto") -> None:
        from transformers import BlipForImageTextRetrieval

        super().__init__(folder, device, precision, BlipForImageTextRetrieval)

    def _scores(self, pixels: Tensor, tokens: dict[str, Tensor], owner: Tensor) -> Tensor:
        import torch

        model = self._model
        seen = model.vision_model(pixel_values=pixels).last_hidden_state[owner]  # (texts, patches, width)
        read = model.text_encoder(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return model.itm_head(read[:, 0]).float().softmax(-1)[:, 1]
