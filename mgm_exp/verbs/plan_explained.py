"""``mgm-exp plan --explain``: where each number of a cell comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from mgm_exp.plan import CellPlan
    from mgm_exp.plan.stage_plan import StagePlan

_RULES = """
weights      fp32 where plain PyTorch trains them, else the compute dtype; ZeRO-3: a share, and what is gathered
gradients    4 bytes a trained parameter (plain PyTorch); ZeRO: 2 bytes, a share
optimizer    8 bytes a trained parameter; ZeRO: 12 (with fp32 masters), a share; none on the card with offload
activations  kept for the backward pass, and what runs: LLM blocks, patch info mining, the ConvNeXt map
logits       learnt positions x vocabulary, at most 2^27 elements at a time
buffers      copies of trained weights for autocast, ZeRO's buckets, tensors that are put together to be saved
The peak is the largest sum of what is alive at one moment; docs/plan.md has every formula and how it was checked."""


def rules() -> str:
    """What the columns hold."""
    return _RULES


def explain_cell(plan: CellPlan, console: Console) -> None:
    """Parameters by part, every stage with its moments, captioning and benchmarks, main memory, disk."""
    from rich.text import Text

    def say(line: str, style: str = "") -> None:
        console.print(Text(line, style=style), soft_wrap=True)

    name = " ".join(plan.overrides) or "(the default)"
    tuned = plan.stages[-1].parameters
    say("")
    parts = tuned.to_json()
    say(f"{name}: parameters by part: " + ", ".join(f"{key} {parts[key]:,}" for key in list(parts)[:-2]), "bold")
    for stage in plan.stages:
        trained = ", ".join(f"{key} {count:,}" for key, count in stage.parameters.trained().items() if count)
        say(f"{stage.name} trains {trained or 'nothing'}")
    for stage in plan.stages:
        say("")
        say(f"{name}: {_of_stage(plan, stage)}", "bold")
        _table(console, stage)
        for line in _numbers(plan, stage):
            say(f"  {line}")
    for phase in plan.phases:
        hours = plan.hours_of[phase.name]
        say("")
        time = "" if hours is None else f", {hours:.2f} hours"
        what = "images" if phase.name == "captioning" else "questions"
        count = "" if phase.count is None else f", {phase.count:,} {what}"
        say(f"{name}: {phase.name}{count}{time}", "bold")
        _table(console, phase)
    say("")
    say(
        f"{name}: beside tensors {plan.reserve_gib:g} GiB are left for CUDA's context and workspaces of kernels; "
        f"{plan.room_gib:.1f} GiB of {plan.device} are for tensors"
    )
    say(f"{name}: main memory of all processes, GiB: {_listed(plan.host_gib)}")
    say(f"{name}: disk at most, GiB: {_listed(plan.disk)}")


def _of_stage(plan: CellPlan, stage: StagePlan) -> str:
    work, hours = stage.work, plan.hours_of[stage.name]
    return (
        f"{stage.name}: {stage.parameters.trainable:,} of {stage.parameters.total:,} parameters trained; "
        f"{work.batch} x {work.length} tokens in a pass, "
        f"{work.bytes} bytes a number{' under autocast' if work.autocast else ''}"
        f"{', gradient checkpointing' if work.checkpointing else ''}"
        f"{f', ZeRO-{work.zero_stage} over {work.devices}' if work.zero_stage else ''}"
        f"{f'; {stage.flops:.3g} operations in {stage.steps} steps' if stage.flops and stage.steps else ''}"
        f"{f', {hours:.2f} hours' if hours is not None else ''}"
    )


def _table(console: Console, part: Any) -> None:
    from rich.table import Table

    from mgm_exp.plan.memory import COMPONENTS

    table = Table(box=None, pad_edge=False)
    table.add_column("GiB alive at this moment", no_wrap=True)
    for name in (*COMPONENTS, "sum"):
        table.add_column(name, justify="right")
    for moment in part.moments:
        values = [getattr(moment, name) for name in COMPONENTS]
        style = "bold" if moment is part.peak else ""
        table.add_row(moment.name, *(f"{v / 2**30:.3f}" for v in (*values, moment.total)), style=style)
    console.print(table)


def _numbers(plan: CellPlan, stage: StagePlan) -> list[str]:
    """What this cell's own numbers are made of."""
    sizes, work, parameters = plan.sizes, stage.work, stage.parameters
    t, z, s = parameters.trainable, parameters.total - parameters.trainable, work.bytes
    gib = 2**30
    lines = []
    if work.zero_stage:
        share = f" / {work.devices}" if work.devices > 1 else ""
        lines.append(
            f"ZeRO-{work.zero_stage}: weights {s} x {t + z:,}{share if work.zero_stage == 3 else ''}, gradients "
            f"{s} x {t:,}{share}, masters and moments {12 if s == 2 else 8} x {t:,}{share} bytes"
            + (", the last two in main memory" if work.offload else "")
            + f"; buckets of {work.reduce_bucket:,} elements{' twice (overlap_comm)' if work.overlap else ''}"
        )
    elif stage.name != "features":
        lines.append(
            f"weights 4 x {t:,} trained + {s} x {z:,} frozen, gradients 4 x {t:,}, "
            f"AdamW 8 x {t:,} bytes: {16 * t / 1e9:.1f} GB for what is trained"
        )
    if work.encodes_images and sizes.map_side:
        native = sum(sizes.map_side**2 * width / 4**n for n, width in enumerate(sizes.map_widths))
        f = 4 if work.autocast else s
        joined = sizes.map_side**2 * sizes.map_width
        reads = (
            f"the stages' own maps {f * native / 1e6:.1f} MB an image (model.mining=native)"
            if work.mines_natively
            else f"the joined map {sizes.map_side} x {sizes.map_side} x {sizes.map_width:,} {f * joined / 1e6:.0f} MB "
            f"an image, {2 * joined / 1e6:.0f} in bf16 (model.mining=reference)"
        )
        lines.append(f"{sizes.visual_tokens} tokens an image; {reads}, for {work.batch} images in a pass")
    if stage.name != "features":
        from mgm_exp.plan.activations import block_saved, logits_at_a_time

        rows, each = logits_at_a_time(sizes, work)
        lines.append(
            f"logits {rows:,} of at most {work.batch * work.supervised:,} learnt positions at a time x "
            f"{sizes.vocabulary:,} tokens of the vocabulary, {each} bytes each"
        )
        again = work.recomputed(sizes.layers)
        lines.append(
            f"a block of the LLM keeps {block_saved(sizes, work) / gib:.3f} GiB; {again} of {sizes.layers} keep their "
            f"input alone and are computed again{'; what is kept waits in main memory' if work.offloads else ''}"
        )
    return lines


def _listed(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if value or name == "peak")
