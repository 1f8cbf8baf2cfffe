"""How far ``mgm-exp plan`` is from PyTorch's own accounting, at the size of MGM-2B and without a GPU.

The same configurations go through the formulas of :mod:`mgm_exp.plan` and through the model's own code on fake tensors
(:mod:`benchmarks.accounting`), which counts every tensor that is alive in one micro-batch: forward, backward, up to
the optimizer. What this cannot show: workspaces of kernels, fragments of the allocator, ZeRO's buffers, and AdamW's
step. The largest difference is the row.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.accounting import GIB, fake_answers, fake_captions, fake_step
from benchmarks.measurement import Row

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(work: Path, quick: bool = False) -> list[Row]:
    """Compares each configuration."""
    chosen = list(cases())
    found = [(name, *compared(adapter, settings)) for name, adapter, settings in (chosen[:2] if quick else chosen)]
    for name, settings in answer_cases()[: 1 if quick else None]:
        found.append((name, *compared_answers(*settings)))
    if not quick:
        found += [(f"captions of {batch} images", *compared_captions(batch)) for batch in (32, 128)]
    errors = {name: predicted / counted - 1 for name, predicted, counted in found}
    worst = max(errors, key=lambda name: abs(errors[name]))
    _, predicted, counted = next(row for row in found if row[0] == worst)
    for name, ours, theirs in found:
        print(f"  {name}: predicted {ours:.2f} GiB, counted {theirs:.2f} GiB ({errors[name]:+.1%})")
    return [
        Row(
            f"predicted peak memory of training, answers and captions, worst of {len(found)} configurations ({worst})",
            "GiB",
            predicted,
            counted,
            None,
            f"errors from {min(errors.values()):+.1%} to {max(errors.values()):+.1%}",
            "PyTorch's live tensors on fake tensors, CUDA's autocast rules; not measured on a GPU",
        )
    ]


def cases() -> list[tuple[str, Any, Any]]:
    """Name, adapter, and what is sent through the model."""
    from mgm_exp.config import AdapterConfig, AdapterKind
    from mgm_exp.plan import Work
    from mgm_exp.plan.architecture import targets_of

    def lora(rank: int = 16, modules: list[str] = SEVEN, dropout: float = 0.0) -> AdapterConfig:
        return AdapterConfig("lora", AdapterKind.lora, rank, 2 * rank, dropout, list(modules))

    full = AdapterConfig("full", AdapterKind.full)
    base = Work("instruct", 1, 1024, 300, 2, autocast=True, checkpointing=True, trains_connector=True, trains_llm=False)
    plain = replace(base, checkpointing=False)
    cached = {"trains_connector": False, "encodes_images": False}
    sharded = {"autocast": False, "zero_stage": 2}
    listed: list[tuple[str, AdapterConfig, Work]] = [
        ("LoRA r=16, checkpointing", lora(), base),
        ("LoRA r=16, checkpointing, 4 samples", lora(), replace(base, batch=4)),
        ("LoRA r=16", lora(), plain),
        ("LoRA r=16, frozen connector, 2 samples", lora(), replace(plain, batch=2, trains_connector=False)),
        ("LoRA r=16, cached tokens, 4 x 2048", lora(), replace(base, batch=4, length=2048, **cached)),
        ("LoRA r=16, cached tokens", lora(), replace(plain, **cached)),
        ("LoRA r=64, dropout", lora(64, dropout=0.05), replace(plain, has_dropout=True)),
        ("LoRA r=8 on q and v", lora(8, ["q_proj", "v_proj"]), plain),
        ("full, checkpointing", full, replace(base, trains_llm=True)),
        ("full", full, replace(plain, trains_llm=True)),
        ("align, checkpointing, 8 samples", lora(), replace(base, stage="align", batch=8)),
        ("align, 2 samples", lora(), replace(plain, stage="align", batch=2)),
        ("LoRA r=16 in fp32", lora(), replace(plain, bytes=4, autocast=False)),
        ("LoRA r=16 in pure bf16", lora(), replace(plain, **sharded)),
        ("LoRA r=16 in pure bf16, 4 x 2048", lora(), replace(base, batch=4, length=2048, supervised=1472, **sharded)),
        ("full in pure bf16, checkpointing, 2 samples", full, replace(base, batch=2, trains_llm=True, **sharded)),
        (
            "visual tokens of 8 images",
            lora(),
            replace(plain, stage="features", batch=8, trains_connector=False, autocast=False),
        ),
    ]
    return [
        (
            name,
            adapter,
            replace(work, targets=targets_of(adapter), rank=adapter.rank) if work.stage == "instruct" else work,
        )
        for name, adapter, work in listed
    ]


def compared(adapter: Any, work: Any, model: str = "mgm_2b") -> tuple[float, float]:
    """Predicted and counted GiB of a micro-batch: all moments but the optimizer's step, without its state."""
    from mgm_exp.config import ModelConfig
    from mgm_exp.model import known_config
    from mgm_exp.plan import architecture_of, moments, parameters_of

    sizes = architecture_of(ModelConfig(model))
    parameters = parameters_of(sizes, work.stage, adapter, is_connector_frozen=not work.trains_connector)
    # Masters and moments are the optimizer's, which the counted micro-batch does not have.
    found = [m.total - m.optimizer for m in moments(sizes, parameters, work) if m.name != "optimizer step"]
    return max(found) / GIB, max(fake_step(known_config(model), adapter, work).values()) / GIB


