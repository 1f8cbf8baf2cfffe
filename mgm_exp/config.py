"""The typed schema behind ``conf/``: one dataclass for each group, every key with its unit, range and trade-off.

Hydra composes YAML on top of these classes, so a misspelt key or a value of the wrong type fails at compose time.
What types cannot say (ranges, combinations) is checked by :func:`validate`, which names every fault at once.
Nothing here imports torch: composing a config must not pay for it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from mgm_exp.errors import ConfigError

# ${mgm_times:2,${.rank}}: a product. ${mgm_choose:${train.default_lr},${adapter.kind}}: the value that a choice names.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # OmegaConf 2.4 renames the function to one that means something else in 2.3
    OmegaConf.register_new_resolver("mgm_times", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("mgm_choose", lambda values, choice: values[choice.value], replace=True)


class Attention(Enum):
    """``auto`` takes flash_attention_2 where it can run, else sdpa; the choice is recorded."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"


class AdapterKind(Enum):
    """What of the language model is trained in the instruct stage."""

    full = "full"
    lora = "lora"


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
    """How samples are put together in a batch. Similar lengths waste less padding; ``modality_length`` is official."""

    none = "none"
    length = "length"
    modality_length = "modality_length"


class LossNorm(Enum):
    """``tokens``: sum over supervised tokens of the global batch / their number, whatever the split.

    ``official``: the mean of the micro-batches' means, as the original code computes it.
    """

    tokens = "tokens"
    official = "official"


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

    ``asha`` keeps the best share of each rung, ``hyperband`` does so for several rungs' beginnings, ``median`` stops
    what is worse than half of the trials at the same step, ``patient`` does so only after a while without progress,
    ``wilcoxon`` compares the seeds of a trial with those of the best one (sweep.seeds).
    """

    none = "none"
    asha = "asha"
    hyperband = "hyperband"
    median = "median"
    patient = "patient"
    wilcoxon = "wilcoxon"


@dataclass
class ModelConfig:
    """Which model, from where."""

    name: str = MISSING
    # Folder of the checkpoint (official tensor names, safetensors). null: the tiny base that is shipped.
    path: str | None = None
    # Folders of the towers when they are not inside the checkpoint.
    vision_tower: str | None = None
    vision_tower_aux: str | None = None
    attn_implementation: Attention = Attention.auto
    # null: obey the checkpoint's config.json; MGM-2B was trained with gelu_pytorch_tanh.
    hidden_activation: str | None = None
    # Recomputes activations in the backward pass: about a third more compute for several GB less memory.
    gradient_checkpointing: bool = False


@dataclass
class ScorerConfig:
    """The judge of captioner.policy=keep_if_better."""

    # A local CLIP folder (cosine similarity) or BLIP image-text-matching folder (probability of a match).
    path: str | None = None
    # The new caption wins where its score is more than this above the raw one's, in units of the score.
    margin: float = 0.0


@dataclass
class CaptionerConfig:
    """Who writes the captions of data=blip2, and which of them are kept."""

    # A local folder: BLIP-2, any image-text-to-text model, or an MGM run. null: the demo captioner that is shipped
    # (demo images only).
    path: str | None = None
    # mgm_exp: greedy, batched, resumable by batch. data_juicer: its image_captioning_mapper (always samples).
    engine: CaptionEngine = CaptionEngine.mgm_exp
    # Images in one forward pass: more is faster and needs more memory.
    batch_size: int = 32
    # Seeds whatever is drawn here (sampled captions, the share of mix), apart from the run's seed: runs with other
    # seeds share the captions.
    seed: int = 0
    # What the captioner is asked. null: nothing (BLIP-2), or the model's own way of asking for a caption.
    prompt: str | None = None
    max_new_tokens: int = 40
    # auto: bf16 on a GPU, fp32 on the CPU. int8 needs a GPU and bitsandbytes.
    precision: CaptionPrecision = CaptionPrecision.auto
    # replace: every caption; keep_if_better: where the scorer prefers the new one; mix: a share of the rows.
    policy: CaptionPolicy = CaptionPolicy.replace
    # policy=mix: share of rows that get the new caption, chosen by a hash of id and seed.
    mix_share: float = 0.5
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    # More than one: the others are sampled and become rows of their own (<id>#c2, ...).
    captions_per_image: int = 1
    # Of sampled captions: higher is more varied and less accurate.
    temperature: float = 1.0
    top_p: float = 0.9
    # Each question is put to the captioner for every image and becomes a row of its own (<id>#q1, ...); the demo
    # captioner only describes.
    questions: list[str] = field(default_factory=list)


@dataclass
class LimitsConfig:
    """Rows are kept where min <= value <= max. A limit is a number, or p1 to p99: that percentile of the values of
    the data at hand; null: open. An operator without limits is off."""

    min: int | float | str | None = None
    max: int | float | str | None = None


@dataclass
class RepetitionConfig(LimitsConfig):
    """Share of n-grams (of words or of characters) that occur more than once in the caption, 0..1."""

    # Length of the n-grams.
    ngram: int = MISSING


@dataclass
class ShapeConfig:
    """Pixels of the image."""

    min_width: int | None = None
    max_width: int | None = None
    min_height: int | None = None
    max_height: int | None = None


@dataclass
class ModelLimitsConfig(LimitsConfig):
    """A value that a local model gives."""

    # Its folder (transformers format, safetensors).
    path: str | None = None


@dataclass
class WatermarkConfig:
    """Probability of a watermark."""

    # Folder of an image classifier whose second class is "watermark".
    path: str | None = None
    max: int | float | str | None = None


@dataclass
class RecipeConfig:
    """Which image-caption pairs are kept, by operators of Data-Juicer; each sees the caption without special tokens."""

    # data_juicer runs Data-Juicer itself; builtin computes the same values of the first five operators without it.
    engine: RecipeEngine = RecipeEngine.data_juicer
    # Of Data-Juicer: default on this machine, ray on a Ray cluster (or all cores of this machine).
    executor: RecipeExecutor = RecipeExecutor.default
    # Processes of Data-Juicer's default executor.
    processes: int = 1
    # Words between white space; digits and signs alone are none ("$72").
    words_num: LimitsConfig = field(default_factory=LimitsConfig)
    # Characters.
    text_length: LimitsConfig = field(default_factory=LimitsConfig)
    word_repetition: RepetitionConfig = field(default_factory=lambda: RepetitionConfig(ngram=2))
    character_repetition: RepetitionConfig = field(default_factory=lambda: RepetitionConfig(ngram=5))
    image_shape: ShapeConfig = field(default_factory=ShapeConfig)
    # Cosine of CLIP's embeddings of image and caption.
    image_text_similarity: ModelLimitsConfig = field(default_factory=ModelLimitsConfig)
    # BLIP's probability that image and caption match.
    image_text_matching: ModelLimitsConfig = field(default_factory=ModelLimitsConfig)
    watermark: WatermarkConfig = field(default_factory=WatermarkConfig)


@dataclass
class AugmentConfig:
    """More rows out of those that were kept."""

    # How often every pair is read in an epoch (copies are called <id>#d2, ...).
    duplicate: int = 1
    # Share of the captions that are reworded by rules (names, numbers and quoted text stay).
    paraphrase: float = 0.0


@dataclass
class InstructDataConfig:
    """Conversations of the instruct stage."""

    # LLaVA/MGM JSON or Data-Juicer JSONL. null: data.path serves both stages (or the demo questions).
    path: str | None = None
    image_root: str | None = None


@dataclass
class DataConfig:
    """What is trained on. Without a path the generated demo data is used."""

    name: str = MISSING
    # Image-caption pairs of the align stage: LLaVA/MGM JSON or Data-Juicer JSONL. null: the generated demo data.
    path: str | None = None
    # Folder that the image paths of the rows are relative to. null: the folder of data.path.
    image_root: str | None = None
    # Already recaptioned pairs (data=blip2 only): read in place of running the captioner.
    recaptioned_path: str | None = None
    instruct: InstructDataConfig = field(default_factory=InstructDataConfig)
    recaption: bool = False
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    bad_rows: BadRows = BadRows.skip
    # The most unusable rows (share of all) that skip accepts before it stops the run.
    max_bad_share: float = 0.1
    # Use only the first N rows of each stage. null: all.
    max_samples: int | None = None
    # Images above this many megapixels are refused before they are decoded (decompression bombs).
    max_megapixels: float = 50.0
    # Demo data only: generated training images; held-out images of the test split, each with one question
    # (validation has two thirds as many); the generator's seed.
    demo_images: int = 2000
    demo_questions: int = 600
    demo_seed: int = 0


@dataclass
class AdapterConfig:
    """How the language model is trained in the instruct stage."""

    name: str = MISSING
    kind: AdapterKind = MISSING
    # Rank of the update: more rank, more capacity and memory.
    rank: int = 0
    # The update is scaled by alpha / rank.
    alpha: float = 0
    dropout: float = 0.0
    # Linear layers of every LLM block that get an update: any of q, k, v, o, gate, up, down (with _proj).
    target_modules: list[str] = field(default_factory=list)


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


@dataclass
class CheckpointConfig:
    """When the state of a running stage is saved."""

    # Optimizer steps between two checkpoints. null: by time only.
    every_steps: int | None = None
    # Minutes between two checkpoints. null: by steps only.
    every_minutes: float | None = 120.0
    # Newest checkpoints that are kept while a stage runs.
    keep: int = 5


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
    # With a frozen connector: encode every image once and read the tokens from disk afterwards.
    cache_visual_tokens: bool = False
    # Processes that decode images beside the training process. 0: in the training process.
    workers: int = 0
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)


@dataclass
class AnswerConfig:
    """How the questions of a benchmark are asked: greedy, in batches."""

    # Questions in one forward pass: more is faster and needs more memory.
    batch_size: int = 8
    # Longest answer, in tokens.
    max_new_tokens: int = 128


@dataclass
class TextVqaConfig(AnswerConfig):
    """TextVQA 0.5.1 from its own files."""

    # LLaVA question JSONL (llava_textvqa_val_v051_ocr.jsonl). null: prompts are made without OCR tokens.
    questions: str | None = None
    # TextVQA_0.5.1_val.json; TextVQA_0.5.1_test.json has no answers and makes a submission file.
    annotations: str | None = None
    # Folder of train_images (of the test split: test_images).
    images: str | None = None
    # Whether the prompt holds the reference OCR tokens; results with and without are not comparable.
    ocr_tokens: bool = True


@dataclass
class VqaConfig(AnswerConfig):
    """VQAv2 or OK-VQA from the files of visualqa.org and okvqa.allenai.org."""

    # v2_OpenEnded_mscoco_val2014_questions.json; OpenEnded_mscoco_val2014_questions.json (OK-VQA).
    questions: str | None = None
    # v2_mscoco_val2014_annotations.json; mscoco_val2014_annotations.json (OK-VQA). null: only a submission file.
    annotations: str | None = None
    # Folder of val2014 (or test2015).
    images: str | None = None
    max_new_tokens: int = 16


@dataclass
class GqaConfig(AnswerConfig):
    """GQA: balanced questions."""

    # testdev_balanced_questions.json (with consistency: a file with all questions, such as val_all_questions.json).
    questions: str | None = None
    # testdev_balanced_choices.json. null: validity and plausibility are left out.
    choices: str | None = None
    # Folder of images.
    images: str | None = None
    # Also ask the questions that the balanced ones entail; they must be in the question file. Takes several times as
    # long on val_all.
    consistency: bool = False
    max_new_tokens: int = 16


class MmBenchRows(Enum):
    """``all``: every row of the file, for the circular score; ``first``: the unrotated rows, a quarter of the time."""

    all = "all"
    first = "first"


@dataclass
class MmBenchConfig(AnswerConfig):
    """MMBench in one language, from its TSV with images inside."""

    # English: mmbench_dev_20230712.tsv; Chinese: mmbench_dev_cn_20231003.tsv. Without answers: a submission file.
    questions: str | None = None
    rows: MmBenchRows = MmBenchRows.all
    max_new_tokens: int = 1024


@dataclass
class CaptionsConfig(AnswerConfig):
    """Captions, against the references of a COCO file."""

    # captions_val2014.json, or any file of its form (NoCaps, Flickr30k).
    annotations: str | None = None
    # Folder of the images.
    images: str | None = None
    # What the model is asked about each image.
    prompt: str = "Provide a one-sentence caption for the provided image."
    # Also METEOR 1.5; needs Java and the package pycocoevalcap.
    meteor: bool = False
    # Also BERTScore (no idf, no rescaling), by the encoder in this local folder. null: none.
    bertscore: str | None = None
    # Hidden layer that BERTScore compares (roberta-large: 17; bert-base-uncased: 9).
    bertscore_layer: int = 17
    max_new_tokens: int = 64


@dataclass
class MmeConfig(AnswerConfig):
    """MME: two yes-or-no questions about each image."""

    # Folder MME_Benchmark_release_version, or the parquet files of lmms-lab/MME.
    questions: str | None = None
    max_new_tokens: int = 16


@dataclass
class PopeConfig(AnswerConfig):
    """POPE: is there an object in the image?"""

    # Folder of coco_pope_{adversarial,popular,random}.json, or one of these files.
    questions: str | None = None
    # Folder of val2014.
    images: str | None = None
    max_new_tokens: int = 16


@dataclass
class ScienceQaConfig(AnswerConfig):
    """ScienceQA-IMG: the questions of one split that have an image."""

    # problems.json, or the parquet files of derek-thomas/ScienceQA.
    questions: str | None = None
    # pid_splits.json; not for parquet files.
    splits: str | None = None
    # Folder of the split's images (<id>/image.png); not for parquet files.
    images: str | None = None
    # train, val (parquet: validation) or test.
    split: str = "test"


@dataclass
class SeedBenchConfig(AnswerConfig):
    """SEED-Bench, the image questions."""

    # SEED-Bench.json.
    questions: str | None = None
    # Folder SEED-Bench-image.
    images: str | None = None


@dataclass
class MmmuConfig(AnswerConfig):
    """MMMU, multiple choice and open questions; the first image of a question is shown."""

    # Folder of the parquet files of MMMU/MMMU of one split (validation-00000-of-00001.parquet of each subject).
    questions: str | None = None
    # validation or test; chooses files by their name. test has no answers and makes a submission file.
    split: str = "validation"
    max_new_tokens: int = 128


@dataclass
class MathVistaConfig(AnswerConfig):
    """MathVista, the multiple-choice part."""

    # testmini-*.parquet of AI4Math/MathVista, or testmini.json with images beside it.
    questions: str | None = None
    # Folder that testmini.json's paths (images/1.jpg) are relative to. null: the file's own.
    images: str | None = None


@dataclass
class CustomConfig(AnswerConfig):
    """Questions of your own, one JSON object a line."""

    # JSONL: image, question, answer or answers; question_id, choices, type where there are any.
    questions: str | None = None
    # Folder that the image paths are relative to. null: the file's own.
    images: str | None = None
    # The first one is the score of an answer; the others are averages (or corpus scores) beside it.
    metrics: list[str] = field(default_factory=lambda: ["exact_match"])
    # Put below each question. null: nothing.
    instruction: str | None = "Answer the question using a single word or phrase."


@dataclass
class DemoEvalConfig:
    """Questions about generated scenes, in TextVQA's form, scored as TextVQA is."""

    # val is for choosing hyper-parameters; test was used for nothing but the final table.
    split: str = "test"
    batch_size: int = 100
    max_new_tokens: int = 12
    # Also score the untouched base, the aligned model and a question-only guesser (once, shared by all runs).
    baselines: bool = True


