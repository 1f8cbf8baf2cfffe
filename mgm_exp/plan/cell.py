"""One cell of a plan: what a configuration needs and costs, whether it fits, and what would make it fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mgm_exp.config import (
    AUTO,
    AdapterConfig,
    AdapterKind,
    Attention,
    Card,
    Device,
    ExperimentConfig,
    Mining,
    ModelFamily,
    Offload,
    Precision,
    loss_kernel_of,
)
from mgm_exp.plan.activations import AdapterWork, Work
from mgm_exp.plan.architecture import Architecture, Parameters, architecture_of, parameters_of, targets_of
from mgm_exp.plan.cards import Device as PlannedOn
from mgm_exp.plan.cards import device_of, verdict
from mgm_exp.plan.cost import disk_of, flops_of_mining, flops_of_sample, flops_of_towers, rows_of, steps_of
from mgm_exp.plan.memory import GIB, Moment, moments, peak

if TYPE_CHECKING:
    from mgm_exp.model.adapters import Cost

_COMPONENTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
# The demo's longest conversation has so many tokens of text.
_DEMO_TEXT = 160


@dataclass(frozen=True)
class StagePlan:
    """One stage of a cell.

    Args:
        moments: Where memory can be largest.
        steps, tokens, flops: Of the whole stage, all processes together; None where nothing says how many rows.
    """

    name: str
    parameters: Parameters
    work: Work
    moments: list[Moment]
    steps: int | None
    tokens: float | None
    flops: float | None

    @property
    def peak(self) -> Moment:
        return peak(self.moments)


@dataclass(frozen=True)
class Measured:
    """What is known of the machine at hand from measuring it.

    Args:
        flops_per_s: Operations a second of one device, by the plan's own count; None: not known.
        source: Where that is known from, as a part of a sentence.
        memory_factor: Measured over predicted peak memory; None: not known.
    """

    flops_per_s: float | None
    source: str = ""
    memory_factor: float | None = None


@dataclass(frozen=True)
class CellPlan:
    """What one configuration needs; :meth:`to_json` is its entry in ``mgm-exp plan --json``."""

    overrides: list[str]
    sizes: Architecture = field(repr=False)
    stages: list[StagePlan]
    hours: float | None
    cost: float | None
    disk_gib: float
    device: str
    verdict: str
    advice: list[str]
    notes: list[str]

    @property
    def largest(self) -> StagePlan:
        """The stage with the highest peak."""
        return max(self.stages, key=lambda stage: stage.peak.total)

    @property
    def peak_gib(self) -> float:
        return self.largest.peak.total / GIB

    def to_json(self) -> dict[str, Any]:
        """Sizes in GiB (1024^3 bytes), time in hours; null where it cannot be said, and ``notes`` says why."""
        return {
            "overrides": self.overrides,
            "parameters": self.stages[-1].parameters.to_json(),
            "memory_gib": _in_gib(self.largest.peak),
            "stage": self.largest.name,
            "moment": self.largest.peak.name,
            "steps": _sum(stage.steps for stage in self.stages),
            "tokens": _sum(stage.tokens for stage in self.stages),
            "flops": _sum(stage.flops for stage in self.stages),
            "hours": self.hours,
            "cost": self.cost,
            "disk_gib": round(self.disk_gib, 4),
            "device": self.device,
            "verdict": self.verdict,
            "advice": self.advice,
            "notes": self.notes,
            "stages": [
                {
                    "name": stage.name,
                    "steps": stage.steps,
                    "tokens": stage.tokens,
                    "flops": stage.flops,
                    "trainable": stage.parameters.trainable,
                    "moments": [{"name": moment.name, **_in_gib(moment)} for moment in stage.moments],
                }
                for stage in self.stages
            ],
        }


def plan_cell(
    config: ExperimentConfig,
    overrides: Sequence[str] = (),
    *,
    with_advice: bool = True,
    measured: Measured | None = None,
) -> CellPlan:
    """What a configuration needs, costs, and whether it fits; from the configuration alone.

    Args:
        with_advice: Say what would make it fit, where it does not.
        measured: What is known of this machine, for ``plan.device=auto``; None: what its data sheet says.

    Raises:
        ModelError: the model's sizes are not known.
    """
    sizes = architecture_of(config.model)
    device = device_of(config.plan.device, is_cpu=config.device is Device.cpu)
    stages = [_stage(config, sizes, name, device) for name in _stages(config)]
    highest = max(stage.peak.total for stage in stages) / GIB
    flops = _sum(stage.flops for stage in stages)
    hours = None
    if config.plan.device is not Card.auto or measured is None:
        measured = Measured(None)
    if measured.flops_per_s is None and device.tflops is not None:
        peak_share = f"at {config.plan.mfu:g} of the card's peak (plan.mfu)"
        measured = replace(measured, flops_per_s=device.tflops * 1e12 * config.plan.mfu, source=peak_share)
    if flops is not None and measured.flops_per_s is not None:
        hours = flops / (config.devices * measured.flops_per_s) / 3600
    # A plan that was too low before is not trusted again; one that was too high keeps its margin
    found = verdict(highest * max(1.0, measured.memory_factor or 1.0), device)
    price = config.plan.price
    return CellPlan(
        overrides=list(overrides),
        sizes=sizes,
        stages=stages,
        hours=None if hours is None else round(hours, 4),
        cost=None if hours is None or price is None else round(hours * config.devices * price, 2),
        disk_gib=disk_of(config, stages[-1].parameters, sizes, rows_of(config, "instruct")) / GIB,
        device=device.name,
        verdict=found,
        advice=list(_advice(config, device)) if with_advice and found == "does not fit" else [],
        notes=list(_notes(config, sizes, stages, measured)),
    )


def predicted_memory_gib(config: ExperimentConfig) -> float:
    """Peak memory of one process, over all stages; milliseconds after the first call for a model."""
    sizes = architecture_of(config.model)
    device = None
    if config.model.gradient_checkpointing == AUTO:
        device = device_of(config.plan.device, is_cpu=config.device is Device.cpu)
    return max(_stage(config, sizes, name, device).peak.total for name in _stages(config)) / GIB


def fitted(config: ExperimentConfig, stage: str) -> ExperimentConfig:
    """With ``model.gradient_checkpointing=auto`` as a number: as few of the LLM's blocks as let the stage fit on the
    card that this process sees (all, if none is enough). ``plan.device`` names a card to plan for, not this one."""
    if config.model.gradient_checkpointing != AUTO or stage == "features":
        return config
    device = device_of(Card.auto, is_cpu=config.device is Device.cpu)
    return _with_blocks(config, _fitting(config, architecture_of(config.model), stage, device))


def _fitting(config: ExperimentConfig, sizes: Architecture, stage: str, device: PlannedOn) -> int:
    for blocks in range(sizes.layers):
        found = _stage(_with_blocks(config, blocks), sizes, stage)
        if verdict(found.peak.total / GIB, device) == "fits":
            return blocks
    return sizes.layers


def _with_blocks(config: ExperimentConfig, blocks: int) -> ExperimentConfig:
    return replace(config, model=replace(config.model, gradient_checkpointing=blocks))


def predicted_hours(config: ExperimentConfig) -> float | None:
    """Training hours on ``plan.device``; None where the card's speed or the number of steps is not known."""
    return plan_cell(config, with_advice=False).hours


