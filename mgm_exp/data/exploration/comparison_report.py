"""The comparison of two datasets as a report: findings in words, plots of both, what changed, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp import page
from mgm_exp.data.exploration import galleries
from mgm_exp.data.exploration.compare import SHARES, Comparison, Difference
from mgm_exp.data.exploration.comparison_plots import comparison_plots
from mgm_exp.data.exploration.findings import Finding
from mgm_exp.data.exploration.numbers import counted, number, ratio, share
from mgm_exp.data.exploration.plots import Plot
from mgm_exp.data.exploration.summary import plain
from mgm_exp.data.exploration.writing import RESULT
from mgm_exp.page import Column, Html, Tile
from mgm_exp.store import disk_full_named, write_atomic, write_json_atomic


def write_comparison(comparison: Comparison, folder: Path) -> list[Finding]:
    """Writes explore.json (of both, and how they differ), report.html, summary.md and plots/*.png.

    Returns:
        The findings, for the screen.
    """
    findings = comparison_findings(comparison)
    plots = comparison_plots(comparison)
    result = {**comparison.content, "findings": [finding.to_json() for finding in findings]}
    with disk_full_named(folder):
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        for plot in plots.values():
            write_atomic(folder / "plots" / f"{plot.name}.png", plot.png)
        write_atomic(folder / "report.html", comparison_report(comparison, findings, plots).encode("utf-8"))
        write_atomic(folder / "summary.md", comparison_summary(comparison, findings).encode("utf-8", "replace"))
        write_json_atomic(folder / RESULT, result)
    return findings


# -- findings --------------------------------------------------------------------------------------------------------


def comparison_findings(comparison: Comparison) -> list[Finding]:
    """What the differences say, in sentences."""
    found = [*_size_artefact(comparison), *_matched(comparison), *_lengths(comparison), *_diversity(comparison)]
    images = comparison.content["comparison"]["images"]
    if images is not None:
        found.append(
            Finding(
                "note",
                f"{counted(images['in_both'], 'picture is', 'pictures are')} in both, byte for byte; "
                f"{images['only_in_a']:,} only in A, {images['only_in_b']:,} only in B.",
            )
        )
    return found


def best(comparison: Comparison, name: str) -> Difference | None:
    """The difference of a measure: over matched rows where there are any."""
    named = [item for item in comparison.differences if item.name == name and not item.refused]
    return max(named, key=lambda item: item.is_paired, default=None)


def _size_artefact(comparison: Comparison) -> list[Finding]:
    naive = next(item for item in comparison.differences if item.name.startswith("distinct words"))
    # Over all captions, as the plain ratio is; not over those that both have.
    fair = next(item for item in comparison.differences if item.name == "MATTR-50" and not item.is_paired)
    if not naive.refused or not naive.a or not naive.b or fair.difference is None:
        return []
    more, less = ("B", "A") if naive.b > naive.a else ("A", "B")
    factor = max(naive.a, naive.b) / min(naive.a, naive.b)
    if factor < 1.1:
        return []
    agrees = (fair.difference > 0) == (naive.b > naive.a) and fair.is_clear
    what = (
        f"Windows of 50 words agree in direction, not in size: {ratio(fair.a)} in A, {ratio(fair.b)} in B."
        if agrees
        else f"In windows of 50 words it is {ratio(fair.a)} in A and {ratio(fair.b)} in B"
        + (", the other way round." if fair.is_clear else ": no clear difference.")
    )
    return [
        Finding(
            "warning",
            f"The plain ratio of distinct to all words would call {more} {factor:.1f} times as varied as {less} "
            f"({ratio(naive.a)} in A, {ratio(naive.b)} in B), but it was counted over {naive.n_a:,} words of A and "
            f"{naive.n_b:,} of B.",
            f"That ratio falls as text grows, whatever the text. {what}",
        )
    ]


def _matched(comparison: Comparison) -> list[Finding]:
    paired = comparison.content["comparison"]["paired"]
    same = f"{counted(paired['captions'], 'row has', 'rows have')} the same id in both"
    if not paired["captions"]:
        return [Finding("note", "No row of A has the id of a row of B: the two are compared as wholes.")]
    if not paired["changed"]:
        return [Finding("note", f"{same}, and the same caption.")]
    return [
        Finding(
            "note",
            f"{same}; the caption of {share(paired['changed'] / paired['captions'])} of them differs.",
            "On these, differences are taken row by row.",
        )
    ]


def _lengths(comparison: Comparison) -> list[Finding]:
    found = []
    words = best(comparison, "words")
    if words is not None and words.is_clear:
        assert words.difference is not None
        longer = "longer" if words.difference > 0 else "shorter"
        found.append(
            Finding(
                "note",
                f"Captions are {longer} in B: {number(words.b)} words on average, {number(words.a)} in A "
                f"({words.difference:+.2f}, 95 % interval {words.ci_low:+.2f} to {words.ci_high:+.2f}).",
            )
        )
    elif words is not None:
        found.append(
            Finding("note", f"Captions are about equally long: {number(words.a)} words in A, {number(words.b)} in B.")
        )
    short = best(comparison, "fewer than 4 words")
    if short is not None and short.is_clear:
        found.append(
            Finding(
                "good" if (short.difference or 0) < 0 else "warning",
                f"Captions of fewer than 4 words: {share(short.a)} in A, {share(short.b)} in B.",
            )
        )
    a, b = (content["text"]["duplicate_share"] or 0.0 for content in (comparison.a.content, comparison.b.content))
    if abs(a - b) > 0.01:
        found.append(
            Finding(
                "warning" if b > a else "good",
                f"Captions that are a copy of another one: {share(a)} in A, {share(b)} in B.",
            )
        )
    return found


def _diversity(comparison: Comparison) -> list[Finding]:
    fair = best(comparison, "MATTR-50")
    if fair is None or fair.difference is None:
        return []
    at = [
        item for item in comparison.differences if item.name.startswith("TTR at") and item.is_paired == fair.is_paired
    ]
    sizes = "; ".join(f"{item.name}: {ratio(item.a)} and {ratio(item.b)}" for item in at)
    if fair.ci_low is None:
        sentence = (
            f"MATTR-50 is {ratio(fair.a)} in A and {ratio(fair.b)} in B; there is too little text for an interval."
        )
    elif fair.is_clear:
        more = "B" if fair.difference > 0 else "A"
        sentence = (
            f"Words are more varied in {more}: of 50 in a row {ratio(fair.a)} are distinct in A, {ratio(fair.b)} in B "
            f"({fair.difference:+.3f}, 95 % interval {fair.ci_low:+.3f} to {fair.ci_high:+.3f})."
        )
    else:
        sentence = f"Words are about equally varied: MATTR-50 is {ratio(fair.a)} in A and {ratio(fair.b)} in B."
    return [Finding("note", sentence, f"In equally many words: {sizes}." if sizes else "")]


# -- the page --------------------------------------------------------------------------------------------------------


def comparison_report(comparison: Comparison, findings: Sequence[Finding], plots: Mapping[str, Plot]) -> str:
    """The page as HTML."""
    a, b = comparison.a.content, comparison.b.content
    whole = page.Page(
        f"{comparison.a.name} and {comparison.b.name}",
        f"A: {comparison.a.name}, {a['rows']:,} rows · B: {comparison.b.name}, {b['rows']:,} rows",
        kicker="Two datasets compared",
    )
    whole.add(page.tiles(_tiles(comparison)))
    whole.add(
        page.section(
            "What differs",
            page.findings(page.finding(item.level, item.sentence, *filter(None, [item.more])) for item in findings),
            anchor="findings",
        ),
        contents=("findings", "What differs"),
    )
    whole.add(
        page.section(
            "Side by side",
            galleries.figures(plots.values()),
            page.note("Blue: A. Orange: B."),
            anchor="plots",
        ),
        contents=("plots", "Side by side"),
    )
    whole.add(_numbers(comparison), contents=("numbers", "Numbers"))
    examples = _examples(comparison)
    if examples is not None:
        whole.add(examples, contents=("examples", "Examples"))
    whole.add(_words(comparison), contents=("words", "Words"))
    whole.foot("This page is one file and loads nothing. explore.json beside it holds everything about both datasets.")
    return whole.html()


def _tiles(comparison: Comparison) -> list[Tile]:
    a, b = comparison.a.content["text"], comparison.b.content["text"]
    return [
        Tile("Captions", f"{a['captions']:,} → {b['captions']:,}", "A → B", is_long=True),
        Tile("Words a caption", f"{number(a['words_mean'])} → {number(b['words_mean'])}", "A → B", is_long=True),
        Tile("Under 4 words", f"{share(a['too_short_share'])} → {share(b['too_short_share'])}", "A → B", is_long=True),
        Tile(
            "Repeated captions", f"{share(a['duplicate_share'])} → {share(b['duplicate_share'])}", "A → B", is_long=True
        ),
        Tile("MATTR-50", f"{ratio(a['mattr_50'])} → {ratio(b['mattr_50'])}", "A → B", is_long=True),
    ]


def _numbers(comparison: Comparison) -> Html:
    columns = [
        Column("Measure"),
        Column("A", True),
        Column("B", True),
        Column("B - A", True),
        Column("95 % interval", True),
    ]
    columns += [Column("Over")]

    def rows(is_paired: bool) -> list[tuple[Any, ...]]:
        return [_row(item) for item in comparison.differences if item.is_paired == is_paired]

    blocks = [page.table(columns, rows(False))]
    matched = rows(True)
    if matched:
        blocks.insert(
            0, page.subsection(f"The {len(comparison.matched_a):,} matched rows", page.table(columns, matched))
        )
        blocks[1] = page.subsection("Everything", blocks[1])
    return page.section("Numbers", *blocks, anchor="numbers")


def _row(item: Difference) -> tuple[Any, ...]:
    form = share if item.name.startswith(SHARES) else ratio if item.unit == "words" else number
    over = f"{item.n_a:,} {item.unit}" if item.n_a == item.n_b else f"{item.n_a:,} and {item.n_b:,} {item.unit}"
    if item.refused:
        return (item.name, form(item.a), form(item.b), "not compared", "", item.refused)
    scale, unit = (100, " %") if form is share else (1, "")
    digits = 3 if form is ratio else 2
    between = (
        ""
        if item.ci_low is None or item.ci_high is None
        else f"{item.ci_low * scale:+.{digits}f} to {item.ci_high * scale:+.{digits}f}{unit}"
    )
    difference = "–" if item.difference is None else f"{item.difference * scale:+.{digits}f}{unit}"
    return (item.name, (form(item.a), item.a), (form(item.b), item.b), (difference, item.difference), between, over)


def _examples(comparison: Comparison) -> Html | None:
    """Rows whose caption differs, spread evenly over all of them."""
    import numpy as np

    a, b = comparison.a, comparison.b
    changed = np.flatnonzero(a.values.hashes[comparison.matched_a] != b.values.hashes[comparison.matched_b])
    if not len(changed):
        return None
    picked = changed[np.linspace(0, len(changed) - 1, min(16, len(changed))).round().astype(int)]
    items = []
    for place in dict.fromkeys(picked.tolist()):
        x, y = int(comparison.matched_a[place]), int(comparison.matched_b[place])
        path = b.rows.images[b.row_of(y)]
        picture = galleries.thumbnail(b, path) if path else None
        before = galleries.cut(a.caption(x), 120) or "(nothing)"
        items.append(page.Item(picture, galleries.cut(b.caption(y), 160), f"A: {before}"))
    return page.section(
        "Before and after", page.gallery(items), page.note("Above: B. Below, smaller: A."), anchor="examples"
    )


def _words(comparison: Comparison) -> Html:
    words = comparison.content["comparison"]["words"]
    columns = [Column("Word"), Column("in A, of 1,000", True), Column("in B, of 1,000", True)]

    def table(key: str) -> Html:
        rows = [
            (
                row["word"],
                (f"{row['per_thousand_a']:.1f}", row["per_thousand_a"]),
                (f"{row['per_thousand_b']:.1f}", row["per_thousand_b"]),
            )
            for row in words[key]
        ]
        return page.table(columns, rows)

    return page.section(
        "Words that tell them apart",
        page.grid(
            page.subsection("More frequent in A", table("more_in_a")),
            page.subsection("More frequent in B", table("more_in_b")),
        ),
        anchor="words",
    )


def comparison_summary(comparison: Comparison, findings: Sequence[Finding]) -> str:
    """The text of ``summary.md``."""
    lines = [f"# {plain(comparison.a.name)} (A) and {plain(comparison.b.name)} (B)", ""]
    lines += [f"- **{plain(finding.sentence)}** {plain(finding.more)}".rstrip() for finding in findings]
    lines += ["", "| | A | B | B - A | 95 % interval | over |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for item in comparison.differences:
        shown = [cell[0] if isinstance(cell, tuple) else cell for cell in _row(item)]
        shown[0] += " (matched rows)" if item.is_paired else ""
        lines.append("| " + " | ".join(map(plain, shown)) + " |")
    return "\n".join(lines) + "\n"
