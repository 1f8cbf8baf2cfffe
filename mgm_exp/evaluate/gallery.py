"""What a model answers wrong, to be looked at: one page a benchmark, by type of question, the worst answers first.

A page is a bounded selection out of ``predictions/<benchmark>.jsonl``: the file is read once, a line at a time, and
only the places of the chosen lines are kept. Within a type answers are ordered by their score, and equal ones by a hash
of their ids, not by what looks good.
"""

from __future__ import annotations

import hashlib
import json
from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgm_exp import page
from mgm_exp.errors import DataError, UserError
from mgm_exp.evaluate.circular import ROTATION
from mgm_exp.page import Column, Html, element
from mgm_exp.store import write_atomic

PER_TYPE = 12
PICTURE_SIDE = 184
"""Pixels of the longer side of a picture: sharp at twice the density of an ordinary screen."""
_MOST_TYPES = 24
"""Types of questions that get pictures; those that lost most."""
_MOST_COUNTED = 2000
_MOST_IN_TABLE = 200
_OTHER = "(further types)"
_CIRCULAR = ("mmbench", "mmbench_cn")
_LONGEST = 240

Row = dict[str, Any]
Picture = Callable[[Row], bytes | None]
"""A small JPEG of the image that a row is about; None: it cannot be had."""


@dataclass
class TypeOfQuestion:
    """What became of the questions of one type.

    Args:
        name: As the benchmark calls it.
        n: Questions.
        points: Sum of their scores.
        wrong: Questions with a score of 0.
        partly: Questions with a score between 0 and 1.
        worst: (score, hash of the id, places of its lines in the file), worst first.
    """

    name: str
    n: int = 0
    points: float = 0.0
    wrong: int = 0
    partly: int = 0
    worst: list[tuple[float, bytes, tuple[int, ...]]] = field(default_factory=list)

    @property
    def lost(self) -> float:
        """Points that were not made."""
        return self.n - self.points

    def add(self, score: float, name: str, places: tuple[int, ...], most: int) -> None:
        """Counts a question, and keeps it if it is one of the worst."""
        self.n, self.points = self.n + 1, self.points + score
        self.wrong += score <= 0
        self.partly += 0 < score < 1
        if score < 1:
            digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            insort(self.worst, (score, digest, places))
            del self.worst[most:]


def write_gallery(
    predictions: Path,
    out: Path,
    picture: Picture,
    *,
    benchmark: str,
    label: str,
    per_type: int = PER_TYPE,
    only: str | None = None,
    remark: str = "",
) -> int:
    """Writes the page of a benchmark.

    Args:
        predictions: Lines of ``predictions/<benchmark>.jsonl``.
        out: The page.
        picture: Where the images come from.
        benchmark: Its name; the rotations of a circular MMBench question are shown together.
        label: What was evaluated: a run's name.
        per_type: Most questions shown of one type.
        only: Only this type of question; None: all.
        remark: A sentence about the pictures.

    Returns:
        How many questions lost points; nothing is written where answers have no scores.

    Raises:
        DataError: a line of ``predictions`` is damaged.
        UserError: there is no such type.
    """
    is_circular = benchmark.partition(".")[0] in _CIRCULAR
    types = _read(predictions, per_type, is_circular)
    if types is None:
        return 0
    if only is not None and only not in types:
        known = ", ".join(sorted(types)[:20])
        raise UserError(f"{benchmark} has no questions of type {only!r}; there are {known}.")
    chosen = [types[only]] if only is not None else sorted(types.values(), key=lambda kind: (-kind.lost, kind.name))
    document = _page(predictions, chosen, picture, benchmark, label, is_circular, remark)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, document.html())
    return sum(kind.wrong + kind.partly for kind in chosen)


# -- reading -----------------------------------------------------------------------------------------------------------


