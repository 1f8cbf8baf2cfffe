"""The report of an exploration as one HTML file: findings first, then advice, then plots, tables and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mgm_exp import page
from mgm_exp.data.exploration import galleries
from mgm_exp.data.exploration.advice import Advice
from mgm_exp.data.exploration.exploration import Exploration
from mgm_exp.data.exploration.findings import Finding
from mgm_exp.data.exploration.numbers import counted, interval, number, ratio, share
from mgm_exp.data.exploration.plots import Plot
from mgm_exp.page import Column, Html, Tile


def report(
    exploration: Exploration, findings: Sequence[Finding], advice: Sequence[Advice], plots: Mapping[str, Plot]
) -> str:
    """The page as HTML."""
    content = exploration.content
    whole = page.Page(exploration.name, _subtitle(content), kicker="Exploration of a dataset")
    whole.add(page.tiles(_tiles(content)))
    whole.add(
        page.section(
            "What stands out",
            page.findings(page.finding(item.level, item.sentence, *filter(None, [item.more])) for item in findings),
            anchor="findings",
        ),
        contents=("findings", "What stands out"),
    )
    if advice:
        whole.add(_advice(advice), contents=("advice", "Recipe"))
    whole.add(_captions(exploration, plots), contents=("captions", "Captions"))
    whole.add(_diversity(content["text"], plots), contents=("diversity", "Diversity"))
    if content["images"] is not None:
        whole.add(_images(exploration, plots), contents=("images", "Images"))
    whole.add(_words(), contents=("definitions", "How it was counted"))
    whole.foot(
        "This page is one file and loads nothing. The same numbers, and more, stand in explore.json beside it; the "
        "plots "
        "as PNG files in plots/.",
    )
    return whole.html()


def _subtitle(content: dict[str, Any]) -> str:
    parts = [counted(content["rows"], "row")]
    if content["images"] is not None:
        parts.append(counted(content["images"]["count"], "image"))
    parts.append(counted(content["text"]["tokens"], "word"))
    sample = content["sample"]
    if sample is not None:
        parts.append(f"a random sample of {sample['rows']:,} rows")
    return " · ".join(parts)


def _tiles(content: dict[str, Any]) -> list[Tile]:
    text, images = content["text"], content["images"]
    bad = sum(content["bad_rows"].values())
    short = text["too_short_share"] or 0
    found = [
        Tile(
            "Rows",
            f"{content['rows']:,}",
            f"{bad:,} cannot be read" if bad else "all can be read",
            "problem" if bad else None,
        ),
        Tile("Words a caption", number(text["words_mean"]), f"median {number(text['words_median'])}"),
        Tile(
            "Under 4 words",
            share(short),
            counted(round(short * text["captions"]), "caption"),
            "warning" if short > 0.01 else None,
        ),
        Tile(
            "Repeated captions",
            share(text["duplicate_share"]),
            counted(text["duplicates"]["captions"], "copy", "copies"),
            "warning" if (text["duplicate_share"] or 0) > 0.05 else None,
        ),
        Tile("MATTR-50", ratio(text["mattr_50"]), interval(*text["mattr_50_interval"].values())),
    ]
    if images is not None:
        unusable = images["missing"] + images["broken"]
        found.append(
            Tile("Unusable images", f"{unusable:,}", f"of {images['count']:,}", "problem" if unusable else "good")
        )
    return found


def _advice(advice: Sequence[Advice]) -> Html:
    columns = [
        Column("data.recipe. …"),
        Column("Limit", True),
        Column("Percentile", True),
        Column("Drops", True),
        Column("Why"),
    ]
    rows = [
        (
            item.key.removeprefix("data.recipe."),
            (f"{item.value:g}", item.value),
            item.percentile or "–",
            (share(item.dropped), item.dropped),
            item.why,
        )
        for item in advice
    ]
    return page.section(
        "A recipe for this data",
        page.paragraph(
            "Limits taken from this data, as keys of the configuration. Each drops the share beside it; together "
            "they drop "
            "less than the sum. None of them is a must: train with and without, and compare."
        ),
        page.table(columns, rows),
        page.paragraph("As a command line, with the recipe that also recaptions (data=blip2):"),
        page.code(command(advice)),
        page.note(
            "A limit may also be given as a percentile, such as data.recipe.words_num.min=p5: it is then taken from "
            "whatever data the recipe meets."
        ),
        anchor="advice",
    )


def command(advice: Sequence[Advice]) -> str:
    """The limits as they are typed."""
    return " \\\n  ".join(["python -m mgm_exp data=blip2 data.path=...", *(item.override() for item in advice)])


def _captions(exploration: Exploration, plots: Mapping[str, Plot]) -> Html:
    text = exploration.content["text"]
    shown = [plots[name] for name in ("words", "tokens", "top_words", "repetition", "similarity") if name in plots]
    names = ("1", "5", "25", "50", "75", "95", "99")
    measured = [
        ("Words", text["words_mean"], text["words_percentiles"], number),
        ("Characters", text["characters_mean"], text["characters_percentiles"], number),
        ("Words as Data-Juicer counts them", text["words_num"]["mean"], text["words_num"]["percentiles"], number),
        ("Special characters", text["special_characters"]["mean"], text["special_characters"]["percentiles"], ratio),
    ]
    for key, title in (
        ("word_2", "Repetition, 2 words"),
        ("character_5", "Repetition, 5 characters"),
        ("word_10", "Repetition, 10 words"),
        ("character_10", "Repetition, 10 characters"),
    ):
        measured.append((title, text["repetition"][key]["mean"], text["repetition"][key]["percentiles"], ratio))
    if text["token_lengths"] is not None:
        lengths = text["token_lengths"]
        measured.insert(2, ("Tokens of the model", lengths["mean"], lengths["percentiles"], number))
    rows = [
        (title, (form(mean), mean), *((form(at[name]), at[name]) if name in at else "–" for name in names))
        for title, mean, at, form in measured
    ]
    columns = [Column("Value of a caption"), Column("Mean", True)]
    columns += [Column("Median" if name == "50" else f"p{name}", True) for name in names]
    languages = [(name, (share(value), value)) for name, value in list(text["languages"].items())[:12]]
    return page.section(
        "Captions",
        galleries.figures(shown),
        page.table(columns, rows),
        page.note(
            f"{share(text['sentences']['several_share'])} of captions have more than one sentence (at most "
            f"{text['sentences']['max']:,})."
        ),
        *galleries.extremes(exploration),
        *galleries.misfits(exploration),
        *galleries.repeated(exploration),
        page.details(
            "Language of each caption (a guess)",
            page.table([Column("Language"), Column("Captions", True)], languages),
            page.note(
                "From function words and scripts. Captions without any, such as names and titles, are undecided."
            ),
        ),
        anchor="captions",
    )


def _diversity(text: dict[str, Any], plots: Mapping[str, Plot]) -> Html:
    rows: list[tuple[Any, ...]] = [
        (
            "MATTR-50",
            (ratio(text["mattr_50"]), text["mattr_50"]),
            interval(*text["mattr_50_interval"].values()),
            "yes: a mean over windows of 50 words",
        )
    ]
    for size, estimate in text["ttr_at"].items():
        between = interval(estimate["ci_low"], estimate["ci_high"])
        value = estimate["value"]
        rows.append(
            (f"TTR at {int(size):,} words", (ratio(value), value), between, f"with others at {int(size):,} words")
        )
    for key, title in (("distinct_1", "Distinct words / all words"), ("distinct_2", "Distinct pairs / all pairs")):
        value = text[key]
        rows.append((title, (ratio(value), value), "", f"only with data of {text['tokens']:,} words"))
    columns = [Column("Measure"), Column("Value", True), Column("95 % interval", True), Column("Can it be compared?")]
    return page.section(
        "Diversity that can be compared",
        page.paragraph(
            "The more one reads, the rarer a new word becomes. So the ratio of distinct words to all words falls "
            "with the "
            "size of the data, whatever its variety, and a small subset always looks more diverse than the whole. "
            "What is "
            "shown here does not have that fault, or says at which size it was taken."
        ),
        galleries.figures([plots[name] for name in ("type_token_ratio", "vocabulary_growth") if name in plots]),
        page.table(columns, rows, is_sortable=False),
        anchor="diversity",
    )


def _images(exploration: Exploration, plots: Mapping[str, Plot]) -> Html:
    images = exploration.content["images"]
    names = ("1", "5", "25", "50", "75", "95", "99")
    measured = [
        ("Width, pixels", images["width_percentiles"], number),
        ("Height, pixels", images["height_percentiles"], number),
        ("Width : height", images["aspect_percentiles"], lambda value: f"{value:.2f}"),
        ("Kilobytes", {key: value / 1000 for key, value in images["bytes_percentiles"].items()}, number),
    ]
    rows = [
        (title, *((form(at[name]), at[name]) if name in at else "–" for name in names)) for title, at, form in measured
    ]
    columns = [Column("Value of an image"), *(Column("Median" if name == "50" else f"p{name}", True) for name in names)]
    kinds = ", ".join(f"{name} ({count:,})" for name, count in images["formats"].items())
    modes = ", ".join(f"{name} ({count:,})" for name, count in images["modes"].items())
    return page.section(
        "Images",
        galleries.figures(
            [plots[name] for name in ("image_sizes", "image_aspects", "image_bytes", "image_contrast") if name in plots]
        ),
        page.table(columns, rows),
        page.note(f"Formats: {kinds or 'none'}. Modes: {modes or 'none'}."),
        *galleries.images(exploration),
        anchor="images",
    )


def _words() -> Html:
    return page.section(
        "How it was counted",
        page.definitions(
            [
                (
                    "Word",
                    "What stands between white space, as written, after special tokens (<__dj__image>, "
                    "<|__dj__eoc|>) were "
                    "taken away. Data-Juicer's own count leaves out words of digits and symbols alone; it is what a "
                    "recipe's "
                    "words_num limits.",
                ),
                ("Caption", "The caption of a row, or each answer of a conversation."),
                (
                    "MATTR-50",
                    "Mean over all windows of 50 words of their distinct words / 50. The interval is a bootstrap over "
                    "blocks of 500 windows.",
                ),
                (
                    "TTR at N",
                    "Distinct words / words of N words, drawn caption by caption without replacement; mean of the "
                    "draws. The interval is their spread, widened because draws of one dataset overlap.",
                ),
                (
                    "Repeated",
                    "Equal in every character. Nearly the same: 70 % of words and word pairs in common, found with "
                    "MinHash and checked exactly.",
                ),
                (
                    "Same image",
                    "Perceptual hashes (64 bits, discrete cosine transform) that differ in 4 bits at most, and a "
                    "coarse picture that agrees.",
                ),
                ("Repetition", "Data-Juicer's word and character repetition of each caption, without special tokens."),
            ]
        ),
        anchor="definitions",
    )
