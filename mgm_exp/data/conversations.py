"""From a well-formed row to a record: what a conversation must be like to be trained on.

The official code trains on malformed conversations without a word: several images in a turn become one, turn markers
or an empty answer mask the whole sample. Here each of these is a kind of rejection of its own.
"""

from __future__ import annotations

import hashlib

from mgm_exp.data.formats import Row
from mgm_exp.data.records import IMAGE_TOKEN, SPEAKERS, BadRow, Record, Turn

CAPTION_PROMPTS = ("describe the picture", "give a caption", "show this image in words", "caption this image")
"""Questions of caption rows, which bring none. Which one a row gets is chosen by a hash of its id."""

IMAGE_TOKEN_ADDED = "image_token_added"
"""Change: a conversation with an image and no ``<image>`` got one in front of its first turn."""
PROMPT_ADDED = "caption_prompt_added"
"""Change: a caption row got one of :data:`CAPTION_PROMPTS` as its question."""
ID_ADDED = "id_added"
"""Change: a row without an id is called ``row-<number>``."""


def caption_prompt(row_id: str) -> str:
    """The question that the caption of this id answers."""
    return CAPTION_PROMPTS[int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big") % len(CAPTION_PROMPTS)]


def to_record(row: Row) -> tuple[Record, list[str]] | BadRow:
    """The record of a row and the names of the changes that were needed, or why it cannot be used.

    Nothing is dropped or rewritten silently: the text of a conversation stays as it is (the processor moves
    ``<image>`` to the front of its turn, like the official code).
    """
    changes = [] if row.has_id else [ID_ADDED]
    if row.conversations is None:
        return _from_caption(row, changes)
    turns = row.conversations
    bad = _speaker_fault(row, turns) or _image_token_fault(row, turns) or _text_fault(row, turns)
    if bad is not None:
        return bad
    if row.image is not None and not any(IMAGE_TOKEN in turn.text for turn in turns):
        turns = (Turn("human", f"{IMAGE_TOKEN}\n{turns[0].text}"), *turns[1:])
        changes.append(IMAGE_TOKEN_ADDED)
    return Record(row.id, row.image, turns, row.raw_caption), changes


def _from_caption(row: Row, changes: list[str]) -> tuple[Record, list[str]] | BadRow:
    caption = row.caption or ""
    if row.image is None:
        return row.bad("no_image", "a caption row needs an image in 'images'")
    if not caption:
        return row.bad("empty_caption", "nothing is left of the text without its special tokens")
    turns = (Turn("human", f"{IMAGE_TOKEN}\n{caption_prompt(row.id)}"), Turn("gpt", caption))
    return Record(row.id, row.image, turns, row.raw_caption), [*changes, PROMPT_ADDED]


def _speaker_fault(row: Row, turns: tuple[Turn, ...]) -> BadRow | None:
    for number, turn in enumerate(turns):
        expected = SPEAKERS[number % 2]
        if turn.speaker != expected:
            return row.bad("turn_order", f"turn {number} is from {turn.speaker!r}; {expected!r} is expected there")
    if len(turns) % 2:
        return row.bad("ends_with_human", f"turn {len(turns) - 1} is a question without an answer")
    return None


def _image_token_fault(row: Row, turns: tuple[Turn, ...]) -> BadRow | None:
    counts = [turn.text.count(IMAGE_TOKEN) for turn in turns]
    if not any(counts):
        return None
    if row.image is None:
        return row.bad("image_token_without_image", f"the text holds {IMAGE_TOKEN}, and the row has no image")
    for number, count in enumerate(counts):
        if count > 1:
            return row.bad("two_images_in_a_turn", f"turn {number} holds {IMAGE_TOKEN} {count} times")
        if count and turns[number].speaker == "gpt":
            return row.bad("image_token_in_answer", f"turn {number} is an answer and holds {IMAGE_TOKEN}")
    if sum(counts) > 1:
        places = ", ".join(str(number) for number, count in enumerate(counts) if count)
        return row.bad("image_token_repeated", f"turns {places} hold {IMAGE_TOKEN}, and the row has one image")
    return None


def _text_fault(row: Row, turns: tuple[Turn, ...]) -> BadRow | None:
    for number, turn in enumerate(turns):
        if turn.text.strip():
            continue
        if turn.speaker == "gpt":
            return row.bad("empty_answer", f"turn {number} is an answer without text")
        has_image_here = number == 0 and row.image is not None and not any(IMAGE_TOKEN in t.text for t in turns)
        if not has_image_here:
            return row.bad("empty_question", f"turn {number} is a question without text")
    return None
