"""The group ``eval``: what is scored, and from which files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from mgm_exp.config.choices import Precision

BENCHMARKS = (
    *("demo", "textvqa", "vqav2", "okvqa", "gqa", "mmbench", "mmbench_cn", "captions", "mme", "pope"),
    *("scienceqa", "seedbench", "mmmu", "mathvista", "custom"),
)
SCORES = ("exact_match", "token_f1", "anls", "vqa_accuracy", "textvqa_accuracy", "choice", "label", "rouge_l")
"""Metrics of eval.custom that score one answer in 0..1; any of them may come first."""
CORPUS_SCORES = ("cider", "bleu4", "macro_f1")
"""Metrics of eval.custom that score all answers together."""
JUDGE_URL = re.compile(r"(?:https://[\w.:/~%+-]+|http://(?:localhost|127\.0\.0\.1)(?::\d+)?(?:/[\w./~%+-]*)?)")


@dataclass
class AnswerConfig:
    """How the questions of a benchmark are asked: greedy, in batches."""

    # Questions in one forward pass: more is faster and needs more memory.
    batch_size: int = 16
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
    # Wrong answers shown of each type of question in galleries/<benchmark>.html, with small pictures; at most 24 types
    # have pictures (about 6 KiB each). 0: no page.
    gallery: int = 12
    # Arithmetic of the answers: bf16 is several times as fast as fp32 on a GPU, its last digits depend on the batch.
    # null: that of the training.
    precision: Precision | None = None
    # Add what an adapter learnt to the weights before questions are asked, as the official code does: less work a
    # token. Last digits differ from those of an adapter beside its weights, in bf16 more than in fp32.
    merge_adapter: bool = False
    # Main memory in GiB for images that another benchmark of the same call may show again: an image of MGM-2B takes
    # 2.4 MB in bf16. 0: they are encoded anew.
    image_cache_gib: float = 2.0
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
