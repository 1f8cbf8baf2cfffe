"""The summary of an exploration as Markdown: findings in words, advice, and the numbers one quotes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mgm_exp.data.exploration.advice import Advice
from mgm_exp.data.exploration.findings import Finding
from mgm_exp.data.exploration.numbers import interval, number, ratio, share

_MEANING = re.compile(r"([\\`*_{}\[\]<>#|~])")


def summary(content: dict[str, Any], findings: Sequence[Finding], advice: Sequence[Advice], command: str) -> str:
    """The text of ``summary.md``."""
    lines = [f"# {plain(content['name'])}", ""]
    for finding in findings:
        lines.append(f"- **{plain(finding.sentence)}** {plain(finding.more)}".rstrip())
    if advice:
        lines += [
            "",
            "## Recipe",
            "",
            "| key | limit | percentile | drops | why |",
            "| --- | ---: | ---: | ---: | --- |",
        ]
        lines += [
            f"| `{item.key}` | {item.value:g} | {item.percentile or ''} | {share(item.dropped)} | {plain(item.why)} |"
            for item in advice
        ]
        lines += ["", "```", command, "```"]
    lines += ["", "## Numbers", "", "| | value | 95 % interval |", "| --- | ---: | --- |"]
    lines += [f"| {name} | {value} | {between} |" for name, value, between in _numbers(content)]
    lines += ["", "Words are counted without special tokens. More: `report.html`, `explore.json`."]
    return "\n".join(lines) + "\n"


def _numbers(content: dict[str, Any]) -> list[tuple[str, str, str]]:
    text, images = content["text"], content["images"]
    found = [
        ("rows", f"{content['rows']:,}", ""),
        ("words a caption", f"{number(text['words_mean'], 2)} (median {number(text['words_median'])})", ""),
        ("characters a caption", number(text["characters_mean"]), ""),
        ("fewer than 4 words", share(text["too_short_share"]), ""),
        ("copies of another caption", share(text["duplicate_share"]), ""),
        ("words, distinct words", f"{text['tokens']:,}, {text['vocabulary']:,}", ""),
        ("MATTR-50", ratio(text["mattr_50"]), interval(*text["mattr_50_interval"].values())),
    ]
    for size, estimate in text["ttr_at"].items():
        between = interval(estimate["ci_low"], estimate["ci_high"])
        found.append((f"TTR at {int(size):,} words", ratio(estimate["value"]), between))
    if images is not None:
        found += [
            ("images", f"{images['count']:,}", ""),
            ("missing, broken", f"{images['missing']:,}, {images['broken']:,}", ""),
            ("width x height, mean", f"{number(images['width_mean'])} x {number(images['height_mean'])}", ""),
        ]
    return found


def plain(text: str) -> str:
    """Text in Markdown, one line, nothing of it a command."""
    return _MEANING.sub(r"\\\1", " ".join(text.split()))
