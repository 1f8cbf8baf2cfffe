"""Model folders of a few thousand random weights: real architectures of transformers, made in milliseconds.

Their weights are wide, so that another image or another word gives another result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "sign",
    "label",
    "that",
    "reads",
    "open",
    "raw",
    "USER:",
    "ASSISTANT:",
    "above",
    "what",
    "is",
    "it",
]
WORDS += [str(number) for number in range(20)]
SIDE, PATCH, WIDTH = 16, 8, 16
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ 'USER:' if m.role == 'user' else 'ASSISTANT:' }} "
    "{% for c in m.content %}{{ '<image> ' if c.type == 'image' else c.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def word_tokenizer(*, is_closed: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, after <s> and, where it is closed, before </s>."""
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    around = "<s> $A </s>" if is_closed else "<s> $A"
    core.post_processor = TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def _save(model: Any, processor: Any, folder: Path, width: float = 0.4) -> Path:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 0 and not (parameter == 1).all():  # the norms stay as they are
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _small(**more: Any) -> dict[str, Any]:
    return {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **more}


def _tokens() -> dict[str, int]:
    return {"vocab_size": len(SPECIAL) + len(WORDS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def clip_folder(folder: Path) -> Path:
    """CLIP."""
    text = _small(**_tokens(), max_position_embeddings=12)
    vision = _small(image_size=SIDE, patch_size=PATCH)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    size = {"shortest_edge": SIDE}
    images = CLIPImageProcessor(size=size, crop_size={"height": SIDE, "width": SIDE})
    return _save(model, CLIPProcessor(images, word_tokenizer()), folder)


def _blip_config() -> BlipConfig:
    tokens = {**_tokens(), "sep_token_id": 2}
    return BlipConfig(
        text_config=_small(**tokens, max_position_embeddings=96, encoder_hidden_size=WIDTH),
        vision_config=_small(image_size=SIDE, patch_size=PATCH),
        projection_dim=8,
        image_text_hidden_size=8,
    )


def _blip_processor() -> BlipProcessor:
    return BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), word_tokenizer())


def blip_matching_folder(folder: Path) -> Path:
    """BLIP with an image-text matching head."""
    return _save(BlipForImageTextRetrieval(_blip_config()), _blip_processor(), folder)


def blip_folder(folder: Path) -> Path:
    """BLIP that writes captions."""
    return _save(BlipForConditionalGeneration(_blip_config()), _blip_processor(), folder)


def llava_folder(folder: Path, *, has_template: bool = True) -> Path:
    """LLaVA: CLIP's vision half and a Llama, asked through a chat template or not."""
    vision = CLIPVisionConfig(**_small(image_size=SIDE, patch_size=PATCH))
    text = LlamaConfig(**_small(**_tokens(), max_position_embeddings=128))
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=SPECIAL.index("<image>"), vision_feature_layer=-1
    )
    config.image_token_id = SPECIAL.index("<image>")
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        images,
        word_tokenizer(is_closed=False),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT if has_template else None,
    )
    return _save(LlavaForConditionalGeneration(config), processor, folder)
