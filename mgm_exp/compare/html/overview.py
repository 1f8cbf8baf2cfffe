"""What is seen first: the verdict, the table of runs, all differences as intervals, and what did not end well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mgm_exp import page
from mgm_exp.compare.html.plot import Scale, dot, line, percent_place, scale_of
from mgm_exp.compare.html.view import Cells, View, series
from mgm_exp.compare.runs import Run
from mgm_exp.compare.wording import (
    count,
    notes,
    p_text,
    percent,
    points_interval,
    rate_interval,
    short_folders,
    signed,
    verdict_lines,
    where,
)
from mgm_exp.page import Column, Html, Tile, element, join
from mgm_exp.store import parse_record, read_text

_LEVELS: dict[str, Any] = {"better": "good", "worse": "problem", "tied": "note"}
_MOST_INTERVALS = 40
_MOST_SWATCHES = 64
"""More runs than this share colours anyway."""
_SECONDS = ((86400, "d"), (3600, "h"), (60, "min"))


def verdict(view: View) -> Html:
    """The result in sentences, with the numbers that go with it."""
    pairs = view.comparison["pairs"]
    lines = verdict_lines(view.comparison)
    level: Any = "note"
    if not pairs:
        level = "warning"
    elif len(pairs) == 1:
        level = _LEVELS[pairs[0]["verdict"]]
    found = [
        page.finding(_LEVELS[pairs[k]["verdict"]] if len(lines) == len(pairs) else level, text)
        for k, text in enumerate(lines)
    ]
    ended = [entry for entry in view.entries if entry["status"] not in ("completed", "running", "paused", "pruned")]
    if ended:
        text = f"{len(ended)} of {len(view.entries)} runs did not end as they should."
        found.append(page.finding("warning", text, "They take part in no comparison; their causes stand below."))
    working = sum(entry["status"] == "running" for entry in view.entries)
    if working:
        said = "1 run is" if working == 1 else f"{working} runs are"
        found.append(page.finding("note", f"{said} still running: this is not the last word."))
    return page.section("Verdict", page.findings(found), page.tiles(_tiles(view)), anchor="verdict")


def _tiles(view: View) -> Iterator[Tile]:
    comparison = view.comparison
    done = len(view.completed)
    yield Tile("Runs completed", f"{done}", f"of {len(view.entries)}", "warning" if done < len(view.entries) else None)
    for benchmark in comparison["benchmarks"][:3]:
        # The best of several seeds would be the luckiest one: configurations count there.
        entries = view.several_seeds or [entry for _, entry in view.completed]
        scored = [(score, entry) for entry in entries if (score := view.accuracy(entry, benchmark)) is not None]
        if scored:
            score, best = max(scored, key=lambda pair: pair[0])
            interval = rate_interval(best["metrics"][f"{benchmark}/accuracy"])
            yield Tile(f"Highest on {benchmark}", f"{percent(score)} %", f"{best['label']}, {interval}")
        detectable = comparison["minimum_detectable_difference"].get(benchmark)
        if detectable is not None:
            power = f"{comparison['method']['power']:.0%}"
            yield Tile("Smallest difference found", percent(detectable), f"points, {power} of the time, {benchmark}")
    if comparison["pairs"]:
        yield Tile("Comparisons adjusted for", f"{comparison['method']['comparisons']}", "by Holm's method")


def remarks(view: View) -> Html:
    """What a reader must know beside the numbers."""
    said = [text for text in notes(view.comparison) if not _is_cause(text, view)]
    return page.section(
        "How sure is this?", element("ul", *(element("li", text) for text in said), class_="remarks"), anchor="remarks"
    )


def _is_cause(text: str, view: View) -> bool:
    """Causes have a table of their own."""
    return any(
        entry["status"] != "completed" and text.startswith(f"{entry['label']} ") and (entry["cause"] or "") in text
        for entry in view.entries
    )


# -- arms of several seeds ---------------------------------------------------------------------------------------------


def arm_table(view: View) -> Html | None:
    """Runs that differ in their seed alone, as one row; None where every run stands for itself."""
    arms = view.several_seeds
    if not arms:
        return None
    blocks = []
    for benchmark in view.comparison["benchmarks"]:
        columns = [
            Column("configuration"),
            Column("seeds", is_number=True),
            Column(f"mean accuracy on {benchmark}, % [95 %]", is_number=True),
            Column("between seeds, points", is_number=True),
            *_difference_columns(""),
            Column("group"),
        ]
        rows = []
        for arm in arms:
            found = arm["metrics"].get(f"{benchmark}/accuracy")
            spread = found.get("seed_sd") if found else None
            rows.append(
                [
                    arm["label"],
                    (_seeds(arm, found), float(len(arm["runs"]))),
                    (rate_interval(found), found["value"] if found else None),
                    ("-" if spread is None else f"± {percent(spread)}", spread),
                    *_difference(view, arm["runs"][0], benchmark),
                    view.letters(arm["id"], benchmark),
                ]
            )
        blocks.append(page.table(columns, rows, name=f"Configurations, {benchmark}"))
    remark = (
        "Runs that differ in their seed alone are one configuration. Intervals hold for other questions and other "
        "seeds; ± is the standard deviation between seeds. Configurations that share a letter are not told apart."
    )
    return page.section("Configurations", *blocks, page.note(remark), anchor="arms")


def _seeds(arm: Mapping[str, Any], found: Mapping[str, Any] | None) -> str:
    """How many seeds an arm has, and how many of them have a score."""
    n, scored = len(arm["runs"]), (found or {}).get("n_seeds", 0)
    return f"{n}" if scored == n else f"{scored} of {n}"


def _difference_columns(of: str) -> list[Column]:
    return [
        Column(f"difference, points [95 %]{of}", is_number=True),
        Column(f"verdict{of}"),
        Column(f"adjusted p{of}", is_number=True),
    ]


def _difference(view: View, name: str, benchmark: str) -> Cells:
    """Cells of :func:`_difference_columns` for a run, or for the arm that it belongs to."""
    entry = {"run_dir": name}
    pair = view.pair(entry, benchmark)
    if view.is_baseline(entry):
        return [("baseline", 0.0), "", ("", None)]
    if pair is None:
        return [("-", None), "", ("-", None)]
    said = p_text(pair["p_adjusted"]).removeprefix("p = ").removeprefix("p ")
    return [(points_interval(pair), pair["difference"]), badge(pair["verdict"]), (said, pair["p_adjusted"])]


# -- the table of runs -------------------------------------------------------------------------------------------------


def run_table(view: View) -> Html:
    """All runs: what differs, accuracy, difference, cost. Every column sorts."""
    keys = view.settings()
    benchmarks = view.comparison["benchmarks"]
    several = len(benchmarks) > 1
    columns = [Column("run")]
    seeds = {tuple(entry["seeds"]) for entry in view.entries}
    for benchmark in benchmarks:
        of = f", {benchmark}" if several else ""
        columns.append(Column(f"accuracy, % [95 %]{of}", is_number=True))
        # With several seeds an arm is compared, not a run: its differences stand in a table of their own.
        columns += [] if view.several_seeds else [*_difference_columns(of), Column(f"group{of}")]
    columns += [Column(key) for key in keys]
    if len(seeds) > 1:
        columns.append(Column("seed", is_number=True))
    columns += [
        Column(title, is_number=True)
        for title in ("peak GiB", "tokens/s", "minutes", "trained: adapter", "trained: others")
    ]
    columns.append(Column("status"))
    rows = [
        _row(view, place, entry, keys, benchmarks, has_seeds=len(seeds) > 1) for place, entry in enumerate(view.entries)
    ]
    empty = len(columns) - 1
    for baseline in view.comparison["baselines"]:
        cells: Cells = [f"{baseline['label']} (no run)"]
        cells += ["" if not column.is_number else ("", None) for column in columns[1 : empty + 1]]
        at = next(
            k for k, column in enumerate(columns) if column.title.startswith("accuracy") and (
                not several or column.title.endswith(f", {baseline['benchmark']}")
            )
        )  # fmt: skip
        cells[at] = (rate_interval(baseline), baseline["value"])
        rows.append(cells)
    folder = where(view.comparison)
    return page.section(
        "Runs",
        page.table(columns, rows, name="Runs"),
        page.note(
            "Settings that are the same for all runs are left out. A click on a heading sorts. "
            + (
                "Intervals of a single run are about other questions only; the table of configurations says how much "
                "seeds matter, and has the differences."
                if view.several_seeds
                else "Differences are run minus baseline, paired by question; runs that share a letter (group) are "
                "not told apart."
            )
            + (f" {folder}." if folder else "")
        ),
        anchor="runs",
    )


def _row(
    view: View, place: int, entry: Mapping[str, Any], keys: list[str], benchmarks: list[str], *, has_seeds: bool
) -> Cells:
    name = short_folders([one["run_dir"] for one in view.entries])[1][place]
    row: Cells = [
        join(
            [
                swatch(place) if len(view.entries) <= _MOST_SWATCHES else "",
                element("b", entry["label"]),
                element("small", name),
            ],
            " ",
        )
    ]
    for benchmark in benchmarks:
        found = entry["metrics"].get(f"{benchmark}/accuracy")
        row.append((rate_interval(found), found["value"] if found else None))
        if not view.several_seeds:
            row += [*_difference(view, entry["run_dir"], benchmark), view.letters(entry["run_dir"], benchmark)]
    reference = next((one for one in view.entries if view.is_baseline(one)), None)
    for key in keys:
        told = view.told(entry, key)
        is_changed = reference is not None and told != view.told(reference, key)
        row.append(element("mark", told) if is_changed else told)
    if has_seeds:
        seeds = entry["seeds"]
        row.append((", ".join(map(str, seeds)), _sortable(seeds[0]) if seeds else None))
    memory, speed, wall = entry["peak_memory_gib"], entry["train_tokens_per_s"], entry["wall_s"]
    lora, other = entry["trainable"].get("n_lora"), entry["trainable"].get("n_other")
    row += [
        ("-" if memory is None else f"{memory:.2f}", memory),
        (count(speed), speed),
        ("-" if wall is None else f"{wall / 60:.1f}", wall),
        (count(lora), lora),
        (count(other), other),
        element("span", entry["status"], class_=f"status {entry['status']}"),
    ]
    return [
        (cell[0], None if cell[1] is None else float(f"{cell[1]:.6g}")) if isinstance(cell, tuple) else cell
        for cell in row
    ]


def _sortable(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) or str(value).isdigit() else None


def swatch(place: int) -> Html:
    """The colour and dashes of a run, as a short line."""
    drawn = element("line", x1=0, y1=6, x2=22, y2=6, class_="path")
    return element("svg", drawn, width=22, height=12, class_=f"swatch {series(place)}", aria_hidden="true")


def badge(word: str) -> Html:
    """A verdict, in its colour."""
    return element("span", word, class_=f"badge {word}")


# -- differences -------------------------------------------------------------------------------------------------------


def forest(view: View) -> Html | None:
    """Every difference to the baseline with its interval, one below the other; None without pairs."""
    parts = [_forest_of(view, benchmark) for benchmark in view.comparison["benchmarks"]]
    found = [part for part in parts if part is not None]
    return page.section("Differences to the baseline", *found, anchor="differences") if found else None


def _forest_of(view: View, benchmark: str) -> Html | None:
    baseline = view.comparison["baseline"]
    pairs = [
        pair for pair in view.comparison["pairs"] if pair["benchmark"] == benchmark and pair["a"] == baseline
    ]  # fmt: skip
    if not pairs:
        return None
    ordered = sorted(pairs, key=lambda pair: -pair["difference"])
    left_out = len(ordered) - _MOST_INTERVALS
    if left_out > 0:
        ordered = [*ordered[: _MOST_INTERVALS // 2], *ordered[-_MOST_INTERVALS // 2 :]]
    smallest = view.comparison["minimum_detectable_difference"].get(benchmark, 0.0)
    ends = [end for pair in ordered for end in (100 * pair["ci_low"], 100 * pair["ci_high"])]
    scale = scale_of([*ends, 0.0, 100 * smallest, -100 * smallest])
    rows = [_interval(pair, view, scale, 100 * smallest) for pair in ordered]
    ticks = [
        element("span", signed(value / 100), style=f"left:{percent_place(scale.place(value))}")
        for value in scale.ticks(7)
    ]
    axis = element("li", element("span", ""), element("div", *ticks, class_="ticks"), class_="axis", aria_hidden="true")
    caption = (
        f"Points gained or lost against {view.label(baseline)} on {benchmark}, with 95 % intervals, highest first. "
        f"A true difference that reaches beyond the band, {percent(smallest)} points to either side, is found with a "
        f"probability of {view.comparison['method']['power']:.0%} or more; a smaller one may be found, or not."
    )
    if left_out > 0:
        caption += f" The {_MOST_INTERVALS // 2} highest and lowest are shown; {left_out} between them are not."
    return page.figure(element("ul", *rows, axis, class_="forest"), benchmark, caption)


def _interval(pair: Mapping[str, Any], view: View, scale: Scale, smallest: float) -> Html:
    low, middle, high = (scale.place(100 * pair[key]) for key in ("ci_low", "difference", "ci_high"))
    left, right = scale.place(-smallest), scale.place(smallest)
    band = element(
        "rect", x=percent_place(left), y=0, width=percent_place(right - left), height="100%", class_="band"
    )  # fmt: skip
    drawing = element(
        "svg",
        band,
        line(scale.place(0), 0, scale.place(0), 1, "zero"),
        line(low, 0.5, high, 0.5, f"interval {pair['verdict']}"),
        dot(middle, 0.5, points_interval(pair), pair["verdict"]),
        width="100%",
        height=26,
        aria_hidden="true",
    )
    text = f"{points_interval(pair)}"
    return element(
        "li",
        element("span", view.label(pair["b"]), class_="name"),
        drawing,
        element("span", text, " ", badge(pair["verdict"]), class_="said"),
    )


# -- what did not end well ---------------------------------------------------------------------------------------------


def ended(view: View) -> Html | None:
    """Runs without a result, each with its cause, what to do, and how far it came; None where all are completed."""
    rows = []
    for entry in view.entries:
        if entry["status"] == "completed":
            continue
        run = view.run(entry["run_dir"])
        rows.append(
            [
                entry["label"],
                element("span", entry["status"], class_=f"status {entry['status']}"),
                entry["cause"] or "no cause was recorded",
                entry["advice"] or "-",
                _reached(run) if run else "-",
                (duration(entry["wall_s"]), entry["wall_s"]),
            ]
        )
    if not rows:
        return None
    columns = [Column(title) for title in ("run", "status", "cause", "what to do", "came as far as")]
    return page.section(
        "Runs without a result",
        page.table([*columns, Column("after", is_number=True)], rows, name="Runs without a result"),
        anchor="ended",
    )


def _reached(run: Run) -> str:
    """The last optimizer step that a run wrote down."""
    try:
        lines = read_text(run.path / "metrics.jsonl", errors="replace").splitlines()
    except (OSError, ValueError):
        return "no optimizer step"
    for text in reversed(lines):
        try:
            row = parse_record(text)
        except ValueError:
            continue  # killed while it wrote the line
        if isinstance(row, dict) and "event" not in row and "step" in row:
            return f"step {row['step']} of {row.get('stage', 'training')}"
    return "no optimizer step"


def duration(seconds: float | None) -> str:
    """``3.1 min``, ``2.0 h``."""
    if seconds is None:
        return "-"
    for size, unit in _SECONDS:
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
