"""What the runs answered: accuracy by type of question, how varied the answers are, and where two runs disagree."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp import page
from mgm_exp.compare.html.overview import badge, swatch
from mgm_exp.compare.html.view import Cells, View
from mgm_exp.compare.runs import Run
from mgm_exp.compare.wording import percent, signed
from mgm_exp.page import Column, Html, element, join
from mgm_exp.store import parse_record, read_record

_MOST_COLUMNS = 8
_MOST_ANSWERED = 24
"""Runs whose answers are read: a large sweep has millions of them."""
_MOST_PAIRS = 4
_SHOWN = 9
"""Questions shown for each side of a pair."""
_LONGEST = 160
_PICTURE = 168  # pixels of the longer side
_MOST_PIXELS = 50_000_000
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

Rows = dict[str, Mapping[str, Any]]
"""Lines of a benchmark's predictions by question id."""


def _ranked(view: View, benchmark: str, most: int) -> list[int]:
    """The baseline and the highest completed runs, in the order of the comparison."""
    scored = [place for place, entry in view.completed if view.accuracy(entry, benchmark) is not None]

    def rank(place: int) -> tuple[bool, float]:
        entry = view.entries[place]
        return (not view.is_baseline(entry), -(view.accuracy(entry, benchmark) or 0.0))

    return sorted(sorted(scored, key=rank)[:most])


# -- types of questions ------------------------------------------------------------------------------------------------


def question_types(view: View) -> Html | None:
    """A table for each benchmark: type of question by run, with the number of questions. None without types."""
    blocks = []
    for benchmark in view.comparison["benchmarks"]:
        places = _ranked(view, benchmark, _MOST_COLUMNS)
        prefix = f"{benchmark}/accuracy["
        kinds: dict[str, int] = {}
        for place in places:
            for name, found in view.entries[place]["metrics"].items():
                if name.startswith(prefix) and found["n"]:
                    kinds.setdefault(name.removeprefix(prefix).removesuffix("]"), int(found["n"]))
        if len(kinds) < 2:
            continue
        columns = [
            Column("type of question"),
            Column("n", is_number=True),
            *(Column(view.entries[place]["label"], is_number=True) for place in places),
        ]
        rows: list[Cells] = [
            [kind, (f"{n:,}", float(n)), *(_cell(view.entries[place], f"{prefix}{kind}]") for place in places)]
            for kind, n in sorted(kinds.items(), key=lambda pair: -pair[1])
        ]
        remark = f"Accuracy on {benchmark} in percent, 95 % intervals below. The fewer questions, the wider."
        if len(places) < len(view.completed):
            remark += f" The baseline and the highest {len(places) - 1} of {len(view.completed)} runs are shown."
        blocks += [page.table(columns, rows, name=f"Accuracy by type of question, {benchmark}"), page.note(remark)]
    return page.section("By type of question", *blocks, anchor="types") if blocks else None


def _cell(entry: Mapping[str, Any], name: str) -> tuple[Html | str, float | None]:
    found = entry["metrics"].get(name)
    if found is None:
        return "-", None
    value = percent(found["value"])
    if found["ci_low"] is not None:
        value = join([value, element("small", f"{percent(found['ci_low'])} – {percent(found['ci_high'])}")], " ")
    tint = element("span", value, class_=f"heat h{min(4, int(found['value'] * 5))}")
    return tint, found["value"]


# -- answers -----------------------------------------------------------------------------------------------------------


def read_rows(run: Run, benchmark: str) -> Rows:
    """Predictions of a run by question id; what is damaged is left out here, the comparison has refused it already."""
    rows: Rows = {}
    try:
        with (run.path / "predictions" / f"{benchmark}.jsonl").open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    row = parse_record(text)
                except ValueError:
                    continue
                if isinstance(row, dict) and "question_id" in row and "score" in row:
                    rows[str(row["question_id"])] = row
    except OSError:
        return {}
    return rows


def read_answers(view: View) -> dict[tuple[str, str], Rows]:
    """(run, benchmark) -> predictions, of the runs that are looked at closely."""
    found = {}
    for benchmark in view.comparison["benchmarks"]:
        for place in _ranked(view, benchmark, _MOST_ANSWERED):
            name = view.entries[place]["run_dir"]
            run = view.run(name)
            if run is not None:
                found[name, benchmark] = read_rows(run, benchmark)
    return found


