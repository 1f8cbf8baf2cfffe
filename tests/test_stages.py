"""For each config key: which stages it changes. A key that is in no stage must not change any output."""

from __future__ import annotations

import copy
from dataclasses import replace
from enum import Enum
from typing import Any

import pytest

from mgm_exp import stages
from mgm_exp.config import (
    BENCHMARKS,
    AdaLoraConfig,
    AdapterConfig,
    AdapterKind,
    AlertsConfig,
    CaptionEngine,
    CaptionPolicy,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    LimitsConfig,
    ModelConfig,
    ModelFamily,
    ModelLimitsConfig,
    MonitorLimitsConfig,
    PathsConfig,
    Precision,
    RepetitionConfig,
    ScorerConfig,
    TrackerConfig,
    TrainConfig,
    ZeroConfig,
    from_plain,
    plain,
)

SOURCES = stages.Sources(
    model="m", align="a", instruct="i", captioner="c", recaptioned=None, device="cpu", attention="sdpa"
)
TRAINED = {"align", "instruct"}
NOTHING: set[str] = set()
FILES = {
    "vqav2": "questions annotations images batch_size max_new_tokens",
    "okvqa": "questions annotations images batch_size max_new_tokens",
    "gqa": "questions choices images consistency batch_size max_new_tokens",
    "mmbench": "questions rows batch_size max_new_tokens",
    "mmbench_cn": "questions rows batch_size max_new_tokens",
    "captions": "annotations images prompt meteor bertscore bertscore_layer batch_size max_new_tokens",
    "mme": "questions batch_size max_new_tokens",
    "pope": "questions images batch_size max_new_tokens",
    "scienceqa": "questions splits images split batch_size max_new_tokens",
    "seedbench": "questions images batch_size max_new_tokens",
    "mmmu": "questions split batch_size max_new_tokens",
    "mathvista": "questions images batch_size max_new_tokens",
    "custom": "questions images metrics instruction batch_size max_new_tokens",
}

# Where the questions of a benchmark come from and how they are asked and read.
BENCHMARK_KEYS = [
    *("judge.url", "judge.model", "judge.timeout_s"),
    *(f"robustness.{key}" for key in ("corruptions", "severities", "rephrased", "long_tail", "rare_at_most")),
    *(f"{name}.{key}" for name in BENCHMARKS if name not in ("demo", "textvqa") for key in FILES[name].split()),
]

