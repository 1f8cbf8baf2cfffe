"""Writes a row in a form so that nothing is lost: what the form has no place for is kept aside and found again.

    value = written(row, "datajuicer")          # a JSON object
    row == with_aside(parse_row(value, ...))

A row is written plainly, read back, and compared. Most rows come back as they were, and nothing is added to them.
Otherwise the key ``mgm_exp`` holds, as one text (the same type in every row, as loaders that make columns want it):

- ``is``: what was not read back right (``id``, ``image``, ``text``, ``raw_caption``, ``extra``), exactly;
- ``of``: for each of these a checksum of what was read back. Where another program has changed the row since, the
  checksum no longer fits, and what the row says now is what counts (of a caption that was changed, the question that
  it answers stays);
- ``origin``: how the row was spelled in the file it was first converted from, so that it can be written there again as
  it stood: a number as its id, keys inside turns, another spelling of Data-Juicer's tokens.

A caption row and a conversation of one round that asks what caption rows are asked are the same thing in two forms
(:func:`mgm_exp.data.prompts.caption_prompt` is a function of the id): they need nothing aside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mgm_exp.data.formats.data_juicer_text import MEDIA_TOKENS, caption_text, conversation_text, without_tokens
from mgm_exp.data.formats.rows import ASIDE, SYSTEM, Form, Malformed, Origin, Row, parse_row, refuse_surrogates
from mgm_exp.data.prompts import caption_prompt
from mgm_exp.data.records import IMAGE_TOKEN, Turn
from mgm_exp.data.strict_json import MAX_NESTING, Element, fault_in

_FORMS: tuple[Form, ...] = ("llava", "sharegpt", "datajuicer", "pairs")
# A key of these has a meaning in some form: as an extra key it would be taken for it.
_STRUCTURE = frozenset(
    {"id", "image", "images", "conversations", "messages", "text", "caption", "raw_caption", "videos", "audios", ASIDE}
)
_GUARDED = ("id", "image", "text", "raw_caption")
_MISSING = object()


def written(row: Row, form: Form, *, answers_only: bool = False) -> dict[str, Any]:
    """A row as a JSON object of a form, from which :func:`mgm_exp.data.formats.read_rows` reads it again.

    Args:
        row: What is written.
        form: The form.
        answers_only: In Data-Juicer's form, of one question and answer about an image write the answer alone, as its
            operators are to see it; the question is kept aside, also where the answer is changed later.
    """
    if row.given is not None and row.form == form:
        return dict(row.given) if row.renamed_from is None else {**row.given, "id": row.id}
    plain = plain_row(row, form, answers_only=answers_only)
    if row.origin is not None and row.origin.form == form:
        restored = {key: item for key, item in {**plain, **row.origin.keys}.items() if key not in row.origin.absent}
        if _differences(row, restored) == ({}, {}):
            return restored
    exact, checksums = _differences(row, plain)
    origin = row.origin or _origin(row)
    if not exact and (origin is None or origin.form == form):
        return plain
    aside: dict[str, Any] = {"is": exact, "of": checksums} if exact else {}
    if origin is not None:
        aside["origin"] = {"form": origin.form, "keys": origin.keys, "absent": origin.absent}
    return {**plain, ASIDE: json.dumps(aside, ensure_ascii=False, allow_nan=False)}


def plain_row(row: Row, form: Form, *, answers_only: bool = False) -> dict[str, Any]:
    """A row as a JSON object of a form, as far as the form goes."""
    value: dict[str, Any] = {"id": row.id} if row.has_id else {}
    extra = {key: item for key, item in row.extra.items() if key not in _STRUCTURE}
    images = {} if row.image is None else {"images": [row.image]}
    if form == "datajuicer":
        value |= {"text": _data_juicer_text(row, answers_only), **images}
    elif form == "sharegpt":
        system = extra.pop(SYSTEM) if isinstance(extra.get(SYSTEM), str) else None
        messages = [] if system is None else [{"role": SYSTEM, "content": system}]
        messages += [
            {"role": "user" if turn.speaker == "human" else "assistant", "content": turn.text}
            for turn in _with_token(row)
        ]
        value |= {"messages": messages, **images}
    else:
        if row.image is not None:
            value["image"] = row.image
        if form == "pairs":
            value["caption"] = as_caption(row).caption or ""
        else:
            value["conversations"] = [{"from": turn.speaker, "value": turn.text} for turn in _asked(row)]
    if row.raw_caption is not None:
        value["raw_caption"] = row.raw_caption
    return {**value, **extra}


def _data_juicer_text(row: Row, answers_only: bool) -> str:
    has_image = row.image is not None
    row = as_caption(row)
    if answers_only and has_image and _is_one_round(row.conversations):
        row = replace(row, conversations=None, caption=(row.conversations or ())[1].text)
    if row.conversations is None:
        # A token inside a caption would be a second image, or one of nothing.
        return caption_text(without_tokens(row.caption or ""), has_image)
    if any(token in turn.text for turn in row.conversations for token in MEDIA_TOKENS):
        row = replace(row, conversations=tuple(replace(t, text=without_tokens(t.text)) for t in row.conversations))
    return conversation_text(row.conversations or (), has_image)


def as_caption(row: Row) -> Row:
    """A caption row, where the conversation of a row is one that a caption row gets."""
    turns = row.conversations
    if turns is None or row.image is None or not _is_one_round(turns) or turns[0] != _question(row):
        return row
    return replace(row, conversations=None, caption=turns[1].text)


def _is_one_round(turns: Sequence[Turn] | None) -> bool:
    return turns is not None and [turn.speaker for turn in turns] == ["human", "gpt"]


def _question(row: Row) -> Turn:
    """What a caption row is asked. One without an id is asked the same wherever it stands."""
    return Turn("human", f"{IMAGE_TOKEN}\n{caption_prompt(row.id if row.has_id else '')}")


def _asked(row: Row) -> tuple[Turn, ...]:
    if row.conversations is not None:
        return row.conversations
    return (_question(row), Turn("gpt", row.caption or ""))


def _with_token(row: Row) -> tuple[Turn, ...]:
    """The turns, with ``<image>`` in front where the row has an image that none of them mentions: loaders count."""
    turns = _asked(row)
    if row.image is None or any(IMAGE_TOKEN in turn.text for turn in turns):
        return turns
    return (replace(turns[0], text=f"{IMAGE_TOKEN}\n{turns[0].text}"), *turns[1:])


def _differences(row: Row, value: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What is not read back from ``value`` as it stands in ``row``, and a checksum of what is read instead."""
    try:
        # Any form reads back: what counts is what it says.
        read = parse_row(dict(value), row.file, Element(row.line, row.index))
        found = _fields(read)
        extra = read.extra
    except Malformed:
        found, extra = {}, {}
    wanted = _fields(row)
    exact, checksums = {}, {}
    if _text(as_caption(row)) == found.get("text") or ("text" in found and _text(as_caption(read)) == wanted["text"]):
        wanted["text"] = found["text"]
    for field in _GUARDED:
        if found.get(field, _MISSING) != wanted[field]:
            exact[field] = wanted[field]
            checksums[field] = _checksum(found.get(field))
    lost = {key: item for key, item in row.extra.items() if not _same(extra.get(key, _MISSING), item)}
    if lost:
        exact["extra"] = lost
    return exact, checksums


