"""Puts together what a stage trains with: model, adapter, data, optimizer, engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mgm_exp.config import (
    AdapterKind,
    CheckpointConfig,
    Compile,
    ExperimentConfig,
    LoraKernel,
    ModelFamily,
    Precision,
    adapter_key,
    last_block_of,
    lora_kernel_of,
    loss_kernel_of,
    plain,
)
from mgm_exp.errors import DataError
from mgm_exp.store import file_sha256
from mgm_exp.train.agreement import batch_fingerprint
from mgm_exp.train.job import StageSettings, TrainJob, derived_seed, stage_settings
from mgm_exp.train.ranks import Ranks
from mgm_exp.train.step import CountedBatch

if TYPE_CHECKING:
    from torch import nn

    from mgm_exp.data import BatchPlan, ImageTextDataset
    from mgm_exp.data.kept_rows import Rows
    from mgm_exp.data.whole_inputs import WholeInputsDataset
    from mgm_exp.model import TrainableSet
    from mgm_exp.model.adapters.adalora import RankSharing
    from mgm_exp.model.execution import Execution
    from mgm_exp.train.engine import Engine

    Dataset = ImageTextDataset | WholeInputsDataset


# Key of a batch that a model's own processor collated: how many of its rows have an image.
IMAGE_COUNT = "image_count"


@dataclass(frozen=True)
class Stage:
    """A stage that is ready to run.

    Args:
        module: What the engine was given; its forward is the loss.
        model: The model inside.
        belongs_to: What a checkpoint must share with this stage to be continued.
    """

    config: ExperimentConfig
    settings: StageSettings
    model: Any
    module: nn.Module
    engine: Engine
    trainable: TrainableSet
    dataset: Dataset
    plan: BatchPlan
    processor: Any
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
        from mgm_exp.data.processor import InputsProcessor

        whole = self.processor if isinstance(self.processor, InputsProcessor) else None
        loader = StepLoader(
            self.dataset,
            self.plan,
            step + batches_skipped,
            self.config.train.workers,
            self.processor.pad_token_id,
            pin_memory=self.engine.ranks.device.type == "cuda",
            stop_step=self.n_steps + batches_skipped,
            collate_with=whole.collate if whole else None,
        )
        for micro_batches in loader:
            yield [self._counted(batch) for batch in micro_batches]

    def _counted(self, batch: dict[str, Any]) -> CountedBatch:
        if IMAGE_COUNT in batch:
            return count_whole(batch)
        return count(batch, self.processor.n_visual_tokens, self.settings.max_length)


def count_whole(batch: dict[str, Any]) -> CountedBatch:
    """Counts a micro-batch whose image tokens are in place already, and which is cut."""
    from mgm_exp.data.processor import IGNORE_INDEX

    supervised = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    tokens = int(batch["attention_mask"].sum())
    return CountedBatch(batch, supervised, tokens, len(batch["ids"]), batch[IMAGE_COUNT])


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


def assemble(
    job: TrainJob,
    ranks: Ranks,
    say: Callable[[str], None],
    on_progress: Callable[[str, int, int], None] | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
    *,
    build: Callable[..., tuple[Any, dict[str, Any]]] | None = None,
) -> Stage:
    """Everything a stage needs, on this process.

    Args:
        say: Takes a sentence for the reader.
        on_progress: Called with (what, images done, images in all) while features are made.
        is_stopped: Asked while features are made.
        build: Makes the base; None: :func:`build_base`.

    Raises:
        UserError: The model or the data cannot be used.
        Interrupted: A stop was requested.
    """
    from mgm_exp.data import ImageTextDataset
    from mgm_exp.model import family_of
    from mgm_exp.model.execution import run_as
    from mgm_exp.train.contract import assert_same_start
    from mgm_exp.train.feature_pass import use_caches

    config = job.experiment()
    settings = stage_settings(config, job.stage)
    family = family_of(config.model)
    model, load_report = (build or build_base)(config, settings, ranks)
    ranks.marks.works()
    trainable = make_trainable(model, job.stage, config, settings)
    put_connector(model, job, config)  # after trained tensors became fp32: an aligned connector keeps every bit
    say(_in_words(job.stage, trainable))
    processor = family.processor(config.model, settings.max_length, job.stage)
    dataset = open_dataset(job, config, settings, processor)
    _refuse_mixed_rows(dataset, settings, config)
    plan = open_plan(dataset, settings, ranks)
    ranks.marks.works()
    if isinstance(dataset, ImageTextDataset):
        use_caches(dataset, plan, job, settings, model, ranks, say, on_progress, is_stopped)
    module = family.loss_module(model)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    execution = execution_of(config, job.stage, ranks)
    run_as(model, execution)
    if words := execution.in_words():
        load_report = {**load_report, "execution": words}
        say(f"{job.stage}: {words}")
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
            **({"train_connector": True} if config.model.train_connector else {}),
            "engine": engine.describe()["name"],
            "records": file_sha256(job.records),
            "n_steps": plan.n_steps,
        },
    )


def build_base(config: ExperimentConfig, settings: StageSettings, ranks: Ranks) -> tuple[Any, dict[str, Any]]:
    """The model as it lies on disk, in the precision of training, and where its tensors came from."""
    from mgm_exp.model import family_of
    from mgm_exp.train.engine import COMPUTE_DTYPE

    family = family_of(config.model)
    model, report = family.build(
        config.model,
        device=ranks.device,
        dtype=COMPUTE_DTYPE[settings.precision],
        seed=derived_seed(config.seed, "new weights"),
    )
    family.set_max_length(model, settings.max_length)
    return model, report


def execution_of(config: ExperimentConfig, stage: str, ranks: Ranks) -> Execution:
    """How the configuration asks for the model to be run in a stage, on this process's device."""
    from mgm_exp.model.execution import Execution, has_liger

    train = config.train
    return Execution(
        loss_kernel=loss_kernel_of(config, stage, has_liger(ranks.device.type)),
        loss_chunk=train.loss_chunk,
        lora_kernel=lora_kernel_of(config, stage) or LoraKernel.peft.value,
        last_block=last_block_of(config, stage),
        block_kernel=train.block_kernel.value,
        padding_free=train.padding_free,
        compiles=train.compile is not Compile.none,
        offloads=train.offload_activations,
    )