# Direct effects: a stage further down changes through the key of its input. What enters as a fingerprint of files
# (paths, benchmark files) is tested with the sources below.
AFFECTS: dict[str, set[str]] = {
    "model.name": NOTHING,
    "model.path": NOTHING,
    "model.vision_tower": NOTHING,
    "model.vision_tower_aux": NOTHING,
    # Part of the model's fingerprint: see tests/test_preflight.py.
    "model.image_grid": NOTHING,
    "model.image_global": NOTHING,
    "model.image_size_aux": NOTHING,
    "model.attn_implementation": NOTHING,
    "model.hidden_activation": TRAINED | {"evaluate"},
    "model.gradient_checkpointing": TRAINED,
    "model.mining": TRAINED | {"features", "evaluate"},
    "model.family": TRAINED | {"curate", "features", "evaluate"},
    "model.train_connector": NOTHING,  # of MGM; see below for other models
    "data.name": NOTHING,
    "data.path": NOTHING,
    "data.image_root": NOTHING,
    "data.recaptioned_path": NOTHING,
    "data.instruct.path": NOTHING,
    "data.instruct.image_root": NOTHING,
    "data.recaption": NOTHING,
    "data.captioner.path": NOTHING,
    "data.captioner.engine": {"recaption"},
    "data.captioner.batch_size": {"recaption"},
    "data.captioner.seed": NOTHING,  # with one greedy caption for every image nothing is drawn
    "data.captioner.prompt": {"recaption"},
    "data.captioner.max_new_tokens": {"recaption"},
    "data.captioner.precision": {"recaption"},
    "data.captioner.policy": {"recaption"},
    "data.captioner.mix_share": NOTHING,  # see test_settings_of_a_policy_matter_under_that_policy
    "data.captioner.scorer.path": NOTHING,
    "data.captioner.scorer.margin": NOTHING,
    "data.captioner.captions_per_image": {"recaption"},
    "data.captioner.temperature": NOTHING,
    "data.captioner.top_p": NOTHING,
    "data.captioner.questions": {"recaption"},
    "data.recipe.engine": {"measure"},
    "data.recipe.executor": {"measure"},
    "data.recipe.processes": NOTHING,
    "data.recipe.words_num.min": {"measure", "curate"},
    "data.recipe.words_num.max": {"measure", "curate"},
    "data.recipe.text_length.min": {"measure", "curate"},
    "data.recipe.text_length.max": {"measure", "curate"},
    "data.recipe.word_repetition.ngram": NOTHING,
    "data.recipe.word_repetition.min": {"measure", "curate"},
    "data.recipe.word_repetition.max": {"measure", "curate"},
    "data.recipe.character_repetition.ngram": NOTHING,
    "data.recipe.character_repetition.min": {"measure", "curate"},
    "data.recipe.character_repetition.max": {"measure", "curate"},
    "data.recipe.image_shape.min_width": {"measure", "curate"},
    "data.recipe.image_shape.max_width": {"measure", "curate"},
    "data.recipe.image_shape.min_height": {"measure", "curate"},
    "data.recipe.image_shape.max_height": {"measure", "curate"},
    "data.recipe.image_text_similarity.min": {"measure", "curate"},
    "data.recipe.image_text_similarity.max": {"measure", "curate"},
    "data.recipe.image_text_similarity.path": NOTHING,
    "data.recipe.image_text_matching.min": {"measure", "curate"},
    "data.recipe.image_text_matching.max": {"measure", "curate"},
    "data.recipe.image_text_matching.path": NOTHING,
    "data.recipe.watermark.max": {"measure", "curate"},
    "data.recipe.watermark.path": NOTHING,
    "data.augment.duplicate": {"curate"},
    "data.augment.paraphrase": {"curate"},
    "data.bad_rows": {"curate"},
    "data.max_bad_share": {"curate"},
    "data.max_samples": {"check", "recaption", "measure", "curate"},
    "data.max_megapixels": {"check", "recaption", "measure", "curate", "evaluate"},
    "data.demo_images": {"demo"},
    "data.demo_questions": {"demo"},
    "data.demo_seed": {"demo"},
    "adapter.name": NOTHING,
    "adapter.kind": {"instruct"},
    "adapter.rank": {"instruct"},
    "adapter.alpha": {"instruct"},
    "adapter.dropout": {"instruct"},
    "adapter.target_modules": {"instruct"},
    "adapter.use_rslora": {"instruct"},
    "adapter.use_dora": {"instruct"},
    "adapter.init": {"instruct"},
    "adapter.pissa_iterations": {"instruct"},
    "adapter.b_lr_ratio": {"instruct"},
    "adapter.base_bits": {"instruct"},
    # A LoRA does not read them; see test_settings_of_an_adapter_matter_for_the_kind_that_reads_them
    **{f"adapter.{key}": NOTHING for key in ("tokens", "norms")},
    **{f"adapter.adalora.{key}": NOTHING for key in plain(AdaLoraConfig())},
    "zero.stage": TRAINED,
    "zero.offload_optimizer": NOTHING,
    "zero.reduce_bucket_size": NOTHING,
    "zero.overlap_comm": NOTHING,
    # When parameters are sent, not what is computed: not even with zero=3.
    **{f"zero.{key}": NOTHING for key in ("prefetch_bucket_size", "persistence_threshold", "max_live_parameters")},
    "train.name": NOTHING,
    "train.align.lr": {"align"},
    "train.align.epochs": {"align"},
    "train.align.max_steps": {"align"},
    "train.align.global_batch_size": {"align"},
    "train.align.micro_batch_size": {"align"},
    "train.align.warmup_ratio": {"align"},
    "train.align.weight_decay": {"align"},
    "train.align.max_length": {"curate", "align"},
    "train.align.image_aspect": {"align"},
    "train.align.group_by": {"align"},
    "train.align.reset": {"align"},
    **{f"train.default_lr.{kind.value}": NOTHING for kind in AdapterKind},
    "train.lr": {"instruct"},
    "train.projector_lr": {"instruct"},
    "train.epochs": {"instruct"},
    "train.max_steps": {"instruct"},
    "train.global_batch_size": {"instruct"},
    "train.micro_batch_size": {"features", "instruct"},
    "train.warmup_ratio": {"instruct"},
    "train.weight_decay": {"instruct"},
    "train.beta1": {"align", "instruct"},
    "train.beta2": {"align", "instruct"},
    "train.max_grad_norm": {"align", "instruct"},
    "train.max_length": {"curate", "instruct"},
    "train.precision": TRAINED | {"features", "evaluate"},
    "train.image_aspect": {"features", "instruct"},
    "train.group_by": {"instruct"},
    "train.loss_norm": {"align", "instruct"},
    "train.freeze_connector": {"instruct"},
    "train.optimize_vision_tower": {"instruct"},
    "train.optimize_vision_tower_aux": {"instruct"},
    "train.vision_tower_lr": NOTHING,  # without a switch nothing of a tower is trained
    "train.cache_visual_tokens": {"instruct"},
    # Bit-equal to computing: tests/train/test_feature_cache.py
    **{f"train.{key}": NOTHING for key in stages.CACHES},
    "train.workers": NOTHING,
    "train.deterministic": TRAINED | {"features"},
    "train.auto_micro_batch": TRAINED,
    "train.loss_kernel": TRAINED,
    "train.loss_chunk": TRAINED,
    "train.lora_kernel": {"instruct"},
    "train.last_block": TRAINED,
    "train.block_kernel": TRAINED,
    "train.padding_free": TRAINED,
    "train.compile": TRAINED,
    "train.cuda_graphs": NOTHING,  # but of a pack: test_graphs_belong_to_the_key_of_a_packed_trial
    "train.tf32": NOTHING,  # of a CPU; see test_tf32_belongs_to_what_a_gpu_makes
    "train.offload_activations": NOTHING,  # where activations wait changes no bit
    "train.gradient_statistics_every": NOTHING,
    "train.profile": NOTHING,
    "train.guards.on_nonfinite": TRAINED,
    "train.guards.on_spike": TRAINED,
    "train.guards.on_divergence": TRAINED,
    **{
        f"train.guards.{key}": NOTHING  # but under a policy that changes weights
        for key in "window threshold patience divergence_factor divergence_patience plateau_patience "
        "plateau_min_delta lr_factor max_actions dead_after".split()
    },
    "train.validation.every_steps": NOTHING,
    "train.validation.questions": NOTHING,
    "train.validation.share": NOTHING,
    "train.validation.benchmark": NOTHING,
    "train.early_stopping.patience": {"instruct"},
    "train.early_stopping.min_delta": NOTHING,
    "train.checkpoint.every_steps": NOTHING,
    "train.checkpoint.every_minutes": NOTHING,
    "train.checkpoint.keep": NOTHING,
    "train.checkpoint.keep_best": NOTHING,
    "train.checkpoint.background": NOTHING,
    "train.checkpoint.continue_from": NOTHING,  # but the checkpoint that is found there
    "eval.name": NOTHING,
    "eval.benchmarks": NOTHING,
    "eval.max_questions": {"evaluate"},
    "eval.gallery": NOTHING,
    "eval.precision": {"evaluate"},
    "eval.merge_adapter": {"evaluate"},
    "eval.image_cache_gib": NOTHING,
    "eval.textvqa.questions": NOTHING,
    "eval.textvqa.annotations": NOTHING,
    "eval.textvqa.images": NOTHING,
    "eval.textvqa.ocr_tokens": NOTHING,
    "eval.textvqa.batch_size": NOTHING,
    "eval.textvqa.max_new_tokens": NOTHING,
    # What of them changes a score is part of the benchmark's own fingerprint.
    **{f"eval.{key}": NOTHING for key in BENCHMARK_KEYS},
    "eval.demo.split": NOTHING,
    "eval.demo.batch_size": NOTHING,
    "eval.demo.max_new_tokens": NOTHING,
    "eval.demo.baselines": NOTHING,
    "tracker.mode": NOTHING,
    "tracker.project": NOTHING,
    "tracker.entity": NOTHING,
    "tracker.table_rows": NOTHING,
    "tracker.base_url": NOTHING,
    "launch.machines": NOTHING,
    "launch.hostfile": NOTHING,
    "launch.remote_shell": NOTHING,
    "launch.max_restarts": NOTHING,
    "launch.timeout_s": NOTHING,
    "launch.wait": NOTHING,
    "launch.pack": {"instruct"},
    "paths.root": NOTHING,
    "paths.store": NOTHING,
    "paths.mirror": NOTHING,
    "sweep.objectives": NOTHING,
    "sweep.directions": NOTHING,
    "sweep.n_trials": NOTHING,
    "sweep.seeds": NOTHING,
    "sweep.slots": NOTHING,
    "sweep.isolate": NOTHING,
    "sweep.pause_after": NOTHING,
    "sweep.retries": NOTHING,
    "sweep.max_failures": NOTHING,
    "sweep.storage": NOTHING,
    "sweep.enqueue": NOTHING,
    "sweep.constraints": NOTHING,
    "sweep.sampler.name": NOTHING,
    "sweep.sampler.seed": NOTHING,
    "sweep.sampler.startup": NOTHING,
    "sweep.sampler.population": NOTHING,
    "sweep.pruner.name": NOTHING,
    "sweep.pruner.min_step": NOTHING,
    "sweep.pruner.reduction_factor": NOTHING,
    "sweep.pruner.startup": NOTHING,
    "sweep.pruner.synchronous": NOTHING,
    "sweep.pruner.patience": NOTHING,
    "sweep.pruner.min_delta": NOTHING,
    "sweep.pruner.p_threshold": NOTHING,
    "sweep.budget.hours": NOTHING,
    "sweep.budget.trials": NOTHING,
    "sweep.budget.gpu_hours": NOTHING,
    "sweep.budget.interrupt": NOTHING,
    "sweep.plateau.trials": NOTHING,
    "sweep.plateau.min_delta": NOTHING,
    "sweep.name": NOTHING,
    "sweep.objective": NOTHING,
    "sweep.direction": NOTHING,
    "sweep.rerun": NOTHING,
    **dict.fromkeys("plan.device plan.rows plan.align_rows plan.text_tokens plan.longest_text".split(), NOTHING),
    **{f"monitor.{key}": NOTHING for key in ("every_s", "prometheus_port", "prometheus_host", "textfile")},
    **{f"alerts.{key}": NOTHING for key in plain(AlertsConfig())},
    **{f"monitor.limits.{key}": NOTHING for key in plain(MonitorLimitsConfig())},
    "plan.mfu": NOTHING,
    "plan.refuse": NOTHING,
    "plan.price": NOTHING,
    "plan.prices": NOTHING,
    "plan.host_memory_gib": NOTHING,
    "seed": TRAINED,
    "name": NOTHING,
    "devices": TRAINED,
    "device": NOTHING,
    "trial": NOTHING,
}


