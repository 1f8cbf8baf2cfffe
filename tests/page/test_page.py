"""Pages: whatever a text holds, it stays a text; nothing is loaded from anywhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp import page
from mgm_exp.page.html import escape

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><script>",
    "&lt;b&gt; &amp;",
    "' onclick='x",
    "\u202eelgoog\u202c",
    "\ud800 half a pair",
    "\x00\x1b[31m",
]


class Reader(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


def page_with(text: str) -> str:
    whole = page.Page(text, text, kicker=text)
    whole.add(
        page.section(
            text,
            page.paragraph(text),
            page.note(text, text),
            page.code(text),
            page.callout("warning", text),
            page.findings([page.finding("problem", text, text)]),
            page.tiles([page.Tile(text, text, text, "good", is_long=True)]),
            page.table([page.Column(text), page.Column(text, is_number=True)], [(text, (text, 1.5)), (text, text)]),
            page.grid(page.figure(page.paragraph(text), text, text)),
            page.gallery([page.Item(page.image(b"x", "png", text), text, text), page.Item(None)]),
            page.quotes([(text, text)]),
            page.details(text, page.subsection(text), is_open=True),
            page.definitions([(text, text)]),
            anchor=text,
        ),
        contents=(text, text),
    )
    whole.foot(text)
    return whole.html()


HARMLESS = read(page_with("plain"))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_adds_no_element_and_no_attribute(text: str) -> None:
    found = read(page_with(text))
    assert found.tags == HARMLESS.tags
    assert [name for name, _ in found.attributes] == [name for name, _ in HARMLESS.attributes]


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_any_text_can_be_shown_and_written(text: str) -> None:
    html = page_with(text)
    html.encode("utf-8")
    assert read(html).tags == HARMLESS.tags


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc", "Cf"]), max_size=60))
def test_ordinary_text_is_shown_as_it_is(text: str) -> None:
    assert read(f"<p>{escape(text)}</p>").text == text


def test_a_page_loads_nothing() -> None:
    html = page_with("plain")
    assert re.findall(r'(?:src|href)="(?!#|data:image/)[^"]*"', html) == []
    assert "url(" not in html and "@import" not in html and "http://" not in html and "https://" not in html
    assert "default-src 'none'" in html.replace("&#x27;", "'")
    assert html.startswith("<!doctype html>") and html.count("<h1>") == 1


def test_a_table_sorts_numbers_by_their_value() -> None:
    """Where what is shown begins with a number that is in another order, the value stands in the page."""
    sizes = page.Column("Size", is_number=True)
    html = page.table([sizes], [(("1,200 KB", 1_200_000.0),), (("none", None),), (("3 MB", 3_000_000.0),)])
    assert re.findall('data-key="([^"]*)"', html) == ["1200000.0", "", "3000000.0"]
    shares = [(("61.2 [57.1, 65.0]", 0.6123),), (("baseline", 0.0),), (("-", None),), (("-4.0", -0.04),)]
    assert re.findall('data-key="([^"]*)"', page.table([sizes], shares)) == ["0.0"]
    assert "data-key" not in page.table([sizes], [(("1,200", 1200.0),), (("900", 900.0),)])
    assert 'data-key="7.0"' in page.table([sizes], [(("one of 7", 7.0),), (("3", 3.0),)])


def test_a_table_has_a_name_for_those_who_do_not_see_it() -> None:
    html = page.table([page.Column("Size")], [("a",)], name="Sizes")
    assert '<caption class="unseen">Sizes</caption>' in html
    assert 'role="region" aria-label="Sizes"' in html


def colours(style: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", style))


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_all_text_has_enough_contrast_in_the_light_and_in_the_dark() -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1."""
    style = page_with("plain")
    light, dark = style[: style.index("@media (prefers")], style[style.index("@media (prefers") :]
    first = colours(light)
    for theme in (first, first | colours(dark[: dark.index("* {")])):
        pairs = [(ink, ground) for ink in ("ink", "soft") for ground in ("ground", "card", "code")]
        pairs += [(name, f"{name}-tint") for name in ("good", "note", "warning", "problem")]
        pairs += [(name, "card") for name in ("good", "note", "warning", "problem")] + [("note", "ground")]
        for ink, ground in pairs:
            low, high = sorted(luminance(theme[name]) for name in (ink, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


def test_a_table_with_a_cell_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="argument"):
        page.table([page.Column("a"), page.Column("b")], [("only one",)])


def test_a_drawing_takes_the_colours_of_the_page() -> None:
    svg = '<?xml version="1.0"?><svg width="9pt" height="9pt" viewBox="0 0 9 9"><path style="fill: #2F6FDE"/></svg>'
    drawn = page.inline_svg(svg, 'a "plot" of <b>')
    assert "fill: var(--a)" in drawn and 'viewBox="0 0 9 9"' in drawn
    assert 'width="9pt"' not in drawn and "<?xml" not in drawn
    assert 'aria-label="a &quot;plot&quot; of &lt;b&gt;"' in drawn


@pytest.mark.parametrize(
    "inside",
    [
        "<script>alert(1)</script>",
        '<a href="#x">x</a>',
        "<foreignObject/>",
        '<path onload="x()"/>',
        '<use xlink:href="http://somewhere/x.svg#a"/>',
        '<image href="data:image/png;base64,AA"/>',
        '<path style="fill: url(http://somewhere/x)"/>',
    ],
)
def test_a_drawing_that_could_load_or_run_something_is_refused(inside: str) -> None:
    with pytest.raises(ValueError, match="SVG drawing"):
        page.inline_svg(f"<svg>{inside}</svg>", "x")


def test_names_of_elements_are_checked() -> None:
    with pytest.raises(ValueError, match="no name of an element"):
        page.element("p onload=x")
