"""What a stage costs: steps, tokens, floating-point operations, hours, disk. Estimates, with their formulas.

A multiplication with its addition counts as two operations. n, D, f: tokens, width and MLP width of a tower.
"""

from __future__ import annotations

import math

from mgm_exp.config import AlignConfig, ExperimentConfig, FeatureTier, Precision, TrainConfig, trains_towers
from mgm_exp.plan.activations import Work
from mgm_exp.plan.architecture import Architecture, Parameters

GIB = 1024**3


def rows_of(config: ExperimentConfig, stage: str) -> int | None:
    """Rows that a stage reads; None where nothing says it (no file is opened)."""
    data, plan = config.data, config.plan
    given = plan.align_rows if stage == "align" else plan.rows
    if given is None and data.path is None and (stage == "align" or data.instruct.path is None):
        given = data.demo_images  # one caption and one conversation an image
    if data.max_samples is not None:
        given = data.max_samples if given is None else min(given, data.max_samples)
    return given


def steps_of(section: TrainConfig | AlignConfig, rows: int | None) -> int | None:
    """Optimizer steps; None where they depend on a number of rows that is not known."""
    if section.max_steps is not None:
        return section.max_steps
    return None if rows is None else max(1, math.ceil(rows * section.epochs / section.global_batch_size))


def flops_of_sample(sizes: Architecture, parameters: Parameters, work: Work, tokens: float, learnt: float) -> float:
    """Operations for one sample: forward, backward, and forward once more where it is computed again.

    Blocks ``L (2 T w + 4 T^2 h)`` with w weights in their linear layers and h the width of all heads (attention is not
    halved for its mask): forward, gradient of the input, gradient of weights that are trained. Head ``2 n d V`` at n
    learnt positions, computed again in the backward pass where ``train.loss_kernel=torch``. LoRA ``6 T p``.

    Args:
        tokens: T: mean length of a merged sequence.
        learnt: Mean number of learnt tokens.
    """
    again = work.recomputed(sizes.layers) / sizes.layers
    remade = 1 if work.loss_kernel == "torch" else 0
    linear = sum(math.prod(shape) for name, shape in sizes.shapes.items() if _is_block_linear(name))
    blocks = 2 * tokens * linear + 4 * tokens**2 * sizes.heads * sizes.head_dim * sizes.layers
    head = 2 * learnt * sizes.hidden * sizes.vocabulary
    vision = flops_of_towers(sizes) if work.encodes_images else 0.0
    mining = flops_of_mining(sizes, work.mines_natively) if work.encodes_images else 0.0
    trains = 1 if work.trains_llm else 0
    reaches = 1 if parameters.trainable else 0
    total = vision + mining * (1 + work.trains_connector * (1 + again))
    total += blocks * (1 + again + reaches + trains) + head * (2 + remade + trains)
    return total + tokens * parameters.lora * (6 + 2 * again)


