"""The group ``data``: what it is trained on, and the recipe that makes it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from mgm_exp.config.choices import BadRows, CaptionEngine, CaptionPolicy, CaptionPrecision, RecipeEngine, RecipeExecutor

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
