"""What determines the output of each stage.

The key of a stage is the hash of its payload: the keys of its inputs, its own settings, the seed and the engine. Two
runs whose payloads are equal share the stage. What stands in no payload (names, paths, tracker, checkpoint intervals,
loader workers) must not change an output; ``tests/test_stages.py`` says for each config key which stages it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mgm_exp.config import (
    BlockKernel,
    CaptionEngine,
    CaptionPolicy,
    Compile,
    CudaGraphs,
    ExperimentConfig,
    GuardAction,
    LastBlock,
    LoraKernel,
    LossKernel,
    Mining,
    ModelFamily,
    adapter_key,
    last_block_of,
    lora_kernel_of,
    loss_kernel_of,
    plain,
    trains_towers,
)
from mgm_exp.data.recipe import bounds_of, operators_of
from mgm_exp.store import fingerprint, stage_key
from mgm_exp.train.pack.compatible import why_alone

# Bumped by hand when the code of a stage changes what it writes.
STAGE_VERSION = {
    "demo": 1,
    "check": 1,
    "recaption": 2,
    "measure": 1,
    "curate": 2,
    "align": 1,
    "features": 1,
    "instruct": 1,
    "evaluate": 2,
}

Payload = dict[str, Any]

# Features and images that are kept have the bits that they are computed with: no output depends on them.
CACHES = ("feature_cache", "feature_cache_gb", "resized_cache_gb")


@dataclass(frozen=True)
class Sources:
    """Fingerprints (SHA-256, hex) of everything that enters an experiment from outside.

    Args:
        model: Checkpoint folder with towers and tokenizer.
        align: Pairs of the align stage, images included; None: the demo data.
        instruct: Conversations of the instruct stage, images included; None: the demo data.
        captioner: Folder of the captioner; None where nothing is recaptioned.
        recaptioned: A recaptioned file given by path.
        scorer: Folder of the model that judges captions; None where nobody asks it.
        operators: Folders of the models of the recipe's operators, by operator.
        device: ``cpu`` or ``cuda``.
        attention: The attention implementation that will run.
        has_liger: Whether Liger's kernels can run.
    """

    model: str
    align: str | None
    instruct: str | None
    captioner: str | None
    recaptioned: str | None
    device: str
    attention: str
    has_liger: bool = False
    scorer: str | None = None
    operators: Mapping[str, str] = field(default_factory=dict)


def config_hash(config: ExperimentConfig) -> str:
    """Hash of all that defines the experiment: two runs with equal hashes are the same experiment."""
    values = plain(config)
    for key in ("name", "paths", "tracker", "sweep", "plan", "monitor", "alerts", "launch", "trial"):
        values.pop(key, None)
    if continued := (values["train"].pop("checkpoint", None) or {}).get("continue_from"):
        values["continued_from"] = continued
    if not config.train.deterministic:
        values["train"].pop("deterministic")
    values["eval"].pop("image_cache_gib", None)
    values["train"].pop("profile", None)
    for key in CACHES:
        values["train"].pop(key)
    if config.train.early_stopping.patience is None:  # else the points decide when training ends
        values["train"].pop("validation", None)
        values["train"].pop("early_stopping", None)
    return fingerprint(values)[:16]


def key_of(stage: str, payload: Payload) -> str:
    """The key under which the output of ``stage`` lies in the store."""
    return stage_key(stage, STAGE_VERSION[stage], payload)


def demo_payload(config: ExperimentConfig) -> Payload:
    """The generated demo data: its size and seed; the generator's version is the stage version."""
    data = config.data
    return {"images": data.demo_images, "questions": data.demo_questions, "seed": data.demo_seed}


def check_payload(config: ExperimentConfig, sources: Sources, demo: str | None) -> Payload:
    """Verdicts on the images of both stages: shared by raw and new captions, and by every recipe."""
    return {
        "align": sources.align or demo,
        "instruct": sources.instruct or demo,
        "max_megapixels": config.data.max_megapixels,
        "max_samples": config.data.max_samples,
    }


def recaption_payload(config: ExperimentConfig, sources: Sources, demo: str | None) -> Payload:
    """New captions: only the source and the captioner, so that another model does not recaption."""
    captioner = plain(config.data.captioner)
    policy, scorer = captioner["policy"], captioner.pop("scorer")
    captioner.pop("path")
    if policy != CaptionPolicy.mix.value:
        captioner.pop("mix_share")
    if captioner["engine"] == CaptionEngine.mgm_exp.value and captioner["captions_per_image"] == 1:
        captioner.pop("temperature")
        captioner.pop("top_p")
        if policy != CaptionPolicy.mix.value:
            captioner.pop("seed")  # nothing is drawn
    return {
        "source": sources.align or demo,
        "captioner": sources.captioner,
        "settings": captioner,
        "scorer": [sources.scorer, scorer["margin"]] if policy == CaptionPolicy.keep_if_better.value else None,
        "max_megapixels": config.data.max_megapixels,
        "max_samples": config.data.max_samples,
        "device": sources.device,
    }


