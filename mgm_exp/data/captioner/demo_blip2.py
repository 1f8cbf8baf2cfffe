"""demo-blip2: a small model with BLIP-2's architecture, shipped compact and written out as an ordinary BLIP-2 folder.

The shipped file holds a word table of 256 rows. BLIP-2 folders of the OPT kind have 50,272 rows, `<image>` at 50265,
and Data-Juicer relies on that number; so `write_folder` spreads the used rows over a full table and writes the
processor files beside. It is not Salesforce's BLIP-2: it was trained by this project on generated scenes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.data.demo.scenes import BRANDS, CHARACTERS, COLOURS, KINDS, SHAPES, SIGN_WORDS
from mgm_exp.data.demo.words import BLANK, word_tokenizer

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import Blip2Config, Blip2ForConditionalGeneration

DEMO_CAPTIONER = Path(__file__).parent / "demo_blip2"
"""The shipped folder: compact weights and config, recipe, model card."""
WEIGHTS = DEMO_CAPTIONER / "model.safetensors"

SIZE = 128
N_QUERIES = 20
COMPACT_ROWS, COMPACT_IMAGE = 256, 255
FULL_ROWS, FULL_IMAGE = 50272, 50265

BOS, PAD, EOS, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"
_CAPTION_WORDS = (
    "a",
    "an",
    "the",
    "above",
    "below",
    "and",
    "that",
    "reads",
    "with",
    "word",
    "of",
    "brand",
    "name",
    "number",
    "price",
)
_TABLES = ("language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight")


def pieces() -> list[str]:
    """The vocabulary in the order of its ids (OPT's special ids 0 to 3 first); fewer than `COMPACT_IMAGE`."""
    words = sorted({*_CAPTION_WORDS, *COLOURS, *KINDS, *SHAPES})
    made = [BOS, PAD, EOS, UNKNOWN, BLANK, *CHARACTERS, ",", ";"]
    made += [*SIGN_WORDS, *BRANDS]
    for word in words:
        made += [word, BLANK + word]
    return list(dict.fromkeys(made))


@cache
def caption_tokenizer() -> Tokenizer:
    """Tokenizer of the used rows: words whole, other texts by characters; `</s>` stands first, as in OPT."""
    return word_tokenizer(pieces(), (BOS, PAD, EOS, UNKNOWN), first=EOS, unknown=UNKNOWN)


def blip2_config(rows: int, image_token: int) -> Blip2Config:
    """The architecture. `word_embed_proj_dim` equals `hidden_size`: otherwise transformers would scatter the
    queries into the wrong images without an error."""
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

    vision = Blip2VisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE,
        patch_size=8, initializer_range=0.02,
    )  # fmt: skip
    qformer = Blip2QFormerConfig(
        vocab_size=8, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, cross_attention_frequency=1,
        encoder_hidden_size=128, max_position_embeddings=32,
    )  # fmt: skip
    text = OPTConfig(
        vocab_size=rows, hidden_size=96, word_embed_proj_dim=96, ffn_dim=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
        bos_token_id=2, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=N_QUERIES,
        image_token_index=image_token,
    )  # fmt: skip


def new_model() -> Blip2ForConditionalGeneration:
    """A fresh model with the compact table, initialised so that it can learn.

    transformers starts the queries at zero (all equal) and positions as faint noise; here queries are normal(0, 1)
    and positions half a 2-D sin-cos code. Both stay plain parameters of the standard model.
    """
    import torch
    from transformers import Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration(blip2_config(COMPACT_ROWS, COMPACT_IMAGE))
    with torch.no_grad():
        model.query_tokens.normal_(0.0, 1.0)
        positions = model.vision_model.embeddings.position_embedding
        positions.zero_()
        positions[0, 1:] = 0.5 * _sin_cos(SIZE // 8, positions.shape[-1])
    return model


def _sin_cos(side: int, width: int) -> torch.Tensor:
    """2-D sin-cos position code (side * side, width): half the channels for rows, half for columns."""
    import torch

    frequencies = 10_000.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies[None]  # (side, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


def spread_table(compact: torch.Tensor) -> torch.Tensor:
    """The full word table from the compact one.

    Rows that no word uses get the mean of the compact table's unused rows: those have learnt to be improbable, while
    a row of zeros has logit 0 and can win.
    """
    import torch

    used = len(pieces())
    full = torch.empty((FULL_ROWS, compact.shape[1]), dtype=compact.dtype)
    full[:] = compact[used:COMPACT_IMAGE].float().mean(0).to(compact.dtype)
    full[:used] = compact[:used]
    full[FULL_IMAGE] = compact[COMPACT_IMAGE]
    return full


def weights_sha256() -> str:
    """SHA-256 of the shipped compact weights."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def demo_folder(cache_root: Path) -> Path:
    """The shipped model as an ordinary BLIP-2 folder below `cache_root`, written on first use (about 22 MB)."""
    folder = Path(cache_root) / f"demo-blip2-{weights_sha256()[:16]}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
        try:
            write_folder(partial)
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # another process was faster only if the folder stands now
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_folder(folder: Path, *, weights: Path = WEIGHTS, sharpness: float = 1.0) -> None:
    """Write a complete BLIP-2 folder (config, bf16 weights, tokenizer, image processor, model card).

    Args:
        folder: created.
        weights: compact weights.
        sharpness: factor on OPT's last layer norm, which divides the sampling temperature. Programs that always
            sample (Data-Juicer's `image_captioning_mapper`) give nearly greedy captions at 8; 1 is the model itself.
    """
    from safetensors.torch import load_file, save_file
    from transformers import Blip2Processor, BlipImageProcessor, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    tensors = load_file(weights)
    table = spread_table(tensors[_TABLES[0]])
    tensors[_TABLES[0]] = table
    for name in ("weight", "bias"):
        tensors[f"language_model.model.decoder.final_layer_norm.{name}"] *= sharpness
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, FULL_ROWS, FULL_IMAGE)
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}) + "\n", encoding="utf-8"
    )
    used = pieces()
    filled = [*used, *(f"<unused{i}>" for i in range(len(used), FULL_IMAGE)), "<image>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(filled, (BOS, PAD, EOS, UNKNOWN, "<image>"), first=EOS, unknown=UNKNOWN),
        bos_token=EOS, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN, clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    image_processor = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    Blip2Processor(image_processor, tokenizer, num_query_tokens=N_QUERIES).save_pretrained(folder)
    card = weights.with_name("README.md")
    if card.exists():
        shutil.copyfile(card, folder / "README.md")


def write_config(folder: Path, rows: int, image_token: int) -> None:
    """Write the `config.json` of a folder with `rows` rows in its word table."""
    config = blip2_config(rows, image_token).to_dict()
    config["architectures"] = ["Blip2ForConditionalGeneration"]
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")


def compact_state(model: Any) -> dict[str, Any]:
    """The tensors of the shipped file: bf16, the tied head left out."""
    import torch

    return {
        name: tensor.detach().to(torch.bfloat16).contiguous().clone()
        for name, tensor in model.state_dict().items()
        if name != _TABLES[1]
    }
