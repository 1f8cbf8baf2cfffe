"""What the rows of ``metrics.jsonl`` show: NaN, spikes, divergence, plateaus, steps that stall, events of the guards.

All of it is a function of the rows alone, so a run that was recorded elsewhere is judged the same. Losses and gradient
norms are compared on a log scale, in robust standard deviations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mgm_exp.doctor.facts import Fact
from mgm_exp.doctor.reading import plain_line
from mgm_exp.doctor.robust import is_finite, log_of, sigma

# As the guards of training have it: steps that are seen before anything is compared, the window, what counts as a spike
FEWEST, WINDOW, SPIKE = 16, 64, 6.0
LEAST_SIGMA = 0.05
# A loss has diverged that stays so much above its best: as a factor, and in nats per token.
DIVERGED_FACTOR, DIVERGED_RISE, DIVERGED_STEPS = 1.5, 0.5, 8
SMOOTHED = 8
# A loss that fell by less than this share of itself, over so many steps, did not learn.
FLAT, FLAT_STEPS = 0.02, 40
# Most rows that are looked at; of a longer run the last ones.
MOST_ROWS = 200_000
# What is counted by these is hashed and compared.
_KINDS: dict[str, type] = {"step": int, "stage": str, "event": str, "batch_name": str}


@dataclass(frozen=True)
class Row:
    """A row with the line it stands in."""

    line: int
    values: Mapping[str, Any]


def row_of(line: int, values: Mapping[str, Any]) -> Row:
    """A row of a file that others may have written: without the keys whose value is of another kind than it should."""
    kept = {key: value for key, value in values.items() if key not in _KINDS or type(value) is _KINDS[key]}
    return Row(line, {key: plain_line(kept[key]) if _KINDS.get(key) is str else kept[key] for key in kept})


def stages_of(rows: Sequence[Row]) -> list[str]:
    """The trained stages, in the order of their first rows."""
    return list(dict.fromkeys(str(row.values["stage"]) for row in rows if row.values.get("stage")))


def curve_facts(rows: Sequence[Row], stage: str, source: str = "metrics.jsonl") -> Iterator[Fact]:
    """``curves.*`` and ``events.*`` of one stage.

    Args:
        rows: Of all stages.
        stage: The one that is asked about.
        source: Name of the file.
    """
    mine = [row for row in rows if row.values.get("stage") == stage][-MOST_ROWS:]
    steps = [row for row in mine if "loss" in row.values and "lr" in row.values]
    yield from _events(mine, stage, source)
    if not steps:
        return
    last = f"{source}:{steps[-1].line}"
    yield Fact("curves.stage", stage, last, f"stage {stage}")
    yield Fact("curves.steps", len(steps), last, f"{stage}: {len(steps)} steps were recorded")
    yield from _not_finite(steps, stage, source)
    good = [row for row in steps if is_finite(row.values["loss"]) and float(row.values["loss"]) >= 0]
    if good:
        yield from _level(good, stage, source)
        yield from _spikes(good, stage, source)
    yield from _gradients(steps, stage, source)
    yield from _rates(steps, stage, source)
    yield from _speed(steps, stage, source)
    yield from _validation(mine, stage, source)


def _events(rows: Sequence[Row], stage: str, source: str) -> Iterator[Fact]:
    counts = Counter(str(row.values["event"]) for row in rows if row.values.get("event"))
    for event, count in counts.items():
        first = next(row for row in rows if row.values.get("event") == event)
        detail = str(first.values.get("detail") or "")[:200]
        told = (
            f"{stage}: event {event}{f' {count} times, first' if count > 1 else ''} at step {first.values.get('step')}"
        )
        yield Fact(f"events.{event}", count, f"{source}:{first.line}", told + (f": {detail}" if detail else ""))


def _not_finite(steps: Sequence[Row], stage: str, source: str) -> Iterator[Fact]:
    bad = [row for row in steps if row.values["loss"] is None or row.values.get("grad_norm", 0.0) is None]
    if not bad:
        yield Fact("curves.not_finite", 0, f"{source}:{steps[-1].line}", f"{stage}: every loss is finite")
        return
    first = bad[0]
    step = first.values.get("step")
    place = f"{source}:{first.line}"
    told = f"{stage}: loss or gradient is not finite in {len(bad)} of {len(steps)} steps, first at step {step}"
    yield Fact("curves.not_finite", len(bad), place, told)
    position = steps.index(first)
    yield Fact("curves.not_finite_from", position + 1, place, f"{stage}: step {step} is the first that is not finite")
    yield Fact("curves.not_finite_share", len(bad) / len(steps), place, told)
    rest = steps[position:]
    stays = len(rest) >= 3 and all(row in bad for row in rest)
    yield Fact("curves.not_finite_stays", stays, place, f"{stage}: from step {step} on no step is finite")
    names = [row.values.get("batch_name") for row in bad if row.values.get("batch_name")]
    again = len(names) > len(set(names))
    yield Fact("curves.not_finite_same_batch", again, place, f"{stage}: the same batch was not finite twice")


def _level(good: Sequence[Row], stage: str, source: str) -> Iterator[Fact]:
    losses = [float(row.values["loss"]) for row in good]
    first, last = median(losses[:5]), median(losses[-SMOOTHED:])
    place = f"{source}:{good[-1].line}"
    yield Fact(
        "curves.loss_first", losses[0], f"{source}:{good[0].line}", f"{stage}: the first loss is {losses[0]:.4g}"
    )
    yield Fact("curves.loss_last", last, place, f"{stage}: the last losses are about {last:.4g}")
    zeros = sum(loss < 1e-6 for loss in losses)
    told = f"{stage}: the loss is 0 in {zeros} of {len(losses)} steps"
    yield Fact("curves.zero_loss_share", zeros / len(losses), place, told)
    smoothed = [median(losses[max(0, i - SMOOTHED + 1) : i + 1]) for i in range(len(losses))]
    best = min(smoothed[SMOOTHED - 1 :] or smoothed)
    above = 0
    for loss in reversed(losses):
        if loss <= max(best * DIVERGED_FACTOR, best + DIVERGED_RISE):
            break
        above += 1
    told = f"{stage}: the last {above} losses lie far above the best ({best:.4g}), now {last:.4g}"
    yield Fact("curves.diverged", above >= DIVERGED_STEPS, place, told)
    if len(losses) >= FLAT_STEPS:
        quarter = len(losses) // 4
        begin, end = median(losses[:quarter]), median(losses[-quarter:])
        flat = begin > 0 and (begin - end) / begin < FLAT and last < begin * DIVERGED_FACTOR
        told = f"{stage}: the loss went from {begin:.4g} to {end:.4g} in {len(losses)} steps"
        yield Fact("curves.flat", flat, place, told)
    yield Fact(
        "curves.loss_ratio", last / first if first > 0 else 1.0, place, f"{stage}: loss {first:.4g} -> {last:.4g}"
    )


def _spikes(good: Sequence[Row], stage: str, source: str) -> Iterator[Fact]:
    history: list[float] = []
    found: list[tuple[float, Row]] = []
    for row in good:
        value = log_of(float(row.values["loss"]))
        recent = history[-WINDOW:]
        if len(recent) >= FEWEST:
            score = (value - median(recent)) / max(LEAST_SIGMA, sigma(recent))
            if score > SPIKE:
                found.append((score, row))
        history.append(value)
    place = f"{source}:{good[-1].line}"
    if not found:
        yield Fact("curves.spikes", 0, place, f"{stage}: no loss stands out")
        return
    score, worst = max(found, key=lambda pair: pair[0])
    place = f"{source}:{worst.line}"
    told = (
        f"{stage}: {len(found)} loss spike(s), the worst at step {worst.values.get('step')} "
        f"(loss {float(worst.values['loss']):.4g}, {score:.0f} robust standard deviations)"
    )
    yield Fact("curves.spikes", len(found), place, told)
    names = Counter(row.values.get("batch_name") for _, row in found if row.values.get("batch_name"))
    name, times = names.most_common(1)[0] if names else ("", 0)
    yield Fact("curves.spikes_of_one_batch", times, place, f"{stage}: batch {name} spiked {times} times")
    warm = [row for _, row in found if int(row.values.get("step") or 0) <= max(50, len(good) // 20)]
    told = f"{stage}: {len(warm)} of {len(found)} spikes lie in the first steps"
    yield Fact("curves.early_spikes_share", len(warm) / len(found), place, told)


def _gradients(steps: Sequence[Row], stage: str, source: str) -> Iterator[Fact]:
    known = [row for row in steps if is_finite(row.values.get("grad_norm"))]
    if not known:
        return
    norms = [float(row.values["grad_norm"]) for row in known]
    place = f"{source}:{known[-1].line}"
    zeros = sum(norm == 0 for norm in norms)
    told = f"{stage}: the gradient is exactly 0 in {zeros} of {len(norms)} steps"
    yield Fact("curves.zero_gradient_share", zeros / len(norms), place, told)
    middle = median(norms[-WINDOW:])
    yield Fact("curves.grad_norm", middle, place, f"{stage}: the gradient norm is about {middle:.4g}")
    scales = [row for row in steps if is_finite(row.values.get("loss_scale"))]
    if scales:
        least = min(scales, key=lambda row: float(row.values["loss_scale"]))
        told = f"{stage}: the loss scale fell to {least.values['loss_scale']}"
        yield Fact("curves.least_loss_scale", float(least.values["loss_scale"]), f"{source}:{least.line}", told)


def _rates(steps: Sequence[Row], stage: str, source: str) -> Iterator[Fact]:
    known = [row for row in steps if is_finite(row.values.get("lr"))]
    if not known:
        return
    top = max(known, key=lambda row: float(row.values["lr"]))
    rate = float(top.values["lr"])
    yield Fact("curves.lr_max", rate, f"{source}:{top.line}", f"{stage}: the largest learning rate is {rate:.3g}")


def _speed(steps: Sequence[Row], stage: str, source: str) -> Iterator[Fact]:
    speeds = [float(row.values["tokens_per_s"]) for row in steps if is_finite(row.values.get("tokens_per_s"))]
    if len(speeds) >= FLAT_STEPS:
        quarter = len(speeds) // 4
        before, after = median(speeds[quarter : 2 * quarter]), median(speeds[-quarter:])
        if before > 0:
            told = f"{stage}: {before:,.0f} tokens a second at first, {after:,.0f} at the end"
            yield Fact("curves.throughput_ratio", after / before, f"{source}:{steps[-1].line}", told)
        middle = median(speeds)
        stalls = [row for row in steps if is_finite(row.values.get("tokens_per_s"))]
        slow = [row for row in stalls if float(row.values["tokens_per_s"]) < middle / 4]
        told = f"{stage}: {len(slow)} of {len(stalls)} steps took more than four times as long as usual"
        place = f"{source}:{(slow or stalls)[-1].line}"
        yield Fact("curves.stalled_share", len(slow) / len(stalls), place, told)


def _validation(rows: Sequence[Row], stage: str, source: str) -> Iterator[Fact]:
    points = [row for row in rows if row.values.get("event") == "validation" and is_finite(row.values.get("value"))]
    if len(points) < 3:
        return
    best = max(points, key=lambda row: float(row.values["value"]))
    drop = float(best.values["value"]) - float(points[-1].values["value"])
    told = (
        f"{stage}: the validation score fell from {float(best.values['value']):.4f} at step {best.values.get('step')} "
        f"to {float(points[-1].values['value']):.4f}"
    )
    yield Fact("curves.validation_drop", drop, f"{source}:{points[-1].line}", told)
    # The scores are of a sample of questions; fewer than two standard errors are no fall
    asked = points[-1].values.get("questions")
    level = min(1.0, max(0.0, float(best.values["value"])))
    error = math.sqrt(level * (1 - level) / asked) if isinstance(asked, int) and asked > 0 else 0.0
    yield Fact("curves.validation_drop_errors", drop / max(error, 1e-3), f"{source}:{points[-1].line}", told)
    widest = drop == 0 and len({float(row.values["value"]) for row in points}) == 1
    told = f"{stage}: all {len(points)} validation scores are {float(points[-1].values['value']):.4f}"
    yield Fact("curves.validation_same", widest, f"{source}:{points[-1].line}", told)