def measure_payload(config: ExperimentConfig, sources: Sources, demo: str | None, recaption: str | None) -> Payload:
    """Values of a recipe's operators: without the limits, so that recipes which differ in limits share them."""
    recipe = config.data.recipe
    operators = operators_of(recipe)
    settings = {name: getattr(getattr(recipe, name), "ngram", None) for name in operators}
    return {
        "align": recaption or sources.recaptioned or sources.align or demo,
        "align_images": sources.align or demo,
        "max_megapixels": config.data.max_megapixels,
        "max_samples": config.data.max_samples,
        "operators": settings,
        "models": {name: sources.operators[name] for name in operators if name in sources.operators},
        "engine": recipe.engine.value,
        "executor": recipe.executor.value,
    }


def curate_payload(
    config: ExperimentConfig, sources: Sources, demo: str | None, recaption: str | None, measure: str | None
) -> Payload:
    """Usable rows of both stages: sources, policies, limits, and what decides whether a label remains.

    Args:
        measure: Key of the values that the limits apply to; None: no operator is on.
    """
    data = config.data
    return {
        "align": recaption or sources.recaptioned or sources.align or demo,
        "align_images": sources.align or demo,
        "instruct": sources.instruct or demo,
        "measure": measure,
        "limits": {f"{bound.value}.{bound.side}": bound.given for bound in bounds_of(data.recipe)},
        "augment": plain(data.augment),
        "bad_rows": data.bad_rows.value,
        "max_bad_share": data.max_bad_share,
        "max_megapixels": data.max_megapixels,
        "max_samples": data.max_samples,
        "max_length": [config.train.align.max_length, config.train.max_length],
        "model": sources.model,
        **_of_family(config),
    }


def align_payload(config: ExperimentConfig, sources: Sources, curate: str) -> Payload:
    """Stage 1: its own section, the optimizer settings it shares with stage 2, seed and engine."""
    return {
        "curate": curate,
        "section": _length_of_training(plain(config.train.align)),
        "optimizer": _shared_optimizer(config) | _reactions(config),
        **_run(config, sources, "align"),
    }


def features_payload(config: ExperimentConfig, sources: Sources, align: str | None, curate: str) -> Payload:
    """Visual tokens of the training images under a frozen connector; the batch size belongs to the bits."""
    return {
        "align": align,
        "curate": curate,
        "model": sources.model,
        "aspect": config.train.image_aspect.value,
        "batch_size": config.train.micro_batch_size,
        "precision": config.train.precision.value,
        "device": sources.device,
        "attention": sources.attention,
        **_kernels(config),
        **_tf32(config, sources),
        **_mining(config),
    }


def instruct_payload(config: ExperimentConfig, sources: Sources, align: str | None, curate: str) -> Payload:
    """Stage 2: the adapter, its training settings, seed and engine."""
    section = plain(config.train)
    left_out = ("name", "align", "default_lr", "checkpoint", "workers", "deterministic", "guards", "profile")
    for key in (*left_out, *CACHES, *_HOW_IT_RUNS, "gradient_statistics_every"):
        section.pop(key)
    section.pop("auto_micro_batch")
    section |= _reactions(config)
    if config.train.early_stopping.patience is None:  # validation points change nothing of the training
        section.pop("validation")
        section.pop("early_stopping")
    is_hf = config.model.family is ModelFamily.hf
    if config.train.freeze_connector or (is_hf and not config.model.train_connector):
        section.pop("projector_lr")
    for key in ("optimize_vision_tower", "optimize_vision_tower_aux"):
        if not section[key]:
            section.pop(key)
    if not trains_towers(config.train):
        section.pop("vision_tower_lr")
    payload = {
        "align": align,
        "curate": curate,
        "adapter": adapter_key(config.adapter),
        "section": _length_of_training(section),
        **({"train_connector": config.model.train_connector} if is_hf else {}),
        **_run(config, sources, "instruct"),
    }
    if config.launch.pack and why_alone(config) is None:
        payload["engine"]["pack"] = True  # equal within rounding to a run by itself, not bit for bit
        if config.train.cuda_graphs is not CudaGraphs.none:
            payload["engine"]["cuda_graphs"] = config.train.cuda_graphs.value
    return payload


def evaluate_payload(config: ExperimentConfig, sources: Sources, weights: str | None, benchmark: str) -> Payload:
    """One benchmark on one set of weights.

    Args:
        weights: Key of the stage that made the weights; None: the untouched base.
        benchmark: The benchmark's own fingerprint (files, prompts, metric version).
    """
    return {
        "weights": weights,
        "benchmark": benchmark,
        "max_questions": config.eval.max_questions,
        "max_megapixels": config.data.max_megapixels,
        "precision": (config.eval.precision or config.train.precision).value,
        "model": sources.model,
        "hidden_activation": config.model.hidden_activation,
        "attention": sources.attention,
        "device": sources.device,
        **_of_family(config),
        # Always: answers in fp32 came from a form of their own before there was a choice
        **({"mining": config.model.mining.value} if config.model.family is ModelFamily.mgm else {}),
        **({"merge_adapter": True} if config.eval.merge_adapter and weights is not None else {}),
    }