@dataclass
class JudgeConfig:
    """A language model that reads the option out of answers which the rules cannot read. Off without a url.

    Question, options and answer are sent there. The key stands in the environment, as MGM_EXP_JUDGE_KEY.
    """

    # Address of an OpenAI-compatible server, such as http://localhost:8000/v1.
    url: str | None = None
    # Name of the model there.
    model: str | None = None
    # Seconds to wait for one answer.
    timeout_s: float = 60.0


class CorruptionKind(Enum):
    """How images are changed to see what a model does when they are worse than usual."""

    blur = "blur"
    noise = "noise"
    jpeg = "jpeg"
    rotation = "rotation"
    brightness = "brightness"


@dataclass
class RobustnessConfig:
    """The same questions once more with changed images or in other words, paired with the clean answers."""

    # Each kind at each severity is a benchmark of its own: textvqa.blur3. [] asks none.
    corruptions: list[CorruptionKind] = field(default_factory=list)
    # 1 (slight) to 5 (severe).
    severities: list[int] = field(default_factory=lambda: [1, 3, 5])
    # Folder of <benchmark>.jsonl with lines {"question_id", "question"}: the same questions in other words, asked as
    # textvqa.rephrased. null: none.
    rephrased: str | None = None
    # Also the accuracy by how often the training answers hold the wanted answer: never, rarely, often.
    long_tail: bool = False
    # An answer that occurs at most so often among the training answers is a rare one.
    rare_at_most: int = 10


