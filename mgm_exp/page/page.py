"""The page around the blocks: head, title, contents, foot."""

from __future__ import annotations

from pathlib import Path

from mgm_exp.page.html import Html, element, join
from mgm_exp.page.svg import THEME

# Nothing is loaded from anywhere: what is not inside the file is refused by the browser itself.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


class Page:
    """A page that grows by blocks.

    Args:
        title: What it is about, also the title of the window.
        subtitle: One line below it.
        kicker: A word or two above the title: what kind of page this is.
    """

    def __init__(self, title: str, subtitle: str = "", *, kicker: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self.kicker = kicker
        self._blocks: list[Html] = []
        self._contents: list[tuple[str, str]] = []
        self._foot: list[Html] = []

    def add(self, block: Html, *, contents: tuple[str, str] | None = None) -> None:
        """Adds a block.

        Args:
            block: See :mod:`mgm_exp.page.blocks`.
            contents: (id of the section, name) for the list of contents.
        """
        self._blocks.append(block)
        if contents is not None:
            self._contents.append(contents)

    def foot(self, *lines: str) -> None:
        """Small print at the end."""
        self._foot += [element("p", line) for line in lines]

    def html(self) -> str:
        """The whole file."""
        contents = [element("a", name, href=f"#{anchor}") for anchor, name in self._contents]
        header = element(
            "header",
            element("p", self.kicker, class_="kicker") if self.kicker else Html(""),
            element("h1", self.title),
            element("p", self.subtitle, class_="subtitle") if self.subtitle else Html(""),
            element("nav", *contents, aria_label="Contents") if contents else Html(""),
        )
        head = element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("meta", name="referrer", content="no-referrer"),
            element("title", self.title),
            element("style", Html(_style())),
        )
        body = element(
            "body",
            header,
            element("main", *self._blocks),
            element("footer", *self._foot) if self._foot else Html(""),
            element("script", Html(_own("script.js"))),
        )
        return "<!doctype html>\n" + str(element("html", join([head, body], "\n"), lang="en")) + "\n"


def _style() -> str:
    colours = " ".join(f"--{name}: {colour};" for name, colour in THEME.items())
    return f":root {{ {colours} }}\n{_own('style.css')}"


def _own(name: str) -> str:
    """A file of this package."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
