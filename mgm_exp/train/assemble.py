"""Puts together what a stage trains with: model, adapter, data, optimizer, engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mgm_exp.config import AdapterKind, CheckpointConfig, ExperimentConfig, Precision, adapter_key, plain
from mgm_exp.errors import DataError
from mgm_exp.store import file_sha256
from mgm_exp.train.agreement import batch_fingerprint
from mgm_exp.train.job import StageSettings, TrainJob, derived_seed, stage_settings
from mgm_exp.train.ranks import Ranks
from mgm_exp.train.step import CountedBatch

if TYPE_CHECKING:
    from torch import nn

    from mgm_exp.data import BatchPlan, ImageTextDataset
    from mgm_exp.model import MGMForConditionalGeneration, MGMProcessor, TrainableSet
    from mgm_exp.model.adapters.adalora import RankSharing
    from mgm_exp.train.engine import Engine


@dataclass(frozen=True)
class Stage:
    """A stage that is ready to run.

    Args:
        module: What the engine was given; its forward is the loss.
        model: The MGM inside.
        belongs_to: What a checkpoint must share with this stage to be continued.
    """

    config: ExperimentConfig
    settings: StageSettings
    model: MGMForConditionalGeneration
    module: nn.Module
    engine: Engine
    trainable: TrainableSet
    dataset: ImageTextDataset
    plan: BatchPlan
    processor: MGMProcessor
    load_report: dict[str, Any]
    n_parameters: int
    belongs_to: dict[str, Any]

    @property
    def n_steps(self) -> int:
        return self.plan.n_steps

    @property
    def n_train(self) -> int:
        return len(self.dataset)

    def fingerprint_of(self, step: int) -> int:
        """Says which samples of which rows step ``step`` holds, over all processes."""
        return batch_fingerprint(self.plan.global_batch(step), self.belongs_to["records"])

    def batch_name(self, step: int) -> str:
        """Thirteen hexadecimal digits that name the sample numbers of step ``step`` in their order: equal names, equal
        batches, whatever the rows say."""
        return f"{batch_fingerprint(self.plan.global_batch(step), 'samples'):013x}"

    def ids_of(self, step: int) -> list[str]:
        """Ids of the samples of step ``step``, over all processes."""
        return [self.dataset.records[i].id for i in self.plan.global_batch(step)]

    @property
    def checkpointing(self) -> CheckpointConfig:
        return self.config.train.checkpoint

    def steps_from(self, step: int, batches_skipped: int = 0) -> Iterator[list[CountedBatch]]:
        """This process's counted micro-batches of each optimizer step, from ``step`` on.

        Args:
            batches_skipped: How many batches of the plan were left out: the data is so many ahead of the step.
        """
        from mgm_exp.data import StepLoader

        loader = StepLoader(
            self.dataset,
            self.plan,
            step + batches_skipped,
            self.config.train.workers,
            self.processor.pad_token_id,
            pin_memory=self.engine.ranks.device.type == "cuda",
            stop_step=self.n_steps + batches_skipped,
        )
        for micro_batches in loader:
            yield [self._counted(batch) for batch in micro_batches]

    def _counted(self, batch: dict[str, Any]) -> CountedBatch:
        return count(batch, self.processor.n_visual_tokens, self.settings.max_length)


def count(batch: dict[str, Any], n_visual: int, max_length: int) -> CountedBatch:
    """Counts what a collated micro-batch holds, as the model will merge and cut it."""
    from mgm_exp.data import IMAGE_TOKEN_INDEX, supervised_tokens
    from mgm_exp.data.processor import merged_length

    supervised = tokens = images = 0
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        kept, learnt = ids[mask].tolist(), labels[mask].tolist()
        supervised += supervised_tokens(kept, learnt, n_visual, max_length)
        tokens += min(merged_length(kept, n_visual), max_length)
        images += kept.count(IMAGE_TOKEN_INDEX)
    return CountedBatch(batch, supervised, tokens, len(batch["input_ids"]), images)


def assemble(job: TrainJob, ranks: Ranks, say: Callable[[str], None]) -> Stage:
    """Everything a stage needs, on this process.

    Raises:
        UserError: The model or the data cannot be used.
    """
    from mgm_exp.model import LossModule
    from mgm_exp.model.folders import source_of_section
    from mgm_exp.model.processor import processor_of
    from mgm_exp.train.contract import assert_same_start

    config = job.experiment()
    settings = stage_settings(config, job.stage)
    model, load_report = build_base(config, settings, ranks)
    ranks.marks.works()
    trainable = make_trainable(model, job.stage, config, settings)
    put_connector(model, job, config)  # after trained tensors became fp32: an aligned connector keeps every bit
    say(_in_words(job.stage, trainable))
    processor = processor_of(source_of_section(vars(config.model)), settings.max_length, job.stage)
    dataset = open_dataset(job, config, settings, processor)
    plan = open_plan(dataset, settings, ranks)
    ranks.marks.works()
    module = LossModule(model)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    around = shared_ranks(model, job.stage, config, plan.n_steps)
    engine = make_engine(module, trainable, config, settings, ranks, around)
    ranks.marks.works()
    if ranks.world_size > 1 and not settings.zero_stage:
        assert_same_start(engine, ranks)
    return Stage(
        config=config,
        settings=settings,
        model=model,
        module=module,
        engine=engine,
        trainable=trainable,
        dataset=dataset,
        plan=plan,
        processor=processor,
        load_report=load_report,
        n_parameters=n_parameters,
        belongs_to={
            **{key: plain(value) for key, value in vars(settings).items()},
            "adapter": adapter_key(config.adapter) if job.stage == "instruct" else None,
            "towers": sorted(trainable.towers),
            "freeze_connector": job.stage == "instruct" and config.train.freeze_connector,
            "engine": engine.describe()["name"],
            "records": file_sha256(job.records),
            "n_steps": plan.n_steps,
        },
    )


def build_base(
    config: ExperimentConfig, settings: StageSettings, ranks: Ranks
) -> tuple[MGMForConditionalGeneration, dict[str, Any]]:
    """The model as it lies on disk, in the precision of training, and where its tensors came from."""
    from mgm_exp.model import build_model
    from mgm_exp.train.engine import COMPUTE_DTYPE

    model, report = build_model(
        config.model,
        device=ranks.device,
        dtype=COMPUTE_DTYPE[settings.precision],
        seed=derived_seed(config.seed, "new weights"),
    )
    model.config.tokenizer_model_max_length = settings.max_length
    return model, json.loads(json.dumps(report.to_dict()))  # tuples as lists, as they come back from a file


def put_connector(model: MGMForConditionalGeneration, job: TrainJob, config: ExperimentConfig) -> None:
    """The connector that this stage starts from: the aligned one, new weights, or the checkpoint's own."""
    from mgm_exp.model import load_connector, reset_connector

    if job.connector is not None:
        load_connector(model, job.connector)
    if job.stage == "align":
        reset_connector(model, config.train.align.reset.value, derived_seed(config.seed, "new weights"))