# Of the section train: what _execution puts into a key where it changes a result, and what never does.
_HOW_IT_RUNS = (
    "loss_kernel",
    "loss_chunk",
    "lora_kernel",
    "last_block",
    "block_kernel",
    "padding_free",
    "compile",
    "cuda_graphs",
    "tf32",
    "offload_activations",
)
# Of the section zero: when parameters are sent, not what is computed.
_ONLY_SENT = ("prefetch_bucket_size", "persistence_threshold", "max_live_parameters")


def _run(config: ExperimentConfig, sources: Sources, stage: str) -> Payload:
    """What every trained stage depends on: weights, numerics, seed, engine."""
    return {
        "model": sources.model,
        "hidden_activation": config.model.hidden_activation,
        "seed": config.seed,
        "precision": config.train.precision.value,
        "engine": {
            "zero": _without(plain(config.zero), _ONLY_SENT) if config.zero.stage else None,
            "world_size": config.devices,
            "device": sources.device,
            "attention": sources.attention,
            "gradient_checkpointing": config.model.gradient_checkpointing,
            **_kernels(config),
            **_tf32(config, sources),
            **_execution(config, sources, stage),
            **_mining(config),
        },
        **_of_family(config),
    }


def _without(values: Payload, keys: tuple[str, ...]) -> Payload:
    return {key: value for key, value in values.items() if key not in keys}


def _execution(config: ExperimentConfig, sources: Sources, stage: str) -> Payload:
    """Ways to run a model that round otherwise than the plain one, which keeps its keys."""
    train = config.train
    found: Payload = {}
    kernel = loss_kernel_of(config, stage, sources.has_liger)
    if kernel != LossKernel.torch.value:
        found["loss_kernel"] = kernel
    if train.loss_chunk is not None:
        found["loss_chunk"] = train.loss_chunk
    if lora_kernel_of(config, stage) == LoraKernel.fused.value:
        found["lora_kernel"] = LoraKernel.fused.value
    if last_block_of(config, stage) == LastBlock.learnt.value:
        found["last_block"] = LastBlock.learnt.value
    if train.block_kernel is not BlockKernel.torch:
        found["block_kernel"] = train.block_kernel.value
    if train.padding_free:
        found["padding_free"] = True
    if train.compile is not Compile.none:
        found["compile"] = train.compile.value
    return found


def _tf32(config: ExperimentConfig, sources: Sources) -> Payload:
    """Of GPUs alone: a CPU has no TF32."""
    return {"tf32": config.train.tf32} if sources.device == "cuda" else {}


def _mining(config: ExperimentConfig) -> Payload:
    """How mining is computed decides its last bits; the official form came first and keeps its keys."""
    is_native = config.model.family is ModelFamily.mgm and config.model.mining is Mining.native
    return {"mining": Mining.native.value} if is_native else {}


def _kernels(config: ExperimentConfig) -> Payload:
    """Deterministic kernels add up in another order, so their bits are others."""
    return {"deterministic": True} if config.train.deterministic else {}


def _of_family(config: ExperimentConfig) -> Payload:
    """What only models of transformers have; nothing for MGM, whose keys stay what they were."""
    if config.model.family is ModelFamily.mgm:
        return {}
    return {"family": config.model.family.value}


def _shared_optimizer(config: ExperimentConfig) -> Payload:
    train = config.train
    return {
        "beta1": train.beta1,
        "beta2": train.beta2,
        "max_grad_norm": train.max_grad_norm,
        "loss_norm": train.loss_norm.value,
    }


def _reactions(config: ExperimentConfig) -> Payload:
    """What the guards may do to the weights. Nothing where they only look on, or end a stage: those leave no output."""
    train = config.train
    found: Payload = {}
    guards = train.guards
    usual = {"on_nonfinite": GuardAction.skip}
    policies = {key: getattr(guards, key) for key in ("on_nonfinite", "on_spike", "on_divergence")}
    acting = {
        key: action.value
        for key, action in policies.items()
        if action not in (usual.get(key), GuardAction.warn, GuardAction.stop)
    }
    if acting:
        found["guards"] = dict(acting)
        if "on_spike" in acting:
            found["guards"] |= {key: getattr(guards, key) for key in ("window", "threshold", "patience")}
        if "on_divergence" in acting:
            found["guards"] |= {
                "window": guards.window,
                "divergence": [guards.divergence_factor, guards.divergence_patience],
            }
        if GuardAction.lower_lr.value in acting.values():
            found["guards"]["lr_factor"] = guards.lr_factor
    if train.auto_micro_batch:
        found["auto_micro_batch"] = True
    return found


def _length_of_training(section: Payload) -> Payload:
    """Steps override epochs: where steps are given, epochs change nothing."""
    if section["max_steps"] is not None:
        section = {key: value for key, value in section.items() if key != "epochs"}
    return section
