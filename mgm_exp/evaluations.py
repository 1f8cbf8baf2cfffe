"""Several models scored in one call: those of one base are asked side by side, in one pass over the questions.

What is asked together goes into the store as if each model had been asked alone; then every model is scored by
:class:`mgm_exp.evaluation.Evaluation` as if it were alone, and finds its answers there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgm_exp import stages
from mgm_exp.config import ExperimentConfig, ModelFamily, plain
from mgm_exp.evaluation import Evaluation
from mgm_exp.preflight import Preflight
from mgm_exp.scoring import Asked
from mgm_exp.store import Store, fingerprint

Say = Callable[[str], None]


class Evaluations:
    """See the module.

    Args:
        evaluations: One for each model.
        tell: Told (what, done, total) while questions are answered.
        say: Takes a sentence for the user.
    """

    def __init__(self, evaluations: Sequence[Evaluation], tell: Callable[[str, int, int], None], say: Say) -> None:
        self.evaluations, self.tell, self.say = list(evaluations), tell, say
        self._benchmarks: dict[str, Any] = {}
        for evaluation in self.evaluations:
            evaluation.load = self._load

    def run(self) -> list[list[Any]]:
        """Scores all benchmarks of all models; for each model the lines of its table.

        Raises:
            LeaseHeld, UserError: as :meth:`Evaluation.run`, before anything is asked.
        """
        with ExitStack() as stack:
            held = [(evaluation, stack.enter_context(evaluation.held())) for evaluation in self.evaluations]
            for group in _by(held, lambda one: _base(one[0].config, one[1])):
                if len(group) > 1:
                    self._ask_together(group)
            lines = []
            for evaluation, found in held:
                lines.append(evaluation.score(found))
                evaluation.scoring.close()  # weights that share no base are a whole model
            return lines

    def _ask_together(self, group: Sequence[tuple[Evaluation, Preflight]]) -> None:
        """Fills the store with the answers of models that share their base."""
        from mgm_exp import evaluate

        first, found = group[0]
        with evaluate.Examiner(first.config, found.sources.device, first.config.devices, self.say) as examiner:
            entries = [entry for evaluation, found in group for entry in _entries(evaluation, found)]
            for same in _by(entries, lambda entry: entry.payload["benchmark"]):
                distinct = list({(str(entry.store.root), entry.key): entry for entry in same}.values())
                name = f"evaluate[{same[0].benchmark.name}] {len(distinct)} models"
                if len(distinct) > 1:
                    self._ask(name, same[0].benchmark, distinct, examiner)

    def _ask(self, name: str, benchmark: Any, entries: Sequence[_Entry], examiner: Any) -> None:
        def make(works: dict[_Entry, Path]) -> dict[_Entry, dict[str, Any]]:
            candidates = {c: w for entry, work in works.items() for c, w in entry.asked.candidate(work).items()}
            told = examiner.examine(benchmark, candidates, lambda done, total: self.tell(name, done, total))
            return dict(zip(works, told, strict=True))

        made = produce_together(entries, make, lambda why: self.say(f"{name}: waiting, {why}"))
        for evaluation in self.evaluations:
            evaluation.made |= {entry.key for entry in made}
        if made:
            self.say(f"evaluate[{benchmark.name}]: {len(made)} models answered side by side")

    def _load(self, name: str, config: ExperimentConfig, demo: Path | None) -> Any:
        """Benchmarks that are configured alike are read once."""
        from mgm_exp import evaluate

        described = {"eval": plain(config.eval), "megapixels": config.data.max_megapixels, "root": config.paths.root}
        key = fingerprint([name, described, str(demo)])
        if key not in self._benchmarks:
            self._benchmarks[key] = evaluate.load_benchmark(name, config, demo)
        return self._benchmarks[key]


@dataclass(frozen=True, eq=False)
class _Entry:
    """An entry of a store that is still to be made, or there already."""

    store: Store
    benchmark: Any
    asked: Asked

    @property
    def payload(self) -> stages.Payload:
        return self.asked.payload

    @property
    def key(self) -> str:
        return stages.key_of("evaluate", self.payload)


def _entries(evaluation: Evaluation, found: Preflight) -> Iterator[_Entry]:
    """What the evaluation will look for in its store, as far as its weights share their base with others."""
    from mgm_exp import evaluate

    weights = evaluation.trained.weights()
    is_mgm, is_merged = evaluation.config.model.family is ModelFamily.mgm, evaluation.config.eval.merge_adapter
    if not is_mgm or not evaluate.shares_base(weights.path if weights else None, is_merged=is_merged):
        return
    for name in evaluation.config.eval.benchmarks:
        benchmark = evaluation.benchmark(name, found)
        for one in [benchmark, *evaluate.variants(benchmark, evaluation.config.eval.robustness)]:
            yield _Entry(evaluation.store, one, Asked.of(evaluation.config, found, one, weights))


def produce_together(
    entries: Sequence[_Entry],
    make: Callable[[dict[_Entry, Path]], dict[_Entry, dict[str, Any]]],
    on_wait: Say,
) -> list[_Entry]:
    """Has those entries made that are not there yet, in one go: all of them are published, or none.

    Args:
        entries: Different ones.
        make: Gets the work folder of each, and gives what each says about itself; not called if nothing is to be made.
        on_wait: Called with a sentence while another process makes one of them.

    Returns:
        Those that were made now.
    """
    # In one order everywhere: two calls that want the same entries wait for each other, and not in a circle.
    ordered = sorted(entries, key=lambda entry: (str(entry.store.root), entry.key))
    works: dict[_Entry, Path] = {}
    told: dict[_Entry, dict[str, Any]] = {}

    def take(place: int) -> None:
        if place == len(ordered):
            if works:
                told.update(make(works))
            return
        entry = ordered[place]

        def made(work: Path) -> dict[str, Any]:
            works[entry] = work
            take(place + 1)
            return told[entry]

        output = entry.store.produce("evaluate", entry.key, made, inputs=entry.payload, on_wait=on_wait)
        if output.reused:
            take(place + 1)

    take(0)
    return list(works)


def _base(config: ExperimentConfig, found: Preflight) -> str:
    """Equal for models that one loaded base serves."""
    sources, model = found.sources, plain(config.model)
    return fingerprint(
        {
            "files": sources.model,
            "model": {key: value for key, value in model.items() if key != "gradient_checkpointing"},
            "precision": (config.eval.precision or config.train.precision).value,
            "max_length": config.train.max_length,
            "device": sources.device,
            "attention": sources.attention,
        }
    )


def _by(things: Sequence[Any], key: Callable[[Any], str]) -> list[list[Any]]:
    """Things with equal keys together, in the order in which they first came."""
    groups: dict[str, list[Any]] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return list(groups.values())