def _read(predictions: Path, most: int, is_circular: bool) -> dict[str, TypeOfQuestion] | None:
    """Counts and worst answers of each type; None where a server scores."""
    types: dict[str, TypeOfQuestion] = {}
    turns: dict[str, list[tuple[float, int, str]]] = {}
    with predictions.open("rb") as file:
        place = 0
        for number, line in enumerate(file, 1):
            row = _row(line, predictions, number)
            if row["score"] is None:
                return None
            kind = _cut(str(row.get("question_type") or "unknown"), 80)
            score = min(1.0, max(0.0, float(row["score"])))
            if is_circular:
                turns.setdefault(str(row.get("image_id")), []).append((score, place, kind))
            else:
                _type_of(types, kind).add(score, str(row["question_id"]), (place,), most)
            place += len(line)
    for base, found in turns.items():  # a question with all its rotations; right only if all are
        share = sum(score for score, _, _ in found) / len(found)
        _type_of(types, found[0][2]).add(share, base, tuple(place for _, place, _ in found), most)
    return types


def _type_of(types: dict[str, TypeOfQuestion], name: str) -> TypeOfQuestion:
    name = name if name in types or len(types) < _MOST_COUNTED else _OTHER
    return types.setdefault(name, TypeOfQuestion(name))


def _row(line: bytes, file: Path, number: int) -> Row:
    try:
        row = json.loads(line)
        if (
            not isinstance(row, dict)
            or "question_id" not in row
            or not isinstance(row["score"], (int, float, type(None)))
        ):
            raise ValueError("no question_id or score")
    except (ValueError, KeyError, RecursionError) as error:
        raise DataError(
            f"{file}, line {number} is damaged: {error}.", advice="Score the benchmark again with mgm-exp evaluate."
        ) from error
    return row


# -- the page ----------------------------------------------------------------------------------------------------------


def _page(
    predictions: Path,
    types: Sequence[TypeOfQuestion],
    picture: Picture,
    benchmark: str,
    label: str,
    is_circular: bool,
    remark: str,
) -> page.Page:
    n, points = sum(kind.n for kind in types), sum(kind.points for kind in types)
    wrong, partly = sum(kind.wrong for kind in types), sum(kind.partly for kind in types)
    said = "questions, each asked with its options in every order" if is_circular else "questions"
    document = page.Page(f"Wrong answers: {benchmark}", f"{label}: {n:,} {said}", kicker="mgm_exp gallery")
    document.add(page.tiles(_tiles(n, points, wrong, partly, is_circular)))
    document.add(_table(types, is_circular), contents=("types", "By type"))
    shown = [kind for kind in types if kind.worst][:_MOST_TYPES]
    with predictions.open("rb") as file:
        for place, kind in enumerate(shown):
            cards = []
            for score, _, places in kind.worst:
                rows = []
                for start in places:
                    file.seek(start)
                    rows.append(json.loads(file.readline()))
                rows.sort(key=_turn)
                cards.append(_card(rows, score, picture(rows[0]), is_circular))
            more = f"{kind.wrong + kind.partly:,} of {kind.n:,} lost points"
            more += f"; the worst {len(cards)}:" if len(cards) < kind.wrong + kind.partly else ":"
            block = page.section(
                kind.name, page.note(more), element("ul", *cards, class_="cards"), anchor=f"type-{place}"
            )
            document.add(block, contents=(f"type-{place}", _cut(kind.name, 40)))
    if not shown:
        document.add(page.callout("good", "No answer lost a point."))
    left = sum(bool(kind.worst) for kind in types) - len(shown)
    if left:
        document.add(page.note(f"{left} more types have wrong answers: mgm-exp gallery RUN --type NAME shows one."))
    if remark:
        document.add(page.note(remark))
    document.foot(
        "One file that loads nothing. Within a type the worst answers come first, equal ones in the order of a hash of "
        "their ids. All answers are in predictions/."
    )
    return document


def _tiles(n: int, points: float, wrong: int, partly: int, is_circular: bool) -> list[page.Tile]:
    if is_circular:
        right = n - wrong - partly
        return [
            page.Tile("right in every order", f"{right / n:.1%}", f"{right:,} of {n:,}"),
            page.Tile("right in some", f"{partly:,}", f"{partly / n:.1%}"),
            page.Tile("right in none", f"{wrong:,}", f"{wrong / n:.1%}"),
        ]
    return [
        page.Tile("accuracy", f"{points / n:.1%}", f"{n:,} questions"),
        page.Tile("wrong", f"{wrong:,}", f"{wrong / n:.1%}"),
        page.Tile("partly right", f"{partly:,}", f"{partly / n:.1%}"),
    ]


