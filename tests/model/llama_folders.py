"""Small folders of an MGM on Vicuna or Llama 3, laid out as the official ones; random weights, tokenizers made here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from model_files import GOLDEN
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from mgm_exp.model import MGMLlamaConfig, meta_model
from mgm_exp.model.templates import TEMPLATES

CLIP = "openai-clip-vit-tiny-patch14-56"
LLAMA_3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def write_vicuna_tokenizer(folder: Path, legacy: bool | None = False) -> None:
    """SentencePiece's `tokenizer.model` alone. "USER" is one piece, but with a blank before it two, as in Vicuna's."""
    from transformers.convert_slow_tokenizer import import_protobuf

    content = import_protobuf().ModelProto()
    content.trainer_spec.model_type = 2
    characters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    words = ["US", "ER", "▁US", "USER", "▁A", "SS", "IS", "in", "the", "▁t", "▁the", "▁a", "an", "er", "or", "re", "as"]
    words += ["he", "th", "▁q", "us"]
    for kind, pieces in (
        (2, ["<unk>"]),
        (3, ["<s>", "</s>"]),
        (6, [f"<0x{byte:02X}>" for byte in range(256)]),
        (1, [*words, *characters]),
    ):
        for piece in pieces:
            content.pieces.add(piece=piece, score=-float(len(content.pieces)), type=kind)
    (folder / "tokenizer.model").write_bytes(content.SerializeToString())
    bos = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False}
    stated: dict[str, Any] = {"bos_token": bos, "eos_token": "</s>", "unk_token": "<unk>"}
    stated |= {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer", "pad_token": None}
    if legacy is not None:
        stated["legacy"] = legacy
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))


def write_llama_3_tokenizer(folder: Path) -> None:
    """A byte-level `tokenizer.json` that puts <|begin_of_text|> first and has no padding token."""
    tokenizer = Tokenizer(models.BPE())
    # As Llama 3's own: line breaks are a piece of their own, whatever follows
    pieces = pre_tokenizers.Split(
        Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|[^\s]|\s+(?!\S)|\s+"), "isolated"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=list(LLAMA_3_SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator([TEMPLATES["llama_3"].opening, "what is on the sign? \n\n"] * 2, trainer)
    bos = LLAMA_3_SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    numbers = {str(tokenizer.token_to_id(t)): {"content": t, "special": True} for t in LLAMA_3_SPECIAL}
    stated = {"bos_token": bos, "eos_token": "<|end_of_text|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | {"added_tokens_decoder": numbers}))


def llama_config(vocabulary: int, **changes: Any) -> dict[str, Any]:
    """`config.json` as the official training writes it: the towers by name alone."""
    golden = json.loads((GOLDEN / "model" / "config.json").read_text())
    fields = {k: v for k, v in golden.items() if k.startswith(("image_", "mm_", "optimize_", "tokenizer_", "tune_"))}
    return (
        fields
        | {
            "architectures": ["MGMLlamaForCausalLM"],
            "model_type": "mgm",
            "vocab_size": vocabulary,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "pretraining_tp": 1,
            "torch_dtype": "float32",
            "use_cache": True,
        }
        | changes
    )


def write_llama_mgm(root: Path, kind: str = "vicuna", *, pickled: bool = False, **changes: Any) -> Path:
    """A folder `root/MGM-tiny` with its CLIP beside it; the ConvNeXt lies inside, LLM and connector are random.

    Args:
        kind: "vicuna" or "llama_3".
        pickled: `.bin` shards, as Vicuna's own; else sharded safetensors.
        changes: of `config.json`.
    """
    folder = root / "MGM-tiny"
    folder.mkdir(parents=True)
    shutil.copytree(GOLDEN / "towers" / CLIP, root / CLIP)
    if kind == "vicuna":
        write_vicuna_tokenizer(folder)
        vocabulary = 300 + 96
    else:
        write_llama_3_tokenizer(folder)
        vocabulary = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) + 10
        changes = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None} | changes
    fields = llama_config(vocabulary, **changes)
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = random_tensors(fields)
    for shard in sorted((GOLDEN / "model").glob("*.safetensors")):
        inside = load_file(str(shard))
        tensors |= {n: t for n, t in inside.items() if n.startswith("model.vision_tower_aux.")}
    write_shards(folder, tensors, pickled=pickled)
    return folder


def random_tensors(fields: dict[str, Any]) -> dict[str, Tensor]:
    """LLM and connector by official name, each with values that matter (norms near 1)."""
    golden = json.loads((GOLDEN / "towers" / CLIP / "config.json").read_text())
    clip = golden.get("vision_config", golden)
    aux = {"dims": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}
    config = MGMLlamaConfig(**{k: v for k, v in fields.items() if k not in ("model_type", "architectures")})
    config.vision_config, config.vision_aux_config = clip, aux
    generator = torch.Generator().manual_seed(11)
    out = {}
    for name, parameter in meta_model(config).named_parameters():
        if "vision_tower" in name:
            continue
        spread = torch.randn(tuple(parameter.shape), generator=generator)
        out[name] = 1 + 0.2 * spread if "norm" in name else spread * (0.5 if parameter.dim() < 2 else 0.25)
    return out


def write_shards(folder: Path, tensors: dict[str, Tensor], *, pickled: bool) -> None:
    llm = {n for n in tensors if n.startswith(("model.layers.", "model.embed", "model.norm", "lm_head."))}
    end, index = ("bin", "pytorch_model.bin.index.json") if pickled else ("safetensors", "model.safetensors.index.json")
    weight_map = {}
    for number, names in enumerate((sorted(llm), sorted(set(tensors) - llm)), 1):
        file = f"{'pytorch_model' if pickled else 'model'}-{number:05d}-of-00002.{end}"
        part = {name: tensors[name] for name in names}
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
