"""What a key of the configuration may be chosen from."""

from __future__ import annotations

from enum import Enum


class Attention(Enum):
    """``auto`` takes FlashAttention where it can run (3 on Hopper, else 2), else sdpa; the choice is recorded."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"
    flash_attention_3 = "flash_attention_3"


class Mining(Enum):
    """``native``: from the tower's stages as they are. ``reference``: the official form, on the joined map. Equal in
    real arithmetic."""

    native = "native"
    reference = "reference"


class LossKernel(Enum):
    """How the loss over a wide vocabulary is computed; equal in real arithmetic.

    ``torch`` makes a chunk's logits twice; ``fused`` makes the gradient with the loss; ``liger`` does so in Liger's
    Triton kernel (GPU). ``auto``: liger where it can run, else fused for a frozen head and torch for a trained one.
    """

    torch = "torch"
    fused = "fused"
    liger = "liger"
    auto = "auto"


class LoraKernel(Enum):
    """How a linear layer with a LoRA update is computed while it trains; equal in real arithmetic.

    ``peft``: as PEFT's layer does; ``fused``: the update is scaled and added inside of the layer's matrix products.
    ``auto``: fused, but peft where weights come and go (zero=3), are compiled, or have 4 bits, and for DoRA.
    """

    peft = "peft"
    fused = "fused"
    auto = "auto"


class LastBlock(Enum):
    """Where what follows the attention of the LLM's last block is computed while it trains; equal in real arithmetic.

    ``whole``: at all positions; ``learnt``: where the loss reads it. ``auto``: learnt, but whole for models of
    transformers, kinds of adapters other than full and lora, compiled blocks, and where it would draw other dropout.
    """

    whole = "whole"
    learnt = "learnt"
    auto = "auto"


class BlockKernel(Enum):
    """How norms and gated MLPs of the LLM's blocks are computed while they train; equal in real arithmetic.

    ``torch``: as transformers and torch do; ``fused``: each as one operation, on a CPU in fp32, for Gemma.
    """

    torch = "torch"
    fused = "fused"


class Compile(Enum):
    """What ``torch.compile`` compiles: ``regional``: the LLM's blocks, once for all of them."""

    none = "none"
    regional = "regional"


class CudaGraphs(Enum):
    """What CUDA graphs replay: ``packs``: small passes of trials that train together (``hydra/launcher=packed``)."""

    none = "none"
    packs = "packs"


class FeatureTier(Enum):
    """How much of what frozen towers see is kept: CLIP's features, those of both towers, or the projected tokens.
    ``auto``: the most that is frozen and fits."""

    none = "none"
    clip = "clip"
    towers = "towers"
    tokens = "tokens"
    auto = "auto"


class ModelFamily(Enum):
    """``mgm``: Mini-Gemini, in two stages. ``hf``: an image-text-to-text model of transformers, instruct stage only."""

    mgm = "mgm"
    hf = "hf"


class AdapterKind(Enum):
    """What of the language model is trained in the instruct stage."""

    full = "full"
    lora = "lora"
    adalora = "adalora"
    loha = "loha"
    vera = "vera"
    prompt = "prompt"
    prefix = "prefix"
    bottleneck = "bottleneck"
    bitfit = "bitfit"


class AdapterInit(Enum):
    """What a LoRA adapter starts from: ``zero`` changes nothing yet, ``pissa`` holds the weights' principal part."""

    zero = "zero"
    pissa = "pissa"


class Precision(Enum):
    """Arithmetic of training. bf16 needs no loss scaling; fp16 uses dynamic loss scaling; fp32 is the CPU default."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Device(Enum):
    """``auto`` takes a GPU where one is there, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Offload(Enum):
    """Where DeepSpeed keeps the optimizer state."""

    none = "none"
    cpu = "cpu"


class GroupBy(Enum):
    """How samples are put together. ``modality_length`` is official: a global batch has samples with images or without,
    and is split into micro-batches by length; ``length`` only splits. ``like_length`` draws global batches of samples
    of like length, which pads least.
    """

    none = "none"
    length = "length"
    like_length = "like_length"
    modality_length = "modality_length"


