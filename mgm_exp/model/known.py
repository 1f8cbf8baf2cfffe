"""The published models: sizes, and the official names of what has to be downloaded. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLIP_FOLDER = "clip-vit-large-patch14-336"
CLIP_REPO = "openai/clip-vit-large-patch14-336"
CONVNEXT_FOLDER = "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup"
CONVNEXT_REPO = "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"


@dataclass(frozen=True)
class KnownModel:
    """A model of the MGM family.

    Attributes:
        title: as its authors call it.
        backbone: a name of `mgm_exp.model.backbones.BACKBONES`.
        llm: what its language model is called.
        repo, llm_repo: on the Hugging Face Hub: the trained model, and the language model that it began from.
        fields: of its `config.json`: the language model's sizes, and what differs from 336/768 pixels.
    """

    title: str
    backbone: str
    llm: str
    repo: str
    llm_repo: str
    fields: Mapping[str, Any]

    def how_to_get(self) -> str:
        """What to download, and where to put it."""
        return (
            f"Download {self.repo} from the Hugging Face Hub (all files) into DIR/{self.repo.split('/')[1]}; beside it "
            f"{CLIP_REPO} as DIR/{CLIP_FOLDER} and {CONVNEXT_REPO} as DIR/{CONVNEXT_FOLDER}; give "
            f"model.path=DIR/{self.repo.split('/')[1]}. To begin from the language model alone, download "
            f"{self.llm_repo} and give its folder, with model.vision_tower=DIR/{CLIP_FOLDER} and "
            f"model.vision_tower_aux=DIR/{CONVNEXT_FOLDER}."
        )


_GEMMA_2B = {
    "vocab_size": 256000,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
_VICUNA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_VICUNA_13B = _VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_LLAMA_3_8B = _VICUNA_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}
# The official switches of the HD models: 2 x 2 crops and the whole image, 672/1536 pixels, sequences of 4096.
_HD = {"image_grid": 2, "image_global": True, "image_size_aux": 1536, "tokenizer_model_max_length": 4096}
_GEMMA, _VICUNA = "google/gemma-2b-it", "lmsys/vicuna-{}b-v1.5"
_LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"

KNOWN = {
    "mgm_2b": KnownModel("MGM-2B", "gemma", "Gemma-2B", "YanweiLi/MGM-2B", _GEMMA, _GEMMA_2B),
    # No weights of it are published: it goes on from MGM-2B, as the official HD script does from the stage-1 connector.
    "mgm_2b_hd": KnownModel("MGM-2B-HD", "gemma", "Gemma-2B", "YanweiLi/MGM-2B", _GEMMA, _GEMMA_2B | _HD),
    "mgm_7b": KnownModel("MGM-7B", "llama", "Vicuna-7B-v1.5", "YanweiLi/MGM-7B", _VICUNA.format(7), _VICUNA_7B),
    "mgm_8b": KnownModel("MGM-8B", "llama", "Llama-3-8B-Instruct", "YanweiLi/MGM-8B", _LLAMA, _LLAMA_3_8B),
    "mgm_13b": KnownModel("MGM-13B", "llama", "Vicuna-13B-v1.5", "YanweiLi/MGM-13B", _VICUNA.format(13), _VICUNA_13B),
}
