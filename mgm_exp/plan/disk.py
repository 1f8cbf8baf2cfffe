"""What a run leaves on disk at most: checkpoints while it trains, its result, curated rows, caches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mgm_exp.config import ExperimentConfig, Precision
from mgm_exp.plan.architecture import Architecture
from mgm_exp.plan.features import bytes_of_features, kept_of
from mgm_exp.plan.lengths import Rows, is_of_demo, rows_of
from mgm_exp.plan.memory import GIB
from mgm_exp.plan.phases import Phase
from mgm_exp.plan.stage_plan import StagePlan

# Of a checkpoint: weights and both moments of what is trained, in fp32.
_STATE = 12
# Bytes of a curated row with its fate beside its text, of a token of text, of a caption and of an answer; of a
# generated picture. Measured on the demo.
_ROW, _TOKEN, _CAPTION, _ANSWER, _PICTURE = 200, 4.3, 250, 420, 34_000
_IMAGES_OF_QUESTIONS = 5 / 3  # of the demo: those of both splits


def disk_gib(
    config: ExperimentConfig,
    sizes: Architecture,
    stages: Sequence[StagePlan],
    phases: Sequence[Phase],
    curated: Rows | None = None,
) -> dict[str, float]:
    """GiB by component; stages and trials share all but ``checkpoints``, ``result`` and ``answers``.

    ``checkpoints`` ``train.checkpoint.keep`` of them, the best ones, and one that is being written, of the larger
    stage; ``result`` adapter or model with the connector; ``curated`` rows of both stages; ``captions``; ``demo``
    generated pictures; ``visual_tokens`` (``train.cache_visual_tokens``); ``features`` (``train.feature_cache``) and
    ``resized`` (``train.resized_cache_gb``), at most and within their budgets; ``answers`` of benchmarks.
    """
    train = config.train
    rows = {name: rows_of(config, name, curated) or 0 for name in ("align", "instruct")}
    copies = train.checkpoint.keep + 1
    if train.validation.every_steps is not None:
        copies += train.checkpoint.keep_best
    trained = max(stage.parameters.trainable for stage in stages)
    found = {
        "checkpoints": float(copies * _STATE * trained),
        "result": _result(config, stages[-1]),
        "curated": _curated(stages, rows, curated),
        "captions": 2.0 * _CAPTION * rows["align"] if config.data.recaption else 0.0,
        "demo": _demo(config),
        "visual_tokens": _visual_tokens(config, sizes, rows["instruct"]),
        "features": _features(config, sizes, stages, rows),
        "resized": min(train.resized_cache_gb * 1e9, 3.0 * (4 * sizes.map_side) ** 2 * sum(rows.values())),
        "answers": float(sum(2 * _ANSWER * (p.count or 0) for p in phases if p.name.startswith("evaluate"))),
    }
    return {name: round(size / GIB, 4) for name, size in found.items()}


def _result(config: ExperimentConfig, tuned: StagePlan) -> float:
    half = 4 if config.train.precision is Precision.fp32 else 2
    parameters = tuned.parameters
    if parameters.trained_llm == parameters.llm:
        return float(half * (parameters.total - parameters.lora))
    connector = parameters.mining + parameters.projector
    return 4.0 * (parameters.lora + parameters.trained_llm + parameters.trained_towers + connector)


def _curated(stages: Sequence[StagePlan], rows: dict[str, int], curated: Rows | None) -> float:
    if curated:
        return float(max(one.size for one in curated.values()))
    texts = {stage.name: stage.lengths.text for stage in stages}
    usual = texts["instruct"]
    return sum(count * (_ROW + _TOKEN * texts.get(name, usual)) for name, count in rows.items())


def _demo(config: ExperimentConfig) -> float:
    data = config.data
    is_read = is_of_demo(config, "instruct") or is_of_demo(config, "align")
    if not is_read or config.plan.rows is not None:
        return 0.0
    return _PICTURE * (data.demo_images + _IMAGES_OF_QUESTIONS * data.demo_questions)


def _visual_tokens(config: ExperimentConfig, sizes: Architecture, images: int) -> float:
    if not config.train.cache_visual_tokens:
        return 0.0
    half = 4 if config.train.precision is Precision.fp32 else 2
    return float(images * sizes.visual_tokens * sizes.hidden * half)


def _features(
    config: ExperimentConfig, sizes: Architecture, stages: Sequence[StagePlan], rows: dict[str, int]
) -> float:
    limit = math.inf if config.train.feature_cache_gb is None else config.train.feature_cache_gb * 1e9
    total = 0.0
    for stage in stages:
        if stage.name == "features":
            continue
        name, images = stage.name, rows[stage.name]
        if stage.steps is not None and config.zero.stage != 3:  # images that no step reads are not seen
            section = config.train.align if name == "align" else config.train
            images = min(images, stage.steps * section.global_batch_size)
        kept = kept_of(config, sizes, name, images)
        if kept is not None:
            total += kept[1] * bytes_of_features(config, sizes, kept[0])
    return min(total, limit)