def make_trainable(
    model: MGMForConditionalGeneration, stage: str, config: ExperimentConfig, settings: StageSettings
) -> TrainableSet:
    """Puts the adapter on, declares what is trained and switches to training mode."""
    from mgm_exp.model import apply_adapter, set_trainable

    if stage == "instruct":
        apply_adapter(model, config.adapter, derived_seed(config.seed, "adapter"))
    trainable = set_trainable(
        model,
        stage,
        config.adapter,
        config.train.freeze_connector,
        vision_tower=config.train.optimize_vision_tower,
        vision_tower_aux=config.train.optimize_vision_tower_aux,
    )
    model.train()
    if settings.zero_stage == 0 and settings.precision is not Precision.fp32:
        # Plain PyTorch trains in fp32 and computes under autocast; DeepSpeed keeps fp32 masters of its own
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainable


def shared_ranks(
    model: MGMForConditionalGeneration, stage: str, config: ExperimentConfig, n_steps: int
) -> RankSharing | None:
    """What AdaLoRA does around every update; None for every other kind."""
    if stage != "instruct" or config.adapter.kind is not AdapterKind.adalora:
        return None
    from mgm_exp.model.adapters.adalora import RankSharing

    return RankSharing(model, config.adapter.adalora, n_steps)


def make_engine(
    module: nn.Module,
    trainable: TrainableSet,
    config: ExperimentConfig,
    settings: StageSettings,
    ranks: Ranks,
    around: RankSharing | None = None,
) -> Engine:
    """The engine that the configuration asks for, around the loss."""
    from mgm_exp.model import official_name
    from mgm_exp.train.optimizer import build_optimizer, parameter_groups

    named = {official_name(name): p for name, p in module.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
    groups = parameter_groups(
        named, trainable.connector_names, settings, towers=trainable.towers, rates=trainable.rates
    )
    if settings.zero_stage:
        from mgm_exp.train.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(module, named, groups, settings, config.zero, ranks)
    from mgm_exp.train.engine import PlainEngine

    return PlainEngine(module, named, build_optimizer(groups, settings), settings, ranks, around_updates=around)


def open_dataset(
    job: TrainJob, config: ExperimentConfig, settings: StageSettings, processor: MGMProcessor
) -> ImageTextDataset:
    """The stage's curated rows with their images, or with cached visual tokens."""
    from mgm_exp.data import ImageTextDataset, VisualTokens, read_records

    records = read_records(job.records)
    if not len(records):
        raise DataError(
            f"{job.records} holds no usable row for the {job.stage} stage.",
            advice="See the curation report for what was rejected and why.",
        )
    return ImageTextDataset(
        records,
        job.image_root,
        processor,
        aspect=settings.image_aspect,
        max_megapixels=config.data.max_megapixels,
        visual_tokens=VisualTokens(job.visual_tokens) if job.visual_tokens else None,
    )


def open_plan(dataset: ImageTextDataset, settings: StageSettings, ranks: Ranks) -> BatchPlan:
    """Which samples go into which step, on this process."""
    from mgm_exp.data import BatchPlan

    return BatchPlan(
        dataset.lengths.tolist(),
        dataset.has_image.tolist(),
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        world_size=ranks.world_size,
        rank=ranks.rank,
        seed=derived_seed(settings.seed, "data order"),
        group_by=settings.group_by,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
    )


def _in_words(stage: str, trainable: TrainableSet) -> str:
    counts = trainable.counts()
    return (
        f"{stage}: trains {counts['n_total']:,} parameters in {len(trainable.names)} tensors "
        f"(adapter {counts['n_lora']:,}, others {counts['n_other']:,}): {', '.join(trainable.patterns)}"
    )
