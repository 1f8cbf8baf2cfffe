"""The tiny base's tokenizer: a real `tokenizer.json` of Gemma's structure with a small, fixed vocabulary.

Known words are single tokens, as a BPE trained on the corpus would make them; everything else (prices, numbers,
unknown words) is spelt by characters, and what is not printable ASCII by bytes, so that decoding gives back any text.
A blank is "▁": it is part of a lower-case word, and a token of its own before capitals, digits and signs, so that
"OPEN" is one token wherever it stands.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from mgm_exp.data.demo.captions import NOISE_CAPTIONS
from mgm_exp.data.demo.scenes import BRANDS, COLOURS, KINDS, SHAPES, SIGN_WORDS
from mgm_exp.data.demo.words import BLANK, word_tokenizer

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")

_CAPTION_WORDS = "a an the above below and that reads with word words of brand name number price img"
_QUESTION_WORDS = "what is does say on colour shape first last letter sign label jersey tag"
_BASE_WORDS = (
    "user model read list describe show picture image upper lower one thing object objects which carries bears "
    "there any in order everything text texts written lettering spell transcribe character paint form outline it "
    "yes no top bottom how many seen give caption this please"
)


def vocabulary_words() -> list[str]:
    """Lower-case words that are single tokens, sorted."""
    words = set(" ".join((_CAPTION_WORDS, _QUESTION_WORDS, _BASE_WORDS, *NOISE_CAPTIONS)).split())
    words |= {*KINDS, *SHAPES, *COLOURS}
    return sorted(words)


def make_tokenizer() -> Tokenizer:
    """The tokenizer, ids in a fixed order: specials, bytes, newlines, characters, demo words, lower-case words."""
    printable = [chr(c) for c in range(33, 127)]
    pieces = [*SPECIAL_TOKENS, *(f"<0x{b:02X}>" for b in range(256)), "\n", "\n\n", BLANK, *printable]
    pieces += [w for w in (*SIGN_WORDS, *BRANDS) if len(w) > 1]
    for word in vocabulary_words():
        pieces += [word, BLANK + word]
    return word_tokenizer(pieces, SPECIAL_TOKENS, first="<bos>", unknown="<unk>")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and its two config files; `AutoTokenizer` loads the folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    decoder = {
        str(i): {
            "content": t,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, t in enumerate(SPECIAL_TOKENS)
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": turns,
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    special = {**names, "additional_special_tokens": turns}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def has_only_known_words(text: str) -> bool:
    """Whether every lower-case word of a text is a single token."""
    return set(re.findall(r"[a-z]+", text)) <= set(vocabulary_words())
