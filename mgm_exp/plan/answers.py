"""Evaluation: what answering the questions of a benchmark takes, in batches with a KV cache.

Followed tensor by tensor through :mod:`mgm_exp.evaluate` and the blocks that it runs. Symbols as in
:mod:`mgm_exp.plan.activations`: N = questions x tokens of the merged prompt, d, f, s; without gradients nothing is kept
but keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mgm_exp.config import ExperimentConfig, Mining, MmBenchRows, ModelFamily, Precision
from mgm_exp.plan.activations import Work, connector, towers
from mgm_exp.plan.architecture import Architecture
from mgm_exp.plan.cost import flops_of_mining, flops_of_towers, is_block_linear
from mgm_exp.plan.memory import Moment
from mgm_exp.plan.phases import Phase, Writing, weights_alone
from mgm_exp.plan.stage_plan import StagePlan, pixels

# As mgm_exp.evaluate.sight: images in one pass through the towers.
_IMAGES_AT_A_TIME = 8
ENCODING, READING, ANSWERING = "encoding images", "reading the prompts", "writing the answers"


@dataclass(frozen=True)
class Benchmark:
    """What is usual of a benchmark: its published numbers, and lengths in Gemma's tokens as they are about.

    Args:
        questions, images: In its file; None: the file is the user's own.
        prompt: Tokens of a question in its template, beside the image's.
        answer: Tokens of an answer.
    """

    questions: int | None
    images: int | None
    prompt: int
    answer: int


BENCHMARKS = {
    "textvqa": Benchmark(5_000, 3_166, 110, 6),
    "vqav2": Benchmark(214_354, 40_504, 35, 4),
    "okvqa": Benchmark(5_046, 5_033, 35, 4),
    "gqa": Benchmark(12_578, 398, 35, 3),
    "mmbench": Benchmark(4_329, 1_164, 110, 3),
    "mmbench_cn": Benchmark(4_329, 1_164, 110, 3),
    "captions": Benchmark(40_504, 40_504, 30, 16),
    "mme": Benchmark(2_374, 1_187, 45, 3),
    "pope": Benchmark(9_000, 500, 35, 3),
    "scienceqa": Benchmark(2_017, 2_017, 130, 3),
    "seedbench": Benchmark(14_233, 14_233, 80, 3),
    "mmmu": Benchmark(900, 900, 150, 10),
    "mathvista": Benchmark(540, 540, 110, 10),
    "custom": Benchmark(None, None, 60, 10),
}
_FIRST_ROWS = 1_164  # of MMBench: without the rotations of their options


@dataclass(frozen=True)
class Asked:
    """A benchmark as a configuration asks it.

    Args:
        questions, images: How many; None: not known.
        prompt, answer: Tokens.
        batch: Questions in one pass.
        most: Tokens of the longest answer that is allowed.
    """

    name: str
    questions: int | None
    images: int | None
    prompt: int
    answer: int
    batch: int
    most: int

    @property
    def written(self) -> int:
        """Passes of a batch until its longest answer has ended: twice a usual one."""
        return max(1, min(self.most, 2 * self.answer))


def asked_of(config: ExperimentConfig, name: str) -> Asked:
    """A benchmark of the configuration, whose files are not opened."""
    section = config.eval
    own = getattr(section, name)
    if name == "demo":
        count = config.data.demo_questions if own.split == "test" else config.data.demo_questions * 2 // 3
        usual = Benchmark(count, count, 24, 5)
    else:
        usual = BENCHMARKS[name]
    questions, images = usual.questions, usual.images
    if name in ("mmbench", "mmbench_cn") and own.rows is MmBenchRows.first:
        questions = _FIRST_ROWS
    if section.max_questions is not None:
        questions = min(questions or section.max_questions, section.max_questions)
        images = min(images or questions, questions)
    prompt = usual.prompt if name != "textvqa" or own.ocr_tokens else 40
    return Asked(name, questions, images, prompt, usual.answer, own.batch_size, own.max_new_tokens)


def evaluation(config: ExperimentConfig, sizes: Architecture, tuned: StagePlan) -> Iterator[Phase]:
    """Every benchmark of the configuration, with its variants, and validation points of the instruct stage."""
    weights = float(_bytes(config) * tuned.parameters.total)
    robustness = config.eval.robustness
    variants = len(robustness.corruptions) * len(robustness.severities) + (robustness.rephrased is not None)
    for name in config.eval.benchmarks:
        asked = asked_of(config, name)
        yield _phase(f"evaluate[{name}]", config, sizes, tuned, asked, weights, times=1 + variants)
        if name == "demo" and config.eval.demo.baselines:
            models = 1 if config.train.align.max_steps == 0 or config.model.family is ModelFamily.hf else 2
            yield _phase("evaluate[demo] baselines", config, sizes, tuned, asked, weights, times=models)
    yield from _validation(config, sizes, tuned)


def _validation(config: ExperimentConfig, sizes: Architecture, tuned: StagePlan) -> Iterator[Phase]:
    """Points in the middle of training: the optimizer's state stays where it is."""
    settings = config.train.validation
    if settings.every_steps is None:
        return
    asked = asked_of(config, settings.benchmark or config.eval.benchmarks[0])
    points = None if tuned.steps is None else max(0, (tuned.steps - 1) // settings.every_steps)
    questions = settings.questions
    if settings.share is not None and asked.questions is not None:
        questions = max(1, round(settings.share * asked.questions))
    few = Asked(asked.name, questions, min(questions, asked.images or questions), asked.prompt, asked.answer,
                asked.batch, asked.most)  # fmt: skip
    held = tuned.moments[0]
    weights = held.weights + held.optimizer
    yield _phase("validation", config, sizes, tuned, few, weights, times=points)


def _phase(
    name: str,
    config: ExperimentConfig,
    sizes: Architecture,
    tuned: StagePlan,
    asked: Asked,
    weights: float,
    *,
    times: int | None,
) -> Phase:
    length = min(sizes.visual_tokens + asked.prompt, config.train.max_length)
    s = _bytes(config)
    eyes = eyes_of(config, sizes, s)
    moments = answering(sizes, weights, s, asked.batch, length, asked.most, eyes)
    smallest = answering(sizes, weights, s, 1, length, asked.most, eyes, images=1)
    count = None if asked.questions is None or times is None else asked.questions * times
    batches = 0 if count is None else math.ceil(count / asked.batch)
    pictures = 0 if count is None or not asked.questions else (asked.images or 0) * count / asked.questions
    linear, heads = _linear(sizes), sizes.heads * sizes.head_dim * sizes.layers
    head = 2.0 * sizes.hidden * sizes.vocabulary
    own = 2.0 * (linear + tuned.parameters.lora)
    reads = pictures * (flops_of_towers(sizes) + flops_of_mining(sizes, tuned.work.mines_natively))
    reads += (count or 0) * (length * own + 4 * length**2 * heads + head)
    full = min(asked.batch, asked.questions or asked.batch)
    writes = Writing(
        steps=float(batches * (asked.written - 1)),
        flops=full * (own + 4 * length * heads + head),
        bytes=s * (linear + sizes.hidden * sizes.vocabulary) + full * length * cached_bytes(sizes, s),
        blocks=sizes.layers,
    )
    what = (
        f"{asked.name}: its own file decides on the number of questions; give eval.max_questions for its time"
        if count is None
        else ""
    )
    return Phase(name, moments, count, reads, writes, config.devices, smallest, what)


def cached_bytes(sizes: Architecture, itemsize: int) -> float:
    """Keys and values that are kept of one token."""
    return 2.0 * sizes.layers * sizes.kv_heads * sizes.head_dim * itemsize


def answering(
    sizes: Architecture,
    weights: float,
    itemsize: int,
    batch: int,
    length: int,
    most: int,
    eyes: Work | None,
    *,
    images: int = _IMAGES_AT_A_TIME,
) -> list[Moment]:
    """The moments of answering a batch.

    Reading the prompts: keys and values, ``3 s N f`` of a block's MLP, four tensors as wide as the residual stream
    (one is the prompt itself), the rotation's tables, and a mask of one byte for each pair of positions. Writing: keys
    and values up to the last token, those of a block once more as they grow, and logits in fp32 beside the model's own.

    Args:
        weights: Bytes of the model's weights, and of what else stays.
        batch, length, most: Questions, tokens of a prompt with its image's, tokens of the longest answer.
        eyes: How images are encoded; None: they are not.
        images: At a time.
    """
    n, s, d = batch * length, itemsize, sizes.hidden
    image = float(sizes.visual_tokens * d * s)
    seen = batch * image
    kept = cached_bytes(sizes, s)
    mask = float(batch * length**2) if batch > 1 else 0.0
    reading = kept * n + 3.0 * s * n * sizes.mlp + 4.0 * s * n * d + 2.0 * s * n * sizes.head_dim + mask
    longest = kept * batch * (length + most)
    logits = float(batch * sizes.vocabulary) * (s + 4)
    found = []
    if eyes is not None:
        work = replace(eyes, batch=images)
        running = max(towers(sizes, work), connector(sizes, work).forward) + images * (work.pixel_bytes + image)
        found.append(weights_alone(ENCODING, weights, seen + running))
    found.append(weights_alone(READING, weights, seen + reading))
    found.append(weights_alone(ANSWERING, weights, seen + s * n * d + longest * (1 + 1 / sizes.layers), logits))
    return found


def eyes_of(config: ExperimentConfig, sizes: Architecture, itemsize: int) -> Work | None:
    """How images are encoded: in one dtype, without autocast; None for a model of transformers, whose eyes are not
    followed."""
    if config.model.family is ModelFamily.hf:
        return None
    return Work(
        "features",
        batch=1,
        length=1,
        supervised=1,
        bytes=itemsize,
        autocast=False,
        checkpointing=False,
        trains_connector=False,
        trains_llm=False,
        mines_natively=config.model.mining is Mining.native,
        pixel_bytes=float(itemsize * pixels(sizes)),
    )


def _bytes(config: ExperimentConfig) -> int:
    return 4 if (config.eval.precision or config.train.precision) is Precision.fp32 else 2


def _linear(sizes: Architecture) -> int:
    blocks = (shape for name, shape in sizes.shapes.items() if is_block_linear(name))
    return sum(math.prod(shape) for shape in blocks)
