"""One stage of a cell: what is sent through the model, and what memory and operations that takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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
from mgm_exp.plan.around import around
from mgm_exp.plan.cards import Device as PlannedOn
from mgm_exp.plan.cards import device_of, verdict
from mgm_exp.plan.cost import flops_of_mining, flops_of_sample, flops_of_towers, steps_of
from mgm_exp.plan.features import saved_flops
from mgm_exp.plan.lengths import Lengths, Rows, lengths_of, rows_of
from mgm_exp.plan.memory import GIB, Moment, moments, peak

if TYPE_CHECKING:
    from mgm_exp.model.adapters import Cost


@dataclass(frozen=True)
class StagePlan:
    """One stage of a cell.

    Args:
        moments: Where memory can be largest.
        steps, tokens, flops: Of the whole stage, all processes together; None where nothing says how many rows.
        lengths: Of its sequences.
    """

    name: str
    parameters: Parameters
    work: Work
    moments: list[Moment]
    steps: int | None
    tokens: float | None
    flops: float | None
    lengths: Lengths

    @property
    def peak(self) -> Moment:
        return peak(self.moments)


def fitted(config: ExperimentConfig, stage: str) -> ExperimentConfig:
    """With ``model.gradient_checkpointing=auto`` as a number: as few of the LLM's blocks as let the stage fit on the
    card that this process sees (all, if none is enough). ``plan.device`` names a card to plan for, not this one."""
    if config.model.gradient_checkpointing != AUTO or stage == "features":
        return config
    device = device_of(Card.auto, is_cpu=config.device is Device.cpu)
    return _with_blocks(config, _fitting(config, architecture_of(config.model), stage, device))


def _fitting(
    config: ExperimentConfig, sizes: Architecture, stage: str, device: PlannedOn, curated: Rows | None = None
) -> int:
    for blocks in range(sizes.layers):
        found = plan_stage(_with_blocks(config, blocks), sizes, stage, curated=curated)
        if verdict(found.peak.total / GIB, device) == "fits":
            return blocks
    return sizes.layers


def _with_blocks(config: ExperimentConfig, blocks: int) -> ExperimentConfig:
    return replace(config, model=replace(config.model, gradient_checkpointing=blocks))


def stages_of(config: ExperimentConfig) -> list[str]:
    """The names of the stages that a run trains, with the one that caches visual tokens."""
    if config.model.family is ModelFamily.hf:
        return ["instruct"]
    names = [] if config.train.align.max_steps == 0 else ["align"]
    if config.train.cache_visual_tokens:
        names.append("features")
    return [*names, "instruct"]


def plan_stage(
    config: ExperimentConfig,
    sizes: Architecture,
    name: str,
    device: PlannedOn | None = None,
    curated: Rows | None = None,
) -> StagePlan:
    """One stage.

    Args:
        name: Of :func:`stages_of`.
        device: Whose memory ``model.gradient_checkpointing=auto`` is to fill.
        curated: What is known of the rows.
    """
    if config.model.gradient_checkpointing == AUTO and name != "features":
        assert device is not None
        config = _with_blocks(config, _fitting(config, sizes, name, device, curated))
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
    rows = rows_of(config, name, curated)
    lengths = lengths_of(config, sizes, section, "align" if name == "align" else "instruct", curated or {})
    work = _work(config, sizes, name, parameters, lengths.longest)
    found = [*around(sizes, parameters, work), *moments(sizes, parameters, work)]
    if name == "features":
        each = flops_of_towers(sizes) + flops_of_mining(sizes, work.mines_natively)
        return StagePlan(name, parameters, work, found, 0, 0.0, None if rows is None else rows * each, lengths)
    steps = steps_of(section, rows)
    if steps is None:
        return StagePlan(name, parameters, work, found, None, None, None, lengths)
    samples = steps * section.global_batch_size
    flops = samples * flops_of_sample(sizes, parameters, work, lengths.mean, lengths.learnt)
    if work.encodes_images:
        flops -= saved_flops(config, sizes, name, rows, samples, work.mines_natively)
    return StagePlan(name, parameters, work, found, steps, float(round(samples * lengths.mean)), flops, lengths)


def pixels(sizes: Architecture) -> float:
    """Numbers of one sample's images, in both resolutions (patches of 14 pixels, as CLIP-L has them)."""
    return 3.0 * ((sizes.map_side * 4) ** 2 + sizes.views * sizes.clip_tokens * 14**2)


def _work(config: ExperimentConfig, sizes: Architecture, stage: str, parameters: Parameters, length: int) -> Work:
    from mgm_exp.model.adapters import adapter_of

    train, zero = config.train, config.zero
    section = train.align if stage == "align" else train
    is_half = train.precision is not Precision.fp32
    # Images are encoded in the compute dtype, by one process, without autocast.
    stage_zero = 0 if stage == "features" else zero.stage
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
        pixel_bytes=4.0 * pixels(sizes),
        is_fused=_is_fused(config, stage_zero),
        adapter=_adapter_work(config, sizes, own, parameters.lora) if stage == "instruct" else None,
        tower=stage == "instruct" and train.optimize_vision_tower,
        tower_aux=stage == "instruct" and train.optimize_vision_tower_aux,
        mines_natively=config.model.mining is Mining.native,
    )


def _is_fused(config: ExperimentConfig, zero_stage: int) -> bool:
    """As :class:`mgm_exp.train.engine.PlainEngine` decides it: torch's fused AdamW on a GPU."""
    asks = config.train.precision is Precision.fp16 or config.adapter.kind is AdapterKind.adalora
    return not zero_stage and not asks and config.device is not Device.cpu


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