def base() -> ExperimentConfig:
    return ExperimentConfig(
        model=ModelConfig(name="tiny"),
        data=DataConfig(name="raw"),
        adapter=AdapterConfig("lora_r8", AdapterKind.lora, rank=8, alpha=16.0, target_modules=["q_proj", "v_proj"]),
        zero=ZeroConfig(),
        train=TrainConfig(name="demo", lr=1e-3, projector_lr=1e-3, precision=Precision.fp32),
        eval=EvalConfig(name="demo", benchmarks=["demo"]),
        tracker=TrackerConfig(),
        paths=PathsConfig(store="outputs/store"),
        name="run",
    )


def keys(config: ExperimentConfig, sources: stages.Sources = SOURCES) -> dict[str, str]:
    """Every stage's key with the keys of its inputs held fixed: direct effects only."""
    payloads = {
        "demo": stages.demo_payload(config),
        "check": stages.check_payload(config, sources, None),
        "recaption": stages.recaption_payload(config, sources, None),
        "measure": stages.measure_payload(config, sources, None, None),
        "curate": stages.curate_payload(config, sources, None, None, None),
        "align": stages.align_payload(config, sources, "curated"),
        "features": stages.features_payload(config, sources, "aligned", "curated"),
        "instruct": stages.instruct_payload(config, sources, "aligned", "curated"),
        "evaluate": stages.evaluate_payload(config, sources, "tuned", "benchmark"),
    }
    return {stage: stages.key_of(stage, payload) for stage, payload in payloads.items()}


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


