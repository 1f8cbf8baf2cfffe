"""From a well-formed row to a record: what a conversation must be like to be trained on.

The official code trains on malformed conversations without a word: several images in a turn become one, turn markers
or an empty answer mask the whole sample. Here each of these is a kind of rejection of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from mgm_exp.data.formats import Row
from mgm_exp.data.prompts import CAPTION_PROMPTS, caption_prompt
from mgm_exp.data.records import IMAGE_TOKEN, SPEAKERS, BadRow, Record, Turn

__all__ = [
    "CAPTION_PROMPTS",
    "ID_ADDED",
    "IMAGE_TOKEN_ADDED",
    "PROMPT_ADDED",
    "caption_prompt",
    "row_faults",
    "to_record",
]

IMAGE_TOKEN_ADDED = "image_token_added"
"""Change: a conversation with an image and no ``<image>`` got one in front of its first turn."""
PROMPT_ADDED = "caption_prompt_added"
"""Change: a caption row got one of :data:`CAPTION_PROMPTS` as its question."""
ID_ADDED = "id_added"
"""Change: a row without an id is called ``row-<number>``."""


def to_record(row: Row) -> tuple[Record, list[str]] | BadRow:
    """The record of a row and the names of the changes that were needed, or why it cannot be used.

    Nothing is dropped or rewritten silently: the text of a conversation stays as it is (the processor moves
    ``<image>`` to the front of its turn, like the official code).
    """
    bad = next(row_faults(row), None)
    if bad is not None:
        return bad
    changes = [] if row.has_id else [ID_ADDED]
    if row.conversations is None:
        asked = (Turn("human", f"{IMAGE_TOKEN}\n{caption_prompt(row.id)}"), Turn("gpt", row.caption or ""))
        return Record(row.id, row.image, asked, row.raw_caption), [*changes, PROMPT_ADDED]
    turns = row.conversations
    if row.image is not None and not any(IMAGE_TOKEN in turn.text for turn in turns):
        turns = (Turn("human", f"{IMAGE_TOKEN}\n{turns[0].text}"), *turns[1:])
        changes.append(IMAGE_TOKEN_ADDED)
    return Record(row.id, row.image, turns, row.raw_caption), changes


def row_faults(row: Row) -> Iterator[BadRow]:
    """Everything for which a well-formed row cannot be trained on, leaving its image and its tokens aside."""
    if row.conversations is None:
        if row.image is None:
            yield row.bad("no_image", "a caption row needs an image in 'images'")
        if not row.caption:
            yield row.bad("empty_caption", "nothing is left of the text without its special tokens")
        return
    yield from _speaker_faults(row, row.conversations)
    yield from _image_token_faults(row, row.conversations)
    yield from _text_faults(row, row.conversations)


def _speaker_faults(row: Row, turns: tuple[Turn, ...]) -> Iterator[BadRow]:
    for number, turn in enumerate(turns):
        expected = SPEAKERS[number % 2]
        if turn.speaker != expected:
            yield row.bad("turn_order", f"turn {number} is from {turn.speaker!r}; {expected!r} is expected there")
            break
    if turns[-1].speaker == "human":
        yield row.bad("ends_with_human", f"turn {len(turns) - 1} is a question without an answer")


def _image_token_faults(row: Row, turns: tuple[Turn, ...]) -> Iterator[BadRow]:
    counts = [turn.text.count(IMAGE_TOKEN) for turn in turns]
    if not any(counts):
        return
    if row.image is None:
        yield row.bad("image_token_without_image", f"the text holds {IMAGE_TOKEN}, and the row has no image")
        return
    for number, count in enumerate(counts):
        if count > 1:
            yield row.bad("two_images_in_a_turn", f"turn {number} holds {IMAGE_TOKEN} {count} times")
        if count and turns[number].speaker == "gpt":
            yield row.bad("image_token_in_answer", f"turn {number} is an answer and holds {IMAGE_TOKEN}")
    places = [str(number) for number, count in enumerate(counts) if count]
    if len(places) > 1:
        shown = ", ".join(places)
        yield row.bad("image_token_repeated", f"turns {shown} hold {IMAGE_TOKEN}, and the row has one image")


def _text_faults(row: Row, turns: tuple[Turn, ...]) -> Iterator[BadRow]:
    for number, turn in enumerate(turns):
        if turn.text.strip():
            continue
        if turn.speaker == "gpt":
            yield row.bad("empty_answer", f"turn {number} is an answer without text")
            continue
        has_image_here = number == 0 and row.image is not None and not any(IMAGE_TOKEN in t.text for t in turns)
        if not has_image_here:
            yield row.bad("empty_question", f"turn {number} is a question without text")