def _stages(config: ExperimentConfig) -> list[str]:
    if config.model.family is ModelFamily.hf:
        return ["instruct"]
    names = [] if config.train.align.max_steps == 0 else ["align"]
    if config.train.cache_visual_tokens:
        names.append("features")
    return [*names, "instruct"]


def _stage(config: ExperimentConfig, sizes: Architecture, name: str, device: PlannedOn | None = None) -> StagePlan:
    if config.model.gradient_checkpointing == AUTO and name != "features":
        assert device is not None
        config = _with_blocks(config, _fitting(config, sizes, name, device))
    train = config.train
    section = train.align if name == "align" else train
    is_frozen = name == "features" or (name == "instruct" and train.freeze_connector)
    if config.model.family is ModelFamily.hf:
        is_frozen = not config.model.train_connector
    parameters = parameters_of(
        sizes,
        name,
        config.adapter,
        is_connector_frozen=is_frozen,
        tower=train.optimize_vision_tower,
        tower_aux=train.optimize_vision_tower_aux,
    )
    work = _work(config, sizes, name, parameters)
    rows = rows_of(config, name)
    steps = rows if name == "features" else steps_of(section, rows)
    length = min(sizes.visual_tokens + config.plan.text_tokens, section.max_length)
    learnt = max(1.0, (length - sizes.visual_tokens) / 2)
    if name == "features":
        tokens = 0.0
        flops = (
            None if steps is None else steps * (flops_of_towers(sizes) + flops_of_mining(sizes, work.mines_natively))
        )
        return StagePlan(name, parameters, work, moments(sizes, parameters, work), 0, tokens, flops)
    samples = None if steps is None else steps * section.global_batch_size
    return StagePlan(
        name,
        parameters,
        work,
        moments(sizes, parameters, work),
        steps,
        None if samples is None else float(samples * length),
        None if samples is None else samples * flops_of_sample(sizes, parameters, work, length, learnt),
    )


