"""One cell of a plan: what a configuration needs and costs, whether it fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mgm_exp.config import AUTO, Card, Compile, Device, ExperimentConfig
from mgm_exp.plan.answers import evaluation
from mgm_exp.plan.architecture import Architecture, architecture_of
from mgm_exp.plan.captioning import captioning
from mgm_exp.plan.cards import Device as PlannedOn
from mgm_exp.plan.cards import device_of, verdict
from mgm_exp.plan.disk import disk_gib
from mgm_exp.plan.host import host_gib
from mgm_exp.plan.lengths import Rows, is_of_demo
from mgm_exp.plan.memory import COMPONENTS, GIB, Moment
from mgm_exp.plan.phases import Phase
from mgm_exp.plan.prices import price_of
from mgm_exp.plan.stage_plan import StagePlan, plan_stage, stages_of

TOO_LARGE = "does not fit"
WITHOUT_IMAGES = "reading and resizing images is not in them"


@dataclass(frozen=True)
class Measured:
    """What is known of the machine at hand from measuring it.

    Args:
        flops_per_s: Operations a second of one device, by the plan's own count; None: not known.
        source: Where that is known from, as a part of a sentence.
        memory_factor: Measured over predicted peak memory; None: not known.
        answers_flops_per_s: The same speed while questions are answered; None: not known.
    """

    flops_per_s: float | None
    source: str = ""
    memory_factor: float | None = None
    answers_flops_per_s: float | None = None


@dataclass(frozen=True)
class CellPlan:
    """What one configuration needs; :meth:`to_json` is its entry in ``mgm-exp plan --json``.

    Args:
        stages: Those that train.
        phases: Captioning and benchmarks.
        hours_of: Hours of each stage and phase; None: not known.
        devices: Processes, and cards that are held as long as the run lasts.
        hours: Of the whole run; None where those of training are not known.
        price: Of an hour of one device, in ``currency``; None: not known.
        host_gib, disk_gib: By component.
        device: Its name.
        room_gib: What tensors may take of it.
        lacks: Why it does not fit, as sentences; empty: it does.
    """

    overrides: list[str]
    sizes: Architecture = field(repr=False)
    stages: list[StagePlan]
    phases: list[Phase]
    hours_of: dict[str, float | None]
    devices: int
    hours: float | None
    price: float | None
    currency: str
    host_gib: dict[str, float]
    disk: dict[str, float]
    device: str
    room_gib: float
    reserve_gib: float
    verdict: str
    lacks: list[str]
    advice: list[str]
    notes: list[str]

    @property
    def largest(self) -> StagePlan | Phase:
        """The stage or phase with the highest peak."""
        parts: list[StagePlan | Phase] = [*self.stages, *self.phases]
        return max(parts, key=lambda part: part.peak.total)

    @property
    def peak_gib(self) -> float:
        return self.largest.peak.total / GIB

    @property
    def needed_gib(self) -> float:
        """What decides on the verdict: a benchmark counts with the smallest batch that it comes down to by itself."""
        return _most_needed(self.stages, self.phases)[1]

    @property
    def gpu_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.devices

    @property
    def cost(self) -> float | None:
        """Hours x devices x price."""
        return None if self.gpu_hours is None or self.price is None else round(self.gpu_hours * self.price, 2)

    @property
    def disk_gib(self) -> float:
        return sum(self.disk.values())

    def to_json(self) -> dict[str, Any]:
        """Sizes in GiB (1024^3 bytes), time in hours; null where it cannot be said, and ``notes`` says why."""
        tuned = self.stages[-1].parameters
        return {
            "overrides": self.overrides,
            "parameters": tuned.to_json(),
            "trained": tuned.trained(),
            "memory_gib": in_gib(self.largest.peak),
            "stage": self.largest.name,
            "moment": self.largest.peak.name,
            "steps": _sum(stage.steps for stage in self.stages),
            "tokens": _sum(stage.tokens for stage in self.stages),
            "flops": _sum(stage.flops for stage in self.stages),
            "hours": _rounded(self.hours),
            "gpu_hours": _rounded(self.gpu_hours),
            "cost": self.cost,
            "currency": self.currency,
            "disk_gib": round(self.disk_gib, 4),
            "disk": self.disk,
            "host_gib": self.host_gib,
            "device": self.device,
            "room_gib": round(self.room_gib, 4),
            "reserve_gib": self.reserve_gib,
            "verdict": self.verdict,
            "advice": self.advice,
            "notes": self.notes,
            "stages": [
                {
                    "name": stage.name,
                    "steps": stage.steps,
                    "tokens": stage.tokens,
                    "flops": stage.flops,
                    "hours": _rounded(self.hours_of[stage.name]),
                    "trainable": stage.parameters.trainable,
                    "moments": [{"name": moment.name, **in_gib(moment)} for moment in stage.moments],
                }
                for stage in self.stages
            ],
            "phases": [phase.to_json(self.hours_of[phase.name]) for phase in self.phases],
        }


def plan_cell(
    config: ExperimentConfig,
    overrides: Sequence[str] = (),
    *,
    with_advice: bool = True,
    measured: Measured | None = None,
    curated: Rows | None = None,
) -> CellPlan:
    """What a configuration needs, costs, and whether it fits; from the configuration alone.

    Args:
        with_advice: Say what would make it fit, where it does not.
        measured: What is known of this machine, for ``plan.device=auto``; None: what its data sheet says.
        curated: What is known of the rows; None: what the configuration says.

    Raises:
        ModelError: the model's sizes are not known.
        ConfigError: the table of prices cannot be used.
    """
    sizes = architecture_of(config.model)
    device = device_of(config.plan.device, is_cpu=config.device is Device.cpu)
    stages = [plan_stage(config, sizes, name, device, curated) for name in stages_of(config)]
    captions = captioning(config, curated)
    phases = [captions] if isinstance(captions, Phase) else []
    phases += evaluation(config, sizes, stages[-1])
    measured = _speeds(config, device, measured)
    hours_of = _hours(config, stages, phases, measured, device)
    training = _sum(hours_of[stage.name] for stage in stages)
    hours = None if training is None else training + sum(hours_of[phase.name] or 0.0 for phase in phases)
    price = price_of(config.plan)
    host = host_gib(config, sizes, stages)
    name, needed = _most_needed(stages, phases)
    # A plan that was too low before is not trusted again; one that was too high keeps its margin
    found = verdict(needed * max(1.0, measured.memory_factor or 1.0), device)
    lacks = []
    if found == TOO_LARGE:
        lacks.append(f"{name} needs {needed:.1f} GiB for tensors, and does not fit in {device.name}")
    notes = list(_notes(config, sizes, stages, phases, measured, device))
    if isinstance(captions, str):
        notes.append(captions)
    limit = config.plan.host_memory_gib
    if limit is not None and host["peak"] > limit:
        found = TOO_LARGE
        lacks.append(f"main memory: {host['peak']:.1f} GiB are needed, plan.host_memory_gib={limit:g}")
        notes.append(lacks[-1])
    advice: list[str] = []
    if with_advice and found == TOO_LARGE:
        from mgm_exp.plan.advice import advice_for

        advice = advice_for(config, device, measured, curated)
    return CellPlan(
        overrides=list(overrides),
        sizes=sizes,
        stages=stages,
        phases=phases,
        hours_of=hours_of,
        devices=config.devices,
        hours=hours,
        price=price.amount if price else None,
        currency=price.currency if price else "",
        host_gib=host,
        disk=disk_gib(config, sizes, stages, phases, curated),
        device=device.name,
        room_gib=device.room_gib,
        reserve_gib=device.reserve_gib,
        verdict=found,
        lacks=lacks,
        advice=advice,
        notes=notes,
    )


def _most_needed(stages: Sequence[StagePlan], phases: Sequence[Phase]) -> tuple[str, float]:
    """The stage or phase that cannot do with less than all others need, and its GiB."""
    needs = [(f"the {stage.name} stage", stage.peak.total) for stage in stages]
    needs += [(phase.name, phase.least.total) for phase in phases]
    name, most = max(needs, key=lambda one: one[1])
    return name, most / GIB


def _speeds(config: ExperimentConfig, device: PlannedOn, measured: Measured | None) -> Measured:
    """What was measured, where the plan is of this machine; else a share of what the card's data sheet says."""
    if config.plan.device is not Card.auto or measured is None:
        measured = Measured(None)
    if measured.flops_per_s is None and device.tflops is not None:
        peak_share = f"at {config.plan.mfu:g} of the card's peak (plan.mfu); {WITHOUT_IMAGES}"
        measured = replace(measured, flops_per_s=device.tflops * 1e12 * config.plan.mfu, source=peak_share)
    return measured


