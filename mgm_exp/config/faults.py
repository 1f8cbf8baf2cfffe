"""What types cannot say about a configuration: ranges and combinations. Every fault is named at once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mgm_exp.config.adapter_faults import adapter_faults
from mgm_exp.config.addresses import address_fault
from mgm_exp.config.as_json import plain
from mgm_exp.config.choices import (
    CaptionEngine,
    CaptionPolicy,
    Device,
    FeatureTier,
    GuardAction,
    LossNorm,
    Machines,
    Offload,
    Precision,
    PrunerName,
    RecipeEngine,
)
from mgm_exp.config.data import PERCENTILE, RECIPE_OPERATORS
from mgm_exp.config.evaluate import BENCHMARKS, CORPUS_SCORES, JUDGE_URL, SCORES
from mgm_exp.config.execution_faults import execution_faults
from mgm_exp.config.hf import hf_faults
from mgm_exp.errors import ConfigError

if TYPE_CHECKING:
    from mgm_exp.config.data import DataConfig
    from mgm_exp.config.evaluate import EvalConfig
    from mgm_exp.config.experiment import ExperimentConfig
    from mgm_exp.config.model import ModelConfig
    from mgm_exp.config.surroundings import AlertsConfig
    from mgm_exp.config.train import AlignConfig, TrainConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,199}")


def validate(config: ExperimentConfig) -> None:
    """Checks ranges and combinations.

    Raises:
        ConfigError: naming every fault: what was given, what is allowed, what to do.
    """
    faults = list(_faults(config))
    if faults:
        raise ConfigError("; ".join(faults) + ".")


def _faults(config: ExperimentConfig) -> Iterator[str]:
    named = list(_range_faults(config))
    yield from named
    # 1e400 and nan are numbers to YAML; no key means anything by them.
    for key, value in _not_finite(plain(config)):
        if not any(fault.startswith(f"{key}=") for fault in named):
            yield f"{key}={value} must be a finite number"
    yield from _view_faults(config.model)
    yield from adapter_faults(config)
    yield from hf_faults(config)
    yield from execution_faults(config)
    yield from _alert_faults(config.alerts)
    yield from _batch_faults(config)
    for key, name in (("name", config.name), ("sweep.name", config.sweep.name)):
        if name is not None and not NAME.fullmatch(name):
            yield f"{key}={name!r} is not a folder name: letters, digits and . _ = , + - are allowed, no slash"
    yield from _eval_faults(config.eval)
    train = config.train
    if train.cache_visual_tokens and not train.freeze_connector:
        yield (
            "train.cache_visual_tokens=true needs train.freeze_connector=true: cached tokens would go stale while the "
            "projector trains"
        )
    if train.feature_cache is FeatureTier.tokens and not train.freeze_connector:
        yield (
            "train.feature_cache=tokens needs train.freeze_connector=true: the projector that makes the tokens trains; "
            "towers and clip end before it"
        )
    if config.zero.stage not in (0, 2, 3):
        yield f"zero.stage={config.zero.stage}; allowed are 0 (zero=none), 2 and 3"
    if config.zero.stage == 0 and config.zero.offload_optimizer is not Offload.none:
        yield "zero.offload_optimizer=cpu needs zero=2 or zero=3: plain PyTorch keeps its optimizer on the device"
    yield from _recipe_faults(config.data)
    yield from _validation_faults(config)
    yield from _guard_faults(config)
    if config.data.recaptioned_path and not config.data.recaption:
        yield "data.recaptioned_path is read by data=blip2 only; give data=blip2 or drop it"
    if config.data.instruct.image_root and not (config.data.instruct.path or config.data.path):
        yield "data.instruct.image_root is given without data.instruct.path"
    if config.data.image_root and not config.data.path:
        yield "data.image_root is given without data.path"
    if config.device is Device.cpu and train.precision is Precision.fp16:
        yield "train.precision=fp16 needs a GPU; on the CPU use fp32 or bf16"
    if config.launch.hostfile is not None and config.launch.machines is Machines.here:
        yield "launch.hostfile is given with launch.machines=here, which does not read it; drop one of the two"
    if not config.launch.remote_shell:
        yield "launch.remote_shell=[] is empty: it is the command that reaches another machine, such as [ssh]"


def _not_finite(values: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _not_finite(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list):
        for place, value in enumerate(values):
            yield from _not_finite(value, f"{prefix}[{place}]")
    elif isinstance(values, float) and not math.isfinite(values):
        yield prefix, values


def _alert_faults(section: AlertsConfig) -> Iterator[str]:
    for place, address in enumerate(section.urls):
        fault = address_fault(address)  # which repeats nothing of it
        if fault is not None:
            yield f"alerts.urls[{place}] {fault}"


def _eval_faults(section: EvalConfig) -> Iterator[str]:
    unknown = [name for name in section.benchmarks if name not in BENCHMARKS]
    if unknown:
        yield f"eval.benchmarks has {unknown}; allowed are {list(BENCHMARKS)}"
    if not section.benchmarks:
        yield f"eval.benchmarks is empty: name at least one of {list(BENCHMARKS)}"
    if len(set(section.benchmarks)) < len(section.benchmarks):
        yield f"eval.benchmarks={section.benchmarks} has one twice"
    for key, value, allowed in (
        ("demo.split", section.demo.split, ("val", "test")),
        ("scienceqa.split", section.scienceqa.split, ("train", "val", "validation", "test")),
        ("mmmu.split", section.mmmu.split, ("dev", "validation", "test")),
    ):
        if value not in allowed:
            yield f"eval.{key}={value!r}; allowed are {', '.join(map(repr, allowed))}"
    metrics = section.custom.metrics
    wrong = [name for name in metrics if name not in (*SCORES, *CORPUS_SCORES)]
    if wrong:
        yield f"eval.custom.metrics has {wrong}; allowed are {[*SCORES, *CORPUS_SCORES]}"
    elif not metrics or metrics[0] not in SCORES:
        yield f"eval.custom.metrics={metrics}: the first one scores a single answer, and must be one of {list(SCORES)}"
    robustness = section.robustness
    if not all(1 <= severity <= 5 for severity in robustness.severities):
        yield f"eval.robustness.severities={robustness.severities}; allowed are 1 (slight) to 5 (severe)"
    if robustness.corruptions and not robustness.severities:
        yield "eval.robustness.corruptions is given and eval.robustness.severities is empty: give some of 1 to 5"
    for key in ("corruptions", "severities"):
        values = [plain(value) for value in getattr(robustness, key)]
        if len(set(values)) < len(values):
            yield f"eval.robustness.{key}={values} has one twice"
    if section.judge.url is not None and section.judge.model is None:
        yield "eval.judge.url is given without eval.judge.model, the name of the model on that server"
    if section.judge.url is not None and not JUDGE_URL.fullmatch(section.judge.url):
        yield (
            "eval.judge.url must be https://..., or http:// to this machine (localhost, 127.0.0.1), without a user "
            "name or key in it: the key stands in the environment, as MGM_EXP_JUDGE_KEY"
        )


def _validation_faults(config: ExperimentConfig) -> Iterator[str]:
    """What does not go together in validation points, early stopping and the settings of a search."""
    train, sweep = config.train, config.sweep
    if train.early_stopping.patience is not None and train.validation.every_steps is None:
        yield "train.early_stopping.patience needs train.validation.every_steps: the score it watches comes from there"
    benchmark = train.validation.benchmark
    if benchmark is not None and benchmark not in BENCHMARKS:
        yield f"train.validation.benchmark={benchmark!r}; allowed are {list(BENCHMARKS)}"
    if sweep.objectives and len(sweep.directions) != len(sweep.objectives):
        yield (
            f"sweep.directions={[d.value for d in sweep.directions]} must have one entry for each of "
            f"sweep.objectives={sweep.objectives}: maximize or minimize"
        )
    if sweep.directions and not sweep.objectives:
        yield "sweep.directions is given without sweep.objectives; for one objective there is sweep.direction"
    if sweep.objectives and sweep.objective:
        yield f"sweep.objective={sweep.objective} and sweep.objectives={sweep.objectives} are both given; give one"
    if len(set(sweep.objectives)) < len(sweep.objectives):
        yield f"sweep.objectives={sweep.objectives} has one twice"
    if sweep.budget.interrupt and sweep.budget.hours is None:
        yield "sweep.budget.interrupt=true needs sweep.budget.hours: it says when running trials stop"
    if sweep.pruner.name is PrunerName.rungs and train.validation.every_steps is None:
        yield "sweep.pruner.name=rungs needs train.validation.every_steps: a trial pauses at a validation point"
    if sweep.pruner.name is PrunerName.rungs and sweep.objectives:
        yield "sweep.pruner.name=rungs needs one objective: with sweep.objectives no trial is better than all others"
    if sweep.pause_after is not None and train.validation.every_steps is None:
        yield "sweep.pause_after needs train.validation.every_steps: a run pauses at a validation point"
    if sweep.pruner.reduction_factor < 2:
        yield f"sweep.pruner.reduction_factor={sweep.pruner.reduction_factor} must be 2 or above"


def _guard_faults(config: ExperimentConfig) -> Iterator[str]:
    """What does not go together in the guards of training."""
    train, guards = config.train, config.train.guards
    if guards.on_nonfinite is GuardAction.warn:
        yield (
            "train.guards.on_nonfinite=warn: an update that is not finite is never applied; allowed are skip, "
            "rollback, lower_lr and stop"
        )
    if guards.on_divergence is GuardAction.skip:
        yield (
            "train.guards.on_divergence=skip: its steps are applied long before it is seen; allowed are warn, "
            "rollback, lower_lr and stop"
        )
    if guards.on_spike is GuardAction.skip and (config.zero.stage or train.precision is Precision.fp16):
        yield (
            "train.guards.on_spike=skip needs zero=none and train.precision=bf16 or fp32: DeepSpeed and the fp16 loss "
            "scaler apply a step before its gradient norm is known; use warn, rollback, lower_lr or stop"
        )
    if guards.window < 16:
        yield f"train.guards.window={guards.window} must be 16 or above: fewer steps say nothing about an outlier"
    if guards.divergence_factor <= 1:
        yield f"train.guards.divergence_factor={guards.divergence_factor} must be above 1"
    if not 0 < guards.lr_factor < 1:
        yield f"train.guards.lr_factor={guards.lr_factor} must lie between 0 and 1"
    if train.auto_micro_batch and train.loss_norm is LossNorm.official:
        yield (
            "train.auto_micro_batch=true needs train.loss_norm=tokens: the mean of micro-batch means depends on how "
            "large they are"
        )


def _range_faults(config: ExperimentConfig) -> Iterator[str]:
    train, align, data, sweep = config.train, config.train.align, config.data, config.sweep
    positive: dict[str, float | None] = {
        "devices": config.devices,
        "train.lr": train.lr,
        "train.projector_lr": train.projector_lr,
        "train.vision_tower_lr": train.vision_tower_lr,
        "train.epochs": train.epochs,
        "train.max_steps": train.max_steps,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.max_length": train.max_length,
        "train.align.lr": align.lr,
        "train.align.epochs": align.epochs,
        "train.align.global_batch_size": align.global_batch_size,
        "train.align.micro_batch_size": align.micro_batch_size,
        "train.align.max_length": align.max_length,
        "train.checkpoint.every_steps": train.checkpoint.every_steps,
        "train.checkpoint.every_minutes": train.checkpoint.every_minutes,
        "train.checkpoint.keep": train.checkpoint.keep,
        "train.validation.every_steps": train.validation.every_steps,
        "train.validation.questions": train.validation.questions,
        "train.validation.share": train.validation.share,
        "train.early_stopping.patience": train.early_stopping.patience,
        "train.gradient_statistics_every": train.gradient_statistics_every,
        "train.loss_chunk": train.loss_chunk,
        "zero.prefetch_bucket_size": config.zero.prefetch_bucket_size,
        "zero.max_live_parameters": config.zero.max_live_parameters,
        "train.guards.threshold": train.guards.threshold,
        "train.guards.patience": train.guards.patience,
        "train.guards.divergence_patience": train.guards.divergence_patience,
        "train.guards.plateau_patience": train.guards.plateau_patience,
        "train.guards.dead_after": train.guards.dead_after,
        "sweep.n_trials": sweep.n_trials,
        "sweep.seeds": sweep.seeds,
        "sweep.slots": sweep.slots,
        "sweep.max_failures": sweep.max_failures,
        "sweep.pause_after": sweep.pause_after,
        "sweep.sampler.population": sweep.sampler.population,
        "sweep.pruner.min_step": sweep.pruner.min_step,
        "sweep.pruner.p_threshold": sweep.pruner.p_threshold,
        "sweep.budget.hours": sweep.budget.hours,
        "sweep.budget.trials": sweep.budget.trials,
        "sweep.budget.gpu_hours": sweep.budget.gpu_hours,
        "sweep.plateau.trials": sweep.plateau.trials,
        "data.max_samples": data.max_samples,
        "data.max_megapixels": data.max_megapixels,
        "data.demo_images": data.demo_images,
        "data.demo_questions": data.demo_questions,
        "data.captioner.batch_size": data.captioner.batch_size,
        "data.captioner.max_new_tokens": data.captioner.max_new_tokens,
        "data.captioner.captions_per_image": data.captioner.captions_per_image,
        "data.captioner.temperature": data.captioner.temperature,
        "data.recipe.processes": data.recipe.processes,
        "data.recipe.word_repetition.ngram": data.recipe.word_repetition.ngram,
        "data.recipe.character_repetition.ngram": data.recipe.character_repetition.ngram,
        "data.augment.duplicate": data.augment.duplicate,
        "eval.max_questions": config.eval.max_questions,
        **{
            f"eval.{name}.{key}": getattr(getattr(config.eval, name), key)
            for name in BENCHMARKS
            for key in ("batch_size", "max_new_tokens")
        },
        "eval.robustness.rare_at_most": config.eval.robustness.rare_at_most,
        "eval.judge.timeout_s": config.eval.judge.timeout_s,
        "eval.captions.bertscore_layer": config.eval.captions.bertscore_layer,
        "zero.reduce_bucket_size": config.zero.reduce_bucket_size,
        "plan.rows": config.plan.rows,
        "plan.align_rows": config.plan.align_rows,
        "plan.text_tokens": config.plan.text_tokens,
        "plan.longest_text": config.plan.longest_text,
        "plan.mfu": config.plan.mfu,
        "plan.price": config.plan.price,
        "plan.host_memory_gib": config.plan.host_memory_gib,
        **{f"monitor.limits.{key}": value for key, value in plain(config.monitor.limits).items()},
        "monitor.every_s": config.monitor.every_s,
        "launch.timeout_s": config.launch.timeout_s,
        "alerts.every_minutes": config.alerts.every_minutes,
        "train.feature_cache_gb": train.feature_cache_gb,
    }
    for key, value in positive.items():
        if value is not None and not 0 < value < float("inf"):
            yield f"{key}={value} must be a finite number above 0"
    not_negative: dict[str, float | None] = {
        "train.weight_decay": train.weight_decay,
        "train.align.weight_decay": align.weight_decay,
        "train.align.max_steps": align.max_steps,
        "train.max_grad_norm": train.max_grad_norm,
        "train.workers": train.workers,
        "zero.persistence_threshold": config.zero.persistence_threshold,
        "train.resized_cache_gb": train.resized_cache_gb,
        "tracker.table_rows": config.tracker.table_rows,
        "eval.image_cache_gib": config.eval.image_cache_gib,
        "seed": config.seed,
        "data.captioner.seed": data.captioner.seed,
        "train.early_stopping.min_delta": train.early_stopping.min_delta,
        "train.guards.plateau_min_delta": train.guards.plateau_min_delta,
        "train.guards.max_actions": train.guards.max_actions,
        "train.checkpoint.keep_best": train.checkpoint.keep_best,
        "launch.max_restarts": config.launch.max_restarts,
        "eval.gallery": config.eval.gallery,
        "sweep.retries": sweep.retries,
        "sweep.sampler.seed": sweep.sampler.seed,
        "sweep.sampler.startup": sweep.sampler.startup,
        "sweep.pruner.startup": sweep.pruner.startup,
        "sweep.pruner.patience": sweep.pruner.patience,
        "sweep.pruner.min_delta": sweep.pruner.min_delta,
        "sweep.plateau.min_delta": sweep.plateau.min_delta,
    }
    for key, value in not_negative.items():
        if value is not None and not 0 <= value < float("inf"):
            yield f"{key}={value} must be a finite number, 0 or above"
    closed_shares = {
        "data.captioner.mix_share": data.captioner.mix_share,
        "data.captioner.top_p": data.captioner.top_p,
        "data.augment.paraphrase": data.augment.paraphrase,
    }
    for key, value in closed_shares.items():
        if not 0 <= value <= 1:
            yield f"{key}={value} must lie in [0, 1]"
    shares = {
        "train.warmup_ratio": train.warmup_ratio,
        "train.align.warmup_ratio": align.warmup_ratio,
        "train.beta1": train.beta1,
        "train.beta2": train.beta2,
        "adapter.dropout": config.adapter.dropout,
        "data.max_bad_share": data.max_bad_share,
    }
    for key, value in shares.items():
        if not 0 <= value < 1:
            yield f"{key}={value} must lie in [0, 1)"
    if not (config.plan.prices is None or isinstance(config.plan.prices, (str, dict))):
        yield f"plan.prices={config.plan.prices!r} must be a file, or prices by card: {{h100: 2.5, currency: EUR}}"
    for key in ("memory_share", "throughput_share", "idle_share"):
        if getattr(config.monitor.limits, key) > 1:
            yield f"monitor.limits.{key}={getattr(config.monitor.limits, key)} must lie in (0, 1]"
    monitor = config.monitor
    port = monitor.prometheus_port
    if port is not None and not 1 <= port <= 65_535:
        yield f"monitor.prometheus_port={port} must lie in 1..65535"
    if monitor.textfile is not None and monitor.every_s is None:
        yield "monitor.textfile needs monitor.every_s, the seconds after which the file is written anew; it is null"
    elif monitor.textfile is not None and monitor.every_s is not None and monitor.every_s >= monitor.limits.down_s:
        yield (
            f"monitor.every_s={monitor.every_s} with monitor.textfile must lie below "
            f"monitor.limits.down_s={monitor.limits.down_s}: a file that old is taken for a dead run's"
        )
    if config.plan.mfu > 1:
        yield f"plan.mfu={config.plan.mfu} must lie in (0, 1]"
    if train.validation.share is not None and train.validation.share > 1:
        yield f"train.validation.share={train.validation.share} must lie in (0, 1]"


def _recipe_faults(data: DataConfig) -> Iterator[str]:
    recipe, captioner = data.recipe, data.captioner
    for name in RECIPE_OPERATORS:
        section = getattr(recipe, name)
        limits = {f.name: getattr(section, f.name) for f in fields(section) if f.name not in ("ngram", "path")}
        for key, limit in limits.items():
            yield from _limit_faults(f"data.recipe.{name}.{key}", limit)
        lower, upper = limits.get("min"), limits.get("max")
        if isinstance(lower, (int, float)) and isinstance(upper, (int, float)) and lower > upper:
            yield f"data.recipe.{name}: min={lower} is above max={upper}, so no row could be kept"
        if hasattr(section, "path"):
            is_on = any(limit is not None for limit in limits.values())
            if is_on and section.path is None:
                yield f"data.recipe.{name} has a limit and needs data.recipe.{name}.path=/folder/of/its/model"
            if is_on and recipe.engine is RecipeEngine.builtin:
                yield f"data.recipe.{name} needs a model, which data.recipe.engine=builtin does not run"
    for kind in ("width", "height"):
        low, high = getattr(recipe.image_shape, f"min_{kind}"), getattr(recipe.image_shape, f"max_{kind}")
        if low is not None and high is not None and low > high:
            yield f"data.recipe.image_shape: min_{kind}={low} is above max_{kind}={high}"
    if captioner.policy is CaptionPolicy.keep_if_better and captioner.scorer.path is None:
        yield (
            "data.captioner.policy=keep_if_better needs data.captioner.scorer.path=/folder of a CLIP or BLIP "
            "image-text-matching model that judges the captions"
        )
    if captioner.engine is CaptionEngine.data_juicer:
        own = {"captions_per_image": captioner.captions_per_image > 1, "questions": bool(captioner.questions)}
        for key in (key for key, is_used in own.items() if is_used):
            yield f"data.captioner.{key} is written by data.captioner.engine=mgm_exp only, not by data_juicer"


def _limit_faults(key: str, limit: int | float | str | None) -> Iterator[str]:
    if isinstance(limit, str) and not PERCENTILE.fullmatch(limit):
        yield f"{key}={limit!r} must be a number, a percentile from p1 to p99 (p5, p97.5), or null"
    elif isinstance(limit, (int, float)) and not abs(limit) < float("inf"):
        yield f"{key}={limit} must be finite; leave it null for no limit"


def _view_faults(model: ModelConfig) -> Iterator[str]:
    if model.image_grid is not None and not 1 <= model.image_grid <= 8:
        yield f"model.image_grid={model.image_grid} must be 1 (no grid) to 8; the official HD models have 2"
    if model.image_grid == 1 and model.image_global:
        yield "model.image_global=true adds the whole image to crops of it: it needs model.image_grid=2 or more"
    if model.image_size_aux is not None and (model.image_size_aux < 32 or model.image_size_aux % 32):
        yield f"model.image_size_aux={model.image_size_aux} must be a multiple of 32 pixels (768, or 1536 in HD)"


def _batch_faults(config: ExperimentConfig) -> Iterator[str]:
    sections: tuple[tuple[str, TrainConfig | AlignConfig], ...] = (
        ("train", config.train),
        ("train.align", config.train.align),
    )
    for where, section in sections:
        per_pass = section.micro_batch_size * config.devices
        if per_pass > 0 and section.global_batch_size % per_pass:  # 0 and less were named already
            yield (
                f"{where}.global_batch_size={section.global_batch_size} is not a multiple of "
                f"{where}.micro_batch_size={section.micro_batch_size} x devices={config.devices} = {per_pass}; "
                f"change one of the three"
            )