def _work(config: ExperimentConfig, sizes: Architecture, stage: str, parameters: Parameters) -> Work:
    from mgm_exp.model.adapters import adapter_of

    train, zero = config.train, config.zero
    section = train.align if stage == "align" else train
    is_half = train.precision is not Precision.fp32
    # Images are encoded in the compute dtype, by one process, without autocast.
    stage_zero = 0 if stage == "features" else zero.stage
    length = _longest(config, sizes, section.max_length)
    in_pass = section.micro_batch_size * config.devices
    own = adapter_of(config.adapter).cost(sizes.llm)
    blocks = config.model.gradient_checkpointing
    return Work(
        stage=stage,
        batch=section.micro_batch_size,
        length=length + (own.tokens if stage == "instruct" else 0),
        supervised=max(1, length - sizes.visual_tokens),
        bytes=2 if is_half else 4,
        autocast=is_half and stage_zero == 0 and stage != "features",
        checkpointing=bool(blocks) and stage != "features",
        blocks=None if isinstance(blocks, (bool, str)) else blocks,
        padding_free=train.padding_free,
        offloads=train.offload_activations,
        loss_kernel=loss_kernel_of(config, stage, has_liger=False),
        loss_chunk=train.loss_chunk,
        trains_connector=parameters.trained_connector > 0,
        trains_llm=stage == "instruct" and config.adapter.kind is AdapterKind.full,
        targets=targets_of(config.adapter) if stage == "instruct" else (),
        rank=_rank(config.adapter) if stage == "instruct" else 0,
        has_dropout=config.adapter.dropout > 0,
        encodes_images=stage != "instruct" or not train.cache_visual_tokens,
        is_eager=config.model.attn_implementation is Attention.eager,
        devices=1 if stage == "features" else config.devices,
        zero_stage=stage_zero,
        offload=stage_zero > 0 and zero.offload_optimizer is Offload.cpu,
        overlap=zero.overlap_comm,
        reduce_bucket=zero.reduce_bucket_size if stage_zero else 0,
        accumulation=max(1, section.global_batch_size // in_pass),
        is_cpu=config.device is Device.cpu,
        pixel_bytes=4.0 * 3 * ((sizes.map_side * 4) ** 2 + sizes.clip_tokens * 14**2),
        adapter=_adapter_work(config, sizes, own, parameters.lora) if stage == "instruct" else None,
        tower=stage == "instruct" and train.optimize_vision_tower,
        tower_aux=stage == "instruct" and train.optimize_vision_tower_aux,
        mines_natively=config.model.mining is Mining.native,
    )


def _adapter_work(config: ExperimentConfig, sizes: Architecture, own: Cost, n_adapter: int) -> AdapterWork:
    from mgm_exp.model.layout import n_elements

    linears = n_elements(sizes.llm.places(sizes.llm.linears).values())
    return AdapterWork(
        kept=own.kept,
        whole=own.weights,
        per_block=own.block_weights,
        state=own.state * n_adapter,
        packed=linears if config.adapter.base_bits == 4 else 0,
    )


def _rank(adapter: AdapterConfig) -> int:
    """Columns of what an adapter makes of each token; LoHa makes a whole weight instead."""
    if adapter.kind is AdapterKind.adalora:
        return adapter.adalora.initial_rank
    return 0 if adapter.kind is AdapterKind.loha else adapter.rank


def _longest(config: ExperimentConfig, sizes: Architecture, max_length: int) -> int:
    """The longest merged sequence that memory must do for: as long as it may be, unless the data is known."""
    text = config.plan.longest_text
    if text is None and config.data.path is None and config.data.instruct.path is None and config.model.name == "tiny":
        text = _DEMO_TEXT
    return max_length if text is None else min(max_length, sizes.visual_tokens + text)


def _notes(
    config: ExperimentConfig, sizes: Architecture, stages: Sequence[StagePlan], measured: Measured
) -> Iterator[str]:
    if sizes.note:
        yield sizes.note
    data = config.data
    if config.model.name != "tiny" and data.path is None and data.instruct.path is None and config.plan.rows is None:
        yield (
            f"steps are those of the generated demo data ({data.demo_images:,} rows), as data.path is not set: "
            "give plan.rows for yours"
        )
    longest = max(stage.work.length for stage in stages)
    yield f"memory for samples of {longest} tokens (plan.longest_text, or what max_length allows)"
    unknown = [stage.name for stage in stages if stage.flops is None]
    if unknown:
        keys = {"align": "plan.align_rows", "instruct": "plan.rows", "features": "plan.rows"}
        given = " and ".join(dict.fromkeys(keys[name] for name in unknown))
        yield f"steps and hours need the number of rows: give {given} (or max_steps)"
    elif measured.flops_per_s is None:
        yield "hours need plan.device=CARD, or --probe: the speed of this machine is not known"
    else:
        yield (
            f"hours of training {measured.source}, with "
            f"{config.plan.text_tokens} tokens of text a sample (plan.text_tokens); no evaluation, no captioning"
        )
    if measured.memory_factor is not None:
        yield (
            f"finished stages on this card had {measured.memory_factor:.2f} of the memory that was predicted"
            + ("; the verdict takes that into account" if measured.memory_factor > 1 else "")
        )


# -- what would make it fit ------------------------------------------------------------------------------------------

Change = Callable[[ExperimentConfig], str]


def _advice(config: ExperimentConfig, device: Any) -> Iterator[str]:
    """The cheapest changes first: what costs nothing of the result, then time, then what changes the experiment."""
    found = []
    for changes in ((_batch,), (_checkpointing,), (_checkpointing, _batch), (_offload,), (_lora,), (_lora, _batch)):
        other = copy.deepcopy(config)
        words = [change(other) for change in changes]
        if not all(words):
            continue
        gib = predicted_memory_gib(other)
        state = verdict(gib, device)
        if state != "does not fit":
            found.append(f"{' '.join(words)}: {gib:.1f} GiB, {state}")
        if len(found) == 3:
            break
    yield from found or [
        "no single change of the batch, checkpointing, offload or adapter makes it fit in "
        f"{device.memory_gib:.0f} GiB: "
        "take a larger card, or more of them with zero=3"
    ]


def _batch(config: ExperimentConfig) -> str:
    train = config.train
    if train.micro_batch_size == 1 and train.align.micro_batch_size == 1:
        return ""
    changed = []
    for key, section in (("train", train), ("train.align", train.align)):
        if section.micro_batch_size > 1:
            section.micro_batch_size = 1
            changed.append(f"{key}.micro_batch_size=1")
    return " ".join(changed)


def _checkpointing(config: ExperimentConfig) -> str:
    if config.model.gradient_checkpointing is True or config.adapter.kind is AdapterKind.prefix:
        return ""
    config.model.gradient_checkpointing = True
    return "model.gradient_checkpointing=true"


def _offload(config: ExperimentConfig) -> str:
    is_alone = config.adapter.kind is AdapterKind.adalora or config.adapter.base_bits == 4
    if config.zero.offload_optimizer is Offload.cpu or is_alone:
        return ""
    config.zero.offload_optimizer = Offload.cpu
    config.zero.stage = config.zero.stage or 2
    return f"zero={config.zero.stage} zero.offload_optimizer=cpu"


def _lora(config: ExperimentConfig) -> str:
    if config.adapter.kind is AdapterKind.lora:
        return ""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config.adapter = AdapterConfig("lora_r16", AdapterKind.lora, 16, 32, 0.0, modules)
    return "adapter=lora_r16"


def _in_gib(moment: Moment) -> dict[str, float]:
    found = {name: round(getattr(moment, name) / GIB, 4) for name in _COMPONENTS}
    return {**found, "peak": round(moment.total / GIB, 4)}


def _sum(values: Any) -> Any:
    listed = list(values)
    return None if any(value is None for value in listed) else sum(listed)
