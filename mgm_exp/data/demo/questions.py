"""Questions about demo scenes, their answers, and ten references each in the manner of TextVQA.

Seven types: read the sign, the brand, the number or the price; name a colour; name a shape; and one skill, the first
letter of a word. None of these phrasings occurs in the training of the shipped tiny base model.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mgm_exp.data.demo.scenes import SHAPED_KINDS, Item, Scene

_READ = {
    "sign": ("read_sign", "what does the sign say?"),
    "label": ("read_brand", "what is the brand on the label?"),
    "jersey": ("read_number", "what is the number on the jersey?"),
    "tag": ("read_price", "what is the price on the tag?"),
}

QUESTION_TYPES = ("read_sign", "read_brand", "read_number", "read_price", "colour", "shape", "first_letter")


@dataclass(frozen=True)
class Question:
    """One question about a scene with its answer; `question_type` is one of `QUESTION_TYPES`."""

    question: str
    answer: str
    question_type: str


def _about(item: Item) -> list[Question]:
    kind, text = _READ[item.kind]
    questions = [
        Question(text, item.text, kind),
        Question(f"what colour is the {item.kind}?", item.colour, "colour"),
    ]
    if item.kind in SHAPED_KINDS:
        questions.append(Question(f"what shape is the {item.kind}?", item.shape, "shape"))
        questions.append(Question(f"what is the first letter on the {item.kind}?", item.text[0], "first_letter"))
    return questions


def questions_of(scene: Scene) -> list[Question]:
    """All questions about a scene: 4 to 8, upper object first."""
    return [question for item in scene.items for question in _about(item)]


def references(question: Question, rng: random.Random) -> list[str]:
    """Ten reference answers as ten people would give them.

    Seven to nine give the answer itself, so that it scores 1.0 under the TextVQA metric; the others vary its case,
    leave out the currency sign or add a word.
    """
    answer = question.answer
    if question.question_type in ("read_sign", "read_brand"):
        others = (answer.lower(), answer.capitalize(), f"the {question.question_type[5:]} {answer}")
    elif question.question_type == "read_price":
        others = (answer.lstrip("$"), f"{answer.lstrip('$')} dollars", f"{answer}")
    elif question.question_type == "read_number":
        others = (answer, f"number {answer}", f"no. {answer}")
    elif question.question_type == "first_letter":
        others = (answer.lower(), f"letter {answer}", answer)
    else:
        others = (answer, answer.capitalize(), f"it is {answer}")
    same = rng.randint(7, 9)
    ten = [answer] * same + [rng.choice(others) for _ in range(10 - same)]
    rng.shuffle(ten)
    return ten


def question_only_answers(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The most frequent training answer to each question: the best one can do without looking at the image.

    Args:
        rows: the rows of `instruct.json` (LLaVA conversations).

    Returns:
        question text -> answer. Equal counts are settled by alphabetical order.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        turns = row["conversations"]
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            counts[asked["value"].replace("<image>", "").strip()][answered["value"]] += 1
    return {q: min(c, key=lambda answer: (-c[answer], answer)) for q, c in counts.items()}