def _fields(row: Row) -> dict[str, Any]:
    return {
        "id": row.id if row.has_id else None,
        "image": row.image,
        "text": _text(row),
        "raw_caption": row.raw_caption,
    }


def _text(row: Row) -> Any:
    if row.conversations is None:
        return row.caption
    return [[turn.speaker, turn.text] for turn in row.conversations]


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values; unlike Python's, it tells true from 1 and 1 from 1.0."""
    if one is other:
        return True
    if one is _MISSING or one != other:
        return False
    return isinstance(one, str) or json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _origin(row: Row) -> Origin | None:
    """How a row is spelled in its file, as a difference to how it would be written there; None if there is none."""
    if row.given is None:
        return None
    plain = plain_row(row, row.form)
    given = {key: item for key, item in row.given.items() if key != ASIDE or ASIDE in row.extra}
    keys = {key: item for key, item in given.items() if not _same(plain.get(key, _MISSING), item)}
    absent = tuple(key for key in plain if key not in row.given)
    return Origin(row.form, keys, absent) if keys or absent else None


def with_aside(row: Row) -> Row:
    """A row that was read plainly, with what was kept aside for it in its right place.

    Raises:
        Malformed: what was kept aside holds text that cannot be written.
    """
    if ASIDE not in row.extra:
        return row
    aside = _parsed(row.extra[ASIDE])
    if aside is None:  # somebody else's key of this name
        return row
    extra = {key: item for key, item in row.extra.items() if key != ASIDE}
    found = _fields(row)
    exact, checksums = aside.get("is", {}), aside.get("of", {})
    changes: dict[str, Any] = {"extra": {**extra, **exact.get("extra", {})}}
    for field in _GUARDED:
        if field in exact and checksums.get(field) == _checksum(found[field]):
            changes |= _change(field, exact[field], row)
    if "text" in exact and "caption" not in changes and row.caption is not None:
        changes |= _asked_as_before(exact["text"], row.caption)
    if "origin" in aside:
        origin = aside["origin"]
        changes["origin"] = Origin(origin["form"], origin["keys"], tuple(origin["absent"]))
    refuse_surrogates(changes.get("id"), changes)
    return replace(row, **changes)


