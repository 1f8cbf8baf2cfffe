"""The tokenizer of a model folder, with the padding token that the official code gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mgm_exp.errors import MissingDependencyError, ModelError
from mgm_exp.model.backbones import Backbone
from mgm_exp.model.folders import read_json

# Llama 3 has neither an unknown nor a padding token; the official code takes this one for both.
_RESERVED = "<|reserved_special_token_0|>"
_BPE = 2  # TrainerSpec.ModelType of SentencePiece


def load_tokenizer(folder: Path, backbone: Backbone) -> Any:
    """A fast tokenizer.

    Of a Llama, SentencePiece's `tokenizer.model` goes before a `tokenizer.json`: the official code reads that one
    (`use_fast=False`), and conversions of it that lie beside it often treat the blank behind `</s>` otherwise.

    Raises:
        ModelError: none is there, it cannot be read, or it lacks a token that the templates need.
        MissingDependencyError: `tokenizer.model` cannot be read without the package protobuf.
    """
    stated = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if backbone.name == "llama" and (folder / "tokenizer.model").is_file():
        tokenizer = _of_sentencepiece(folder, stated)
    elif (folder / "tokenizer.json").is_file():
        tokenizer = _of_json(folder)
    else:
        raise ModelError(
            f"{folder} has no tokenizer.json{' and no tokenizer.model' if backbone.name == 'llama' else ''}.",
            advice="Copy the tokenizer of the LLM (all files that begin with tokenizer) into the model folder.",
        )
    if backbone.pads_with_unknown:
        if tokenizer.unk_token is None and _RESERVED in tokenizer.get_vocab():
            tokenizer.unk_token = _RESERVED
        if tokenizer.unk_token is not None:
            tokenizer.pad_token = tokenizer.unk_token
    missing = [n for n in ("bos_token", "eos_token", "pad_token") if getattr(tokenizer, n) is None]
    if missing:
        raise ModelError(f"The tokenizer in {folder} defines no {', '.join(missing)}; MGM's template needs them.")
    return tokenizer


def _of_json(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust parser raises bare Exception
        raise ModelError(f"The tokenizer in {folder} cannot be read: {error}") from error


def _of_sentencepiece(folder: Path, stated: dict[str, Any]) -> Any:
    """SentencePiece's BPE pieces as a fast tokenizer; needs protobuf to read them, and not SentencePiece itself."""
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import import_protobuf
    from transformers.tokenization_utils_base import generate_merges

    file = folder / "tokenizer.model"
    try:
        content = import_protobuf().ModelProto()
    except ImportError as error:
        raise MissingDependencyError(
            f"{file} cannot be read without the package protobuf.",
            advice="pip install protobuf, or put a tokenizer.json into the folder in its place.",
        ) from error
    try:
        content.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's own error class differs between its implementations
        raise ModelError(f"{file} is damaged or no SentencePiece model: {error}", advice="Copy it again.") from error
    vocabulary = {piece.piece: number for number, piece in enumerate(content.pieces)}
    if not vocabulary or content.trainer_spec.model_type != _BPE:
        raise ModelError(f"{file} is no SentencePiece model of kind BPE, which Llama's and Vicuna's are.")
    # `legacy` decides whether a blank is put behind special tokens. Where nothing says it, the slow tokenizer of the
    # official code's transformers does; the class here would not.
    legacy = stated.get("legacy")
    names = {key: _content(stated[key]) for key in ("bos_token", "eos_token", "unk_token") if stated.get(key)}
    tokenizer = LlamaTokenizer(
        vocab=vocabulary,
        merges=generate_merges(vocabulary),
        legacy=True if legacy is None else bool(legacy),
        add_bos_token=bool(stated.get("add_bos_token", True)),
        add_eos_token=False,
        **names,
    )
    added = {int(number): token for number, token in stated.get("added_tokens_decoder", {}).items()}
    tokenizer.add_tokens([_content(added[n]) for n in sorted(added) if n >= len(vocabulary)], special_tokens=True)
    return tokenizer


def _content(token: str | dict[str, Any]) -> str:
    return str(token["content"]) if isinstance(token, dict) else token
