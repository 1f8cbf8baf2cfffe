"""Where the curves of two runs part, beyond their noise, and what is different there: batches, rates, data, settings.

Only like is compared with like: a stage with the same stage, step by step. Two kinds of difference are told apart:
the first step at which any number differs at all (arithmetic), and the first from which on the losses differ by more
than the noise on them explains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mgm_exp.doctor.case import METRICS_BYTES, read_log_bytes
from mgm_exp.doctor.curves import Row, row_of, stages_of
from mgm_exp.doctor.reading import shown
from mgm_exp.doctor.robust import is_finite, log_of, noise
from mgm_exp.errors import UserError
from mgm_exp.record import redact_text
from mgm_exp.store import parse_record, read_record, read_yaml

# Steps whose mean difference is judged, and by how many of its standard errors it must differ.
WINDOW, SIGNIFICANT = 16, 5.0
# The least noise that is believed where batches differ (5 %), and where they are the same (rounding, growing slowly).
LEAST_NOISE, LEAST_SAME_NOISE = 0.05, 1e-4
# Of the same batches, a logarithmic difference that rounding does not make.
VISIBLE = 0.01
MOST_DIFFERENCES = 12
# Settings that say where and how a run was recorded, not what it computes.
_ELSEWHERE = ("name", "paths", "tracker", "sweep", "launch", "trial", "plan")


@dataclass(frozen=True)
class Parting:
    """What two runs' curves of one stage show.

    Args:
        stage: Which.
        steps: How many both have.
        first_difference: The first step at which a number (see ``field``) is not the same; None: there is none.
        field: Which number that is.
        parts_at: The first step from which on ``quantity`` differs significantly; None: it never does.
        quantity: ``loss`` or ``grad_norm``.
        noise: Standard deviation of the logarithmic difference of one step that is noise.
        difference: Mean logarithmic difference over the window that begins at ``parts_at``.
        last: Medians of the last losses of both.
        batches_differ_at, rates_differ_at: The first step of another batch, of another learning rate.
        share_of_equal_batches: 0 to 1.
        batch: Name of the batch at ``parts_at`` in both runs.
        sample_ids: Ids of samples that either run named at that step, or in its events near it.
        events: What the guards said near that step, in words.
    """

    stage: str
    steps: int
    first_difference: int | None = None
    field: str = ""
    parts_at: int | None = None
    quantity: str = ""
    noise: float = 0.0
    difference: float = 0.0
    last: tuple[float, float] | None = None
    batches_differ_at: int | None = None
    rates_differ_at: int | None = None
    share_of_equal_batches: float = 1.0
    batch: tuple[str, str] | None = None
    sample_ids: tuple[str, ...] = ()
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Args:
        runs: Their folders.
        partings: One for each stage that both trained.
        only_one: Stages that only one of them trained.
        settings: Settings that differ, ``key: a -> b``.
        data: What differs in the data, in words.
        reasons: What the partings come from, the likeliest first, in words.
    """

    runs: tuple[str, str]
    partings: tuple[Parting, ...]
    only_one: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    reasons: tuple[str, ...] = field(default=())

    @property
    def has_parted(self) -> bool:
        """Whether any stage does, beyond noise."""
        return any(parting.parts_at is not None for parting in self.partings)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        found = asdict(self)
        for parting in found["partings"]:
            if not math.isfinite(parting["difference"]):
                parting["difference"] = None  # finite in one of them only
        return {"schema_version": 1, "has_parted": self.has_parted, **found}

    def in_words(self) -> str:
        """A few lines for the terminal."""
        lines = [f"A: {self.runs[0]}", f"B: {self.runs[1]}"]
        for parting in self.partings:
            lines += ["", *_stage_in_words(parting)]
        lines += [f"only one of them trained {stage}" for stage in self.only_one]
        if self.reasons:
            lines += ["", *(f"because: {reason}" for reason in self.reasons)]
        for title, found in (("settings that differ", self.settings), ("data", self.data)):
            if found:
                lines += ["", f"{title}:", *(f"   {item}" for item in found)]
        return shown("\n".join(lines))