OTHER = {
    "model.mining": "reference",
    "adapter.init": "pissa",
    "adapter.kind": "full",
    "adapter.target_modules": ["q_proj"],
    "data.bad_rows": "fail",
    "data.captioner.engine": "data_juicer",
    "data.captioner.policy": "mix",
    "data.captioner.precision": "bf16",
    "data.captioner.questions": ["what is it?"],
    "data.recipe.engine": "builtin",
    "data.recipe.executor": "ray",
    "device": "cpu",
    "eval.benchmarks": ["textvqa"],
    "eval.custom.metrics": ["anls"],
    "eval.demo.split": "val",
    "eval.mmbench.rows": "first",
    "eval.mmbench_cn.rows": "first",
    "eval.robustness.corruptions": ["blur"],
    "eval.robustness.severities": [2],
    "launch.machines": "here",
    "launch.remote_shell": ["rsh"],
    "model.attn_implementation": "eager",
    "model.family": "hf",
    "plan.device": "a10",
    "sweep.constraints": ["adapter.rank <= 8"],
    "sweep.direction": "minimize",
    "sweep.directions": ["minimize"],
    "sweep.enqueue": [{"adapter.rank": 8}],
    "sweep.objectives": ["demo/anls"],
    "sweep.pruner.name": "median",
    "sweep.sampler.name": "random",
    "sweep.rerun": "all",
    "tracker.mode": "offline",
    "train.align.group_by": "length",
    "train.align.image_aspect": "pad",
    "train.align.reset": "connector",
    "train.freeze_connector": True,
    "train.group_by": "none",
    "train.guards.on_divergence": "rollback",
    "train.guards.on_nonfinite": "rollback",
    "train.guards.on_spike": "lower_lr",
    "train.image_aspect": "square",
    "train.compile": "regional",
    "train.cuda_graphs": "packs",
    "train.last_block": "whole",
    "train.block_kernel": "fused",
    "train.lora_kernel": "peft",
    "train.loss_kernel": "fused",
    "train.loss_norm": "official",
    "train.precision": "bf16",
    "train.cache_visual_tokens": True,
    "train.feature_cache": "towers",
    "train.warmup_ratio": 0.5,
    "train.align.warmup_ratio": 0.5,
    "train.beta1": 0.5,
    "train.beta2": 0.5,
    "adapter.dropout": 0.5,
    "data.max_bad_share": 0.5,
    "eval.precision": Precision.bf16,
    "zero.offload_optimizer": "cpu",
    "zero.stage": 2,
}