def _hours(
    config: ExperimentConfig,
    stages: Sequence[StagePlan],
    phases: Sequence[Phase],
    measured: Measured,
    device: PlannedOn,
) -> dict[str, float | None]:
    """Of every stage and phase."""
    speed = measured.flops_per_s
    found: dict[str, float | None] = {}
    for stage in stages:
        devices = 1 if stage.name == "features" else config.devices
        known = stage.flops is not None and speed is not None
        found[stage.name] = stage.flops / (devices * speed) / 3600 if known else None  # type: ignore[operator]
    for phase in phases:
        answers = measured.answers_flops_per_s if phase.name != "captioning" else None
        found[phase.name] = phase.hours(answers or speed, None if answers else device.bandwidth_gb_s)
    return found


def predicted_memory_gib(config: ExperimentConfig) -> float:
    """Peak memory of one process, over all stages that train; milliseconds after the first call for a model."""
    sizes = architecture_of(config.model)
    device = None
    if config.model.gradient_checkpointing == AUTO:
        device = device_of(config.plan.device, is_cpu=config.device is Device.cpu)
    return max(plan_stage(config, sizes, name, device).peak.total for name in stages_of(config)) / GIB


def predicted_hours(config: ExperimentConfig) -> float | None:
    """Hours on ``plan.device``, captioning and evaluation included; None where the card's speed or the number of steps
    is not known."""
    return plan_cell(config, with_advice=False).hours