def compare_runs(first: Path, second: Path) -> Comparison:
    """Reads both runs and says where they part.

    Raises:
        UserError: one of them has no readable rows of training, or they have no stage in common.
    """
    rows = [_rows(folder) for folder in (first, second)]
    stages = [stages_of(found) for found in rows]
    common = [stage for stage in stages[0] if stage in stages[1]]
    if not common:
        raise UserError(
            f"{first} trained {_named(stages[0])} and {second} {_named(stages[1])}: there is no stage that both have, "
            "and different stages are not compared."
        )
    partings = tuple(parting_of(stage, *rows) for stage in common)
    settings = tuple(_settings(_mapping(first, "config.yaml"), _mapping(second, "config.yaml")))
    found_data = tuple(_data_differences(_data(first), _data(second)))
    return Comparison(
        runs=(str(first), str(second)),
        partings=partings,
        only_one=tuple(sorted({*stages[0]} ^ {*stages[1]})),
        settings=settings[:MOST_DIFFERENCES],
        data=found_data,
        reasons=tuple(_reasons(partings, settings, found_data)),
    )


def parting_of(stage: str, first: Sequence[Row], second: Sequence[Row]) -> Parting:
    """Where the curves of one stage part.

    Args:
        stage: Which one.
        first, second: Rows of both runs, of all stages.
    """
    ours, theirs = _steps(first, stage), _steps(second, stage)
    steps = sorted(set(ours) & set(theirs))
    pairs = [(step, ours[step], theirs[step]) for step in steps]
    found = Parting(stage, len(steps))
    if not pairs:
        return found
    batches_at = _first(pairs, "batch_name")
    named = [a["batch_name"] == b["batch_name"] for _, a, b in pairs if "batch_name" in a and "batch_name" in b]
    different, key = _first_difference(pairs)
    found = Parting(
        stage,
        len(steps),
        first_difference=different,
        field=key,
        last=_last(pairs),
        batches_differ_at=batches_at,
        rates_differ_at=_first(pairs, "lr"),
        share_of_equal_batches=sum(named) / len(named) if named else 0.0,
    )
    candidates = [c for quantity in ("loss", "grad_norm") if (c := _significant(pairs, quantity, batches_at))]
    if not candidates:
        level = _noise_of(pairs, "loss", batches_at)
        return replace(found, noise=level, quantity="loss")
    # The loss is what counts; a gradient that parted before it is how it began
    loss = next((c for c in candidates if c[0] == "loss"), None)
    quantity, step, level, difference = loss or candidates[0]
    ahead = next((c for c in candidates if c[0] == "grad_norm" and c[1] < step), None)
    a, b = ours[step], theirs[step]
    events = [*_events_near(first, stage, step, "A"), *_events_near(second, stage, step, "B")]
    if ahead is not None and loss is not None:
        events.insert(0, f"the gradient norm parted before, at step {ahead[1]}")
    return replace(
        found,
        parts_at=step,
        quantity=quantity,
        noise=level,
        difference=difference,
        batch=(str(a.get("batch_name", "")), str(b.get("batch_name", ""))),
        sample_ids=tuple(dict.fromkeys([*_samples(first, stage, step), *_samples(second, stage, step)]))[:16],
        events=tuple(events[:8]),
    )


Pair = tuple[int, Mapping[str, Any], Mapping[str, Any]]


def _steps(rows: Sequence[Row], stage: str) -> dict[int, Mapping[str, Any]]:
    return {
        int(row.values["step"]): row.values
        for row in rows
        if row.values.get("stage") == stage and "loss" in row.values and "lr" in row.values and "step" in row.values
    }


def _first(pairs: Sequence[Pair], key: str) -> int | None:
    """The first step at which both have a value and it is not the same."""
    return next((step for step, a, b in pairs if key in a and key in b and a[key] != b[key]), None)


def _first_difference(pairs: Sequence[Pair]) -> tuple[int | None, str]:
    for step, a, b in pairs:
        for key in ("batch_name", "lr", "loss", "grad_norm"):
            if key in a and key in b and a[key] != b[key]:
                return step, key
    return None, ""


def _series(pairs: Sequence[Pair], key: str) -> list[tuple[int, float, float]]:
    """Step and logarithms, of the steps where both are finite."""
    return [
        (step, log_of(float(a[key])), log_of(float(b[key])))
        for step, a, b in pairs
        if is_finite(a.get(key)) and is_finite(b.get(key))
    ]