@dataclass
class EvalConfig:
    """Which benchmarks are run on the trained model, and from which files."""

    name: str = MISSING
    benchmarks: list[str] = field(default_factory=list)
    # Use only the first N questions of each benchmark. null: all.
    max_questions: int | None = None
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    textvqa: TextVqaConfig = field(default_factory=TextVqaConfig)
    vqav2: VqaConfig = field(default_factory=VqaConfig)
    okvqa: VqaConfig = field(default_factory=VqaConfig)
    gqa: GqaConfig = field(default_factory=GqaConfig)
    mmbench: MmBenchConfig = field(default_factory=MmBenchConfig)
    mmbench_cn: MmBenchConfig = field(default_factory=MmBenchConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    mme: MmeConfig = field(default_factory=MmeConfig)
    pope: PopeConfig = field(default_factory=PopeConfig)
    scienceqa: ScienceQaConfig = field(default_factory=ScienceQaConfig)
    seedbench: SeedBenchConfig = field(default_factory=SeedBenchConfig)
    mmmu: MmmuConfig = field(default_factory=MmmuConfig)
    mathvista: MathVistaConfig = field(default_factory=MathVistaConfig)
    custom: CustomConfig = field(default_factory=CustomConfig)
    demo: DemoEvalConfig = field(default_factory=DemoEvalConfig)


@dataclass
class TrackerConfig:
    """Weights & Biases. Files in the run folder are always written and are the source of truth."""

    mode: TrackerMode = TrackerMode.auto
    project: str = "mgm_exp"
    entity: str | None = None
    # Questions (with their images) that the predictions table holds.
    table_rows: int = 64
    # Address of a W&B server of your own. null: the client's default.
    base_url: str | None = None


@dataclass
class LaunchConfig:
    """The processes of one run (``devices``): where they are, what happens when one fails; how a sweep is sent away."""

    machines: Machines = Machines.auto
    # A file with a line "host slots=N" for each machine; the first one is this machine. null: none.
    hostfile: str | None = None
    # What runs a command on another machine of the hostfile; the host and one command line are appended.
    remote_shell: list[str] = field(default_factory=lambda: ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"])
    # How often a stage begins again from its newest checkpoint because a process was killed, lost or hung.
    # 0: it fails at once. More survives more faults, and repeats more often what may never work.
    max_restarts: int = 1
    # Seconds without progress of any process before those that lag behind are named and ended. It must be longer than
    # the slowest step, and than loading the model; lower notices a hang sooner.
    timeout_s: float = 1800.0
    # false: with hydra/launcher=slurm the command submits what can run now, and ends; the same command picks the sweep
    # up later.
    wait: bool = True


@dataclass
class PathsConfig:
    """Where results go."""

    # runs/, sweeps/ and store/ lie below it.
    root: str = "outputs"
    store: str = MISSING
    # Copies of stage outputs for machines that share no disk: s3://BUCKET/FOLDER, gs://..., file:///FOLDER (fsspec).
    # Fetched from there rather than made, and copied there when made; credentials belong into the environment.
    mirror: str | None = None


@dataclass
class SamplerConfig:
    """How a search proposes points (hydra/sweeper=mgm_optuna)."""

    name: SamplerName = SamplerName.tpe
    # Every draw depends on it, on the trial's number and on what the trials before have shown.
    seed: int = 0
    # Trials that are drawn at random before the sampler begins to learn.
    startup: int = 8
    # Points of a generation (nsga2, cmaes). null: the sampler's own.
    population: int | None = None


@dataclass
class PrunerConfig:
    """How a search stops hopeless trials; needs train.validation.every_steps (wilcoxon: sweep.seeds)."""

    name: PrunerName = PrunerName.asha
    # No trial is stopped before this optimizer step. null: at its first validation point at the earliest.
    min_step: int | None = None
    # asha, hyperband: one of so many trials goes on from each rung to the next, which lasts so many times as long.
    reduction_factor: int = 3
    # median, patient, wilcoxon: trials that end before any is stopped (wilcoxon: seeds).
    startup: int = 3
    # patient: validation points without progress that are waited for.
    patience: int = 2
    # patient: what counts as progress.
    min_delta: float = 0.0
    # wilcoxon: a trial is stopped when it is worse than the best one with this p-value.
    p_threshold: float = 0.1


@dataclass
class BudgetConfig:
    """When a search starts no more trials. All calls of the same sweep count together."""

    # Hours in which sweepers worked on it.
    hours: float | None = None
    # Trials in all, as sweep.n_trials; the smaller of the two counts.
    trials: int | None = None
    # Hours x devices in use.
    gpu_hours: float | None = None
    # What becomes of running trials when the hours are used up. false: they end first, so that none is half done;
    # true: they save their state and stop, for an allocation that ends then; more hours continue them.
    interrupt: bool = False


@dataclass
class PlateauConfig:
    """When a search is over because it finds nothing better any more."""

    # Completed trials in a row without a better one. null: never.
    trials: int | None = None
    # What counts as better: at least so much beyond the best value.
    min_delta: float = 0.0


@dataclass
class SweepConfig:
    """A multirun (-m): a grid (mgm_grid, the default) or a search (hydra/sweeper=mgm_optuna)."""

    # Folder name below <paths.root>/sweeps. null: what is swept plus a short hash of the rest of the config.
    name: str | None = None
    # Metric of result.json that orders the runs. null: the first benchmark's accuracy.
    objective: str | None = None
    direction: Direction = Direction.maximize
    # Several at once (a search looks for the Pareto front): metrics, or peak_memory_gib, wall_s, train_tokens_per_s,
    # trainable_parameters; directions has one entry for each. They take the place of objective and direction.
    objectives: list[str] = field(default_factory=list)
    directions: list[Direction] = field(default_factory=list)
    # Finished trials that the same command runs again (a search: failed ones only, under a new number).
    rerun: Rerun = Rerun.none
    # Trials of a search in all, however often the command is given.
    n_trials: int = 20
    # Runs of each trial, with seeds seed, seed+1, ...: its value is their mean.
    seeds: int = 1
    # Trials at the same time. On this machine 1 is in this process, and more are processes of their own, each with
    # GPUs of its own. null: 1; with hydra/launcher=local one for each set of `devices` GPUs.
    slots: int | None = None
    # A process for each trial even with one slot: a crash (out of memory) then ends the trial and not the sweep.
    isolate: bool = False
    # How often a trial that was lost (a killed process, a lost machine) is continued before it counts as failed.
    retries: int = 3
    # Trials that may fail for an unknown reason before the sweep stops.
    max_failures: int = 5
    # Where the study is kept: null: study.journal in the sweep's folder; sqlite: study.db in it; a path; or a URL
    # (sqlite:///..., postgresql+psycopg://...; grpc://HOST:PORT for mgm-exp study-server; passwords belong into the
    # environment).
    storage: str | None = None
    # Points that are tried first: what is swept and its value; what is left out is chosen by the sampler.
    enqueue: list[dict[str, Any]] = field(default_factory=list)
    # What must hold of every trial, such as "adapter.rank * adapter.alpha <= 512" or "peak_memory_gib <= 20".
    constraints: list[str] = field(default_factory=list)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    plateau: PlateauConfig = field(default_factory=PlateauConfig)


@dataclass
class PlanConfig:
    """What ``mgm-exp plan`` and a search's predicted_memory_gib, predicted_hours assume. No stage depends on it."""

    device: Card = Card.auto
    # Rows of the instruct stage and of the align stage, where neither max_steps nor the demo says how many.
    rows: int | None = None
    align_rows: int | None = None
    # Mean tokens of a sample beside its image's, for time.
    text_tokens: int = 124
    # Most tokens of a sample beside its image's, for memory. null: as many as max_length allows, the safe side.
    longest_text: int | None = None
    # Share of the card's peak speed that training reaches, 0..1.
    mfu: float = 0.4
    # Money for an hour of one device. null: no cost is shown.
    price: float | None = None


@dataclass
class ExperimentConfig:
    """One experiment: curate -> align -> instruct -> evaluate -> record."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    adapter: AdapterConfig = MISSING
    zero: ZeroConfig = MISSING
    train: TrainConfig = MISSING
    eval: EvalConfig = MISSING
    tracker: TrackerConfig = MISSING
    paths: PathsConfig = MISSING
    sweep: SweepConfig = field(default_factory=SweepConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    # Seeds data order, dropout, new weights.
    seed: int = 0
    # Folder name below <paths.root>/runs.
    name: str = MISSING
    # Processes in all, over all machines: one for each GPU, or CPU processes.
    devices: int = 1
    device: Device = Device.auto
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    # Set by the sweeper: the number of this trial, which is also its folder.
    trial: int | None = None


LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BENCHMARKS = (
    *("demo", "textvqa", "vqav2", "okvqa", "gqa", "mmbench", "mmbench_cn", "captions", "mme", "pope"),
    *("scienceqa", "seedbench", "mmmu", "mathvista", "custom"),
)
SCORES = ("exact_match", "token_f1", "anls", "vqa_accuracy", "textvqa_accuracy", "choice", "label", "rouge_l")
"""Metrics of eval.custom that score one answer in 0..1; any of them may come first."""
CORPUS_SCORES = ("cider", "bleu4", "macro_f1")
"""Metrics of eval.custom that score all answers together."""
RECIPE_OPERATORS = (
    "words_num",
    "text_length",
    "word_repetition",
    "character_repetition",
    "image_shape",
    "image_text_similarity",
    "image_text_matching",
    "watermark",
)
"""Operators of a recipe, in the order in which they are applied."""
PERCENTILE = re.compile(r"p(?:[1-9]|[1-9][0-9])(?:\.[0-9]+)?")
JUDGE_URL = re.compile(r"(?:https://[\w.:/~%+-]+|http://(?:localhost|127\.0\.0\.1)(?::\d+)?(?:/[\w./~%+-]*)?)")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,199}")


def typed(cfg: DictConfig) -> ExperimentConfig:
    """The composed config as plain dataclasses, checked.

    Raises:
        ConfigError: a key that the schema does not have was added with +, a value is out of range, or values do not go
            together; every fault is named.
        OmegaConfBaseException: a key is missing or a value is of another type.
    """
    merged = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), _without_hydra(cfg))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ExperimentConfig)
    # A leading + adds keys past the schema, which would then be ignored: +train.lrr=1 must not look accepted.
    added = list(_added_keys(config))
    if added:
        raise ConfigError(f"There is no key {', '.join(added)}; a + in front does not make one: drop it, or the key.")
    validate(config)
    return config


def _added_keys(config: Any, prefix: str = "") -> Iterator[str]:
    names = {f.name for f in fields(config)}
    for key, value in vars(config).items():
        if key not in names:
            yield prefix + key
        elif is_dataclass(value):
            yield from _added_keys(value, f"{prefix}{key}.")


def _without_hydra(cfg: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def plain(config: Any) -> Any:
    """A (nested) dataclass as JSON-ready dicts, enums by value; the inverse of :func:`from_plain`."""
    if isinstance(config, Enum):
        return config.value
    if is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, (list, tuple)):
        return [plain(item) for item in config]
    if isinstance(config, dict):
        return {str(key): plain(value) for key, value in config.items()}
    return config


def from_plain(values: dict[str, Any]) -> ExperimentConfig:
    """The typed config of what :func:`plain` gave (read back from ``config.yaml`` or a job file)."""
    return typed(OmegaConf.create(values))


def validate(config: ExperimentConfig) -> None:
    """Checks ranges and combinations.

    Raises:
        ConfigError: naming every fault: what was given, what is allowed, what to do.
    """
    faults = list(_faults(config))
    if faults:
        raise ConfigError("; ".join(faults) + ".")


def _faults(config: ExperimentConfig) -> Iterator[str]:
    yield from _range_faults(config)
    yield from _adapter_faults(config.adapter)
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
    if config.zero.stage not in (0, 2, 3):
        yield f"zero.stage={config.zero.stage}; allowed are 0 (zero=none), 2 and 3"
    if config.zero.stage == 0 and config.zero.offload_optimizer is not Offload.none:
        yield "zero.offload_optimizer=cpu needs zero=2 or zero=3: plain PyTorch keeps its optimizer on the device"
    yield from _recipe_faults(config.data)
    yield from _validation_faults(config)
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
    if sweep.pruner.reduction_factor < 2:
        yield f"sweep.pruner.reduction_factor={sweep.pruner.reduction_factor} must be 2 or above"


def _range_faults(config: ExperimentConfig) -> Iterator[str]:
    train, align, data, sweep = config.train, config.train.align, config.data, config.sweep
    positive: dict[str, float | None] = {
        "devices": config.devices,
        "train.lr": train.lr,
        "train.projector_lr": train.projector_lr,
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
        "sweep.n_trials": sweep.n_trials,
        "sweep.seeds": sweep.seeds,
        "sweep.slots": sweep.slots,
        "sweep.max_failures": sweep.max_failures,
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
        "launch.timeout_s": config.launch.timeout_s,
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
        "tracker.table_rows": config.tracker.table_rows,
        "seed": config.seed,
        "data.captioner.seed": data.captioner.seed,
        "train.early_stopping.min_delta": train.early_stopping.min_delta,
        "launch.max_restarts": config.launch.max_restarts,
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


def _adapter_faults(adapter: AdapterConfig) -> Iterator[str]:
    if adapter.kind is AdapterKind.full:
        if adapter.rank or adapter.alpha or adapter.dropout or adapter.target_modules:
            yield (
                "adapter=full trains every weight of the LLM and takes no rank, alpha, dropout or target_modules; "
                "use adapter=lora_r8 or lora_r16 with them"
            )
        return
    if adapter.rank < 1:
        yield f"adapter.rank={adapter.rank} must be 1 or above for a LoRA adapter"
    if not 0 < adapter.alpha < float("inf"):
        yield f"adapter.alpha={adapter.alpha} must be a finite number above 0 (the update is scaled by alpha / rank)"
    wrong = [name for name in adapter.target_modules if name not in LINEAR_LAYERS]
    if wrong or not adapter.target_modules:
        yield f"adapter.target_modules={adapter.target_modules}; allowed are {list(LINEAR_LAYERS)}, at least one"


def _batch_faults(config: ExperimentConfig) -> Iterator[str]:
    sections: tuple[tuple[str, TrainConfig | AlignConfig], ...] = (
        ("train", config.train),
        ("train.align", config.train.align),
    )
    for where, section in sections:
        per_pass = section.micro_batch_size * config.devices
        if section.global_batch_size % per_pass:
            yield (
                f"{where}.global_batch_size={section.global_batch_size} is not a multiple of "
                f"{where}.micro_batch_size={section.micro_batch_size} x devices={config.devices} = {per_pass}; "
                f"change one of the three"
            )
