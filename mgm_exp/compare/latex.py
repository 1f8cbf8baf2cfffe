"""The comparison as LaTeX for a paper: one table for each benchmark, with ``booktabs`` and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgm_exp.compare.table import rows_of
from mgm_exp.compare.wording import has_groups, notes, rate_interval, signed, verdict_lines
from mgm_exp.store import write_atomic

Comparison = Mapping[str, Any]

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "·": r"\textperiodcentered{}",
}


def escaped(text: str) -> str:
    """Text that LaTeX sets as it is; on one line."""
    return re.sub(r'[\\{}&%$#_~^<>|"·]', lambda found: _SPECIAL[found.group()], " ".join(text.split()))


def latex(comparison: Comparison) -> str:
    """The tables; notes of the comparison stand above them as comments."""
    lines = ["% Made by mgm-exp report; needs \\usepackage{booktabs}.", *(_comment(line) for line in notes(comparison))]
    for place, benchmark in enumerate(comparison["benchmarks"]):
        lines += ["", *_table(comparison, benchmark, place)]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    return "% " + " ".join(text.split())


def _table(comparison: Comparison, benchmark: str, place: int) -> list[str]:
    pairs = {
        pair["b"]: pair
        for pair in comparison["pairs"]
        if pair["benchmark"] == benchmark and pair["a"] == comparison["baseline"]
    }
    with_letters = has_groups(comparison, benchmark)
    rows = rows_of(comparison, benchmark)
    body = []
    # The rows of arms come first, in the order of the arms; baselines without a folder follow.
    for arm, row in zip(comparison["arms"], rows, strict=False):
        if arm["status"] != "completed":
            continue
        cells = [escaped(row.cells["what differs"]), _score(row.cells["accuracy [95 %]"], row.cells["group"])]
        pair = pairs.get(arm["id"])
        is_baseline = arm["id"] == comparison["baseline"]
        cells += _difference(pair) if pair else ["baseline" if is_baseline else "--", "--"]
        cells += [escaped(row.cells["trained"]), row.cells["GiB"]]
        body.append(" & ".join(cells) + r" \\")
    others = [row for row in comparison["baselines"] if row["benchmark"] == benchmark]
    if others:
        body.append(r"\midrule")
    body += [f"{escaped(row['label'])} & {_score(rate_interval(row), '')} & & & & \\\\" for row in others]
    return [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{_caption(comparison, benchmark, with_letters)}}}",
        f"  \\label{{tab:comparison-{place + 1}}}",
        r"  \begin{tabular}{llllrr}",
        r"    \toprule",
        r"    & Accuracy (\%) & Difference & $p$ & Trained & GiB \\",
        r"    \midrule",
        *(f"    {line}" for line in body),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]


def _score(text: str, letters: str) -> str:
    value, _, interval = text.partition(" ")
    if value == "-":
        return "--"
    return f"{value}{f'$^{{{letters}}}$' if letters else ''}{f' {{[}}{interval[1:-1]}{{]}}' if interval else ''}"


def _difference(pair: Mapping[str, Any]) -> list[str]:
    ends = f"{{[}}{_number(pair['ci_low'])}, {_number(pair['ci_high'])}{{]}}"
    value = _number(pair["difference"])
    shown = rf"\textbf{{{value}}}" if pair["verdict"] != "tied" else value
    p = pair["p_adjusted"]
    return [f"{shown} {ends}", r"$<$ 0.001" if p < 0.001 else f"{p:.3f}"]


def _number(difference: float) -> str:
    """A signed number of points with a minus sign, not a hyphen."""
    return signed(difference).replace("-", "$-$").replace("+", "$+$")


def _caption(comparison: Comparison, benchmark: str, with_letters: bool) -> str:
    pair = next((pair for pair in comparison["pairs"] if pair["benchmark"] == benchmark), None)
    if pair is None:
        return escaped(f"{benchmark}. {verdict_lines(comparison)[0]}.")
    method = comparison["method"]
    said = [
        f"Accuracy on {benchmark} ({pair['n']:,} questions, {pair['n_images']:,} images) with 95 % intervals.",
        "Differences to the baseline are paired by question, in points;",
        f"p is adjusted for {method['comparisons']} comparisons (Holm), bold: below {method['alpha']:g}.",
    ]
    if with_letters:
        said.append("Rows that share a letter are not told apart when all pairs are compared.")
    smallest = comparison["minimum_detectable_difference"].get(benchmark)
    if smallest is not None:
        said.append(f"A true difference of {100 * smallest:.1f} points is found with probability {method['power']:g}.")
    return escaped(" ".join(said))


def write_latex(comparison: Comparison, path: Path | str) -> Path:
    """Writes the tables."""
    write_atomic(Path(path), latex(comparison))
    return Path(path)
