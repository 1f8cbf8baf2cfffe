"""What would make a cell fit: every change is planned, alone and with others, and the cheapest come first."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from mgm_exp.config import (
    AUTO,
    LINEAR_LAYERS,
    AdapterConfig,
    AdapterKind,
    CaptionPrecision,
    ExperimentConfig,
    LossKernel,
    ModelFamily,
    Offload,
    Precision,
    validate,
)
from mgm_exp.errors import ConfigError
from mgm_exp.plan.architecture import architecture_of
from mgm_exp.plan.cards import Device as PlannedOn
from mgm_exp.plan.cell import TOO_LARGE, CellPlan, Measured, plan_cell
from mgm_exp.plan.lengths import ASSUMED, Rows

# Lines of advice; and how many changes are tried together, the third one only where two are not enough.
_MOST, _TOGETHER = 4, 3
# What a change costs beside time, the least first.
SAME, ROUNDING, OTHER = 0, 1, 2
_IN_WORDS = {SAME: "the same result", ROUNDING: "equal within rounding", OTHER: "another experiment"}
_CHUNK = 64
_SHORTER = (3072, 1536, 1024, 768)
Put = Callable[[ExperimentConfig], str]


@dataclass(frozen=True)
class Change:
    """One change of a configuration.

    Args:
        put: Makes it; the overrides that say so, empty where there is nothing to change.
        kind: Changes of one kind exclude each other; the stronger ones come later.
        costs: Of the result: ``SAME``, ``ROUNDING``, ``OTHER``.
        burden: Of time, as a share, that operations do not show: traffic to the host, small passes. A guess that puts
            changes in an order.
    """

    put: Put
    kind: str
    costs: int
    burden: float = 0.0


@dataclass(frozen=True)
class Found:
    """Changes with which a cell fits: what they cost, and the line that says so."""

    places: tuple[int, ...]
    costs: int
    time: float
    line: str

    @property
    def order(self) -> tuple[int, float, int]:
        return self.costs, self.time, len(self.places)


def advice_for(
    config: ExperimentConfig, device: PlannedOn, measured: Measured | None, curated: Rows | None
) -> list[str]:
    """Lines such as ``train.micro_batch_size=2: 19.8 GiB, fits; about the same time, the same result``.

    The cheapest come first: those that change no result, then those that round otherwise, then other experiments, and
    each by time. More than what is enough is not named.
    """
    tried = [
        change for change in changes(config, has_card=not device.is_main_memory) if change.put(copy.deepcopy(config))
    ]
    before = _operations(plan_cell(config, with_advice=False, measured=measured, curated=curated))
    found: list[Found] = []
    for count in range(1, _TOGETHER + 1):
        for places in combinations(range(len(tried)), count):
            chosen = [tried[place] for place in places]
            if len({change.kind for change in chosen}) == count and not _is_more(tried, places, found):
                one = _try(config, places, chosen, before, measured, curated)
                found += [one] if one else []
        if len(found) >= _MOST or (found and count == 2):
            break
    if not found:
        limit = config.plan.host_memory_gib
        host = "" if limit is None else f" and {limit:g} GiB of main memory"
        return [
            "a larger card, or more of them with zero=3: no change of the batch, checkpointing, the loss, sharding, "
            f"offload, lengths or adapter, and no three of them, makes it fit in {device.memory_gib:.0f} GiB{host}"
        ]
    return [one.line for one in sorted(found, key=lambda one: one.order)[:_MOST]]


def _is_more(tried: Sequence[Change], places: Sequence[int], found: Sequence[Found]) -> bool:
    """Whether less was enough: for each change of something found there is the same one here, or a stronger one."""

    def is_covered(place: int) -> bool:
        return any(tried[other].kind == tried[place].kind and other >= place for other in places)

    return any(all(map(is_covered, one.places)) for one in found)


def _try(
    config: ExperimentConfig,
    places: tuple[int, ...],
    chosen: Sequence[Change],
    before: float | None,
    measured: Measured | None,
    curated: Rows | None,
) -> Found | None:
    """The configuration with these changes, planned; None where it cannot be run, or does not fit."""
    other = copy.deepcopy(config)
    words = " ".join(change.put(other) for change in chosen)
    try:
        validate(other)
    except ConfigError:
        return None
    plan = plan_cell(other, with_advice=False, measured=measured, curated=curated)
    if plan.verdict == TOO_LARGE:
        return None
    after = _operations(plan)
    time = sum(change.burden for change in chosen) + (after / before - 1 if before and after else 0.0)
    costs = max(change.costs for change in chosen)
    host = f", with {plan.host_gib['peak']:.0f} GiB of main memory" if plan.host_gib["offload"] else ""
    words += f": {plan.needed_gib:.1f} GiB, {plan.verdict}{host}; {_percent(time)} time, {_IN_WORDS[costs]}"
    return Found(places, costs, time, words)


def _operations(plan: CellPlan) -> float | None:
    """Of training; None where the number of rows is not known."""
    known = [stage.flops for stage in plan.stages]
    return None if any(flops is None for flops in known) else sum(flops or 0.0 for flops in known)


def _percent(share: float) -> str:
    rounded = round(100 * share)
    return f"about {rounded:+d} %" if rounded else "about the same"


# -- the changes -----------------------------------------------------------------------------------------------------


def changes(config: ExperimentConfig, *, has_card: bool = True) -> Iterator[Change]:
    """All that may be tried of a configuration.

    Args:
        has_card: Beside main memory there is that of a card, from which something can be moved there.
    """
    micro = max(config.train.micro_batch_size, config.train.align.micro_batch_size)
    size = 1 << max(0, math.ceil(math.log2(micro)) - 1) if micro > 1 else 0
    while size >= 1:
        # Half as many samples in a pass: about that much of a GPU's speed is lost where passes become small
        yield Change(_at_most("micro_batch_size", size), "batch", SAME, 0.02 * math.log2(micro / size))
        size //= 2
    yield Change(_checkpointing, "checkpointing", SAME)
    if has_card:
        yield Change(_offload_activations, "checkpointing", SAME, 0.15)
    yield Change(_chunk, "loss", ROUNDING, 0.01)
    for stage in (2, 3):
        if config.devices > 1 and config.zero.stage < stage:
            yield Change(_zero(stage), "zero", ROUNDING, 0.05 if stage == 2 else 0.25)
    for stage in (2, 3):
        if has_card and config.zero.stage <= stage and (stage == 2 or config.devices > 1):
            yield Change(_offload(stage), "zero", ROUNDING, 0.5)
    # Image tokens come first: a shorter sequence has to leave room for what is said of them
    least = architecture_of(config.model).visual_tokens + (config.plan.text_tokens or ASSUMED)
    for length in _SHORTER:
        if length >= least:
            yield Change(_at_most("max_length", length), "length", OTHER)
    yield Change(_frozen, "connector", OTHER)
    yield Change(_lora, "adapter", OTHER)
    yield Change(_qlora, "adapter", OTHER, 0.3)
    if config.data.recaption:
        for size in (8, 1):
            yield Change(_captions(size), "captions", SAME, 0.01)
        yield Change(_captioner_int8, "captioner", OTHER)


def _at_most(key: str, most: int) -> Put:
    """Of both stages that train."""

    def put(config: ExperimentConfig) -> str:
        changed = []
        for where, section in (("train", config.train), ("train.align", config.train.align)):
            if getattr(section, key) > most:
                setattr(section, key, most)
                changed.append(f"{where}.{key}={most}")
        return " ".join(changed)

    return put


def _checkpointing(config: ExperimentConfig) -> str:
    given = config.model.gradient_checkpointing
    if given is True or given == AUTO or config.adapter.kind is AdapterKind.prefix:
        return ""
    config.model.gradient_checkpointing = True
    return "model.gradient_checkpointing=true"


def _offload_activations(config: ExperimentConfig) -> str:
    if config.train.offload_activations or config.model.family is ModelFamily.hf:
        return ""
    config.train.offload_activations = True
    return "train.offload_activations=true"


def _chunk(config: ExperimentConfig) -> str:
    if config.train.loss_kernel is LossKernel.liger or (config.train.loss_chunk or math.inf) <= _CHUNK:
        return ""
    config.train.loss_chunk = _CHUNK
    return f"train.loss_chunk={_CHUNK}"


def _zero(stage: int) -> Put:
    def put(config: ExperimentConfig) -> str:
        config.zero.stage = stage
        return f"zero={stage}"

    return put


def _offload(stage: int) -> Put:
    def put(config: ExperimentConfig) -> str:
        if config.zero.offload_optimizer is Offload.cpu:
            return ""
        config.zero.offload_optimizer = Offload.cpu
        config.zero.stage = stage
        return f"zero={stage} zero.offload_optimizer=cpu"

    return put


def _frozen(config: ExperimentConfig) -> str:
    if config.train.freeze_connector or config.model.family is ModelFamily.hf:
        return ""
    config.train.freeze_connector = True
    return "train.freeze_connector=true"


def _lora(config: ExperimentConfig) -> str:
    if config.adapter.kind is AdapterKind.lora:
        return ""
    config.adapter = AdapterConfig("lora_r16", AdapterKind.lora, 16, 32, 0.0, list(LINEAR_LAYERS))
    return "adapter=lora_r16"


def _qlora(config: ExperimentConfig) -> str:
    if config.adapter.base_bits == 4 or config.train.precision is Precision.fp32:
        return ""
    if config.adapter.kind is AdapterKind.lora:
        config.adapter.base_bits = 4
        return "adapter.base_bits=4"
    config.adapter = AdapterConfig("qlora_r16", AdapterKind.lora, 16, 32, 0.0, list(LINEAR_LAYERS), base_bits=4)
    return "adapter=qlora"


def _captions(size: int) -> Put:
    def put(config: ExperimentConfig) -> str:
        if config.data.captioner.batch_size <= size:
            return ""
        config.data.captioner.batch_size = size
        return f"data.captioner.batch_size={size}"

    return put


def _captioner_int8(config: ExperimentConfig) -> str:
    if config.data.captioner.precision is CaptionPrecision.int8:
        return ""
    config.data.captioner.precision = CaptionPrecision.int8
    return "data.captioner.precision=int8"