def answer_cases() -> list[tuple[str, tuple[str, int, int, int, int]]]:
    """Name; model, prompts, tokens of a prompt, tokens of an answer, bytes of the dtype."""
    return [
        ("answers, 16 prompts", ("mgm_2b", 16, 686, 2, 2)),
        ("answers, 64 prompts", ("mgm_2b", 64, 686, 8, 2)),
        ("answers, 1 prompt in fp32", ("mgm_2b", 1, 700, 8, 4)),
        ("answers of MGM-7B, 8 prompts", ("mgm_7b", 8, 1024, 8, 2)),
        ("answers of MGM-2B-HD, 4 prompts", ("mgm_2b_hd", 4, 3000, 8, 2)),
    ]


def compared_answers(model: str, batch: int, length: int, tokens: int, itemsize: int) -> tuple[float, float]:
    """Predicted and counted GiB of answering a batch, its images in groups of 8 (or 2, where they are large)."""
    from mgm_exp.compose import compose
    from mgm_exp.model import known_config
    from mgm_exp.plan import architecture_of
    from mgm_exp.plan.answers import answering, eyes_of

    config = compose([f"model={model}"])
    sizes = architecture_of(config.model)
    images = 2 if sizes.grid > 1 else 8
    weights = float(itemsize * sum(_elements(shape) for shape in sizes.shapes.values()))
    eyes = eyes_of(config, sizes, itemsize)
    predicted = answering(sizes, weights, itemsize, batch, length, tokens, eyes, images=images)
    counted = fake_answers(_with_views(known_config(model), config.model), batch, length, tokens, itemsize, images)
    return max(moment.total for moment in predicted) / GIB, max(counted.values()) / GIB


def compared_captions(batch: int) -> tuple[float, float]:
    """The same of BLIP-2 OPT 2.7b in bf16."""
    from mgm_exp.plan.captioning import captioning_moments, known_config, sizes_of

    name = "blip2-opt-2.7b"
    sizes = sizes_of(name)
    predicted = captioning_moments(sizes, 2.0 * sizes.parameters, 2, batch, 33, 8)
    counted = fake_captions(known_config(name), batch, 33, 8)
    return max(moment.total for moment in predicted) / GIB, max(counted.values()) / GIB


def _elements(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)


def _with_views(config: Any, section: Any) -> Any:
    for key in ("image_grid", "image_global", "image_size_aux"):
        if getattr(section, key) is not None:
            setattr(config, key, getattr(section, key))
    return config
