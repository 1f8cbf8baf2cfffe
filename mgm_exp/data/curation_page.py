"""The page of a curation: what became of the rows in words, step by step, in numbers, and in pictures.

    write_page(out, name="blip2", images={"align": root, "instruct": root}, recaption=None)

It reads ``report.json`` and ``examples.json`` of a curated folder and writes ``report.html`` beside them: one file that
loads nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp import page
from mgm_exp.data.fates import EXAMPLES_FILE, Example
from mgm_exp.data.images import ImageFault, open_image
from mgm_exp.data.reports import CurationReport, StageReport, read_report
from mgm_exp.store import write_atomic

PAGE = "report.html"

_THUMBNAIL = 176  # pixels of the longer side
_OPERATORS = {
    "words_num": "words",
    "text_length": "characters",
    "word_repetition": "repeated words",
    "character_repetition": "repeated characters",
    "image_shape": "size of the image",
    "image_text_similarity": "similarity of image and text",
    "image_text_matching": "match of image and text",
    "watermark": "watermark",
}
_STEPS = {
    "rows": "rows that can be read",
    "images": "images that open",
    "recaption": "new captions",
    "trainable": "something to learn",
    "augment": "augmentation",
    **_OPERATORS,
}
_TITLES = {
    "changed": "New captions",
    "kept": "Kept as they were",
    "augment": "Added by augmentation",
    "images": "Dropped: image cannot be used",
    "trainable": "Dropped: nothing to learn",
}


def write_page(
    folder: Path,
    *,
    name: str,
    images: Mapping[str, Path],
    recaption: Mapping[str, Any] | None,
    max_megapixels: float = 50.0,
) -> Path:
    """Writes ``report.html`` into a curated folder.

    Args:
        folder: With ``report.json`` and ``examples.json``.
        name: Of the data (``data.name``).
        images: Image root of each stage.
        recaption: What the recaption stage says of itself; None where nothing was recaptioned.
        max_megapixels: Larger images are not shown.
    """
    report = read_report(folder)
    examples = json.loads((folder / EXAMPLES_FILE).read_text(encoding="utf-8"))
    align = report.stages["align"]
    document = page.Page(
        f"Curation: {name}", f"{align.file}: {align.rows:,} rows, {align.kept:,} kept", kicker="mgm_exp data"
    )
    document.add(
        page.section("In words", page.findings(_findings(report, recaption)), anchor="words"),
        contents=("words", "In words"),
    )
    for stage, found in report.stages.items():
        title = "Captions (align stage)" if stage == "align" else "Conversations (instruct stage)"
        document.add(page.section(title, *_numbers(found), anchor=stage), contents=(stage, title))
        shown = list(_galleries(examples.get(stage, {}), images[stage], max_megapixels))
        if shown:
            anchor = f"{stage}-examples"
            document.add(
                page.section(f"Examples: {stage}", *shown, anchor=anchor), contents=(anchor, f"Examples: {stage}")
            )
    document.foot(
        "Examples are chosen by a hash of their ids. The fate of every row stands in fates-align.jsonl and "
        "fates-instruct.jsonl; rows that cannot be used are named with their place in rejected.jsonl.",
        f"Fingerprint of the data: {report.fingerprint}",
    )
    write_atomic(folder / PAGE, document.html())
    return folder / PAGE


# -- in words ----------------------------------------------------------------------------------------------------------


def _findings(report: CurationReport, recaption: Mapping[str, Any] | None) -> Iterator[page.Html]:
    align = report.stages["align"]
    source = align.waterfall[0]["rows_in"]
    added = sum(step["added"] for step in align.waterfall)
    dropped = sum(align.dropped.values())
    kept = align.kept - added if added <= align.kept else align.kept
    sentence = f"{kept / source:.1%} of the {source:,} rows are kept." if source else "There are no rows."
    steps = [f"{count:,} by {_STEPS.get(name, name)}" for name, count in align.dropped.items() if count]
    more = [f"The recipe drops {', '.join(steps)}."] if steps else []
    if added:
        more.append(f"{added:,} rows were added, so that {align.kept:,} are trained on.")
    yield page.finding("note" if dropped else "good", sentence, *more)
    if align.rejected:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in align.rejected.items())
        yield page.finding("warning", f"{sum(align.rejected.values()):,} rows cannot be used: {kinds}.")
    if recaption is not None:
        yield _about_captioner(recaption)
    if align.raw_text is not None:
        yield _about_change(align.raw_text, align.text)
    share = align.text["too_short_share"]
    if share:
        yield page.finding(
            "warning" if share > 0.1 else "note", f"{share:.1%} of what is learnt has fewer than 4 words."
        )
    damaged = align.changed.get("damaged_text", 0)
    if damaged:
        yield page.finding(
            "warning",
            f"{damaged:,} texts hold control characters, mojibake or foreign tokens.",
            "They are used as they are; mgm-exp validate --fix writes a repaired copy of the data.",
        )


def _about_captioner(recaption: Mapping[str, Any]) -> page.Html:
    sentence = f"{recaption['recaptioned']:,} captions were written by {recaption['captioner']}."
    more = []
    accuracy = recaption.get("accuracy")
    if accuracy and accuracy["n"]:
        shares = ", ".join(
            f"{key} {accuracy[key]:.1%}" for key in ("type", "colour", "shape", "text") if accuracy[key] is not None
        )
        more.append(f"Measured on {accuracy['n']:,} generated scenes, whose content is known: {shares}.")
    if recaption["kept_raw"]:
        more.append(f"{recaption['kept_raw']:,} rows keep their own caption.")
    return page.finding("note", sentence, *more)


def _about_change(raw: Mapping[str, Any], new: Mapping[str, Any]) -> page.Html:
    sentence = f"Captions went from {raw['words_mean']:.1f} to {new['words_mean']:.1f} words on average."
    more = []
    size = _common_size(raw, new)
    if size is not None:
        before, after = raw["ttr_at"][size], new["ttr_at"][size]
        more.append(
            f"Diversity at equal size: the type-token ratio at {int(size):,} tokens is {after['value']:.3f}, and was "
            f"{before['value']:.3f}."
        )
    return page.finding("note", sentence, *more)


# -- in numbers --------------------------------------------------------------------------------------------------------


def _numbers(found: StageReport) -> Iterator[page.Html]:
    yield page.tiles(
        [
            page.Tile("rows", f"{found.rows:,}", found.file),
            page.Tile("kept", f"{found.kept:,}", "augmentation included" if found.changed.get("duplicated") else ""),
            page.Tile("images", f"{found.images:,}"),
            page.Tile("tokens to learn", f"{found.supervised_tokens:,}"),
            page.Tile("truncated", f"{found.truncated:,}", f"longer than {found.max_length:,} tokens"),
        ]
    )
    yield page.figure(_waterfall_drawing(found.waterfall), "What became of the rows, step by step")
    columns = [
        page.Column("step"),
        *(page.Column(name, True) for name in ("rows", "dropped", "changed", "added", "left")),
    ]
    rows = [
        (
            _STEPS.get(step["step"], step["step"]),
            *((f"{step[key]:,}", step[key]) for key in ("rows_in", "dropped", "changed", "added", "rows_out")),
            step.get("limit") or ", ".join(f"{count:,} {kind}" for kind, count in step.get("kinds", {}).items()),
        )
        for step in found.waterfall
    ]
    yield page.table([*columns, page.Column("limit, or why")], rows, is_sortable=False)
    yield page.subsection("What is learnt", _text_table(found))


def _text_table(found: StageReport) -> page.Html:
    """Statistics of the answers, beside those of the captions that they replaced."""
    both = [found.text] if found.raw_text is None else [found.raw_text, found.text]
    names = ["value"] if len(both) == 1 else ["as found", "as learnt"]
    size = _common_size(*both)
    rows: list[Sequence[str]] = [
        ("captions or answers", *(f"{text['captions']:,}" for text in both)),
        ("words, mean", *(_number(text["words_mean"], ".2f") for text in both)),
        ("words, median", *(_number(text["words_median"], ".0f") for text in both)),
        ("fewer than 4 words", *(_number(text["too_short_share"], ".1%") for text in both)),
        ("characters, mean", *(_number(text["characters_mean"], ".1f") for text in both)),
        ("said more than once", *(_number(text["duplicate_share"], ".1%") for text in both)),
        ("words in all", *(f"{text['tokens']:,}" for text in both)),
        ("different words", *(f"{text['vocabulary']:,}" for text in both)),
        ("MATTR-50", *(_number(text["mattr_50"], ".3f") for text in both)),
    ]
    if size is not None:
        ratios = [text["ttr_at"][size] for text in both]
        rows.append((f"type-token ratio at {int(size):,} words", *(_number(ratio["value"], ".3f") for ratio in ratios)))
    return page.table([page.Column(""), *(page.Column(name, True) for name in names)], rows, is_sortable=False)


def _common_size(*texts: Mapping[str, Any]) -> str | None:
    """The largest number of tokens at which all have a type-token ratio."""
    sizes = [{int(n) for n, ratio in text["ttr_at"].items() if ratio["value"] is not None} for text in texts]
    common = set.intersection(*sizes)
    return str(max(common)) if common else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _waterfall_drawing(steps: Sequence[Mapping[str, Any]]) -> page.Html:
    """A bar for each step: rows that are left, and those that it drops."""
    height, left, width = 30, 180, 460
    most = max([step["rows_in"] for step in steps] + [step["rows_out"] for step in steps] + [1])
    ink, soft, blue, orange = (page.THEME[name] for name in ("ink", "soft", "a", "b"))
    parts = []
    for number, step in enumerate(steps):
        y = 8 + number * height
        kept = width * (step["rows_out"]) / most
        gone = width * step["dropped"] / most
        name = str(page.element("text", _STEPS.get(step["step"], step["step"]), x=left - 12, y=y + 15, fill=ink,
                                text_anchor="end", style="font-size: 13px"))  # fmt: skip
        parts.append(name.replace("text_anchor", "text-anchor"))
        parts.append(f'<rect x="{left}" y="{y}" width="{max(kept, 0.5):.1f}" height="20" rx="3" fill="{blue}"/>')
        if step["dropped"]:
            parts.append(
                f'<rect x="{left + kept:.1f}" y="{y}" width="{max(gone, 1.5):.1f}" height="20" rx="3" fill="{orange}"/>'
            )
        counts = [f"{step['rows_out']:,}"]
        counts += [f"{sign}{step[key]:,}" for key, sign in (("dropped", "−"), ("added", "+")) if step[key]]
        counts += [f"{step['changed']:,} changed"] if step["changed"] else []
        parts.append(
            f'<text x="{left + kept + gone + 8:.1f}" y="{y + 15}" fill="{soft}" style="font-size: 12px">'
            f"{page.join([', '.join(counts)])}</text>"
        )
    total = left + width + 170
    drawing = f'<svg viewBox="0 0 {total} {len(steps) * height + 8}">{"".join(parts)}</svg>'
    return page.inline_svg(drawing, "Rows that are left after each step, and rows that it drops")


# -- in pictures -------------------------------------------------------------------------------------------------------


def _galleries(steps: Mapping[str, Any], root: Path, max_megapixels: float) -> Iterator[page.Html]:
    order = ["changed", *_OPERATORS, "images", "trainable", "augment", "kept"]
    for step in sorted(steps, key=lambda name: order.index(name) if name in order else len(order)):
        title = _TITLES.get(step) or f"Dropped: {_STEPS.get(step, step)}"
        examples = [Example(**example) for example in steps[step]]
        yield page.subsection(title, page.gallery(_items(examples, root, max_megapixels)))


def _items(examples: Iterable[Example], root: Path, max_megapixels: float) -> Iterator[page.Item]:
    for example in examples:
        is_new = example.after is not None and example.after != example.before
        title = example.after if is_new else example.before
        details = [f"before: {example.before}"] if is_new else []
        details += [example.note] if example.note else []
        picture = None if example.image is None else _thumbnail(root, example.image, max_megapixels)
        yield page.Item(picture, title or "", " · ".join([*details, example.id]))


def _thumbnail(root: Path, image: str, max_megapixels: float) -> page.Html | None:
    try:
        picture = open_image(root, image, max_megapixels)
    except ImageFault:
        return None
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=82)
    return page.image(content.getvalue(), "jpeg", image)
