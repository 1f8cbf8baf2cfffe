"""Validation points: scores on held-out questions in the middle of a stage, and what follows from them.

They change nothing of the training: no weight, no random number, no mode of the model. So they are no part of a stage's
key, unless early stopping makes the length of the stage depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mgm_exp.config import EarlyStoppingConfig, ExperimentConfig, trains_towers
from mgm_exp.train.job import TrainJob
from mgm_exp.train.ranks import Ranks

if TYPE_CHECKING:
    from mgm_exp.evaluate import Benchmark, HeldOut
    from mgm_exp.evaluate.kept import Keeper
    from mgm_exp.train.assemble import Stage

# The event of such a row in metrics.jsonl.
VALIDATION = "validation"


class Validation:
    """The validation points of one stage, on one of its processes.

    Each process answers its share of the questions. Under ZeRO-3 every forward pass is a joint one of all processes:
    there all of them answer all questions.
    """

    def __init__(self, job: TrainJob, stage: Stage, ranks: Ranks) -> None:
        self._stage, self._ranks = stage, ranks
        config = stage.config
        assert config.train.validation.every_steps is not None
        self._every = config.train.validation.every_steps
        self.benchmark = validation_benchmark(config, job)
        self._questions = chosen_questions(config, self.benchmark)
        self._held_out: HeldOut | None = None

    @classmethod
    def of(cls, job: TrainJob, stage: Stage, ranks: Ranks) -> Validation | None:
        """Those of the instruct stage where the configuration asks for them."""
        if job.stage != "instruct" or stage.config.train.validation.every_steps is None:
            return None
        return cls(job, stage, ranks)

    def is_due(self, step: int) -> bool:
        """Whether a validation point follows this step; after the last one comes the evaluation."""
        return step % self._every == 0 and step < self._stage.n_steps

    def score(self) -> float:
        """The mean score over all questions; called by all processes."""
        import torch

        from mgm_exp.config import Precision
        from mgm_exp.evaluate import HeldOut
        from mgm_exp.train.engine import COMPUTE_DTYPE
        from mgm_exp.train.generators import generator_states, set_generator_states

        stage, ranks = self._stage, self._ranks
        mine = self._questions
        if not self._is_joint:
            mine = mine[ranks.rank :: ranks.world_size]
        before = generator_states(ranks.device)
        passes = stage.model.register_forward_pre_hook(lambda *_: ranks.marks.works())
        try:
            is_half = stage.settings.precision is not Precision.fp32 and not stage.settings.zero_stage
            half = COMPUTE_DTYPE[stage.settings.precision] if is_half else None
            if self._held_out is None:
                train = stage.config.train
                frozen = train.freeze_connector and not trains_towers(train)
                self._held_out = HeldOut(self.benchmark, mine, stage.processor, frozen, self._keeper(), half)
            with torch.autocast(ranks.device.type, half, enabled=is_half):
                scores = self._held_out.scores(stage.model)
        finally:
            passes.remove()
            set_generator_states(before, ranks.device)
        parts = [[math.fsum(scores), len(scores)]] if self._is_joint else ranks.gather([math.fsum(scores), len(scores)])
        total, count = (math.fsum(column) for column in zip(*parts, strict=True))
        return total / count

    def _keeper(self) -> Keeper | None:
        """Of what towers see, where they do not train, and lie in one piece on this process."""
        from mgm_exp.evaluate.kept import Keeper

        config = self._stage.config
        return None if trains_towers(config.train) or self._is_joint else Keeper(config)

    @property
    def _is_joint(self) -> bool:
        return self._stage.settings.zero_stage == 3

    def facts(self, value: float) -> dict[str, Any]:
        """What the row of a validation point says."""
        return {"benchmark": self.benchmark.name, "value": value, "questions": len(self._questions)}


def validation_benchmark(config: ExperimentConfig, job: TrainJob) -> Benchmark:
    """The benchmark whose questions are asked; of the demo its split for validation, which no table is made from."""
    from dataclasses import replace

    from mgm_exp.evaluate import load_benchmark

    name = config.train.validation.benchmark or config.eval.benchmarks[0]
    demo = replace(config.eval.demo, split="val")
    return load_benchmark(name, replace(config, eval=replace(config.eval, demo=demo, max_questions=None)), job.demo)


def chosen_questions(config: ExperimentConfig, benchmark: Benchmark) -> list[Any]:
    """The first questions of the split: as many as are asked for, or their share."""
    settings = config.train.validation
    there = benchmark.questions
    count = settings.questions if settings.share is None else math.ceil(settings.share * len(there))
    return there[: max(1, min(count, len(there)))]


class EarlyStopping:
    """Ends a stage whose validation score has stopped rising.

    Args:
        config: ``train.early_stopping``; without patience it never ends anything.
        rows: The rows of ``metrics.jsonl`` so far: a stage that is continued remembers its scores.
    """

    def __init__(self, config: EarlyStoppingConfig, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._patience, self._min_delta = config.patience, config.min_delta
        self._best, self._waited = -math.inf, 0
        for row in rows:
            if row.get("event") == VALIDATION:
                self.note(float(row["value"]))

    def note(self, value: float) -> None:
        """One more score."""
        if self._best == -math.inf or value > self._best + self._min_delta:
            self._best, self._waited = max(value, self._best), 0
        else:
            self._waited += 1

    @property
    def is_over(self) -> bool:
        return self._patience is not None and self._waited >= self._patience

    @property
    def reason(self) -> str:
        return f"no score above {self._best:.4f} at the last {self._waited} validation points"
