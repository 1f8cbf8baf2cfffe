"""One row of a file: what is read out of it, and how the forms that JSON objects come in are told apart.

Four forms are known, told apart row by row by their keys (the first that is there counts):

- ``conversations``: LLaVA/MGM, or ShareGPT where the row has ``images`` or its turns have ``role`` and ``content``;
- ``messages``: ShareGPT as LLaMA-Factory reads it;
- ``text``: Data-Juicer;
- ``caption``: an image and its caption, the plainest form there is.

A row's form is checked here. Whether it can be trained on (its image opens, an answer remains) is checked in
:mod:`mgm_exp.data.conversations` and :mod:`mgm_exp.data.curation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mgm_exp.data.formats.data_juicer_text import MEDIA_TOKENS, caption_of, image_tokens, is_conversation, turns_of
from mgm_exp.data.records import SPEAKERS, BadRow, Speaker, Turn
from mgm_exp.data.strict_json import Element

Form = Literal["llava", "sharegpt", "datajuicer", "pairs"]

ASIDE = "mgm_exp"
"""Key that keeps what a format has no place for; see :mod:`mgm_exp.data.formats.aside`."""

ROLES: dict[str, Speaker] = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_LLAVA_ROLES: dict[str, Speaker] = {"human": "human", "gpt": "gpt"}
SYSTEM = "system"


@dataclass(frozen=True)
class Origin:
    """How a row was spelled where it comes from, as a difference to how :mod:`mgm_exp.data.formats.aside` writes it.

    Args:
        form: The form it was in.
        keys: The keys with another value, or that are written no more.
        absent: The keys that are written and were not there.
    """

    form: Form
    keys: Mapping[str, Any]
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One well-formed row: either a conversation or a caption.

    Args:
        file: Name of the file.
        line: Line on which the row begins, from 1; the number of the row in Parquet, of the sample in a tar shard.
        index: Number of the row, from 0.
        id: The row's id; ``row-<index>`` where it has none (then ``has_id`` is False).
        image: The image path as it is written; ``shard.tar::member`` in a tar shard; None where the row has none.
        conversations: The turns; None in a caption row.
        caption: The caption without Data-Juicer's special tokens; None in a conversation row.
        raw_caption: The caption that was replaced by a captioner, where the row brings one.
        extra: Whatever else the row holds, by its key; never trained on, kept when the row is converted.
        renamed_from: Its id in the file, where ``id`` is another one because an earlier row has it.
        stored_image: In a tar shard: the path that the image had before it was packed, where that is known.
        form: The form of the row in its file.
        given: The row as it stands in its file; only where the reader was asked for it.
        origin: How it stood in the file that it was converted from, where that differs from how it would be written.
    """

    file: str
    line: int
    index: int
    id: str
    image: str | None
    conversations: tuple[Turn, ...] | None = None
    caption: str | None = None
    raw_caption: str | None = None
    has_id: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    renamed_from: str | None = None
    stored_image: str | None = None
    form: Form = "llava"
    given: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def bad(self, kind: str, detail: str) -> BadRow:
        """This row as one that cannot be used."""
        return BadRow(self.file, self.line, self.id, kind, detail, self.index)


