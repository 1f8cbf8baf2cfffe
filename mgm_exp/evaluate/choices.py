"""Which option a free-text answer to a multiple-choice question names, by VLMEvalKit's rules."""

from __future__ import annotations

import re
from collections.abc import Mapping

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LAST_TOKENS = 4


def _option_letter(prediction: str, letters: list[str]) -> str | None:
    """A letter that stands alone near the end, or follows "answer is"."""
    tokens = prediction.translate(_SEPARATORS).split()
    named = [letter for letter in letters if letter in tokens]
    if len(named) == 1 and tokens.index(named[0]) >= len(tokens) - _LAST_TOKENS:
        return named[0]
    if not named and "Z" in tokens:
        return "Z"
    match = _ANSWER_IS.search(prediction)
    return match.group(1).upper() if match else None


def _option_text(prediction: str, choices: Mapping[str, str]) -> str | None:
    """The one option whose text occurs in a short answer."""
    answer = prediction.lower()
    texts = {letter: str(text).lower() for letter, text in choices.items()}
    if len(answer) > 2 * sum(len(text) for text in texts.values()):
        return None
    inside = [letter for letter, text in texts.items() if text in answer]
    return inside[0] if len(inside) == 1 else None


def extract_choice(prediction: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names, or None: refused, undecided or unreadable; never a guess.

    Known misreadings of the original are kept ("A dog" reads A), so that published numbers can be reproduced.

    Args:
        prediction: The model's answer.
        choices: Letter -> text of each option of this question.

    Source: open-compass/VLMEvalKit, ``vlmeval/utils/matching_util.py`` (``can_infer``); its Z and False are None.
    """
    if any(refusal in prediction for refusal in _REFUSALS):
        return None
    letter = _option_letter(prediction, list(choices)) or _option_text(prediction, choices)
    return None if letter == "Z" else letter
