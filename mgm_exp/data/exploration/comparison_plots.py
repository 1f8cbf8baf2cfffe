"""Plots of two datasets in one drawing: A in blue, B in orange."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mgm_exp.data.exploration.compare import Comparison, matched_sizes
from mgm_exp.data.exploration.exploration import Exploration
from mgm_exp.data.exploration.plots import Plot, draw, plain_log, thousands
from mgm_exp.page import THEME

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"A": THEME["a"], "B": THEME["b"]}


def comparison_plots(comparison: Comparison) -> dict[str, Plot]:
    """Lengths, type-token ratios and vocabulary growth of both."""
    both = {"A": comparison.a, "B": comparison.b}
    plots = [_words(both), _ratios(comparison, both), _growth(both), _characters(both)]
    return {plot.name: plot for plot in plots}


def _words(both: dict[str, Exploration]) -> Plot:
    import numpy as np

    last = max(int(np.percentile(item.values.stream.counts, 99.5)) for item in both.values()) + 1

    def paint(axes: Axes) -> None:
        for offset, (name, item) in zip((-0.21, 0.21), both.items(), strict=True):
            counts = item.values.stream.counts
            shares = np.bincount(np.minimum(counts, last), minlength=last + 1) / len(counts) * 100
            axes.bar(np.arange(last + 1) + offset, shares, width=0.4, color=_COLOURS[name], label=name)
        axes.set_xlabel("words in a caption")
        axes.set_ylabel("% of captions")
        axes.set_xticks(range(0, last + 1, max(1, round(last / 8))))
        axes.legend(loc="upper right")

    return draw("words", "Words in a caption", "Share of the captions of each.", paint)


def _characters(both: dict[str, Exploration]) -> Plot:
    import numpy as np

    def paint(axes: Axes) -> None:
        percent = np.linspace(0, 100, 201)
        for name, item in both.items():
            lengths = np.percentile(item.values.table.text_length, percent)
            axes.plot(lengths, percent, color=_COLOURS[name], label=name)
        axes.set_xlabel("characters in a caption")
        axes.set_ylabel("% of captions that are no longer")
        axes.set_xlim(0)
        axes.legend(loc="lower right")

    return draw("characters", "Characters in a caption", "Further right: longer captions.", paint)


def _ratios(comparison: Comparison, both: dict[str, Exploration]) -> Plot:
    sizes = matched_sizes(comparison.a.values.stream, comparison.b.values.stream)
    named = {item.name: item for item in comparison.differences if not item.is_paired}

    def paint(axes: Axes) -> None:
        for name, item in both.items():
            words, found = zip(*item.content["text"]["vocabulary_growth"], strict=True)
            shares = [y / x for x, y in zip(words, found, strict=True)]
            axes.plot(words, shares, color=_COLOURS[name], label=f"{name}, by size")
            axes.plot(words[-1:], shares[-1:], "s", color=_COLOURS[name], markersize=6)
        for size in sizes:
            pair = named[f"TTR at {size:,} words"]
            for value, name in ((pair.a, "A"), (pair.b, "B")):
                assert value is not None
                axes.plot([size], [value], "o", color=_COLOURS[name], markersize=6)
            axes.axvline(size, color=THEME["line"], linewidth=1, zorder=0)
        for name, item in both.items():
            mattr = item.content["text"]["mattr_50"]
            axes.axhline(mattr, color=_COLOURS[name], linestyle=(0, (5, 3)), linewidth=1.4, label=f"{name}, MATTR-50")
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("words (logarithmic)")
        axes.set_ylabel("share of distinct words")
        plain_log(axes)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return draw(
        "type_token_ratio",
        "Distinct words, by how many are counted",
        "Squares: the plain ratio of each whole dataset, which compares two different sizes. Dots: both at one size.",
        paint,
    )


def _growth(both: dict[str, Exploration]) -> Plot:
    def paint(axes: Axes) -> None:
        for name, item in both.items():
            words, found = zip(*item.content["text"]["vocabulary_growth"], strict=True)
            axes.plot(words, found, color=_COLOURS[name], label=name)
            axes.plot(words[-1:], found[-1:], "o", color=_COLOURS[name], markersize=5)
        axes.set_xlim(0)
        axes.set_ylim(0)
        axes.set_xlabel("words read")
        axes.set_ylabel("distinct words met")
        thousands(axes)
        axes.legend(loc="lower right")

    return draw(
        "vocabulary_growth", "Vocabulary growth", "The higher curve has the richer vocabulary at that size.", paint
    )
