"""Benchmarks on one set of weights: scored once for all who need it, and what a folder keeps of them.

``python -m mgm_exp`` scores the model that it trained through here, ``mgm-exp evaluate`` one that is there already.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mgm_exp import stages
from mgm_exp.config import ExperimentConfig, ModelConfig
from mgm_exp.errors import DataError
from mgm_exp.folders import GALLERIES
from mgm_exp.preflight import Preflight
from mgm_exp.store import StageOutput, fingerprint, hard_link_or_copy, read_json


class Weights(Protocol):
    """What a stage made, or a folder of the same form: ``adapter/``, ``model/`` or ``connector.safetensors``."""

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def key(self) -> str:
        """Equal for equal weights."""


class Produce(Protocol):
    """Takes a stage from the store, or makes it."""

    def __call__(
        self, stage: str, payload: stages.Payload, make: Callable[[Path], dict[str, Any]], /, *, label: str
    ) -> StageOutput: ...


@dataclass(frozen=True)
class Asked:
    """One benchmark asked of one set of weights: an entry of the store.

    Args:
        payload: What its key is made of.
        fingerprint: Of the model.
        weights: Their folder; None: the base as it is.
    """

    payload: stages.Payload
    fingerprint: str
    weights: Path | None

    @classmethod
    def of(cls, config: ExperimentConfig, found: Preflight, benchmark: Any, weights: Weights | None) -> Asked:
        """The entry of a benchmark and weights (None: the untouched base)."""
        key = weights.key if weights else None
        return cls(
            stages.evaluate_payload(config, found.sources, key, benchmark.fingerprint()),
            fingerprint({"weights": key, "base": found.sources.model}),
            weights.path if weights else None,
        )

    def candidate(self, work: Path) -> dict[Any, Path | None]:
        """The model as an examiner takes it, in the work folder of the entry; answers so far lie beside its output."""
        from mgm_exp import evaluate

        return {evaluate.Candidate(self.fingerprint, work / "out", work / "answers.jsonl"): self.weights}


class Scoring:
    """Scores benchmarks; ``metrics``, ``eval_keys`` and ``lines`` (of the final table) grow with each.

    Args:
        config: The checked configuration.
        folder: Gets ``predictions/`` and ``submissions/``.
        produce: How a stage is made, shared and recorded.
        tell: Told (what, done, total) while questions are answered.
        say: Takes a sentence for the user.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        folder: Path,
        produce: Produce,
        tell: Callable[[str, int, int], None],
        say: Callable[[str], None],
    ) -> None:
        self.config, self.folder = config, folder
        self.produce, self.tell, self.say = produce, tell, say
        self._examiner: Any = None
        self.metrics: dict[str, float] = {}
        self.eval_keys: dict[str, Any] = {}
        self.lines: list[Any] = []

    def close(self) -> None:
        """Lets go of the models; before the folder's owner does something else."""
        if self._examiner is not None:
            self._examiner.close()
            self._examiner = None

    def score(self, found: Preflight, benchmark: Any, weights: Weights | None, label: str) -> StageOutput:
        """One benchmark on one set of weights (None: the untouched base); the store scores each pair once."""
        from mgm_exp import evaluate

        name = f"evaluate[{benchmark.name}] {label}"
        asked = Asked.of(self.config, found, benchmark, weights)

        def make(work: Path) -> dict[str, Any]:
            if self._examiner is None:
                device, devices = found.sources.device, self.config.devices
                self._examiner = evaluate.Examiner(self.config, device, devices, self.say)
            told: dict[str, Any] = self._examiner.examine(
                benchmark, asked.candidate(work), lambda done, total: self.tell(name, done, total)
            )[0]
            return told

        return self.produce("evaluate", asked.payload, make, label=name)

    def score_all(
        self,
        found: Preflight,
        benchmark: Any,
        weights: Weights | None,
        label: str,
        curated: Path | None,
        keep: Callable[[Any, Path, Mapping[str, float]], None],
    ) -> None:
        """A benchmark and what the configuration asks of its robustness.

        Args:
            found: What the preflight found out.
            benchmark: With its questions.
            weights: The model's; None: the base as it is.
            label: What they are, for messages.
            curated: Folder of the curate stage; needed by ``eval.robustness.long_tail`` only.
            keep: Called with (benchmark, its predictions, its metrics) for each that was scored.
        """
        from mgm_exp import evaluate

        scored = self.score(found, benchmark, weights, label)
        robustness = self.config.eval.robustness
        further: dict[str, float] = {}
        if robustness.long_tail and benchmark.is_scored and curated is not None:
            counts = evaluate.answer_counts(_rows(curated / "instruct.jsonl"))
            tail = evaluate.long_tail(_rows(scored.path / "predictions.jsonl"), counts, robustness.rare_at_most)
            further = {f"{benchmark.name}/{key}": value for key, value in tail.items()}
        keep(benchmark, *self._keep(benchmark, scored, further))
        for variant in evaluate.variants(benchmark, robustness):
            changed = self.score(found, variant, weights, label)
            drop = _drop(variant.name, scored, changed) if benchmark.is_scored else {}
            keep(variant, *self._keep(variant, changed, drop, is_variant=True))

    def _keep(
        self, benchmark: Any, scored: StageOutput, further: Mapping[str, float], *, is_variant: bool = False
    ) -> tuple[Path, dict[str, float]]:
        """A benchmark's metrics, predictions, lines of the final table and, where it has a server, submission file."""
        from mgm_exp import evaluate

        name, meta = benchmark.name, scored.meta
        metrics = {**meta["metrics"], **further}
        self.metrics.update(metrics)
        self.eval_keys[name] = meta["eval_key"]
        error = meta.get("standard_error")
        model = evaluate.published_as(self.config.model.name, is_hd=_is_hd(self.config.model))
        self.lines += evaluate.lines_of(name, metrics, meta["eval_key"], meta["n"], error, model)
        kept = self.folder / "predictions" / f"{name}.jsonl"
        kept.parent.mkdir(exist_ok=True)
        hard_link_or_copy(scored.path / "predictions.jsonl", kept)
        submission = meta.get("submission")
        if submission and not is_variant:
            kept_submission = self.folder / "submissions" / submission
            kept_submission.parent.mkdir(exist_ok=True)
            hard_link_or_copy(scored.path / submission, kept_submission)
            self.say(f"{name}: the file for its server is submissions/{submission}")
        if self.config.eval.gallery and not is_variant:
            self._show(benchmark, kept)
        return kept, metrics

    def _show(self, benchmark: Any, predictions: Path) -> None:
        """The page of a benchmark's wrong answers."""
        from mgm_exp import evaluate

        place = Path(GALLERIES) / f"{benchmark.name}.html"
        n_lost = evaluate.write_gallery(
            predictions,
            self.folder / place,
            lambda row: _small(benchmark, str(row["image"])),
            benchmark=benchmark.name,
            label=f"{self.config.name}, {self.folder.name}",
            per_type=self.config.eval.gallery,
        )
        if (self.folder / place).is_file():
            self.say(f"{benchmark.name}: {n_lost:,} questions lost points, the worst are shown in {place}")