def statistics_of(rows: Rows) -> dict[str, Any]:
    """How varied the answers of a run are: ``n, distinct, words, empty, top``; case and spaces do not count."""
    answers = [" ".join(str(row.get("prediction", "")).lower().split()) for row in rows.values()]
    counted = Counter(answers)
    return {
        "n": len(answers),
        "distinct": len(counted),
        "words": sum(len(answer.split()) for answer in answers) / max(1, len(answers)),
        "empty": counted.get("", 0),
        "top": counted.most_common(4),
    }


def answer_statistics(view: View, answers: Mapping[tuple[str, str], Rows]) -> Html | None:
    """Diversity, length and the most frequent answers of each run: a model that collapsed says one thing to all."""
    blocks = []
    for benchmark in view.comparison["benchmarks"]:
        rows: list[Cells] = []
        for place, entry in view.completed:
            found = answers.get((entry["run_dir"], benchmark))
            if not found:
                continue
            facts = statistics_of(found)
            top = ", ".join(
                f"{_cut(answer, 24) or '(nothing)'} {times / facts['n']:.1%}" for answer, times in facts["top"]
            )
            wrong = view.link(entry["run_dir"], f"galleries/{benchmark}.html")
            rows.append(
                [
                    join(
                        [
                            swatch(place),
                            entry["label"],
                            element("small", element("a", "wrong answers", href=wrong)) if wrong else "",
                        ],
                        " ",
                    ),
                    (f"{facts['distinct']:,} of {facts['n']:,}", float(facts["distinct"])),
                    (f"{facts['words']:.2f}", facts["words"]),
                    (f"{facts['empty']:,}", float(facts["empty"])),
                    top,
                ]
            )
        if rows:
            columns = [
                Column("run"),
                Column("different answers", is_number=True),
                Column("words each", is_number=True),
                Column("empty", is_number=True),
                Column("most frequent answers"),
            ]
            table = page.table(columns, rows, name=f"What was answered, {benchmark}")
            is_one = len(view.comparison["benchmarks"]) == 1
            blocks.append(table if is_one else page.subsection(benchmark, table))
    return page.section("Answers", *blocks, anchor="answers") if blocks else None


# -- where two runs disagree -------------------------------------------------------------------------------------------


def disagreements(view: View, answers: Mapping[tuple[str, str], Rows]) -> Html | None:
    """Questions that only one of two runs answers right, with their images where those can be found."""
    blocks: list[Html] = []
    for benchmark in view.comparison["benchmarks"]:
        for pair in _interesting(view, benchmark):
            first, second = (_known(view, pair[side], benchmark, answers) for side in ("a", "b"))
            if first is None or second is None:
                continue
            sides = list(_sides(view, pair, first, second, benchmark, answers))
            if sides:
                title = f"{view.label(pair['b'])} and {view.label(pair['a'])} on {benchmark}"
                said = f"{title}: {signed(pair['difference'])} points, {pair['verdict']}"
                blocks.append(page.details(said, *sides, is_open=not blocks))
    if not blocks:
        return None
    remark = page.note("Questions are chosen by a hash of their ids, not by what looks good.")
    return page.section("Where two runs disagree", remark, *blocks, anchor="disagreements")


def _interesting(view: View, benchmark: str) -> list[Mapping[str, Any]]:
    """The highest, the lowest, and the next highest pairs of a benchmark."""
    pairs = [pair for pair in view.comparison["pairs"] if pair["benchmark"] == benchmark]
    ordered = sorted(pairs, key=lambda pair: -pair["difference"])
    return ordered if len(ordered) <= _MOST_PAIRS else [*ordered[: _MOST_PAIRS - 1], ordered[-1]]


def _known(view: View, name: str, benchmark: str, answers: Mapping[tuple[str, str], Rows]) -> str | None:
    """The first run behind a name whose answers were read."""
    return next((member for member in view.members(name) if answers.get((member, benchmark))), None)