class LossNorm(Enum):
    """``tokens``: sum over supervised tokens of the global batch / their number, whatever the split.

    ``official``: the mean of the micro-batches' means, as the original code computes it.
    """

    tokens = "tokens"
    official = "official"


class GuardAction(Enum):
    """What is done when training is in trouble; what was done is counted, bounded and recorded.

    ``warn`` names the batch and goes on; ``skip`` does not apply the step; ``rollback`` returns to the last good
    checkpoint and leaves out the batches since; ``lower_lr`` multiplies the schedule; ``stop`` ends the stage.
    """

    warn = "warn"
    skip = "skip"
    rollback = "rollback"
    lower_lr = "lower_lr"
    stop = "stop"


class BadRows(Enum):
    """``skip`` counts and names unusable rows and goes on without them; ``fail`` stops at the first one."""

    skip = "skip"
    fail = "fail"


class Aspect(Enum):
    """``pad`` puts the image on a square canvas; ``square`` resizes the shortest edge and crops the centre."""

    pad = "pad"
    square = "square"


class Reset(Enum):
    """Which part of the connector starts from new weights in the align stage."""

    none = "none"
    projector = "projector"
    connector = "connector"


class CaptionEngine(Enum):
    """Whose captioning loop runs."""

    mgm_exp = "mgm_exp"
    data_juicer = "data_juicer"


class CaptionPolicy(Enum):
    """What becomes of the raw caption; it is always kept beside the new one."""

    replace = "replace"
    keep_if_better = "keep_if_better"
    mix = "mix"


class CaptionPrecision(Enum):
    """Arithmetic of the captioner."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"


class RecipeEngine(Enum):
    """Who computes the values that a recipe filters by."""

    data_juicer = "data_juicer"
    builtin = "builtin"


class RecipeExecutor(Enum):
    """How Data-Juicer runs."""

    default = "default"
    ray = "ray"


class TrackerMode(Enum):
    """``auto``: online where a W&B key is in the environment, else offline; ``disabled``: files only."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Machines(Enum):
    """``auto``: those of the hostfile, of the Slurm or Volcano job, else this one. ``here``: this machine alone."""

    auto = "auto"
    here = "here"


class Direction(Enum):
    """Which end of the objective is better."""

    maximize = "maximize"
    minimize = "minimize"


class Rerun(Enum):
    """Which finished trials of a sweep are run again when the same command is given once more."""

    none = "none"
    failed = "failed"
    all = "all"


class SamplerName(Enum):
    """Who proposes the next trial of a search.

    ``tpe`` suits most; ``gp`` few expensive trials of numbers; ``cmaes`` many trials of numbers; ``nsga2`` several
    objectives; ``qmc`` and ``random`` cover the space without learning; ``grid`` takes every point once.
    """

    tpe = "tpe"
    gp = "gp"
    cmaes = "cmaes"
    nsga2 = "nsga2"
    qmc = "qmc"
    random = "random"
    grid = "grid"


class Card(Enum):
    """Which card a plan is for; ``auto``: this machine's GPU, or its memory where it has none."""

    auto = "auto"
    rtx3090 = "rtx3090"
    rtx4090 = "rtx4090"
    a10 = "a10"
    a100_40 = "a100_40"
    a100_80 = "a100_80"
    h100 = "h100"
    h200 = "h200"
    l40s = "l40s"


class PrunerName(Enum):
    """Who stops hopeless trials at their validation points.

    ``rungs`` stops none for good: all pause at a rung with their state kept, and the best go on. ``asha`` keeps the
    best share of each rung, ``hyperband`` does so for several rungs' beginnings, ``median`` stops what is worse than
    half of the trials at the same step, ``patient`` does so only after a while without progress, ``wilcoxon`` compares
    the seeds of a trial with those of the best one (sweep.seeds).
    """

    none = "none"
    asha = "asha"
    rungs = "rungs"
    hyperband = "hyperband"
    median = "median"
    patient = "patient"
    wilcoxon = "wilcoxon"
