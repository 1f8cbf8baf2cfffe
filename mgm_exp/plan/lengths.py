"""How many rows a stage reads and how long they are: as they were curated, as the demo makes them, or as assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mgm_exp.config import AlignConfig, ExperimentConfig, TrainConfig
from mgm_exp.plan.architecture import Architecture

# Tokens of text in a sample of the generated demo, in the tiny model's vocabulary: mean, learnt ones, longest.
_DEMO = {"align": (20.2, 6.7), "instruct": (111.3, 24.3)}
_DEMO_LONGEST = 160
# Where nothing is known: one question and its answer, of which half is learnt.
ASSUMED = 124


@dataclass(frozen=True)
class Curated:
    """What a curated stage says of its rows.

    Args:
        rows: That were kept.
        length: Mean tokens of a merged sequence, cut to ``max_length``.
        learnt: Mean tokens that are learnt.
        longest: Tokens of the longest sequence, before it is cut.
        size: Bytes of the whole curated folder.
    """

    rows: int
    length: float
    learnt: float
    longest: int
    size: int

    @classmethod
    def of_report(cls, report: Mapping[str, Any], size: int = 0) -> Curated:
        """From what curation reports of a stage, in the store's entry and in the ``data.json`` of a run.

        Raises:
            KeyError, TypeError, ValueError, ZeroDivisionError: it is the report of another version, or of no rows.
        """
        rows = int(report["kept"])
        return cls(
            rows=rows,
            length=float(report["tokens"]) / rows,
            learnt=float(report["supervised_tokens"]) / rows,
            longest=int(report["lengths"]["max"]),
            size=size,
        )


Rows = Mapping[str, Curated]
"""``align`` and ``instruct`` as they were curated; empty: they were not."""


@dataclass(frozen=True)
class Lengths:
    """Of a stage's sequences, in tokens.

    Args:
        mean: Of a merged sequence.
        learnt: Mean of those that are learnt.
        longest: Of the longest one.
        source: Where the mean is known from, as a part of a sentence.
        longest_source: The same of the longest.
        text: Mean tokens beside the image's.
    """

    mean: float
    learnt: float
    longest: int
    source: str
    longest_source: str
    text: float


def lengths_of(
    config: ExperimentConfig, sizes: Architecture, section: TrainConfig | AlignConfig, stage: str, curated: Rows
) -> Lengths:
    """What ``plan.text_tokens`` and ``plan.longest_text`` say; else the curated rows; else the demo; else an
    assumption for the mean, and as many as ``max_length`` allows for the longest."""
    known = curated.get(stage)
    is_demo = is_of_demo(config, stage) and config.model.name == "tiny"
    visual, most, plan = sizes.visual_tokens, section.max_length, config.plan
    if plan.text_tokens is not None:
        given = float(min(visual + plan.text_tokens, most))
        words = f"{plan.text_tokens} tokens of text a sample (plan.text_tokens)"
        found = (given, max(1.0, (given - visual) / 2), words)
    elif known is not None:
        found = (known.length, max(1.0, known.learnt), f"{known.length:.0f} tokens a sample, as curated")
    elif is_demo:
        text, learnt = _DEMO[stage]
        found = (min(visual + text, most), learnt, f"{visual + text:.0f} tokens a sample, as the demo has them")
    else:
        given = float(min(visual + ASSUMED, most))
        words = f"{ASSUMED} tokens of text a sample (an assumption: plan.text_tokens says yours)"
        found = (given, max(1.0, (given - visual) / 2), words)
    if plan.longest_text is not None:
        longest, source = visual + plan.longest_text, "plan.longest_text"
    elif known is not None:
        longest, source = known.longest, "the longest that was curated"
    elif is_demo:
        longest, source = visual + _DEMO_LONGEST, "the demo's"
    else:
        longest, source = most, "as long as max_length allows; plan.longest_text says yours"
    mean, learnt, words = found
    return Lengths(mean, learnt, min(longest, most), words, source, max(0.0, mean - visual))


def is_of_demo(config: ExperimentConfig, stage: str) -> bool:
    """Whether a stage reads generated rows."""
    return config.data.path is None and (stage == "align" or config.data.instruct.path is None)


def rows_of(config: ExperimentConfig, stage: str, curated: Rows | None = None) -> int | None:
    """Rows that a stage reads; None where nothing says it (the user's own files are not opened)."""
    data, plan = config.data, config.plan
    name = "align" if stage == "align" else "instruct"
    given = plan.align_rows if stage == "align" else plan.rows
    if given is None and curated and name in curated:
        return curated[name].rows
    if given is None and is_of_demo(config, stage):
        given = data.demo_images  # one caption and one conversation an image
    if data.max_samples is not None:
        given = data.max_samples if given is None else min(given, data.max_samples)
    return given