def changed(key: str, value: Any) -> Any:
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 or 1
    return "other" if isinstance(value, str) or (value is None and not key.endswith(NUMERIC)) else 3


NUMERIC = (
    *(".min", ".max", "_width", "_height"),
    *("max_steps", "every_steps", "max_samples", "max_questions", "trial", "every_minutes", "share", "patience"),
    *("plateau_patience", "gradient_statistics_every", "loss_chunk", "bucket_size", "feature_cache_gb"),
    *("prometheus_port", "rows", "longest_text", "price", "population", "min_step", "pause_after", "hours", "trials"),
    *("text_tokens", "host_memory_gib"),
)


@pytest.mark.parametrize("key", sorted(leaves(plain(base()))))
def test_each_config_key_changes_exactly_the_stages_it_is_declared_for(key: str) -> None:
    assert key in AFFECTS, f"{key} is new: say in AFFECTS which stages it changes"
    other = _with(base(), key.split("."), changed(key, leaves(plain(base()))[key]))
    before, after = keys(base()), keys(other)
    assert plain(other) != plain(base())
    assert {stage for stage in before if before[stage] != after[stage]} == AFFECTS[key]


def _with(config: Any, path: list[str], value: Any) -> Any:
    """One key changed and nothing validated: single keys are changed here that only make sense with others."""
    old = getattr(config, path[0])
    if len(path) > 1:
        value = _with(old, path[1:], value)
    elif isinstance(old, Enum):
        value = type(old)(value)
    return replace(config, **{path[0]: value})


