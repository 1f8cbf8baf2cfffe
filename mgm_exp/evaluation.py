"""Scores for a model that is there already, added to what its run folder says of it; see ``mgm-exp evaluate``."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mgm_exp import stages
from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import ConfigError, UserError
from mgm_exp.folders import LEASE, open_store, read_record
from mgm_exp.preflight import Preflight
from mgm_exp.scoring import Scoring
from mgm_exp.store import Lease, LeaseHeld, StageOutput, write_json_atomic
from mgm_exp.trained import Trained

SCHEMA_VERSION = 1
# Of a benchmark's metrics those that training left, which no later scoring makes anew.
_OF_TRAINING = "/validation"
_BASELINES = "/baseline_"
_DROP = "/drop"


class Evaluation:
    """Benchmarks on one model, merged one by one into ``result.json`` and ``benchmarks.json`` of a folder.

    Args:
        trained: The model.
        out: The folder; a run's own, or another one.
        tell: Told (what, done, total) while questions are answered.
        say: Takes a sentence for the user.
        label: What the model is called in messages; None: the trained model, or the checkpoint.
    """

    def __init__(
        self,
        trained: Trained,
        out: Path,
        tell: Callable[[str, int, int], None],
        say: Callable[[str], None],
        label: str | None = None,
    ) -> None:
        self.trained, self.config, self.out = trained, trained.config, Path(out).expanduser().resolve()
        self.label = label or ("the trained model" if trained.is_run else "the checkpoint")
        self.load: Callable[[str, ExperimentConfig, Path | None], Any] | None = None
        """Where benchmarks come from; None: each is read anew."""
        self.made: set[str] = set()
        """Keys of the store that this call has made already, for several models at once."""
        self._demo_folder: Path | None = None
        self.tell, self.say = tell, say
        self.store = open_store(self.config.paths)
        self.scoring = Scoring(self.config, self.out, self._produce, tell, say)

    def run(self) -> list[Any]:
        """Scores all benchmarks; the lines of their table. A stopped call has kept those that were finished.

        Raises:
            LeaseHeld: the run is running, or somebody else scores it.
            UserError: a file is missing or damaged, or the folder holds the scores of another model.
        """
        with self.held() as found:
            return self.score(found)

    @contextmanager
    def held(self) -> Iterator[Preflight]:
        """The folder, which nobody else writes meanwhile, of a model that can be scored.

        Raises:
            LeaseHeld, UserError: as :meth:`run`.
        """
        holder = Lease(self.trained.folder / LEASE).holder() if self.trained.is_run else None
        if holder is not None:
            raise self._held(self.trained.folder)
        found = self.trained.check()
        for file in ("result.json", "benchmarks.json"):
            if (self.out / file).exists() and not read_record(self.out / file):
                raise UserError(f"{self.out / file} is damaged, so nothing can be added to it.", advice="Give --out.")
        self.out.mkdir(parents=True, exist_ok=True)
        lease = Lease(self.out / LEASE)
        try:
            lease.acquire(wait=False)
        except LeaseHeld as error:
            raise self._held(self.out) from error
        try:
            yield found
        finally:
            self.scoring.close()
            lease.release()

    def _held(self, folder: Path) -> LeaseHeld:
        return LeaseHeld(
            f"{folder} is being written by a run or an evaluation that has not ended.",
            advice="Wait for it to end (mgm-exp status), or stop it, and give the same command again.",
        )

    def score(self, found: Preflight) -> list[Any]:
        """Scores all benchmarks in the folder that is held; the lines of their table."""
        weights = self.trained.weights()
        model = {"name": self.config.model.name, "weights": weights.key if weights else None}
        self._claim_folder({**model, "fingerprint": found.sources.model})
        curated = self.trained.stage("curate")
        if self.config.eval.robustness.long_tail and curated is None:
            raise ConfigError(
                "eval.robustness.long_tail=true needs the rows that the model was trained on, and the store does not "
                "hold them.",
                advice="Give eval.robustness.long_tail=false, or paths.store=DIR.",
            )
        for name in self.config.eval.benchmarks:
            benchmark = self.benchmark(name, found)
            rows = curated.path if curated else None
            self.scoring.score_all(found, benchmark, weights, self.label, rows, self._merge)
        return self.scoring.lines

    def benchmark(self, name: str, found: Preflight) -> Any:
        """A benchmark with its questions, as the configuration describes it."""
        from mgm_exp import evaluate

        if found.needs_demo and self._demo_folder is None:
            self._demo_folder = self._demo()
        return (self.load or evaluate.load_benchmark)(name, self.config, self._demo_folder)

    def _demo(self) -> Path:
        from mgm_exp.data import stages as data

        payload = stages.demo_payload(self.config)
        return self._produce("demo", payload, lambda work: data.make_demo(self.config, work, self.tell)).path

    def _produce(
        self, stage: str, payload: stages.Payload, make: Callable[[Path], dict[str, Any]], /, *, label: str = ""
    ) -> StageOutput:
        name = label or stage
        output = self.store.produce(
            stage,
            stages.key_of(stage, payload),
            make,
            inputs=payload,
            on_wait=lambda why: self.say(f"{name}: waiting, {why}"),
        )
        is_new = not output.reused or output.key in self.made
        self.say(
            f"{name}: made {output.key} in {output.seconds:.1f} s{' for all models' if output.reused else ''}"
            if is_new
            else f"{name}: reused {output.key} ({output.seconds:.1f} s saved)"
        )
        return output

    def _claim_folder(self, model: dict[str, Any]) -> None:
        """A folder that is not the run's own gets a record of the model, and takes no other model's scores."""
        if self.trained.is_run and self.out == self.trained.folder:
            return
        manifest = self.out / "manifest.json"
        before = read_record(manifest)
        is_anothers = before.get("model") != model if before else (self.out / "result.json").exists()
        if is_anothers:
            raise UserError(
                f"{self.out} holds the results of another model, and the two would be mixed.",
                advice="Give an --out folder of its own to each model.",
            )
        if not before:
            write_json_atomic(
                manifest,
                {
                    "schema_version": SCHEMA_VERSION,
                    "run_id": f"{self.trained.folder.name}-evaluated-{secrets.token_hex(4)}",
                    "seed": self.config.seed,
                    "stages": [],
                    "model": model,
                    "device": {"type": self.config.device.value},
                    "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
                },
            )

    def _merge(self, benchmark: Any, predictions: Path, metrics: Mapping[str, float]) -> None:
        """Puts a benchmark's scores in place of those of an earlier evaluation; all else in the files stays."""
        from mgm_exp import evaluate

        path = self.out / "result.json"
        result = read_record(path) or self._new_result()
        keys, values = dict(result.get("eval_keys") or {}), dict(result.get("metrics") or {})
        name = benchmark.name
        is_same = keys.get(name) == json.loads(json.dumps(self.scoring.eval_keys[name]))

        def stays(key: str) -> bool:
            if is_same:
                return not key.startswith(f"{name}/") or key.startswith((name + _OF_TRAINING, name + _BASELINES))
            # What corrupted images cost was measured against the answers that are replaced now.
            is_drop = key.startswith(f"{name}.") and _DROP in key
            return not is_drop and (not key.startswith(f"{name}/") or key == name + _OF_TRAINING)

        result["metrics"] = {**{key: value for key, value in values.items() if stays(key)}, **metrics}
        result["eval_keys"] = {**keys, name: self.scoring.eval_keys[name]}
        write_json_atomic(path, result)
        table = evaluate.as_json(self.scoring.lines)
        mine = {line.benchmark for line in self.scoring.lines}
        before = [
            line
            for line in read_record(self.out / "benchmarks.json").get("lines", [])
            if line["benchmark"] not in mine and stays(f"{line['benchmark']}/{line['metric']}")
        ]
        table["lines"] = before + table["lines"]
        write_json_atomic(self.out / "benchmarks.json", table)

    def _new_result(self) -> dict[str, Any]:
        """Nothing is trained here; a run without a result was killed, and gets none that says it had ended."""
        from mgm_exp.record import empty_result

        is_own = self.trained.is_run and self.out == self.trained.folder
        manifest = read_record(self.out / "manifest.json")
        return empty_result(manifest.get("run_id", self.out.name), "interrupted" if is_own else "completed")