class Malformed(Exception):
    """A row that is none, with its kind of :data:`mgm_exp.data.kinds.KINDS`."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def parse_row(value: Any, file: str, element: Element) -> Row:
    """The row that a JSON object says.

    Args:
        value: What was read.
        file: Name of its file.
        element: Its place.

    Raises:
        Malformed: it is no row of a known form.
    """
    if not isinstance(value, dict):
        raise Malformed("not_an_object", f"a {_json_type(value)} stands where a row should")
    row_id = id_of(value)
    if row_id is None and value.get("id") is not None:
        raise Malformed("bad_id", f"the id is {shown(value['id'])}")
    form = _form(value)
    fields = _READERS[form](value)
    used: set[str] = fields.pop("used")
    raw_caption = value.get("raw_caption")
    if isinstance(raw_caption, str):
        fields["raw_caption"] = raw_caption
        used.add("raw_caption")
    extra = {key: item for key, item in value.items() if key not in used and key != "id"}
    if SYSTEM in fields:
        extra[SYSTEM] = fields.pop(SYSTEM)
    refuse_surrogates(row_id, fields)
    name = f"row-{element.index:06d}" if row_id is None else row_id
    return Row(file, element.line, element.index, name, has_id=row_id is not None, extra=extra, form=form, **fields)


def _form(value: dict[str, Any]) -> Form:
    turns = value.get("conversations")
    if turns is not None:
        has_roles = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
        return "sharegpt" if has_roles or isinstance(value.get("images"), list) else "llava"
    if value.get("messages") is not None:
        return "sharegpt"
    if isinstance(value.get("text"), str):
        return "datajuicer"
    if isinstance(value.get("caption"), str):
        return "pairs"
    keys = ", ".join(sorted(value)[:8]) or "none"
    raise Malformed("no_conversations", f"neither 'conversations' nor a 'text'; its keys are: {keys}"[:200])


def _llava(value: dict[str, Any]) -> dict[str, Any]:
    fields = {"image": _one_image(value.get("image")), **_turns(value["conversations"], _LLAVA_ROLES)}
    return _with_system(value, fields, {"image", "conversations"})


def _sharegpt(value: dict[str, Any]) -> dict[str, Any]:
    _refuse_media(value)
    key = "conversations" if value.get("conversations") is not None else "messages"
    named = "images" if value.get("images") else "image"
    fields = {"image": _one_image(value.get(named)), **_turns(value[key], ROLES)}
    return _with_system(value, fields, {"images", named, key})


def _with_system(value: dict[str, Any], fields: dict[str, Any], used: set[str]) -> dict[str, Any]:
    if SYSTEM in fields and SYSTEM in value:
        raise Malformed("bad_turn", "the row has a system text both as a key and as a turn")
    return {**fields, "used": used}


def _data_juicer(value: dict[str, Any]) -> dict[str, Any]:
    text = value["text"]
    _refuse_media(value)
    for token in MEDIA_TOKENS:
        if token in text:
            raise Malformed("unsupported_media", f"the text holds {token}; images and text are supported")
    images = value.get("images")
    if images is not None and not isinstance(images, list):
        raise Malformed("bad_image_field", f"'images' is {shown(images)}; a list of one path is needed")
    image = _one_image(images)
    used = {"text", "images"}
    if is_conversation(text):
        return {"image": image, "conversations": turns_of(text), "used": used}
    tokens = image_tokens(text)
    if tokens > 1:
        raise Malformed("two_images_in_a_turn", f"the text holds the image token {tokens} times; one is supported")
    if tokens and image is None:
        raise Malformed("image_token_without_image", "the text holds an image token, and 'images' names no image")
    return {"image": image, "caption": caption_of(text), "used": used}


def _pair(value: dict[str, Any]) -> dict[str, Any]:
    return {"image": _one_image(value.get("image")), "caption": value["caption"].strip(), "used": {"image", "caption"}}


_READERS = {"llava": _llava, "sharegpt": _sharegpt, "datajuicer": _data_juicer, "pairs": _pair}


def _refuse_media(value: dict[str, Any]) -> None:
    for key in ("videos", "audios"):
        if value.get(key):
            raise Malformed("unsupported_media", f"the row holds {key}; images and text are supported")


def refuse_surrogates(row_id: str | None, fields: Mapping[str, Any]) -> None:
    """Raises Malformed if a text of a row's fields cannot be written as UTF-8."""
    texts = [row_id or "", fields.get("image") or "", fields.get("caption") or "", fields.get("raw_caption") or ""]
    texts += [turn.text for turn in fields.get("conversations") or ()]
    together = "\n".join(texts)
    if not together.isascii() and not is_writable(together):
        raise Malformed("lone_surrogate", "a text holds half of a surrogate pair (\\ud800-\\udfff)")


def _one_image(given: Any) -> str | None:
    """A path, a list of one, or nothing."""
    if given is None or given == []:
        return None
    if isinstance(given, list):
        if len(given) > 1:
            raise Malformed("several_images", f"the row names {len(given)} images; one is supported")
        given = given[0]
    if isinstance(given, dict) and "bytes" in given:
        raise Malformed("bad_image_field", "the image is stored inside the row; the path of a file is needed")
    if not isinstance(given, str) or not given:
        raise Malformed("bad_image_field", f"the image is {shown(given)}")
    return given


def _turns(given: Any, roles: Mapping[str, Speaker]) -> dict[str, Any]:
    """``conversations``, and ``system`` where the first turn is the system's."""
    if not isinstance(given, list) or not given:
        raise Malformed("no_conversations", f"the conversation is {shown(given)}; a list of turns is needed")
    fields: dict[str, Any] = {}
    turns = []
    for number, turn in enumerate(given):
        speaker, text = _said(turn)
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise Malformed(
                "bad_turn",
                f"turn {number} is {shown(turn)}; the texts 'from' and 'value' (or 'role' and 'content') are needed",
            )
        if speaker == SYSTEM and number == 0:
            fields[SYSTEM] = text
        elif speaker not in roles:
            allowed = " or ".join(repr(name) for name in SPEAKERS)
            raise Malformed("unknown_speaker", f"turn {number} is from {shown(speaker)}, not {allowed}")
        else:
            turns.append(Turn(roles[speaker], text))
    if not turns:
        raise Malformed("no_conversations", "the conversation holds a system text and no turn")
    return {**fields, "conversations": tuple(turns)}


def _said(turn: Any) -> tuple[Any, Any]:
    if not isinstance(turn, dict):
        return None, None
    if "role" in turn and "from" not in turn:
        return turn["role"], turn.get("content")
    return turn.get("from"), turn.get("value")


def id_of(value: Any) -> str | None:
    """The id of whatever was read, for naming it."""
    given = value.get("id") if isinstance(value, dict) else None
    if isinstance(given, str) and given and is_writable(given):
        return given
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else None


def is_writable(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def shown(value: Any) -> str:
    """A value in an error message."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + "..."
