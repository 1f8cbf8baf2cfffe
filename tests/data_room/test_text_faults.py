from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgm_exp.data.kinds import TEXT_KINDS
from mgm_exp.data.text_faults import repaired, text_faults

# Written with what a misreading hits: accents, typographic signs, other scripts, emoji.
MISREAD = (
    "café|voilà|naïve|Österreich|Äpfel|straße|El Niño|l’été|“quoted” words|a – b|em—dash|wait…|20°C|£5|5 €|½ price|"
    "Привет мир|Ελλάδα|wąż|łódź|błąd|žába|český|Ångström|œuvre|HÔTEL|FRANÇOIS|KÖLN|日本語|שלום|عربي|ไทย|★ ✓|ＦＵＬＬ|"
    "© us|😀 smile|München|coração|Øl|naı̈f|déjà vu"
).split("|")
# What looks like it and is good text.
GOOD = (
    "NESCAFÉ®|ROSÉ™|« un café\xa0»|we met in a café…” she said|MAÇÃ”|É\xa0um dia|CAFÉ’S|5×½|ÉTÉ\xa0:|Straß…|Ä…|"
    "Ålesund’s|IRMÃ’S|Fußball”|łódź „cytat”|20°C ±5µm|señor ¿qué? ¡sí!|naïve—really|piñata®|NÃO – SÃO|à “la” carte|"
    "garçon’s|thé«x»|voilà\xa0!|élan\xa0»|6×9”|a tab\tand a line\nend|a < b > c|<image> of a sign|"
    "👩‍👩‍👧 family|ภาษา\u200bไทย"
).split("|")


def misread(text: str, codec: str) -> str:
    """What a program makes of UTF-8 that takes it for another encoding; bytes without a character pass."""
    raw = text.encode("utf-8")
    if codec == "latin-1":
        return raw.decode("latin-1")
    return "".join(bytes([byte]).decode("cp1252", "replace").replace("\ufffd", chr(byte)) for byte in raw)


@pytest.mark.parametrize("codec", ["latin-1", "cp1252"])
@pytest.mark.parametrize("text", MISREAD)
def test_misread_text_is_found_and_restored_exactly(text: str, codec: str) -> None:
    damaged = misread(text, codec)
    assert [fault.kind for fault in text_faults(damaged)] == ["mojibake"]
    assert repaired(damaged) == text
    assert repaired(misread(damaged, codec)) == text  # misread twice
    assert text_faults(text) == []


@pytest.mark.parametrize("text", GOOD)
def test_good_text_is_left_alone(text: str) -> None:
    assert text_faults(text) == [] and repaired(text) == text


@pytest.mark.parametrize("text", ["lost \ufffd here", "donâ€ t", "voilÃ le chat", "ï¿½"])
def test_lost_characters_are_found_and_not_made_up(text: str) -> None:
    assert [fault.kind for fault in text_faults(text)] == ["mojibake"]
    assert repaired(text) is None


@pytest.mark.parametrize("code", [0x00, 0x07, 0x1B, 0x7F, 0x85, 0xFEFF, 0xFFFE, 0x1FFFF])
def test_control_characters_are_found_and_removed(code: int) -> None:
    text = f"a{chr(code)} sign"
    (fault,) = text_faults(text)
    assert fault.kind == "control_characters" and f"U+{code:04X}" in fault.detail
    assert repaired(text) == "a sign"


def test_every_kind_in_one_text_is_reported() -> None:
    text = "cafÃ©\x07 <__dj__image>"
    assert [fault.kind for fault in text_faults(text)] == ["mojibake", "control_characters", "foreign_token"]
    assert repaired(text) is None  # what the token stood for is not known
    assert repaired("cafÃ©\x07 <|__dj__eoc|>") == "café"


letters = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), max_size=40)


@given(letters, st.sampled_from(["latin-1", "cp1252"]))
def test_whatever_is_repaired_is_what_was_misread(text: str, codec: str) -> None:
    """A repair gives text without damage, is stable, and is never a guess: misreading it again gives what was found."""
    damaged = misread(text, codec)
    result = repaired(damaged)
    if result is None:
        return
    assert text_faults(result) == [] and repaired(result) == result
    if repaired(text) == text and "\ufeff" not in text:
        # Ambiguous places are left; the others are restored: each character is the damaged or the original one.
        pieces = [misread(character, codec) for character in text]
        assert _is_mixture(result, list(text), pieces)


def _is_mixture(result: str, originals: list[str], damaged: list[str]) -> bool:
    ends = {0}
    for original, piece in zip(originals, damaged, strict=True):
        ends = {end + len(part) for end in ends for part in (original, piece) if result.startswith(part, end)}
    return len(result) in ends


@given(st.text(max_size=60))
def test_any_text_gets_a_verdict_that_reports_can_print(text: str) -> None:
    for fault in text_faults(text):
        assert fault.kind in TEXT_KINDS
        assert fault.detail.isascii() and fault.detail.isprintable() and len(fault.detail) < 200
    assert (repaired(text) == text) == (text_faults(text) == []) or repaired(text) is None
