"""Plots of an exploration, each drawn once: as a PNG file, and as SVG that a page takes in.

Figures are made without pyplot: no window, no global state but the style, which is restored.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mgm_exp.data.exploration.exploration import Exploration
from mgm_exp.data.exploration.images import BLANK_CONTRAST
from mgm_exp.data.exploration.text import TOO_SHORT
from mgm_exp.page import THEME

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

_DPI = 180
_INK, _SOFT, _LINE = THEME["ink"], THEME["soft"], THEME["line"]
_A, _B, _C, _FAINT = THEME["a"], THEME["b"], THEME["c"], THEME["faint"]
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # captions hold dollar signs
    "font.size": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "axes.labelsize": 10,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "font.sans-serif": ["DejaVu Sans"],
}


@dataclass(frozen=True)
class Plot:
    """A finished drawing.

    Args:
        name: Of its file, without ending.
        title: What it shows.
        caption: What is to be seen in it.
        png, svg: The drawing.
    """

    name: str
    title: str
    caption: str
    png: bytes
    svg: str


def draw(
    name: str, title: str, caption: str, paint: Callable[[Axes], None], *, size: tuple[float, float] = (5.0, 3.0)
) -> Plot:
    """Draws one plot.

    Args:
        name, title, caption: See :class:`Plot`.
        paint: Puts everything into the axes.
        size: Width and height in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The salt makes the ids inside a drawing its own (several fit on one page), and the same each time.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of the PNG; a browser has more fonts
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        paint(axes)
        figure.draw_without_rendering()  # lays it out; once is enough for both files
        figure.set_layout_engine("none")
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=_DPI, facecolor="#ffffff", metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(name, title, caption, png.getvalue(), svg.getvalue().decode("utf-8"))


def plots_of(exploration: Exploration) -> dict[str, Plot]:
    """Every plot that this data has something to show in, by name."""
    content, values = exploration.content, exploration.values
    text = content["text"]
    plots = []
    if text["tokens"]:
        plots += [
            _words(values.stream.counts, text),
            _growth(text),
            _ratios(text),
            _top_words(text),
            _repetition(exploration),
        ]
    if values.tokens is not None and len(values.tokens):
        plots.append(_tokens(values.tokens, text["token_lengths"]["model_max_length"]))
    if exploration.facts is not None and exploration.facts.is_usable.any():
        plots += [_sizes(exploration), _aspects(exploration), _bytes(exploration), _contrast(exploration)]
    if content["similarity"] is not None and content["similarity"]["captions"]:
        plots.append(_similarity(exploration))
    return {plot.name: plot for plot in plots}


