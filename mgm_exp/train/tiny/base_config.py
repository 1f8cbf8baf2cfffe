"""The shape of the tiny base: 1.9 M parameters, every part of MGM in small."""

from __future__ import annotations

from typing import Any

from mgm_exp.model.configuration import MGMConfig, MGMGemmaConfig

TINY_CLIP = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
    "projection_dim": 64,
    "hidden_act": "quick_gelu",
}
TINY_CONVNEXT = {"dims": [32, 64, 96, 128], "depths": [2, 2, 2, 1], "layer_scale_init": 0.5}
WIDTH, WIDTH_AUX = 96, 320
LOW_SIDE = 64


def small_config(**sizes: Any) -> MGMGemmaConfig:
    """Configuration of a small MGM for the tokenizer made here: four layers, prompts and answers of 512 tokens.

    Args:
        sizes: Everything else of `MGMGemmaConfig`.
    """
    return MGMGemmaConfig(
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        image_aspect_ratio="pad",
        tokenizer_model_max_length=512,
        **sizes,
    )


def tiny_config(vocab_size: int) -> MGMConfig:
    """Configuration of the tiny base for a vocabulary of `vocab_size` tokens."""
    return small_config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        head_dim=32,
        initializer_range=0.04,
        image_size_aux=128,
        mm_hidden_size=WIDTH,
        mm_hidden_size_aux=WIDTH_AUX,
        mm_vision_tower="tiny-clip-patch8-64",
        mm_vision_tower_aux="tiny-convnext-128",
        vision_config=dict(TINY_CLIP),
        vision_aux_config=dict(TINY_CONVNEXT),
    )