def _small(benchmark: Any, image: str) -> bytes | None:
    """A small copy of an image as the model saw it; None where it is not there any more."""
    from mgm_exp import page
    from mgm_exp.evaluate.gallery import PICTURE_SIDE

    try:
        return page.thumbnail(benchmark.picture(image), PICTURE_SIDE)
    except DataError:
        return None


def _is_hd(model: ModelConfig) -> bool:
    """Whether the model sees crops of an image: as the configuration says, else its folder."""
    grid = model.image_grid
    if grid is None and model.path is not None and (Path(model.path).expanduser() / "config.json").is_file():
        grid = read_json(Path(model.path).expanduser() / "config.json").get("image_grid")
    return (grid or 1) > 1


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _drop(name: str, clean: StageOutput, changed: StageOutput) -> dict[str, float]:
    """How much a change of images or words costs, paired by question, with a 95 % interval clustered by image."""
    from mgm_exp.compare.statistics import paired_difference

    before = {row["question_id"]: row["score"] for row in _rows(clean.path / "predictions.jsonl")}
    rows = list(_rows(changed.path / "predictions.jsonl"))
    difference = paired_difference(
        [row["score"] for row in rows],
        [before[row["question_id"]] for row in rows],
        [row["image_id"] for row in rows],
    )
    found = {"drop": difference.difference, "drop_ci_low": difference.ci_low, "drop_ci_high": difference.ci_high}
    return {f"{name}/{key}": value for key, value in found.items() if math.isfinite(value)}
