"""Examples out of a dataset, as pictures and texts of a page: what a number looks like when one looks at it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mgm_exp import page
from mgm_exp.data.exploration.exploration import Exploration
from mgm_exp.data.exploration.numbers import counted, size
from mgm_exp.data.images import ImageFault, open_image

SHOWN = 8
_SIDE = 220  # pixels: sharp at twice the density of an ordinary screen
_MAX_MEGAPIXELS = 50.0
_LONGEST_TEXT = 240


def extremes(exploration: Exploration) -> list[page.Html]:
    """The shortest and the longest captions, with their images."""
    import numpy as np

    counts = exploration.values.stream.counts
    order = np.argsort(counts, kind="stable")
    filled = order[counts[order] > 0]
    if not len(filled):
        return []
    several = len(filled) >= 2 * SHOWN
    blocks = [page.subsection("The shortest captions", captions(exploration, filled[:SHOWN].tolist()))]
    if several:
        blocks.append(page.subsection("The longest captions", captions(exploration, filled[::-1][:SHOWN].tolist())))
    return blocks


def misfits(exploration: Exploration) -> list[page.Html]:
    """Captions that fit their images worst and best, where that was judged."""
    import numpy as np

    scores = exploration.values.similarity
    if scores is None or not np.isfinite(scores).any():
        return []
    order = np.argsort(scores, kind="stable")  # NaN last
    order = order[: int(np.isfinite(scores).sum())]

    def shown(places: Sequence[int]) -> page.Html:
        return captions(exploration, places, [f"score {scores[place]:.3f}" for place in places])

    return [
        page.subsection("Captions that fit their images worst", shown(order[:SHOWN].tolist())),
        page.subsection("Captions that fit best", shown(order[::-1][:SHOWN].tolist())),
    ]


def captions(exploration: Exploration, places: Sequence[int], remarks: Sequence[str] | None = None) -> page.Html:
    """Captions with the images that they belong to."""
    items = []
    for number, place in enumerate(places):
        row = exploration.row_of(place)
        path = exploration.rows.images[row]
        remark = (
            remarks[number] if remarks is not None else counted(int(exploration.values.stream.counts[place]), "word")
        )
        detail = f"{remark} · {exploration.rows.ids[row]}"
        items.append(page.Item(thumbnail(exploration, path) if path else None, cut(exploration.caption(place)), detail))
    return page.gallery(items)


def repeated(exploration: Exploration) -> list[page.Html]:
    """Captions that occur often, and groups of those that say nearly the same."""
    blocks = []
    equal = exploration.repeated.equal[:12]
    if equal:
        texts = [(cut(exploration.caption(group[0])), f"{len(group):,} times") for group in equal]
        blocks.append(page.subsection("The most frequent captions", page.quotes(texts)))
    groups = exploration.repeated.near[:5]
    if groups:
        folded = [
            page.details(
                f"{cut(exploration.caption(group[0]), 80)} · {len(group):,} captions",
                page.quotes(
                    (cut(exploration.caption(place)), exploration.rows.ids[exploration.row_of(place)])
                    for place in group[:10]
                ),
                is_open=number == 0,
            )
            for number, group in enumerate(groups)
        ]
        blocks.append(page.subsection("Captions that say nearly the same", *folded))
    return blocks


def images(exploration: Exploration) -> list[page.Html]:
    """Images that occur twice, show nothing, or have an unusual size; and a list of those that cannot be used."""
    facts, groups = exploration.facts, exploration.groups
    if facts is None or groups is None:
        return []
    blocks = []
    if facts.faults:
        rows = [
            (exploration.image(place), fault.kind, fault.detail) for place, fault in list(facts.faults.items())[:200]
        ]
        columns = [page.Column("Image"), page.Column("Kind"), page.Column("What was found")]
        shown = f"Images that cannot be used ({len(facts.faults):,})"
        blocks.append(page.details(shown, page.table(columns, rows), is_open=len(rows) <= 20))
    if groups.alike:
        shown_groups = [
            page.gallery(_picture(exploration, place, _facts_line(exploration, place)) for place in group[:6])
            for group in groups.alike[:6]
        ]
        blocks.append(page.subsection("Images that look the same", *shown_groups))
    if groups.blank:
        blank = (
            _picture(exploration, place, f"contrast {facts.contrast[place]:.1f}") for place in groups.blank[:SHOWN]
        )
        blocks.append(page.subsection("Images that show next to nothing", page.gallery(blank)))
    odd = _odd(exploration)
    if odd:
        items = (_picture(exploration, place, remark) for place, remark in odd)
        blocks.append(page.subsection("Smallest, largest, widest and tallest", page.gallery(items)))
    return blocks


def _odd(exploration: Exploration) -> list[tuple[int, str]]:
    import numpy as np

    facts = exploration.facts
    assert facts is not None
    usable = np.flatnonzero(facts.is_usable)
    if len(usable) < 8:
        return []
    pixels = facts.width[usable].astype(np.int64) * facts.height[usable]
    shape = facts.width[usable] / facts.height[usable]
    by_pixels, by_shape = usable[np.argsort(pixels, kind="stable")], usable[np.argsort(shape, kind="stable")]
    wanted: dict[int, str] = {}
    for places, word in (
        (by_pixels[:2], "small"),
        (by_pixels[::-1][:2], "large"),
        (by_shape[::-1][:2], "wide"),
        (by_shape[:2], "tall"),
    ):
        for place in places.tolist():
            wanted.setdefault(place, f"{word}: {facts.width[place]} × {facts.height[place]}")
    return list(wanted.items())


def _facts_line(exploration: Exploration, place: int) -> str:
    facts = exploration.facts
    assert facts is not None
    return f"{facts.width[place]} × {facts.height[place]}, {size(int(facts.bytes[place]))}"


def _picture(exploration: Exploration, place: int, remark: str) -> page.Item:
    """An image with what its first row says of it."""
    import numpy as np

    path = exploration.image(place)
    said = np.searchsorted(exploration.rows.text_row, exploration.image_rows[place])
    is_there = said < exploration.values.stream.captions
    caption = cut(exploration.caption(int(said)), 90) if is_there else ""
    return page.Item(thumbnail(exploration, path), caption, f"{remark} · {path}")


def thumbnail(exploration: Exploration, path: str) -> page.Html | None:
    """A small copy of an image; None where it cannot be opened."""
    try:
        picture = open_image(exploration.location.image_root, path, _MAX_MEGAPIXELS)
    except ImageFault:
        return None
    return page.image(page.thumbnail(picture, _SIDE), "jpeg", path)


def cut(text: str, longest: int = _LONGEST_TEXT) -> str:
    """A text that is not longer than this."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def figures(plots: Iterable[object]) -> page.Html:
    """Plots side by side."""
    from mgm_exp.data.exploration.plots import Plot

    return page.grid(
        *(
            page.figure(page.inline_svg(plot.svg, f"{plot.title}. {plot.caption}"), plot.title, plot.caption)
            for plot in plots
            if isinstance(plot, Plot)
        )
    )