def test_no_declared_key_is_gone() -> None:
    assert set(AFFECTS) == set(leaves(plain(base())))


@pytest.mark.parametrize(
    ("field", "affected"),
    [
        ("model", {"curate", "features", "evaluate"} | TRAINED),
        ("align", {"check", "recaption", "measure", "curate"}),
        ("instruct", {"check", "curate"}),
        ("captioner", {"recaption"}),
        ("recaptioned", {"measure", "curate"}),
        ("device", {"recaption", "features", "evaluate"} | TRAINED),
        ("attention", {"features", "evaluate"} | TRAINED),
    ],
)
def test_each_source_changes_its_stages(field: str, affected: set[str]) -> None:
    sources = replace(SOURCES, **{field: "another"})
    before, after = keys(base()), keys(base(), sources)
    assert {stage for stage in before if before[stage] != after[stage]} == affected


@pytest.mark.parametrize(
    ("adapter", "key", "value"),
    [
        (AdapterConfig("", AdapterKind.prompt, tokens=8), "tokens", 16),
        (AdapterConfig("", AdapterKind.bitfit), "norms", True),
        *[
            (AdapterConfig("", AdapterKind.adalora, 4, 8.0, 0.0, ["q_proj"]), "adalora", AdaLoraConfig(**{key: value}))
            for key, value in {
                "initial_rank": 16, "warmup_share": 0.2, "final_share": 0.2, "every_steps": 5, "orthogonality": 0.5,
            }.items()
        ],
    ],
)  # fmt: skip
def test_settings_of_an_adapter_matter_for_the_kind_that_reads_them(
    adapter: AdapterConfig, key: str, value: Any
) -> None:
    before = keys(replace(base(), adapter=adapter))
    after = keys(replace(base(), adapter=replace(adapter, **{key: value})))
    assert {stage for stage in before if before[stage] != after[stage]} == {"instruct"}


def test_the_rate_of_the_towers_matters_where_one_is_trained() -> None:
    train = replace(base().train, optimize_vision_tower=True)
    before = keys(replace(base(), train=train))
    after = keys(replace(base(), train=replace(train, vision_tower_lr=1e-6)))
    assert {stage for stage in before if before[stage] != after[stage]} == {"instruct"}


