"""The groups ``train`` and ``zero``: how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from mgm_exp.config.choices import (
    Aspect,
    BlockKernel,
    Compile,
    CudaGraphs,
    FeatureTier,
    GroupBy,
    GuardAction,
    LastBlock,
    LoraKernel,
    LossKernel,
    LossNorm,
    Offload,
    Precision,
    Reset,
)


@dataclass
class ZeroConfig:
    """How training state is sharded. Stages 2 and 3 run DeepSpeed; none runs plain PyTorch."""

    # 0: none, 2: optimizer state and gradients sharded, 3: parameters too (less memory, more communication).
    stage: int = 0
    # cpu: optimizer state in host memory; saves about 12 bytes a trained parameter on the GPU, costs time.
    offload_optimizer: Offload = Offload.none
    # Elements that are reduced together: larger is faster, and costs 2-4 bytes each of GPU memory.
    reduce_bucket_size: int = 50_000_000
    overlap_comm: bool = True
    # zero=3: elements of later layers that are fetched ahead; more hides more communication and costs 2 bytes each.
    # null: as many as are reduced together.
    prefetch_bucket_size: int | None = None
    # zero=3: tensors of fewer elements stay whole on every process: more saves small messages and costs memory.
    persistence_threshold: int = 20_480
    # zero=3: elements that may be whole on a process at a time; fewer costs time, more memory.
    max_live_parameters: int = 1_000_000_000


@dataclass
class CheckpointConfig:
    """When the state of a running stage is saved."""

    # Optimizer steps between two checkpoints. null: by time only.
    every_steps: int | None = None
    # Minutes between two checkpoints. null: by steps only.
    every_minutes: float | None = 120.0
    # Newest checkpoints that are kept while a stage runs.
    keep: int = 5
    # Checkpoints with the best validation scores that are kept besides; each takes the space of one. 0: none.
    keep_best: int = 1
    # Training goes on while a checkpoint is written, from a copy in host memory. false: it waits, and needs no copy.
    background: bool = True
    # Folder of a run of the same settings but for devices, zero or micro-batch sizes, whose unfinished stage is gone on
    # from: equal to it up to rounding, so the stage has a key of its own. null: a stage begins at its beginning.
    continue_from: str | None = None


@dataclass
class ValidationConfig:
    """Scores of the model in the middle of the instruct stage, on held-out questions. Nothing is learnt from them."""

    # Optimizer steps between two validation points; the last step is left to the evaluation. null: none.
    every_steps: int | None = None
    # Questions at each point, the first ones of the validation split: more tell more surely and cost more time.
    questions: int = 64
    # Share of the validation split, in place of a number of questions.
    share: float | None = None
    # Whose questions. null: the first of eval.benchmarks. The demo has a split of its own for this.
    benchmark: str | None = None


@dataclass
class EarlyStoppingConfig:
    """Ends the instruct stage when its validation score has stopped rising."""

    # Validation points without a better score before the stage ends with the weights it has. null: never.
    patience: int | None = None
    # What counts as better: at least so much above the best score.
    min_delta: float = 0.0


@dataclass
class GuardsConfig:
    """What is watched while a stage trains, and what is done about trouble. Both stages."""

    # A loss or gradient with NaN or infinity. It is never applied; skip, rollback, lower_lr or stop say what else.
    on_nonfinite: GuardAction = GuardAction.skip
    # A loss or gradient norm far above those of the last steps.
    on_spike: GuardAction = GuardAction.warn
    # A loss far above its best for long: warn, rollback, lower_lr or stop.
    on_divergence: GuardAction = GuardAction.warn
    # Steps that a step is compared with: longer is surer and slower to get used to a new level.
    window: int = 64
    # Robust standard deviations above the median that make a spike: lower finds more, and more that are none.
    threshold: float = 8.0
    # Spikes in a row before the policy acts; until then they are named only.
    patience: int = 1
    # A loss is far above its best from this multiple on.
    divergence_factor: float = 3.0
    # Steps in a row for which it is.
    divergence_patience: int = 50
    # Steps without a lower loss that are named as a plateau. null: never.
    plateau_patience: int | None = None
    # What counts as lower, in nats.
    plateau_min_delta: float = 0.01
    # lower_lr multiplies the learning rates by this.
    lr_factor: float = 0.5
    # Skipped steps, rollbacks and lowered rates in one stage, together; one more ends it.
    max_actions: int = 20
    # Updates after which visual tokens must differ, the connector have a gradient and LoRA's B not be zero. null: off.
    dead_after: int | None = 20


@dataclass
class AlignConfig:
    """Stage 1: projector and patch info mining are trained on captions; towers and LLM are frozen."""

    lr: float = 1e-3
    epochs: float = 1.0
    # Optimizer steps; overrides epochs. 0 skips the stage.
    max_steps: int | None = None
    global_batch_size: int = 256
    micro_batch_size: int = 8
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_length: int = 2048
    image_aspect: Aspect = Aspect.square
    group_by: GroupBy = GroupBy.none
    # none: go on from the checkpoint's connector where it has one. Official stage 1 begins with new weights.
    reset: Reset = Reset.none


@dataclass
class DefaultLrConfig:
    """Learning rate of the instruct stage where train.lr is not given."""

    full: float = 2e-5
    lora: float = 2e-4
    adalora: float = 5e-4
    loha: float = 2e-4
    vera: float = 4e-3
    prompt: float = 3e-2
    prefix: float = 1e-2
    bottleneck: float = 1e-4
    bitfit: float = 1e-3


@dataclass
class TrainConfig:
    """Stage 2 (instruct): the adapter or the full LLM. ``train.align`` holds what stage 1 does differently."""

    name: str = MISSING
    align: AlignConfig = field(default_factory=AlignConfig)
    default_lr: DefaultLrConfig = field(default_factory=DefaultLrConfig)
    lr: float = MISSING
    # Learning rate of projector and mining in the instruct stage.
    projector_lr: float = MISSING
    epochs: float = 1.0
    # Optimizer steps; overrides epochs.
    max_steps: int | None = None
    # Samples in one optimizer step, over all processes: accumulation = global / (micro x devices).
    global_batch_size: int = 128
    # Samples in one forward pass of one process: more is faster until memory ends.
    micro_batch_size: int = 8
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    # Largest gradient norm; larger ones are scaled down. 0 switches clipping off.
    max_grad_norm: float = 1.0
    # Tokens of a merged sequence, image tokens included; longer ones are cut.
    max_length: int = 2048
    precision: Precision = Precision.bf16
    image_aspect: Aspect = Aspect.pad
    group_by: GroupBy = GroupBy.modality_length
    loss_norm: LossNorm = LossNorm.tokens
    # Keeps projector and mining as the align stage left them (official: they are trained in both stages).
    freeze_connector: bool = False
    # Trains the later half of CLIP's layers that are run (the official switch); with any adapter, costs memory.
    optimize_vision_tower: bool = False
    # Trains the last block of each ConvNeXt stage (the official switch); costs much more memory.
    optimize_vision_tower_aux: bool = False
    # Learning rate of what is trained of the towers.
    vision_tower_lr: float = 2e-5
    # With a frozen connector: encode every image once and read the tokens from disk afterwards.
    cache_visual_tokens: bool = False
    # What frozen towers see of an image, kept in the store for every stage, trial and evaluation: the same bits as
    # without. clip costs least disk, towers saves most while the connector trains, tokens needs a frozen connector.
    feature_cache: FeatureTier = FeatureTier.none
    # Gigabytes of disk for it, over all models; images beyond are computed in every step. null: as the disk allows.
    feature_cache_gb: float | None = None
    # Gigabytes of disk for images that are decoded and resized once (8 bits), where towers still run. 0: none.
    resized_cache_gb: float = 0.0
    # Processes that decode images beside the training process. 0: in the training process.
    workers: int = 0
    # Only kernels that give the same bits every time. On a GPU it makes runs repeatable (mgm-exp replay) and slower; on
    # the CPU they are anyway, with the same number of threads.
    deterministic: bool = False
    # How the loss over the vocabulary is computed; see LossKernel. Results differ in rounding.
    loss_kernel: LossKernel = LossKernel.torch
    # Learnt positions whose logits are alive together: fewer need less memory, more are faster. null: 2^27 logits.
    loss_chunk: int | None = None
    # How layers with a LoRA update are computed while they train; see LoraKernel. Results differ in rounding.
    lora_kernel: LoraKernel = LoraKernel.auto
    # Where the LLM's last block is computed while it trains; see LastBlock. Results differ in rounding.
    last_block: LastBlock = LastBlock.auto
    # CPU in fp32: how norms and gates of the LLM's blocks are computed in training; see BlockKernel. Rounding differs.
    block_kernel: BlockKernel = BlockKernel.torch
    # A batch as one row without padding: nothing is computed for padding. Rounding differs; with
    # lora_kernel=peft dropout draws others.
    padding_free: bool = False
    # Compiles the LLM's blocks: faster steps after a minute of compilation. Rounding differs.
    compile: Compile = Compile.none
    # GPU: passes of a pack of trials (hydra/launcher=packed) that are small are launched in one call: faster where
    # launching takes longer than computing, costs memory for their results and longer padding. Rounding differs.
    cuda_graphs: CudaGraphs = CudaGraphs.none
    # GPU: fp32 matrix products and convolutions take TF32 inputs (10 bits of mantissa): several times faster. false:
    # full fp32. Half-precision products do not change.
    tf32: bool = False
    # GPU: activations of the LLM wait for the backward pass in host memory: less GPU memory, more traffic. Bit-equal.
    offload_activations: bool = False
    # When memory ends: half the micro-batch and twice the accumulation, from the last step on. Same global batch.
    auto_micro_batch: bool = False
    # Optimizer steps between two records of each layer's gradient (event rows): costs a pass over it. null: none.
    gradient_statistics_every: int | None = None
    # Steps that are recorded with PyTorch's profiler after the first ones: a trace, and where the time went in words.
    # true: 2. They take some times longer, and megabytes. The same bits. A stage that is reused has none.
    profile: Any = False  # true, false or 1 to 50: OmegaConf cannot merge such a union
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)


def trains_towers(train: TrainConfig) -> bool:
    """Whether the instruct stage trains part of a vision tower."""
    return train.optimize_vision_tower or train.optimize_vision_tower_aux
