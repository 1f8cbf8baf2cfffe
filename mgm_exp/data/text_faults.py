"""Damage inside a text: characters nobody typed, UTF-8 that was read as something else, tokens of another format.

    faults = text_faults("cafÃ©\x07")          # mojibake, control_characters
    repaired("cafÃ©\x07")                       # 'café'; None where the original cannot be known

A caption with such damage can still be trained on, so curation counts it and validation names it.

**Mojibake.** UTF-8 that was decoded as Latin-1 or Windows-1252 turns each character beyond ASCII into two to four:
``é`` into ``Ã©``, ``’`` into ``â€™``. Only sequences that are valid UTF-8 when taken back to bytes count. Some of these
are also good text: the accented capital and the sign in ``NESCAFÉ®``, the last three characters of ``« un café »`` with
its hard space. A sequence is therefore damage only where a writer would not have put it: a sign that never follows a
letter, a capital in the middle of a small word, several sequences in a row. What stays ambiguous is left alone.
The repair of a sequence is exact: encoding it again gives what was found.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# C0 and C1 controls but for tab and line ends, DEL, the byte-order mark, interlinear annotation, non-characters.
_CONTROL_CLASS = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufff9-\ufffb\ufdd0-\ufdef" + "".join(
    f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(17)
)
_CONTROL = re.compile(f"[{_CONTROL_CLASS}]")
_TERMINAL_COMMAND = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # colours and the like: more than its first character
_ASCII_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

_TOKEN = re.compile(r"<__dj__\w+>|<\|__dj__\w+\|>|<video>|<audio>")
_REMOVABLE_TOKEN = "<|__dj__eoc|>"


class TextFault(NamedTuple):
    """One kind of damage in a text.

    Args:
        kind: One of :data:`mgm_exp.data.kinds.TEXT_KINDS`.
        detail: What was found, in ASCII.
    """

    kind: str
    detail: str


def text_faults(text: str) -> list[TextFault]:
    """Every kind of damage in a text, once each."""
    if text.isascii() and "<" not in text and not _ASCII_CONTROL.search(text):
        return []
    found: list[TextFault] = []
    sequences = [] if text.isascii() else _mojibake(text)
    if sequences:
        first, more = sequences[0], len(sequences) - 1
        meant = f", meant as {first.meant!a}" if first.meant else ", and what it was is lost"
        again = f", and {more} more" if more else ""
        found.append(TextFault("mojibake", f"{first.found!a}{meant}, at character {first.start}{again}"))
    inside = [range(sequence.start, sequence.end) for sequence in sequences]
    controls = [c for c in _CONTROL.finditer(text) if not any(c.start() in span for span in inside)]
    if controls:
        names = sorted({f"U+{ord(c.group()):04X}" for c in controls})
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        count = f"{len(controls)} control character{'s' * (len(controls) > 1)}"
        found.append(
            TextFault("control_characters", f"{count} ({shown}), the first at character {controls[0].start()}")
        )
    token = _TOKEN.search(text)
    if token:
        found.append(
            TextFault("foreign_token", f"{token.group()} at character {token.start()} would be learnt as text")
        )
    return found


def repaired(text: str) -> str | None:
    """The text without its damage; the text itself where there is none; None where the original cannot be known."""
    if text.isascii() and "<" not in text and not _ASCII_CONTROL.search(text):
        return text
    for _ in range(_MOST_LAYERS):
        sequences = [] if text.isascii() else _mojibake(text)
        if not sequences:
            break
        if any(sequence.meant is None for sequence in sequences):
            return None
        parts, at = [], 0
        for start, end, _, meant in sequences:
            parts += [text[at:start], meant or ""]
            at = end
        text = "".join(parts) + text[at:]
    if text.count(_REMOVABLE_TOKEN):
        text = text.replace(_REMOVABLE_TOKEN, "").rstrip()
    text = _CONTROL.sub("", _TERMINAL_COMMAND.sub("", text))
    return None if text_faults(text) else text


# -- mojibake --------------------------------------------------------------------------------------------------------

_MOST_LAYERS = 4
"""So often may a text have been misread; each layer is undone in turn."""


class _Sequence(NamedTuple):
    """Characters that were one; ``meant`` is None where it cannot be known."""

    start: int
    end: int
    found: str
    meant: str | None


def _windows_1252() -> dict[str, int]:
    """Each character that a byte from 0x80 may have become: by Latin-1, or by Windows-1252 (undefined bytes pass)."""
    bytes_of = {chr(byte): byte for byte in range(0x80, 0x100)}
    for byte in range(0x80, 0xA0):
        character = bytes([byte]).decode("cp1252", "replace")
        if character != REPLACEMENT:
            bytes_of[character] = byte
    return bytes_of


_BYTE_OF = _windows_1252()
_CONTINUATION = "".join(re.escape(character) for character, byte in _BYTE_OF.items() if byte < 0xC0)
_SEQUENCE = re.compile(
    f"[\xc2-\xdf][{_CONTINUATION}]|[\xe0-\xef][{_CONTINUATION}]{{2}}|[\xf0-\xf4][{_CONTINUATION}]{{3}}"
)
# What a writer may well put after a letter, or what typesetting puts there: no evidence by itself.
_AFTER_A_LETTER = frozenset("’‘“”„‚…–—«»‹›®™©°²³¹ºª·•¡¿´†\xa0\xad")
# Bytes that were dropped on the way: "â€" without its third byte.
_CUT = re.compile("\xe2(?:\u20ac|\x80)")
# A small letter, then Ã or Â, then the end of the word: its second byte became a plain space or was dropped.
_CUT_LETTER = re.compile("(?<=[a-z])[\xc2\xc3](?![^\\W\\d_])")
_ENDS_A_WORD = frozenset("“”„…–")
_LATIN_LEADS = "\xc2\xc3"
_RARE_LEADS = frozenset("\xc6\xc7\xc8\xc9\xca\xcb\xcc\xcd\xd4\xd5\xd6\xd7\xd8\xd9\xda\xdb\xdc\xdd\xde\xdf")


def _mojibake(text: str) -> list[_Sequence]:
    """The damaged places of a text, in order."""
    candidates = [(match, _meant(match.group())) for match in _SEQUENCE.finditer(text)]
    candidates = [(match, meant) for match, meant in candidates if meant != ""]
    ends = {match.end() for match, _ in candidates}
    starts = {match.start() for match, _ in candidates}
    found = []
    for match, meant in candidates:
        is_in_a_row = match.start() in ends or match.end() in starts
        if _is_damage(text, match, is_in_a_row):
            found.append(_Sequence(match.start(), match.end(), match.group(), _kept(meant)))
    covered = {place for sequence in found for place in range(sequence.start, sequence.end)}
    lost = [*_CUT.finditer(text), *_CUT_LETTER.finditer(text)]
    lost += re.finditer(REPLACEMENT, text)
    found += [_Sequence(m.start(), m.end(), m.group(), None) for m in lost if m.start() not in covered]
    return sorted(found)


def _meant(found: str) -> str | None:
    """The one character that a sequence stands for; "" if it stands for none, None if taking it back is not exact."""
    raw = bytes(_BYTE_OF[character] for character in found)
    try:
        meant = raw.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    # Either reading alone must give what was found; a mixture of both says that more happened to it.
    as_latin = raw.decode("latin-1")
    as_windows = "".join(bytes([byte]).decode("cp1252", "replace").replace(REPLACEMENT, chr(byte)) for byte in raw)
    return meant if found in (as_latin, as_windows) else None


def _kept(meant: str | None) -> str | None:
    """None for what is no text: a replacement character says that the text was lost before it was misread."""
    return None if meant == REPLACEMENT else meant


def _is_damage(text: str, match: re.Match[str], is_in_a_row: bool) -> bool:
    """Whether a writer would not have put these characters there."""
    found, after = match.group(), text[match.end() : match.end() + 1]
    before = text[match.start() - 1 : match.start()] if match.start() else ""
    lead, rest = found[0], found[1:]
    if any(unicodedata.category(character) == "Cc" for character in rest):
        return True  # a C1 control is never written
    if len(found) == 4 or found == "ï»¿" or is_in_a_row:
        return True
    is_evidence = not set(rest) <= _AFTER_A_LETTER
    if len(found) == 3:
        return is_evidence
    if before.islower():
        return lead != "\xdf"  # a capital inside a small word; ß is a small letter itself
    if lead in _RARE_LEADS:
        return False
    if is_evidence or (lead in _LATIN_LEADS and (not before.isalpha() or after.islower())):
        return True
    # "KÃ–LN", "Å“uvre": a sign that ends a word stands inside one, or begins one.
    return rest in _ENDS_A_WORD and after.isalpha() and (after.islower() or before.isupper())


__all__ = ["TextFault", "repaired", "text_faults"]
