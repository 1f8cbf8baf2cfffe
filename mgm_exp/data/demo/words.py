"""A word tokenizer of Gemma's structure for the tiny models: known words whole, everything else by characters.

A blank is "▁": it is part of a lower-case word, and a token of its own before capitals, digits and signs, so that
"OPEN" is one token wherever it stands. What is neither a known word nor a known character is spelt by bytes where the
vocabulary has them, else it is `<unk>`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BLANK = "▁"


def word_tokenizer(pieces: Sequence[str], special_tokens: Sequence[str], *, first: str, unknown: str) -> Tokenizer:
    """A tokenizer over a fixed vocabulary.

    Args:
        pieces: the vocabulary in the order of its ids, `special_tokens` included; duplicates are dropped.
        special_tokens: found in a text before anything else and left out by `decode(skip_special_tokens=True)`.
        first: special token that is put before every text.
        unknown: special token for what has no piece.
    """
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    has_bytes = "<0x00>" in vocabulary
    # ignore_merges: a pre-token that is in the vocabulary is one token; without merges all others fall to characters.
    bpe = models.BPE(vocabulary, [], unk_token=unknown, byte_fallback=has_bytes, fuse_unk=True, ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", BLANK)
    split = Regex(rf"\n+|{BLANK}?[a-z]+|[A-Z]+|{BLANK}|[^\s{BLANK}A-Za-z]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(split, "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special_tokens])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, vocabulary[first])]
    )
    return tokenizer