def _noise_of(pairs: Sequence[Pair], key: str, batches_at: int | None) -> float:
    """Standard deviation of what a step's logarithmic difference has without a cause.

    Where both saw the same batches, the difference itself is smooth but for rounding; where they did not, each curve
    has the noise of its batches.
    """
    series = _series(pairs, key)
    if batches_at is None:
        # Of the beginning, before anything can have grown
        begin = [a - b for _, a, b in series[: max(WINDOW // 2, len(series) // 8)]]
        return max(LEAST_SAME_NOISE, noise(begin))
    return max(LEAST_NOISE, math.hypot(noise([a for _, a, _ in series]), noise([b for _, _, b in series])))


def _significant(pairs: Sequence[Pair], key: str, batches_at: int | None) -> tuple[str, int, float, float] | None:
    """(quantity, step, noise, difference) of the first window whose mean difference noise does not explain, and
    nor does it explain that of what follows; also of a step that is finite in one run only."""
    one_sided = next((step for step, a, b in pairs if is_finite(a.get(key)) != is_finite(b.get(key))), None)
    series = _series(pairs, key)
    level = _noise_of(pairs, key, batches_at)
    width = min(WINDOW, max(1, len(series) // 2))
    limit = SIGNIFICANT * level / math.sqrt(width)
    differences = [a - b for _, a, b in series]
    for place in range(len(series) - width + 1):
        if one_sided is not None and series[place][0] > one_sided:
            break
        window = differences[place : place + width]
        level_there = fmean(window)
        if abs(level_there) <= limit or abs(median(window)) <= limit / 2:
            continue
        rest = differences[place : place + 2 * width]
        if sum((value > 0) == (level_there > 0) for value in rest) >= 0.75 * len(rest):
            begin = _change_in(differences, place, width)
            if batches_at is None:  # the difference has no noise of batches: back to where it began to grow
                while begin and abs(differences[begin - 1]) > VISIBLE:
                    begin -= 1
            return key, series[begin][0], level, fmean(differences[begin : begin + width])
    return None if one_sided is None else (key, one_sided, level, math.inf)


def _change_in(differences: Sequence[float], place: int, width: int) -> int:
    """Where around a window the differences leave zero for another level: the least squares of both parts."""
    low, high = max(0, place - width), min(len(differences), place + 2 * width)

    def squares(begin: int) -> float:
        after = differences[begin:high]
        level = fmean(after)
        return sum(value**2 for value in differences[low:begin]) + sum((value - level) ** 2 for value in after)

    return min(range(low, high - width // 2), key=squares)


def _last(pairs: Sequence[Pair]) -> tuple[float, float] | None:
    ends = [
        [float(row["loss"]) for row in rows if is_finite(row["loss"])]
        for rows in zip(*(p[1:] for p in pairs[-8:]), strict=True)
    ]
    return (median(ends[0]), median(ends[1])) if all(ends) else None


def _events_near(rows: Sequence[Row], stage: str, step: int, run: str) -> Iterator[str]:
    for row in rows:
        event = row.values.get("event")
        at = row.values.get("step")
        is_near = row.values.get("stage") == stage and isinstance(at, int) and abs(at - step) <= WINDOW
        if is_near and event not in (None, "validation", "gradient_statistics", "resumed"):
            detail = str(row.values.get("detail") or "")[:120]
            yield f"{run}, step {at}: {event}{f': {detail}' if detail else ''}"


def _samples(rows: Sequence[Row], stage: str, step: int) -> Iterator[str]:
    for row in rows:
        ids, at = row.values.get("sample_ids"), row.values.get("step")
        if row.values.get("stage") == stage and isinstance(ids, list) and isinstance(at, int) and abs(at - step) <= 1:
            yield from map(str, ids)


# -- why --------------------------------------------------------------------------------------------------------


def _reasons(partings: Sequence[Parting], settings: Sequence[str], data: Sequence[str]) -> Iterator[str]:
    for parting in partings:
        if parting.parts_at is None:
            continue
        stage, step = parting.stage, parting.parts_at
        rates, batches = parting.rates_differ_at, parting.batches_differ_at
        if rates is not None and rates <= step:
            yield f"{stage}: the learning rate is another one from step {rates} on"
        if batches is not None and batches <= step:
            share = f"{parting.share_of_equal_batches:.0%} of the steps have the same batch"
            what = "the data is not the same" if data else "the order of the rows is not (seed, batch sizes)"
            yield f"{stage}: the batches are other ones from step {batches} on ({share}): {what}"
        if batches is None and (rates is None or rates > step):
            name = parting.batch[0] if parting.batch else ""
            if settings:
                yield f"{stage}: the same batches at the same rate: it is a setting (below) or the weights begun with"
            else:
                yield (
                    f"{stage}: the same batches, rate and settings: arithmetic (device, threads, packages) or a fault; "
                    f"look at batch {name or 'of that step'}, and at mgm-exp replay RUN"
                )
        if batches is not None and batches > step and (rates is None or rates > step):
            yield f"{stage}: batches and rate were still the same: it is a setting (below), the weights or arithmetic"


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """Settings that differ, those that both have first: the others are of another version of the program."""
    ours, theirs = dict(_leaves(a)), dict(_leaves(b))
    changed = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    for key in sorted(changed, key=lambda key: not (key in ours and key in theirs)):
        old, new = (_short(side[key]) if key in side else "not there" for side in (ours, theirs))
        yield f"{key}: {old} -> {new}"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if not prefix and key in _ELSEWHERE:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _data(folder: Path) -> dict[str, Any]:
    return {**_mapping(folder, "data.json"), "manifest": _mapping(folder, "manifest.json").get("data") or {}}


def _data_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    prints = [part.get("fingerprint") or _part(part, "manifest").get("fingerprint") for part in (a, b)]
    if prints[0] != prints[1]:
        yield f"fingerprint {_short(prints[0])} -> {_short(prints[1])}: other rows, or other images"
    for stage in ("align", "instruct"):
        ours, theirs = _part(a, stage), _part(b, stage)
        for key in ("rows", "kept", "dropped"):
            if ours.get(key) != theirs.get(key):
                yield f"{stage}: {key} {_short(ours.get(key))} -> {_short(theirs.get(key))}"
        our_text, their_text = _part(ours, "text"), _part(theirs, "text")
        for key in ("words_mean", "words_median", "characters_mean"):
            old, new = our_text.get(key), their_text.get(key)
            if is_finite(old) and is_finite(new) and old != new:
                yield f"{stage}: {key} {old:.2f} -> {new:.2f}"


def _part(whole: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = whole.get(key)
    return found if isinstance(found, Mapping) else {}


# -- words and files --------------------------------------------------------------------------------------------


def _stage_in_words(parting: Parting) -> Iterator[str]:
    yield f"{parting.stage}: {parting.steps} steps in both"
    if not parting.steps:
        return
    if parting.first_difference is None:
        yield "   every loss, gradient norm, learning rate and batch is the same"
        return
    yield f"   the first number that differs: {parting.field} at step {parting.first_difference}"
    noisy = f"noise of one step: {_factor(parting.noise) - 1:.2%}"
    if parting.parts_at is None:
        yield f"   the losses do not part beyond their noise ({noisy})"
    elif math.isinf(parting.difference):
        yield f"   they part at step {parting.parts_at}: {parting.quantity} is finite in one of them only"
    else:
        how = f"A is {abs(_factor(parting.difference) - 1):.1%} {'above' if parting.difference > 0 else 'below'} B"
        yield f"   they part at step {parting.parts_at}: {parting.quantity} of {how} from there ({noisy})"
    if parting.last:
        yield f"   last losses: A {parting.last[0]:.4g}, B {parting.last[1]:.4g}"
    if parting.batch and parting.parts_at is not None:
        a, b = parting.batch
        yield f"   batch there: {a or 'not recorded'}{'' if a == b else f' in A, {b} in B'}"
    if parting.sample_ids:
        yield f"   samples named there: {', '.join(parting.sample_ids)}"
    yield from (f"   {event}" for event in parting.events)


def _factor(logarithm: float) -> float:
    return math.exp(min(logarithm, 700.0))  # a float holds no more than that of e^709


def _rows(folder: Path) -> list[Row]:
    path = folder / "metrics.jsonl"
    try:
        lines = read_log_bytes(path, METRICS_BYTES)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({why}), so there are no curves to compare.") from error
    found = []
    for number, raw in lines:
        try:
            values = parse_record(raw)
        except ValueError:
            continue
        if isinstance(values, dict):
            found.append(row_of(number, values))
    if not stages_of(found):
        raise UserError(f"{path} holds no row of training.", advice="Give two run folders in which something trained.")
    return found


def _mapping(folder: Path, name: str) -> dict[str, Any]:
    read = read_yaml if name.endswith(".yaml") else read_record
    try:
        found = read(folder / name)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(stages: Sequence[str]) -> str:
    return " and ".join(stages) or "nothing"


def _short(value: Any) -> str:
    text = redact_text(str(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
