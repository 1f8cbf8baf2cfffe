"""Conversation templates of the official code as data: what is written around the turns, and what is learnt of them.

Source: mgm/conversation.py (`gemma`, `vicuna_v1`, `llama_3`, `plain`) and mgm/train/train.py (`preprocess_gemma`,
`preprocess_v1`, `preprocess_llama_3`, `preprocess_plain`), github.com/dvlab-research/MGM, Apache-2.0. The three
masking functions are one procedure with other numbers; see `MGMProcessor.encode`.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """How a conversation becomes text.

    Attributes:
        name: the official one.
        opening: stands before the first turn.
        heads, ends: of a turn by human, and by the model. An empty turn is its head alone, without a blank at its end.
        answer_start: what divides a round into instruction and answer.
        separator: what a conversation is divided by for masking.
        pieces, opening_pieces: parts between separators that make a round; more of them in the first one.
        unlearnt: tokens of an instruction, tokenised by itself, that are not masked: its <bos>, which stands for the
            separator before it; and, in `vicuna_v1`, the blank before the answer, which is part of the answer's
            first word.
        has_fused_head: a later round begins with other tokens than the same text by itself: the tokenizer puts no
            blank behind the separator. How many fewer they are is asked of the tokenizer.
        end_of_turn: a token that ends an answer beside the end of the sequence.
        known, eos: a token that a tokenizer of this template must know, and what ends its sequences; None: any.
        marks: taken out of answers where a tokenizer does not know them as special.
        aligns_by_captions: stage 1 was trained on images and their captions without any turns (the official `plain`).
    """

    name: str
    opening: str = ""
    heads: tuple[str, str] = ("", "")
    ends: tuple[str, str] = ("", "")
    answer_start: str = ""
    separator: str = ""
    pieces: int = 1
    opening_pieces: int = 0
    unlearnt: int = 1
    has_fused_head: bool = False
    end_of_turn: str | None = None
    known: str | None = None
    eos: str | None = None
    marks: tuple[str, ...] = ()
    aligns_by_captions: bool = False

    def fits(self, vocabulary: Container[str], eos: str) -> bool:
        """Whether a tokenizer can have been used with this template."""
        return (self.known is None or self.known in vocabulary) and self.eos in (None, eos)

    def text(self, turns: list[str]) -> str:
        """The text of turns that alternate, human first; an empty one is left open."""
        text = self.opening
        for i, value in enumerate(turns):
            head = self.heads[i % 2]
            text += head + value + self.ends[i % 2] if value else head.rstrip(" ")
        return text

    def rounds(self, text: str) -> list[str]:
        """The text divided into instruction and answer pairs, without the separators between them."""
        parts = text.split(self.separator)
        first = self.opening_pieces + self.pieces
        rounds = [self.separator.join(parts[:first])]
        rounds += [self.separator.join(parts[i : i + self.pieces]) for i in range(first, len(parts), self.pieces)]
        return rounds


_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"
_ASSISTANT = "You are a helpful language and vision assistant. You are able to understand the visual content that the "
_ASSISTANT += "user provides, and assist the user with a variety of tasks using natural language."

TEMPLATES = {
    template.name: template
    for template in (
        Template(
            name="gemma",
            heads=("<start_of_turn>user\n", "<start_of_turn>model\n"),
            ends=("<end_of_turn>\n", "<end_of_turn>\n<eos>"),
            answer_start="<start_of_turn>model\n",
            separator="<eos>",
            end_of_turn="<end_of_turn>",
            marks=("<end_of_turn>", "<start_of_turn>"),
        ),
        Template(
            name="vicuna_v1",
            opening="A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
            heads=("USER: ", "ASSISTANT: "),
            ends=(" ", "</s>"),
            answer_start=" ASSISTANT: ",
            separator="</s>",
            unlearnt=2,
            has_fused_head=True,
            eos="</s>",
            aligns_by_captions=True,
        ),
        Template(
            name="llama_3",
            opening=f"{_SYSTEM}{_ASSISTANT}<|eot_id|>",
            # The official template calls the model "system" as well.
            heads=("<|start_header_id|>user<|end_header_id|>\n\n", _SYSTEM),
            ends=("<|eot_id|>", "<|eot_id|>"),
            answer_start=f"<|eot_id|>{_SYSTEM}",
            separator="<|eot_id|>",
            pieces=2,
            opening_pieces=1,
            end_of_turn="<|eot_id|>",
            known="<|eot_id|>",
            marks=("<|eot_id|>",),
        ),
    )
}
# Tokens that end an answer, whatever the template.
ENDS_OF_TURN = frozenset(t.end_of_turn for t in TEMPLATES.values() if t.end_of_turn)