def _asked_as_before(text: Any, caption: str) -> dict[str, Any]:
    """The question of a row whose answer alone was written, and has been changed since."""
    if not isinstance(text, list) or [speaker for speaker, _ in text] != ["human", "gpt"]:
        return {}
    return {"caption": None, "conversations": (Turn("human", text[0][1]), Turn("gpt", caption))}


def _change(field: str, value: Any, row: Row) -> dict[str, Any]:
    if field == "id":
        return {"id": f"row-{row.index:06d}" if value is None else value, "has_id": value is not None}
    if field != "text":
        return {field: value}
    if isinstance(value, str):
        return {"caption": value, "conversations": None}
    return {"caption": None, "conversations": tuple(Turn(speaker, text) for speaker, text in value)}


def _parsed(text: Any) -> dict[str, Any] | None:
    """What :func:`written` kept aside; None for anything else, as the key may be somebody else's."""
    if not isinstance(text, str):
        return None
    aside, fault = fault_in(text, MAX_NESTING + 4)
    if fault is not None or not isinstance(aside, dict) or not aside or not set(aside) <= {"is", "of", "origin"}:
        return None
    exact, checksums = aside.get("is", {}), aside.get("of", {})
    if not isinstance(exact, dict) or not isinstance(checksums, dict) or not _fits(exact):
        return None
    origin = aside.get("origin")
    if origin is not None and not (
        isinstance(origin, dict)
        and set(origin) == {"form", "keys", "absent"}
        and origin["form"] in _FORMS
        and isinstance(origin["keys"], dict)
        and isinstance(origin["absent"], list)
    ):
        return None
    return aside


def _fits(exact: dict[str, Any]) -> bool:
    texts = [exact[field] for field in ("id", "image", "raw_caption") if field in exact]
    if not all(text is None or (isinstance(text, str) and text) for text in texts if text != ""):
        return False
    return (
        set(exact) <= {*_GUARDED, "extra"}
        and isinstance(exact.get("extra", {}), dict)
        and (isinstance(exact.get("text", ""), str) or _are_turns(exact["text"]))
    )


def _are_turns(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, list) and len(turn) == 2 and turn[0] in ("human", "gpt") and isinstance(turn[1], str)
            for turn in value
        )
    )