def _words(counts: np.ndarray, text: dict[str, Any]) -> Plot:
    import numpy as np

    last = max(int(np.percentile(counts, 99.5)) + 1, TOO_SHORT + 4)
    shares = np.bincount(np.minimum(counts, last), minlength=last + 1) / len(counts) * 100

    def paint(axes: Axes) -> None:
        places = np.arange(last + 1)
        axes.bar(places, shares, width=0.86, color=[_B if place < TOO_SHORT else _A for place in places])
        mean = text["words_mean"]
        axes.axvline(mean, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"mean {mean:.1f}",
            (mean, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=9.5,
        )
        axes.set_xlabel("words in a caption")
        axes.set_ylabel("% of captions")
        ticks = list(range(0, last, max(1, round(last / 8))))
        if counts.max() > last:
            axes.set_xticks([*(tick for tick in ticks if tick < last - 1), last])
            axes.set_xticklabels([*(str(tick) for tick in ticks if tick < last - 1), f"{last} +"])
        else:
            axes.set_xticks(ticks)
        axes.set_xlim(-0.7, last + 0.7)

    return draw("words", "Words in a caption", f"Orange: fewer than {TOO_SHORT} words.", paint)


def _growth(text: dict[str, Any]) -> Plot:
    def paint(axes: Axes) -> None:
        words, found = zip(*text["vocabulary_growth"], strict=True)
        axes.plot(words, found, color=_A)
        axes.fill_between(words, found, color=_FAINT, alpha=0.5, linewidth=0)
        axes.plot(words[-1:], found[-1:], "o", color=_A, markersize=5)
        axes.set_xlim(0)
        axes.set_ylim(0)
        axes.set_xlabel("words read")
        axes.set_ylabel("distinct words met")
        thousands(axes)

    return draw(
        "vocabulary_growth",
        "Vocabulary growth",
        "Distinct words met while captions are read in random order. A curve that flattens has few new words left.",
        paint,
    )


def _ratios(text: dict[str, Any]) -> Plot:
    def paint(axes: Axes) -> None:
        words, found = zip(*text["vocabulary_growth"], strict=True)
        axes.plot(
            words, [b / a for a, b in zip(words, found, strict=True)], color=_B, label="distinct / all words, by size"
        )
        if text["ttr_at"]:
            sizes = [int(size) for size in text["ttr_at"]]
            values = [estimate["value"] for estimate in text["ttr_at"].values()]
            low = [value - estimate["ci_low"] for value, estimate in zip(values, text["ttr_at"].values(), strict=True)]
            high = [
                estimate["ci_high"] - value for value, estimate in zip(values, text["ttr_at"].values(), strict=True)
            ]
            axes.errorbar(
                sizes,
                values,
                yerr=[low, high],
                fmt="o",
                color=_INK,
                markersize=5,
                capsize=3,
                elinewidth=1.4,
                label="at fixed sizes, 95 % interval",
            )
        axes.axhline(text["mattr_50"], color=_C, linestyle=(0, (5, 3)), linewidth=1.8, label="MATTR-50")
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("words (logarithmic)")
        axes.set_ylabel("share of distinct words")
        plain_log(axes)
        axes.legend(loc="lower left")

    return draw(
        "type_token_ratio",
        "Why a plain type-token ratio compares nothing",
        "The same captions have any ratio one likes, depending on how many are counted. Compare values at one size, "
        "or MATTR-50.",
        paint,
    )


def _top_words(text: dict[str, Any]) -> Plot:
    top = text["top_content_words"][:13][::-1]

    def paint(axes: Axes) -> None:
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        places = list(range(len(top)))
        axes.barh(places, [item["count"] / text["tokens"] * 100 for item in top], color=_A, height=0.72)
        axes.set_yticks(places, [_printable(item["word"]) for item in top])
        axes.set_xlabel("% of all words")
        axes.tick_params(axis="y", colors=_INK)

    title = "Most frequent words"
    return draw("top_words", title, "In lower case, without function words such as \u201cthe\u201d.", paint)


def _repetition(exploration: Exploration) -> Plot:
    import numpy as np

    table = exploration.values.table
    series = [
        ("2 words", table.word_repetition[2], _A),
        ("5 characters", table.character_repetition[5], _B),
        ("special characters", table.special_characters, _C),
    ]

    def paint(axes: Axes) -> None:
        for label, values, colour in series:
            percent = np.linspace(50, 100, 201)
            axes.plot(percent, np.percentile(values, percent), color=colour, label=label)
        axes.set_xlabel("percentile of captions")
        axes.set_ylabel("share of the caption")
        axes.set_ylim(-0.02)
        axes.legend(loc="upper left")

    return draw(
        "repetition",
        "Repetition and special characters",
        "How much of a caption repeats itself (pairs of words, runs of 5 characters), and how much of it is no "
        "letter; the "
        "captions with most to the right.",
        paint,
    )


def _tokens(tokens: np.ndarray, limit: int | None) -> Plot:
    import numpy as np

    last = max(float(np.percentile(tokens, 99.5)), 8)

    def paint(axes: Axes) -> None:
        width = max(1, round(last / 40))
        weights = np.full(len(tokens), 100 / len(tokens))
        axes.hist(
            np.minimum(tokens, last),
            bins=np.arange(0, last + width + 1, width).tolist(),
            color=_A,
            weights=weights,
            rwidth=0.9,
        )
        if limit is not None and limit < 1.2 * last:
            axes.axvline(limit, color=_B)
        axes.set_xlabel("tokens in a caption")
        axes.set_ylabel("% of captions")

    return draw("tokens", "Tokens in a caption", "Under the model's tokenizer, without prompt and image.", paint)


def _sizes(exploration: Exploration) -> Plot:
    import numpy as np

    facts = exploration.facts
    assert facts is not None
    width, height = facts.width[facts.is_usable], facts.height[facts.is_usable]
    points, counts = np.unique(np.stack([width, height], axis=1), axis=0, return_counts=True)
    if len(points) > 4000:  # rounded, so that the drawing stays small
        step = max(8, int(max(width.max(), height.max()) / 80))
        rounded = np.stack([width, height], axis=1) // step * step + step // 2
        points, counts = np.unique(rounded, axis=0, return_counts=True)

    def paint(axes: Axes) -> None:
        axes.grid(axis="x")
        area = 10 + 150 * np.sqrt(counts / counts.max())
        axes.scatter(points[:, 0], points[:, 1], s=area, color=_A, alpha=0.45, linewidths=0)
        axes.set_xlim(0, width.max() * 1.06)
        axes.set_ylim(0, height.max() * 1.06)
        axes.set_xlabel("width in pixels")
        axes.set_ylabel("height in pixels")
        thousands(axes)

    return draw("image_sizes", "Image sizes", "A larger dot: more images of that size.", paint)


def _aspects(exploration: Exploration) -> Plot:
    import numpy as np

    facts = exploration.facts
    assert facts is not None
    ratios = np.log2(facts.width[facts.is_usable] / facts.height[facts.is_usable].clip(1))

    def paint(axes: Axes) -> None:
        weights = np.full(len(ratios), 100 / len(ratios))
        axes.hist(ratios.clip(-3, 3), bins=np.linspace(-3, 3, 49).tolist(), color=_A, weights=weights, rwidth=0.9)
        names = {-2: "1:4", -1: "1:2", 0: "1:1", 1: "2:1", 2: "4:1"}
        axes.set_xticks(list(names), list(names.values()))
        axes.set_xlabel("width : height")
        axes.set_ylabel("% of images")

    return draw("image_aspects", "Shapes", "Upright to the left, wide to the right.", paint)


def _bytes(exploration: Exploration) -> Plot:
    import numpy as np

    facts = exploration.facts
    assert facts is not None
    sizes = facts.bytes[facts.is_usable] / 1000

    def paint(axes: Axes) -> None:
        low, high = max(sizes.min(), 0.05), max(sizes.max(), 0.1)
        bins = np.geomspace(low * 0.95, high * 1.05, 40).tolist()
        axes.hist(sizes, bins=bins, color=_A, weights=np.full(len(sizes), 100 / len(sizes)), rwidth=0.9)
        axes.set_xscale("log")
        axes.set_xlabel("kilobytes (logarithmic)")
        axes.set_ylabel("% of images")
        plain_log(axes)

    return draw("image_bytes", "File sizes", "Very small files are often placeholders.", paint)


def _contrast(exploration: Exploration) -> Plot:
    import numpy as np

    facts = exploration.facts
    assert facts is not None
    contrast = facts.contrast[facts.is_usable]

    def paint(axes: Axes) -> None:
        edges = np.arange(0, 132, 4)  # 127.5 is the most there can be
        shares, _ = np.histogram(contrast, edges)
        colours = [_B if edge < BLANK_CONTRAST else _A for edge in edges[:-1]]
        axes.bar(edges[:-1], shares / len(contrast) * 100, width=3.5, align="edge", color=colours)
        axes.set_xlabel("standard deviation of grey values")
        axes.set_ylabel("% of images")

    return draw("image_contrast", "Contrast", "Orange: images that show next to nothing.", paint)


def _similarity(exploration: Exploration) -> Plot:
    import numpy as np

    scores = exploration.values.similarity
    assert scores is not None
    scores = scores[np.isfinite(scores)]

    def paint(axes: Axes) -> None:
        axes.hist(scores, bins=40, color=_A, weights=np.full(len(scores), 100 / len(scores)), rwidth=0.9)
        axes.set_xlabel("image-text score")
        axes.set_ylabel("% of captions")

    return draw("similarity", "How well captions fit their images", "Further right: a better fit.", paint)


def thousands(axes: Axes) -> None:
    """Ticks of both axes as 1,000 and 2,000."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def plain_log(axes: Axes) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    few = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(10, subs=few))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.tick_params(axis="x", which="minor", size=0)


def _printable(word: str) -> str:
    """A word as a label: what cannot be drawn becomes a box, and long ones are cut."""
    shown = "".join(character if character.isprintable() else "\ufffd" for character in word)
    return shown if len(shown) <= 18 else shown[:17] + "…"