def _table(types: Sequence[TypeOfQuestion], is_circular: bool) -> Html:
    total = sum(kind.lost for kind in types) or 1.0
    first = "passes right" if is_circular else "accuracy"
    columns = [
        Column("type of question"),
        Column("questions", is_number=True),
        Column(first, is_number=True),
        Column("wrong", is_number=True),
        Column("partly", is_number=True),
        Column("of all points lost", is_number=True),
    ]
    rows: list[list[str | tuple[str, float | None]]] = [
        [
            kind.name,
            (f"{kind.n:,}", float(kind.n)),
            (f"{kind.points / kind.n:.1%}", kind.points / kind.n),
            (f"{kind.wrong:,}", float(kind.wrong)),
            (f"{kind.partly:,}", float(kind.partly)),
            (f"{kind.lost / total:.1%}", kind.lost / total),
        ]
        for kind in types[:_MOST_IN_TABLE]
    ]
    blocks = [page.table(columns, rows, name="Wrong answers by type of question")]
    if len(types) > _MOST_IN_TABLE:
        blocks.append(page.note(f"{len(types) - _MOST_IN_TABLE} more types, which lost less, are left out."))
    return page.section("By type", *blocks, anchor="types")


def _card(rows: Sequence[Row], score: float, picture: bytes | None, is_circular: bool) -> Html:
    """A question: its image, what was said and what was right; of a circular one every pass."""
    first = rows[0]
    lines = [_pass(row) for row in rows] if is_circular else [_answer(first, score)]
    options = first.get("options")
    told = [] if is_circular and len(rows) > 1 else _options(options, first.get("answers"))
    name = str(first.get("question_id"))
    return element(
        "li",
        page.image(picture, "jpeg", f"image {first.get('image_id', '')}")
        if picture
        else element("div", "no picture", class_="empty"),
        element(
            "div",
            element("p", _cut(str(first.get("question", ""))), class_="question"),
            *told,
            Html("") if told or is_circular else element("p", _accepted(first.get("answers")), class_="accepted"),
            element("ul", *lines),
            element("p", f"question {_cut(name, 40)}", class_="accepted"),
        ),
    )


def _answer(row: Mapping[str, Any], score: float) -> Html:
    return element("li", element("q", _said(row)), _read_as(row), " ", _badge(score))


def _pass(row: Mapping[str, Any]) -> Html:
    """One order of the options: which was right, and what was said."""
    right = "".join(map(str, row.get("answers") or []))[:1]
    options = row.get("options")
    text = f" {_cut(str(options[right]), 60)}" if isinstance(options, Mapping) and right in options else ""
    return element(
        "li",
        element("span", f"right: {right}.{text}", class_="who"),
        " ",
        element("q", _said(row)),
        _read_as(row),
        " ",
        _badge(float(row["score"] or 0.0)),
    )


def _said(row: Mapping[str, Any]) -> str:
    return _cut(str(row.get("prediction", ""))) or "(nothing)"


def _read_as(row: Mapping[str, Any]) -> str:
    """Which option was read out of an answer, where that is not what it says."""
    if "choice" not in row or str(row["choice"]) == str(row.get("prediction", "")).strip(" ."):
        return ""
    return " no option can be read" if row["choice"] is None else f" read as {row['choice']}"


def _accepted(answers: Any) -> str:
    found = Counter(_cut(str(answer), 60) for answer in answers) if isinstance(answers, list) else Counter()
    told = [f"{answer} ×{times}" if times > 1 else answer for answer, times in found.most_common(5)]
    more = f", and {len(found) - len(told)} more" if len(found) > len(told) else ""
    return f"accepted: {', '.join(told)}{more}"


def _options(options: Any, answers: Any) -> list[Html]:
    if not isinstance(options, Mapping) or not options:
        return []
    right = {str(answer) for answer in answers} if isinstance(answers, list) else set()
    shown = list(options.items())[:8]
    return [
        element("p", f"{'✓ ' if letter in right else ''}{letter}. {_cut(str(text), 80)}", class_="accepted")
        for letter, text in shown
    ]


def _badge(score: float) -> Html:
    word = "right" if score >= 1 else "wrong" if score <= 0 else f"{score:.2g}"
    return element("span", word, class_=f"badge {word}")


def _turn(row: Mapping[str, Any]) -> int:
    name = row["question_id"]
    return name // ROTATION if isinstance(name, int) else 0


def _cut(text: str, longest: int = _LONGEST) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