def test_a_lora_keeps_the_key_that_it_had_before_other_kinds_came() -> None:
    """The settings of later kinds are left out at their default, so that stores stay of use."""
    adapter = stages.instruct_payload(base(), SOURCES, "aligned", "curated")["adapter"]
    assert adapter == {
        "kind": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "keys_of_it"),
    [
        ("skip", {"window", "threshold", "patience"}),
        ("lower_lr", {"window", "threshold", "patience", "lr_factor"}),
        ("warn", set()),
        ("stop", set()),
    ],
)
def test_what_a_guard_may_do_to_the_weights_belongs_to_the_key(policy: str, keys_of_it: set[str]) -> None:
    acting = _with(base(), ["train", "guards", "on_spike"], policy)
    for key, value in leaves(plain(base().train.guards)).items():
        if not key.startswith("on_"):
            other = _with(acting, ["train", "guards", key], (value or 1) * 2)
            before, after = keys(acting), keys(other)
            affected = {stage for stage in before if before[stage] != after[stage]}
            assert affected == (TRAINED if key in keys_of_it else set()), key


def test_what_is_trained_of_another_model_changes_its_instruct_stage() -> None:
    other = replace(base(), model=replace(base().model, family=ModelFamily.hf))
    connector = replace(other, model=replace(other.model, train_connector=True))
    rate = replace(other, train=replace(other.train, projector_lr=0.5))
    before = keys(other)
    assert {stage for stage, key in keys(connector).items() if key != before[stage]} == {"instruct"}
    assert keys(rate) == before  # nothing of it is trained at that rate


def _captioned(**settings: Any) -> ExperimentConfig:
    config = base()
    captioner = replace(config.data.captioner, **settings)
    return replace(config, data=replace(config.data, captioner=captioner))


@pytest.mark.parametrize(
    ("policy", "key", "value"),
    [
        ({"policy": CaptionPolicy.mix}, "mix_share", 0.25),
        ({"policy": CaptionPolicy.mix}, "seed", 7),
        ({"policy": CaptionPolicy.keep_if_better}, "scorer", ScorerConfig("folder", 0.1)),
        ({"captions_per_image": 2}, "seed", 7),
        ({"captions_per_image": 2}, "temperature", 0.5),
        ({"captions_per_image": 2}, "top_p", 0.5),
        ({"engine": CaptionEngine.data_juicer}, "seed", 7),
    ],
)
def test_settings_of_a_policy_matter_under_that_policy(policy: dict[str, Any], key: str, value: Any) -> None:
    before, after = keys(_captioned(**policy)), keys(_captioned(**policy, **{key: value}))
    assert {stage for stage in before if before[stage] != after[stage]} == {"recaption"}


def _with_recipe(**operators: Any) -> ExperimentConfig:
    config = base()
    return replace(config, data=replace(config.data, recipe=replace(config.data.recipe, **operators)))


def test_recipes_that_differ_in_limits_share_the_values() -> None:
    before = keys(_with_recipe(words_num=LimitsConfig(min=4)))
    after = keys(_with_recipe(words_num=LimitsConfig(min=6)))
    assert {stage for stage in before if before[stage] != after[stage]} == {"curate"}
    bigrams = keys(_with_recipe(word_repetition=RepetitionConfig(max=0.3, ngram=2)))
    trigrams = keys(_with_recipe(word_repetition=RepetitionConfig(max=0.3, ngram=3)))
    assert bigrams["measure"] != trigrams["measure"]


def test_the_model_of_an_operator_changes_its_values() -> None:
    config = _with_recipe(image_text_similarity=ModelLimitsConfig(min=0.2, path="folder"))
    one = keys(config, replace(SOURCES, operators={"image_text_similarity": "x"}))
    other = keys(config, replace(SOURCES, operators={"image_text_similarity": "y"}))
    assert {stage for stage in one if one[stage] != other[stage]} == {"measure"}


def test_tf32_belongs_to_what_a_gpu_makes() -> None:
    gpu = replace(SOURCES, device="cuda")
    config = base()
    other = _with(config, ["train", "tf32"], True)
    for payload in (stages.align_payload, stages.features_payload, stages.instruct_payload):
        rest = ("x",) if payload is stages.align_payload else (None, "x")
        assert payload(config, gpu, *rest) != payload(other, gpu, *rest)
        assert payload(config, SOURCES, *rest) == payload(other, SOURCES, *rest)