def put_connector(model: Any, job: TrainJob, config: ExperimentConfig) -> None:
    """The connector that this stage starts from: the aligned one, new weights, or the checkpoint's own."""
    from mgm_exp.model import family_of

    seed = derived_seed(config.seed, "new weights")
    family_of(config.model).start_from(model, job.stage, job.connector, config, seed)


def make_trainable(model: Any, stage: str, config: ExperimentConfig, settings: StageSettings) -> TrainableSet:
    """Puts the adapter on, declares what is trained and switches to training mode."""
    from mgm_exp.model import family_of
    from mgm_exp.model.resident import own

    trainable = family_of(config.model).make_trainable(model, stage, config, derived_seed(config.seed, "adapter"))
    own(parameter for parameter in model.parameters() if parameter.requires_grad)
    if settings.zero_stage == 0 and settings.precision is not Precision.fp32:
        # Plain PyTorch trains in fp32 and computes under autocast; DeepSpeed keeps fp32 masters of its own
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainable


def shared_ranks(model: Any, stage: str, config: ExperimentConfig, n_steps: int) -> RankSharing | None:
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


def open_dataset(job: TrainJob, config: ExperimentConfig, settings: StageSettings, processor: Any) -> Dataset:
    """The stage's curated rows with their images, or with cached visual tokens."""
    from mgm_exp.data import ImageTextDataset, VisualTokens, read_records
    from mgm_exp.data.processor import InputsProcessor
    from mgm_exp.data.whole_inputs import WholeInputsDataset

    records = read_records(job.records)
    if not len(records):
        raise DataError(
            f"{job.records} holds no usable row for the {job.stage} stage.",
            advice="See the curation report for what was rejected and why.",
        )
    if isinstance(processor, InputsProcessor):
        return WholeInputsDataset(records, job.image_root, processor, config.data.max_megapixels)
    return ImageTextDataset(
        records,
        job.image_root,
        processor,
        aspect=settings.image_aspect,
        max_megapixels=config.data.max_megapixels,
        visual_tokens=VisualTokens(job.visual_tokens) if job.visual_tokens else None,
        tokens=_kept_rows(job, processor),
    )


def _kept_rows(job: TrainJob, processor: Any) -> Rows | None:
    """Where a worker keeps the stage's tokenised rows for its later trials."""
    from mgm_exp.data import kept_rows

    if not kept_rows.keeps() or (text := processor.text_key()) is None:
        return None
    return kept_rows.rows_of((file_sha256(job.records), text))


def _refuse_mixed_rows(dataset: Dataset, settings: StageSettings, config: ExperimentConfig) -> None:
    """Sharded parameters are gathered by all processes together: all must run the vision tower, or none.

    Raises:
        DataError: some rows have an image and some have none, which MGM evens out and other models do not.
    """
    if config.model.family is not ModelFamily.hf or settings.zero_stage < 3 or settings.world_size == 1:
        return
    if dataset.has_image.any() and not dataset.has_image.all():
        raise DataError(
            f"zero=3 with model=hf needs rows of one kind: {int(dataset.has_image.sum())} of {len(dataset)} have an "
            "image, and processes whose batch has none would wait for ever for those whose batch has.",
            advice="Use zero=2, or leave the rows without an image out.",
        )


def open_plan(dataset: Dataset, settings: StageSettings, ranks: Ranks) -> BatchPlan:
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
