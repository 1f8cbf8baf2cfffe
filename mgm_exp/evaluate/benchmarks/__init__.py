"""Benchmarks, one file each, found by their name in ``eval.benchmarks``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mgm_exp.config import BENCHMARKS, ExperimentConfig
from mgm_exp.errors import ConfigError, DataError
from mgm_exp.evaluate.benchmarks.base import Benchmark, Question, Settings, Source, Submission
from mgm_exp.evaluate.benchmarks.captions import Captions
from mgm_exp.evaluate.benchmarks.custom import Custom
from mgm_exp.evaluate.benchmarks.demo import Demo
from mgm_exp.evaluate.benchmarks.gqa import Gqa
from mgm_exp.evaluate.benchmarks.mathvista import MathVista
from mgm_exp.evaluate.benchmarks.mmbench import MmBench
from mgm_exp.evaluate.benchmarks.mme import Mme
from mgm_exp.evaluate.benchmarks.mmmu import Mmmu
from mgm_exp.evaluate.benchmarks.pope import Pope
from mgm_exp.evaluate.benchmarks.scienceqa import ScienceQa
from mgm_exp.evaluate.benchmarks.seedbench import SeedBench
from mgm_exp.evaluate.benchmarks.textvqa import TextVqa
from mgm_exp.evaluate.benchmarks.vqa import Vqa
from mgm_exp.evaluate.judge import Judge

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Captions",
    "Custom",
    "Demo",
    "Gqa",
    "MathVista",
    "MmBench",
    "Mme",
    "Mmmu",
    "Pope",
    "Question",
    "ScienceQa",
    "SeedBench",
    "Settings",
    "Source",
    "Submission",
    "TextVqa",
    "Vqa",
    "check_sources",
    "load_benchmark",
]

CLASSES: dict[str, type[Benchmark]] = {
    "textvqa": TextVqa,
    "vqav2": Vqa,
    "okvqa": Vqa,
    "gqa": Gqa,
    "mmbench": MmBench,
    "mmbench_cn": MmBench,
    "captions": Captions,
    "mme": Mme,
    "pope": Pope,
    "scienceqa": ScienceQa,
    "seedbench": SeedBench,
    "mmmu": Mmmu,
    "mathvista": MathVista,
    "custom": Custom,
}
"""All benchmarks that are read from the user's files; "demo" is made from the generated data."""


def load_benchmark(name: str, config: ExperimentConfig, demo_folder: Path | None = None) -> Benchmark:
    """The benchmark of a name, as the configuration describes it.

    Args:
        name: One of :data:`BENCHMARKS`.
        config: Its ``eval`` section says where the files are; ``data.max_megapixels`` bounds images.
        demo_folder: Folder of the generated demo data; needed by "demo" only.

    Raises:
        ConfigError: the name is unknown, or a path that the benchmark needs is not given.
        DataError: nothing is where a path leads.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"eval.benchmarks holds {name!r}; allowed are {', '.join(BENCHMARKS)}.")
    section = getattr(config.eval, name)
    judge = config.eval.judge
    settings = Settings(
        section.batch_size,
        section.max_new_tokens,
        config.eval.max_questions,
        config.data.max_megapixels,
        Judge(judge.url, judge.model, judge.timeout_s) if judge.url and judge.model else None,
    )
    if name == "demo":
        if demo_folder is None:
            raise ConfigError(
                "eval.benchmarks holds 'demo', but this run has no generated demo data to be evaluated on.",
                advice="Leave data.path out, or name another benchmark.",
            )
        return Demo.configured(name, section, settings, Path(demo_folder))
    section = check_sources(name, section)
    cache = Path(config.paths.root) / "benchmarks" / "images"
    return CLASSES[name].configured(name, section, settings, cache)


def check_sources(name: str, section: Any) -> Any:
    """Whether every file and folder that a benchmark needs is named and there.

    Args:
        name: One of :data:`CLASSES`.
        section: ``eval.<name>``.

    Returns:
        The section, with ``~`` in its paths replaced by the home folder.

    Raises:
        ConfigError: paths are not given; all of them are named.
        DataError: nothing, or a file where a folder should be, is where a path leads.
    """
    sources = CLASSES[name].needs(section)
    unset = [source for source in sources if source.is_needed and getattr(section, source.key) is None]
    if unset:
        keys = " and ".join(f"eval.{name}.{source.key}" for source in unset)
        raise ConfigError(
            f"eval.benchmarks holds {name!r}, but {keys} {'is' if len(unset) == 1 else 'are'} not given.",
            advice=f"Give {'; '.join(f'{source.key}: {source.what}' for source in unset)} (see docs/evaluation.md).",
        )
    found: dict[str, str] = {}
    for source in sources:
        given = getattr(section, source.key)
        if given is None:
            continue
        path = Path(given).expanduser()
        is_there = {"file": path.is_file(), "folder": path.is_dir(), "file or folder": path.exists()}[source.kind]
        if not is_there:
            raise DataError(
                f"eval.{name}.{source.key}={given} is not a {source.kind}.",
                advice=f"Give {source.what}: docs/evaluation.md says where it comes from.",
            )
        found[source.key] = str(path)
    return replace(section, **found)