def _is_block_linear(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def flops_of_towers(sizes: Architecture) -> float:
    """One sample through both towers.

    CLIP ``layers (8 n D^2 + 4 n D f + 4 n^2 D)``; ConvNeXt, for each stage at side r with width D: ``depth (98 r^2 D +
    16 r^2 D^2)`` (7x7 depthwise convolution, two linear layers of four times the width) and its 2x2 downsampling.
    """
    n, width, mlp = sizes.clip_tokens, sizes.clip_width, sizes.clip_mlp
    clip = sizes.clip_layers * (8 * n * width**2 + 4 * n * width * mlp + 4 * n**2 * width)
    convnext = 2.0 * sizes.map_side**2 * 48 * sizes.map_widths[0]
    before = 0
    for stage, (wide, depth) in enumerate(zip(sizes.map_widths, sizes.map_depths, strict=True)):
        area = (sizes.map_side >> stage) ** 2
        convnext += depth * (98 * area * wide + 16 * area * wide**2) + 2 * area * 4 * before * wide
        before = wide
    return clip * sizes.views + convnext


def flops_of_mining(sizes: Architecture, natively: bool = True) -> float:
    """Queries, keys, values, attention over regions, and the projector.

    Officially keys and values are made of every position of the map: ``4 P D' D``. Natively of every patch: ``4 T D'
    D``, and each position takes part in the scores and in the sum of what was found: ``4 P D'``. Statistics are left
    out.
    """
    width, tokens = sizes.clip_width, sizes.visual_tokens
    if natively:
        rest = 4.0 * (tokens * width + sizes.positions) * sizes.map_width
    else:
        rest = 4.0 * sizes.positions * (sizes.map_width + 1) * width
    return rest + 2 * tokens * (width**2 + width * sizes.hidden + sizes.hidden**2)


def disk_of(config: ExperimentConfig, parameters: Parameters, sizes: Architecture, images: int | None) -> float:
    """Bytes that a run leaves at most: checkpoints (12 bytes a trained parameter each), its result, what is kept of
    images (of which stages and trials share a part)."""
    half = 4 if config.train.precision.value == "fp32" else 2
    kept = config.train.checkpoint.keep * 12 * parameters.trainable
    connector = parameters.mining + parameters.projector
    result = (
        half * (parameters.total - parameters.lora)
        if parameters.trained_llm == parameters.llm
        else 4 * (parameters.lora + parameters.trained_llm + parameters.trained_towers + connector)
    )
    cached = (images or 0) * sizes.visual_tokens * sizes.hidden * half if config.train.cache_visual_tokens else 0
    return float(kept + result + cached + _kept_features(config, sizes) + _resized_images(config, sizes))


def _kept_features(config: ExperimentConfig, sizes: Architecture) -> float:
    """``train.feature_cache``: of both stages' images, within its budget."""
    train = config.train
    if train.feature_cache is FeatureTier.none:
        return 0.0
    limit = math.inf if train.feature_cache_gb is None else train.feature_cache_gb * 1e9
    total = 0.0
    for stage in ("align", "instruct") if train.align.max_steps != 0 else ("instruct",):
        each = [bytes_of_features(config, sizes, tier) for tier in _tiers(config, stage)]
        images = rows_of(config, stage) or 0
        # `auto` takes the most that fits whole, else as many as fit of the smallest
        fitting = [images * size for size in each if images * size <= limit]
        total += (fitting[0] if fitting else limit) if each else 0.0
    return min(total, limit)


def _resized_images(config: ExperimentConfig, sizes: Architecture) -> float:
    """``train.resized_cache_gb``: squares of 8 bits."""
    images = sum(rows_of(config, stage) or 0 for stage in ("align", "instruct"))
    return min(config.train.resized_cache_gb * 1e9, 3.0 * (4 * sizes.map_side) ** 2 * images)


def _tiers(config: ExperimentConfig, stage: str) -> list[str]:
    """What a stage may keep, the most first."""
    train = config.train
    is_frozen = stage == "instruct" and train.freeze_connector
    if train.feature_cache is FeatureTier.auto:
        if stage == "instruct" and trains_towers(train):
            return []
        return [*(["tokens"] if is_frozen else []), "towers", "clip"]
    return [] if train.feature_cache is FeatureTier.tokens and not is_frozen else [train.feature_cache.value]


def bytes_of_features(config: ExperimentConfig, sizes: Architecture, tier: str) -> int:
    """Bytes that ``train.feature_cache`` keeps of an image, at most: under autocast some tensors are half as large."""
    from mgm_exp.model.features import TOKENS, bytes_of_tier

    is_half = config.train.precision is not Precision.fp32
    itemsize = 2 if is_half and (config.zero.stage or tier == TOKENS) else 4
    return bytes_of_tier(
        tier,
        low=((sizes.clip_tokens - 1) * sizes.views, sizes.clip_width),
        map_side=sizes.map_side,
        map_widths=sizes.map_widths,
        tokens=(sizes.visual_tokens, sizes.hidden),
        itemsize=itemsize,
    )