def _sides(
    view: View,
    pair: Mapping[str, Any],
    first: str,
    second: str,
    benchmark: str,
    answers: Mapping[tuple[str, str], Rows],
) -> Iterator[Html]:
    left, right = answers[first, benchmark], answers[second, benchmark]
    shared = sorted(left.keys() & right.keys(), key=lambda name: hashlib.blake2b(name.encode()).digest())
    run_a, run_b = view.run(first), view.run(second)
    roots = [root for run in (run_a, run_b) if run for root in image_roots(run, benchmark)]
    for winner, wins in (
        (pair["b"], [name for name in shared if _score(right[name]) > _score(left[name])]),
        (pair["a"], [name for name in shared if _score(left[name]) > _score(right[name])]),
    ):
        if not wins:
            continue
        more = f"{len(wins):,} of {len(shared):,} questions are answered better by {view.label(winner)}"
        more += f"; {_SHOWN} of them:" if len(wins) > _SHOWN else ":"
        cards = [
            _card(left[name], right[name], (view.label(pair["a"]), view.label(pair["b"])), roots)
            for name in wins[:_SHOWN]
        ]
        yield page.subsection(more, element("ul", *cards, class_="cards"))


def _score(row: Mapping[str, Any]) -> float:
    score = row["score"]
    return float(score) if isinstance(score, (int, float)) else 0.0


def _card(left: Mapping[str, Any], right: Mapping[str, Any], names: tuple[str, str], roots: Sequence[Path]) -> Html:
    question = _cut(str(left.get("question", "")), _LONGEST)
    picture = thumbnail(str(left.get("image") or ""), roots)
    given = left.get("answers")
    accepted = Counter(str(answer) for answer in given) if isinstance(given, list) else Counter([str(given)])
    told = ", ".join(_cut(answer, 40) for answer, _ in accepted.most_common(3))
    lines = []
    for name, row in zip(names, (left, right), strict=True):
        score = _score(row)
        said = _cut(str(row.get("prediction", "")), _LONGEST) or "(nothing)"
        mark = badge("right" if score == 1 else "wrong" if score == 0 else f"{score:.1f}")
        lines.append(element("li", element("span", name, class_="who"), " ", element("q", said), " ", mark))
    source = f"data:image/jpeg;base64,{base64.b64encode(picture).decode('ascii')}" if picture else ""
    return element(
        "li",
        element("img", src=source, alt=f"image {left.get('image_id', '')}") if picture else Html(""),
        element(
            "div",
            element("p", question, class_="question"),
            element("p", f"accepted: {told}", class_="accepted"),
            element("ul", *lines),
        ),
    )


def _cut(text: str, longest: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


# -- images ------------------------------------------------------------------------------------------------------------


def image_roots(run: Run, benchmark: str) -> list[Path]:
    """Folders that the images of a benchmark may lie in: from the configuration, the data, and the stages of a run."""
    named = [run.config.get(f"eval.{benchmark}.images"), run.config.get("data.image_root")]
    try:
        data = read_record(run.path / "data.json")
    except (OSError, ValueError):
        data = {}
    for stage in ("instruct", "align"):
        part = data.get(stage) if isinstance(data, dict) else None
        named.append(part.get("image_root") if isinstance(part, dict) else None)
    roots = [Path(name) for name in named if isinstance(name, str) and name]
    # What was generated lies in the store beside the runs, also after both were moved.
    stages = run.manifest.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        name, key = (str(stage.get(what)) for what in ("name", "key")) if isinstance(stage, dict) else ("", "")
        if name == "demo" and key.isalnum():
            roots += [folder / "store" / name / key for folder in list(run.path.resolve().parents)[:5]]
    return list(dict.fromkeys(root for root in roots if root.is_dir()))


def thumbnail(name: str, roots: Sequence[Path]) -> bytes | None:
    """A small JPEG of an image below one of the roots; None where it is not there, too large, or no image."""
    from PIL import Image

    if not name or Path(name).is_absolute():
        return None
    for root in roots:
        place = (root / name).resolve()
        if root.resolve() not in place.parents or not place.is_file():
            continue
        try:
            with Image.open(place, formats=_FORMATS) as opened:
                if opened.width * opened.height > _MOST_PIXELS:
                    return None
                opened.draft("RGB", (2 * _PICTURE, 2 * _PICTURE))
                return page.thumbnail(opened, _PICTURE)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None  # a damaged image is shown as none
    return None