def test_the_automatic_loss_kernel_is_in_the_key_as_the_one_that_runs() -> None:
    def kernel(stage: str, sources: stages.Sources, **other: Any) -> Any:
        config = _with(base(), ["train", "loss_kernel"], "auto")
        for key, value in other.items():
            config = _with(config, key.split("__"), value)
        made = (
            stages.align_payload(config, sources, "x")
            if stage == "align"
            else stages.instruct_payload(config, sources, None, "x")
        )
        return made["engine"].get("loss_kernel")

    gpu = replace(SOURCES, device="cuda", has_liger=True)
    assert kernel("instruct", SOURCES) == "fused"
    assert kernel("instruct", gpu) == "liger"
    assert kernel("instruct", SOURCES, adapter__kind="full") is None  # torch, which came first
    assert kernel("align", SOURCES, adapter__kind="full") == "fused"
    assert kernel("instruct", gpu, train__precision="fp16") is None


@pytest.mark.parametrize(
    ("other", "kernel"),
    [
        ({}, "fused"),
        ({"train__lora_kernel": "peft"}, None),  # which came first
        ({"zero__stage": 2}, "fused"),
        ({"zero__stage": 3}, None),
        ({"train__compile": "regional"}, None),
        ({"adapter__use_dora": True}, None),
        ({"adapter__base_bits": 4}, None),
        ({"adapter__kind": "full"}, None),
    ],
)
def test_the_automatic_lora_kernel_is_in_the_key_as_the_one_that_runs(other: dict[str, Any], kernel: Any) -> None:
    config = base()
    for key, value in other.items():
        config = _with(config, key.split("__"), value)
    assert stages.instruct_payload(config, SOURCES, None, "x")["engine"].get("lora_kernel") == kernel
    assert "lora_kernel" not in stages.align_payload(config, SOURCES, "x")["engine"]


def test_graphs_belong_to_the_key_of_a_packed_trial() -> None:
    def engine(graphs: str) -> Any:
        config = _with(_with(base(), ["launch", "pack"], True), ["train", "cuda_graphs"], graphs)
        config = _with(config, ["device"], "auto")
        return stages.instruct_payload(config, SOURCES, None, "x")["engine"]

    assert engine("packs") == {**engine("none"), "cuda_graphs": "packs"}


def test_how_zero_3_sends_its_parameters_is_in_no_key() -> None:
    config = _with(base(), ["zero", "stage"], 3)
    other = _with(config, ["zero", "prefetch_bucket_size"], 5)
    assert keys(config) == keys(other)


def test_offload_is_part_of_the_engine_once_zero_is_on() -> None:
    values = plain(base())
    values["zero"]["stage"] = 2
    on = copy.deepcopy(values)
    on["zero"]["offload_optimizer"] = "cpu"
    before, after = keys(from_plain(values)), keys(from_plain(on))
    assert {stage for stage in before if before[stage] != after[stage]} == TRAINED


def test_epochs_do_not_matter_where_steps_are_given() -> None:
    values = plain(base())
    values["train"]["max_steps"] = 10
    more = copy.deepcopy(values)
    more["train"]["epochs"] = 7.0
    assert keys(from_plain(values)) == keys(from_plain(more))


def test_config_hash_ignores_names_paths_tracker_and_checkpoint_intervals() -> None:
    values = plain(base())
    other = copy.deepcopy(values)
    other["name"] = "another"
    other["paths"]["root"] = "elsewhere"
    other["tracker"]["project"] = "p"
    other["train"]["checkpoint"]["keep"] = 9
    assert stages.config_hash(from_plain(values)) == stages.config_hash(from_plain(other))
    other["seed"] = 5
    assert stages.config_hash(from_plain(values)) != stages.config_hash(from_plain(other))
