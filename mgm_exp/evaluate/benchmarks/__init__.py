"""Benchmarks, one file each, found by their name in ``eval.benchmarks``."""

from __future__ import annotations

from pathlib import Path

from mgm_exp.config import DemoEvalConfig, ExperimentConfig, TextVqaConfig
from mgm_exp.errors import ConfigError
from mgm_exp.evaluate.benchmarks.base import Benchmark, Question, Settings
from mgm_exp.evaluate.benchmarks.demo import Demo
from mgm_exp.evaluate.benchmarks.textvqa import TextVqa

__all__ = ["BENCHMARKS", "Benchmark", "Demo", "Question", "Settings", "TextVqa", "load_benchmark"]

BENCHMARKS = ("demo", "textvqa")


def load_benchmark(name: str, config: ExperimentConfig, demo_folder: Path | None = None) -> Benchmark:
    """The benchmark of a name, as the configuration describes it.

    Args:
        name: One of :data:`BENCHMARKS`.
        config: Its ``eval`` section says where the files are; ``data.max_megapixels`` bounds images.
        demo_folder: Folder of the generated demo data; needed by "demo" only.

    Raises:
        ConfigError: the name is unknown, or a path that the benchmark needs is not given.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"eval.benchmarks holds {name!r}; allowed are {', '.join(BENCHMARKS)}.")
    section: DemoEvalConfig | TextVqaConfig = getattr(config.eval, name)
    settings = Settings(
        section.batch_size, section.max_new_tokens, config.eval.max_questions, config.data.max_megapixels
    )
    if name == "demo":
        if demo_folder is None:
            raise ConfigError(
                "eval.benchmarks holds 'demo', but this run has no generated demo data to be evaluated on.",
                advice="Leave data.path out, or name another benchmark.",
            )
        return Demo(Path(demo_folder), config.eval.demo.split, settings)
    return _textvqa(config.eval.textvqa, settings)


def _textvqa(section: TextVqaConfig, settings: Settings) -> TextVqa:
    missing = [key for key in ("annotations", "images") if getattr(section, key) is None]
    if missing:
        raise ConfigError(
            f"eval.benchmarks holds 'textvqa', but {' and '.join(f'eval.textvqa.{key}' for key in missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not given.",
            advice="Give the paths of TextVQA_0.5.1_val.json, the train_images folder and (for OCR tokens) the "
            "question JSONL: see docs/evaluation.md.",
        )
    assert section.annotations is not None and section.images is not None
    return TextVqa(
        Path(section.annotations),
        Path(section.questions) if section.questions else None,
        Path(section.images),
        section.ocr_tokens,
        settings,
    )