def _notes(
    config: ExperimentConfig,
    sizes: Architecture,
    stages: Sequence[StagePlan],
    phases: Sequence[Phase],
    measured: Measured,
    device: PlannedOn,
) -> Iterator[str]:
    if sizes.note:
        yield sizes.note
    if config.model.name != "tiny" and is_of_demo(config, "instruct") and config.plan.rows is None:
        yield (
            f"steps are those of the generated demo data ({config.data.demo_images:,} rows), as data.path is not set: "
            "give plan.rows for yours"
        )
    longest = max((stage for stage in stages), key=lambda stage: stage.work.length)
    yield f"memory for samples of {longest.work.length} tokens ({longest.lengths.longest_source})"
    unknown = [stage.name for stage in stages if stage.flops is None]
    if unknown:
        keys = {"align": "plan.align_rows", "instruct": "plan.rows", "features": "plan.rows"}
        given = " and ".join(dict.fromkeys(keys[name] for name in unknown))
        yield f"steps and hours need the number of rows: give {given} (or max_steps)"
    elif measured.flops_per_s is None:
        yield "hours need plan.device=CARD, or --probe: the speed of this machine is not known"
    else:
        yield f"hours {measured.source}"
    yield f"tokens: {_lengths_in_words(stages)}"
    for phase in phases:
        if phase.what:
            yield f"{phase.name}: {phase.what}"
        if phase.peak.total > device.room_gib * GIB >= phase.least.total:
            yield (
                f"{phase.name}: {phase.peak.total / GIB:.1f} GiB with its batch, which is halved until it fits in "
                f"{device.name}"
            )
    if config.adapter.base_bits == 4:
        yield "adapter.base_bits=4: the base is loaded in 16 bits and packed on the card, so its loading is in the peak"
    if config.train.compile is not Compile.none:
        yield "train.compile: what compiled blocks keep and save is not in the plan"
    if measured.memory_factor is not None:
        yield (
            f"finished stages on this card had {measured.memory_factor:.2f} of the memory that was predicted"
            + ("; the verdict takes that into account" if measured.memory_factor > 1 else "")
        )


def _lengths_in_words(stages: Sequence[StagePlan]) -> str:
    found = {stage.name: stage.lengths.source for stage in stages if stage.name != "features"}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{name}: {words}" for name, words in found.items())


def in_gib(moment: Moment) -> dict[str, float]:
    """A moment's components, and their sum as ``peak``."""
    found = {name: round(getattr(moment, name) / GIB, 4) for name in COMPONENTS}
    return {**found, "peak": round(moment.total / GIB, 4)}


def _rounded(hours: float | None) -> float | None:
    return None if hours is None else round(hours, 4)


def _sum(values: Any) -> Any:
    listed = list(values)
    return None if any(value is None for value in listed) else sum(listed)
