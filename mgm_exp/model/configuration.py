"""`MGMConfig`: the fields of an official MGM (Mini-Gemini) folder's `config.json`, typed, on top of the LLM's own.

The two towers are described by `vision_config` (CLIP) and `vision_aux_config` (ConvNeXt). Official folders do not
have them (they name tower folders instead); our own `save_pretrained` writes them, so that a folder stands alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import GemmaConfig, LlamaConfig, PreTrainedConfig

from mgm_exp.model.backbones import BACKBONES, Backbone
from mgm_exp.model.known import KNOWN

# The fields below go on top of either; to a type checker they stand on what both have.
_Base: Any = PreTrainedConfig if TYPE_CHECKING else object

IMAGE_TOKEN_INDEX = -200  # stands once for each image in `input_ids`
IGNORE_INDEX = -100  # a label that is not learnt
IMAGE_TOKEN = "<image>"

CLIP_VIT_L_14_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CONVNEXT_LARGE: dict[str, Any] = {"dims": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "layer_scale_init": 1e-6}


@dataclass(kw_only=True, repr=False)
class MGMConfig(_Base):
    """Configuration of `MGMForConditionalGeneration`, whatever its LLM; `MGMGemmaConfig`, `MGMLlamaConfig` are whole.

    Defaults are those of the official models at 336/768 pixels.

    Args:
        hidden_activation: activation of the LLM's MLP; a value wins over `hidden_act`. "gelu" is the exact erf form
            in both fields (transformers' own Gemma rewrites it to the tanh form; this class does not).
        mm_vision_tower, mm_vision_tower_aux: folder names of the CLIP and the ConvNeXt tower.
        mm_vision_select_layer: which hidden state of CLIP is used; -2 leaves out the last layer.
        image_size_aux: side of the high-resolution image in pixels (1536 in HD mode).
        image_grid, image_global: HD mode: g x g crops (and one global view) instead of one image. Read at call time.
        tokenizer_model_max_length: the merged sequence (text and visual tokens) is cut to this length; None: never.
        tokenizer_padding_side: side on which merged rows are filled with zero embeddings. Read at call time.
        vision_config: arguments of `transformers.CLIPVisionConfig`.
        vision_aux_config: `{"dims": [4 ints], "depths": [4 ints], "layer_scale_init": float}`.

    Source: github.com/dvlab-research/MGM, mgm/model/mgm_arch.py and mgm/train/train.py (Apache-2.0).
    """

    hidden_activation: str | None = None
    image_aspect_ratio: str | None = "pad"
    image_global: bool = False
    image_grid: int = 1
    image_grid_pinpoints: Any = None
    image_size_aux: int = 768
    mm_hidden_size: int = 1024
    mm_hidden_size_aux: int = 2880
    mm_projector_type: str = "mlp2x_gelu"
    mm_projector_lr: float | None = None
    mm_use_im_patch_token: bool = False
    mm_use_im_start_end: bool = False
    mm_vision_select_feature: str = "patch"
    mm_vision_select_layer: int = -2
    mm_vision_tower: str | None = "clip-vit-large-patch14-336"
    mm_vision_tower_aux: str | None = "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup"
    optimize_vision_tower: bool = False
    optimize_vision_tower_aux: bool = False
    tune_mm_mlp_adapter: bool = False
    freeze_mm_mlp_adapter: bool = False
    use_mm_proj: bool = True
    tokenizer_model_max_length: int | None = 2048
    tokenizer_padding_side: str = "right"
    vision_config: dict[str, Any] | None = None
    vision_aux_config: dict[str, Any] | None = None

    @property
    def backbone(self) -> Backbone:
        """The kind of its language model.

        Raises:
            TypeError: this class alone, which has none.
        """
        raise TypeError("MGMConfig is what the families share: take MGMGemmaConfig or MGMLlamaConfig.")

    @property
    def activation(self) -> str:
        """The activation that the LLM's MLP uses, by transformers' names ("gelu" is the erf form)."""
        return self.hidden_activation or self.hidden_act

    @property
    def embed_scale(self) -> float:
        """Factor on all input embeddings, text and image: Gemma's is sqrt(hidden_size)."""
        return 1.0

    @property
    def visual_tokens_per_image(self) -> int:
        """Number of embeddings that replace one `IMAGE_TOKEN_INDEX` (needs `vision_config`)."""
        if self.vision_config is None:
            raise ValueError("visual_tokens_per_image needs vision_config (the CLIP tower's image and patch size).")
        side = self.vision_config["image_size"] // self.vision_config["patch_size"]
        views = self.image_grid**2 + int(self.image_global) if self.image_grid > 1 else 1
        return side * side * views


@strict
class MGMGemmaConfig(MGMConfig, GemmaConfig):
    """MGM on Gemma; `model_type` as in the official code."""

    model_type = "mgm_gemma"

    def __post_init__(self, **kwargs: Any) -> None:
        # Gemma's own class rewrites "gelu" to the tanh form (and warns); here the folder's word stands
        given: str = self.hidden_act
        self.hidden_act: str = "gelu_pytorch_tanh"
        super().__post_init__(**kwargs)
        self.hidden_act = given

    @property
    def backbone(self) -> Backbone:
        return BACKBONES["gemma"]

    @property
    def embed_scale(self) -> float:
        return math.sqrt(self.hidden_size)


@strict
class MGMLlamaConfig(MGMConfig, LlamaConfig):
    """MGM on Vicuna or Llama 3; `model_type` as in the official code."""

    model_type = "mgm"

    @property
    def backbone(self) -> Backbone:
        return BACKBONES["llama"]


CONFIGS: dict[str, type[MGMGemmaConfig] | type[MGMLlamaConfig]] = {"gemma": MGMGemmaConfig, "llama": MGMLlamaConfig}


def known_config(name: str) -> MGMConfig:
    """A published model's configuration, with CLIP ViT-L/14-336 and OpenCLIP ConvNeXt-L.

    Args:
        name: of `mgm_exp.model.known.KNOWN`.
    """
    known = KNOWN[name]
    towers: dict[str, Any] = {"vision_config": dict(CLIP_VIT_L_14_336), "vision_aux_config": dict(CONVNEXT_LARGE)}
    return CONFIGS[known.backbone](**known.fields, **towers)


def mgm_2b_config() -> MGMConfig:
    """MGM-2B (Gemma-2B, CLIP ViT-L/14-336, OpenCLIP ConvNeXt-L) with the tanh GELU it was most likely trained with."""
    return known_config("mgm_2b")
