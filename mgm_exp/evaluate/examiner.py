"""Evaluations of one call: the base is loaded once, for all benchmarks and adapters, in one process or in several.

with Examiner(config, "cuda", devices=4) as examiner:
    examiner.examine(benchmark, {Candidate("lora 8", out8): run8, Candidate("lora 16", out16): run16})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import ExperimentConfig, ModelFamily
from mgm_exp.evaluate.base import Base
from mgm_exp.evaluate.crew import Crew
from mgm_exp.evaluate.generate import Candidate, Progress, evaluate_together
from mgm_exp.evaluate.kept import Keeper
from mgm_exp.evaluate.passes import Fits, OnAnswers, Plan, one_pass
from mgm_exp.evaluate.sight import Shelf

if TYPE_CHECKING:
    from mgm_exp.evaluate.benchmarks import Benchmark

BATCHES_A_PROCESS = 3
"""A process that would have fewer batches to ask is not started: loading the model takes longer."""


class Examiner:
    """See the module.

    Args:
        config: Its ``model`` section describes the base.
        device: ``cpu`` or ``cuda``.
        devices: Most processes (on GPUs: one a GPU) that share the questions of a benchmark.
        say: Takes a sentence for the user; None: the log's warnings.
    """

    def __init__(
        self, config: ExperimentConfig, device: str, devices: int = 1, say: Callable[[str], None] | None = None
    ) -> None:
        self._config, self._device, self._devices, self._say = config, device, devices, say
        self._here = Desk(config, device, say)
        self._crew: Crew | None = None

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes and lets go of the models."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None
        self._here = Desk(self._config, self._device, self._say)

    def examine(
        self, benchmark: Benchmark, candidates: Mapping[Candidate, Path | None], on_progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """Answers and scores of several models, in one pass over the questions.

        Args:
            benchmark: Questions and scorer.
            candidates: Models and their weights: output of an align or instruct stage; None: the base as it is. All of
                :func:`~mgm_exp.evaluate.base.shares_base`, or one alone.
            on_progress: Called with (answered, all) over all models.

        Returns:
            For each model ``{"metrics", "eval_key", "n", "standard_error", "submission"}``; the last is a file name in
            its folder, or None.

        Raises:
            ProcessKilled: one of the processes was killed; the answers so far are kept.
        """
        weights = list(candidates.values())
        processor = self._here.base.processor(weights[0])

        def ask(plan: Plan, todo: Sequence[Sequence[int]], on_answers: OnAnswers) -> None:
            processes = min(self._devices, len(set().union(*todo)) // BATCHES_A_PROCESS)
            if processes <= 1:
                self._here.ask(benchmark, plan, weights, todo, on_answers)
                return
            if self._crew is None:
                self._crew = Crew(self._config, self._device, self._devices, self._say)
            self._crew.ask(benchmark, plan, weights, todo, on_answers, processes)

        found = evaluate_together(benchmark, processor, list(candidates), ask, on_progress=on_progress)
        return [
            {
                "metrics": result.metrics,
                "eval_key": result.eval_key,
                "n": result.n,
                "standard_error": result.standard_error,
                "submission": result.submission.name if result.submission else None,
            }
            for result in found
        ]


class Desk:
    """Where questions are asked in one process: its models, what they saw, and how much fits into memory."""

    def __init__(self, config: ExperimentConfig, device: str, say: Callable[[str], None] | None) -> None:
        self.base, self._fits, self._keeper = Base(config, device), Fits(say), Keeper(config, say)
        section = config.eval
        is_asked_again = len(section.benchmarks) > 1 or section.robustness.rephrased is not None
        is_asked_again &= config.model.family is ModelFamily.mgm  # of others nothing is kept but the file's pictures
        self._shelf = Shelf(int(section.image_cache_gib * 1024**3)) if is_asked_again else None

    def ask(
        self,
        benchmark: Benchmark,
        plan: Plan,
        weights: Sequence[Path | None],
        todo: Sequence[Sequence[int]],
        on_answers: OnAnswers,
    ) -> None:
        """Loads what is not loaded yet, and asks."""
        answerers = [self.base.answerer(path) for path in weights]
        one_pass(benchmark, plan, answerers, todo, on_answers, fits=self._fits, shelf=self._shelf, keeper=self._keeper)
