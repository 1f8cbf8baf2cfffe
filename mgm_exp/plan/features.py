"""``train.feature_cache`` in the plan: which tier is kept of how many images, its bytes, and the passes it saves."""

from __future__ import annotations

import math

from mgm_exp.config import ExperimentConfig, FeatureTier, ModelFamily, Precision, trains_towers
from mgm_exp.plan.architecture import Architecture
from mgm_exp.plan.cost import flops_of_clip, flops_of_mining, flops_of_towers


def kept_of(config: ExperimentConfig, sizes: Architecture, stage: str, images: int) -> tuple[str, int] | None:
    """The tier that a stage keeps, and of how many images; None: nothing is kept.

    ``auto`` takes the most that fits whole into the budget, else as many images as fit of the smallest.
    """
    train = config.train
    limit = math.inf if train.feature_cache_gb is None else train.feature_cache_gb * 1e9
    tiers = [(tier, bytes_of_features(config, sizes, tier)) for tier in _tiers(config, stage)]
    if not tiers or not images:
        return None
    for tier, size in tiers:
        if images * size <= limit:
            return tier, images
    tier, size = tiers[-1]
    return tier, int(limit // size)


def saved_flops(
    config: ExperimentConfig, sizes: Architecture, stage: str, rows: int | None, samples: int, natively: bool
) -> float:
    """Operations of a stage that are not done again because an image was seen in an earlier epoch.

    What other stages and other trials kept saves more than that, and is not counted.
    """
    kept = kept_of(config, sizes, stage, rows or 0)
    if kept is None or not rows or samples <= rows:
        return 0.0
    tier, images = kept
    each = flops_of_clip(sizes) if tier == "clip" else flops_of_towers(sizes)
    if tier == "tokens":
        each += flops_of_mining(sizes, natively)
    return (samples - rows) * each * images / rows


def _tiers(config: ExperimentConfig, stage: str) -> list[str]:
    """What a stage may keep, the most first."""
    train = config.train
    if train.feature_cache is FeatureTier.none or config.model.family is ModelFamily.hf:
        return []
    if stage == "instruct" and train.cache_visual_tokens:
        return []
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
