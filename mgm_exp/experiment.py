"""The story of one run: curate -> align -> instruct -> evaluate -> record.

Every stage goes through the store: what was made before under the same key is reused, what was interrupted continues
from inside, and two processes that need the same stage make it once. Read :meth:`Experiment.story` first.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from mgm_exp import stages
from mgm_exp.alerts import AlertSink
from mgm_exp.config import AdapterKind, ExperimentConfig, ModelFamily, plain
from mgm_exp.continuation import Origin, offered
from mgm_exp.doctor import explained_error
from mgm_exp.errors import DiskFullError, Interrupted, MgmError, Paused, Pruned
from mgm_exp.folders import open_store, read_record
from mgm_exp.monitor import MonitorSink
from mgm_exp.preflight import Preflight, check
from mgm_exp.preparation import Preparation
from mgm_exp.record import Recorder, explain, open_recorder, redact
from mgm_exp.scoring import Scoring
from mgm_exp.search.reports import reporter_for
from mgm_exp.signals import stop_on_signals
from mgm_exp.store import (
    Lease,
    StageOutput,
    hard_link_or_copy,
    link_tree,
    write_atomic,
    write_json_atomic,
)

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
# A configuration is some hundred lines: libyaml writes them twenty times faster.
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@dataclass(frozen=True)
class Company:
    """What a run leaves to those whom it shares its process with.

    Args:
        train_stage: Trains a stage, called as :func:`mgm_exp.train.run_stage`.
        before_waiting: Called with a stage's name before the run waits for another process that makes it; may raise.
    """

    train_stage: Callable[..., Any]
    before_waiting: Callable[[str], None]


def run_experiment(
    config: ExperimentConfig,
    run_dir: Path,
    *,
    command: list[str],
    overrides: list[str],
    sweep: str | None = None,
    company: Company | None = None,
) -> dict[str, Any]:
    """Runs one experiment in its folder and records it, whatever happens.

    Args:
        config: The checked configuration.
        run_dir: The run's folder; an unfinished run of the same configuration in it is continued.
        command: The command line, for the manifest.
        overrides: What the command line changes, for the tracker's tags.
        sweep: Name of the sweep that this run belongs to.
        company: Whom it shares its process with; None: nobody.

    Returns:
        The content of ``result.json``.

    Raises:
        Interrupted: a signal stopped the run; its state is saved.
        MgmError: the run failed; ``result.json`` says why. (One that a search stopped has the status ``pruned``, one
            that waits at a rung ``paused``.)
    """
    run_dir = Path(run_dir).resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    lease = Lease(run_dir / ".lease")
    lease.acquire(wait=False)
    try:
        with stop_on_signals():
            return Experiment(config, run_dir, command, overrides, sweep, company).run()
    finally:
        lease.release()


class Experiment:
    """One run: its configuration, its folder, and what became of its stages."""

    def __init__(
        self,
        config: ExperimentConfig,
        run_dir: Path,
        command: list[str],
        overrides: list[str],
        sweep: str | None,
        company: Company | None = None,
    ) -> None:
        self.config = config
        self._company = company
        self.run_dir = run_dir
        self.store = open_store(config.paths)
        self.started = time.time()
        self.sweep = sweep
        self.origin: Origin | None = None
        # Of a run that goes on from its rung: what it took up to there.
        before = read_record(self.run_dir / "result.json")
        self.seconds_before = float(before.get("wall_s") or 0.0) if before.get("status") == "paused" else 0.0
        self.demo: Path | None = None
        self.origins: dict[str, Any] = {}
        self.trained: dict[str, Any] = {}
        self.planned_steps: int | None = None
        self.reporter = reporter_for(config, run_dir)
        self.manifest: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "run_id": _run_id(run_dir, config),
            "config_hash": stages.config_hash(config),
            "command": redact(command),
            "seed": config.seed,
            "stages": [],
            "data": {"name": config.data.name, "fingerprint": None, "n_train": None},
            "model": {"name": config.model.name, "fingerprint": None, "n_parameters": None},
            "trainable": {"n_lora": 0, "n_other": 0, "n_total": 0, "patterns": []},
            "started_at": _now(),
            "ended_at": None,
        }
        write_atomic(run_dir / "config.yaml", yaml.dump(redact(plain(config)), Dumper=_DUMPER, sort_keys=False))
        self.alerts = AlertSink(config.alerts, config.monitor.limits)
        self.monitor = MonitorSink(config, run_dir, [self.alerts.sample])
        self.recorder: Recorder = open_recorder(
            config,
            run_dir,
            run_id=self.manifest["run_id"],
            overrides=overrides,
            sweep=sweep,
            further=[self.alerts, self.monitor],
        )
        self.scoring = Scoring(config, run_dir, self._produce, self.recorder.progress, self.recorder.say)

    def run(self) -> dict[str, Any]:
        """The story, and its record: a run that fails leaves a ``result.json`` with cause and advice."""
        try:
            with self.recorder:
                try:
                    self.story()
                except Pruned as error:
                    self.recorder.say(f"pruned: {error}")
                    return self._finish("pruned", error)
                except Paused as error:
                    self.recorder.say(f"paused: {error}")
                    return self._finish("paused", error)
                except BaseException as error:
                    interrupted = isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit))
                    try:
                        self._finish("interrupted" if interrupted else "failed", error)
                    except DiskFullError as full:
                        # What ended it says more than that there is no room for the record of it either.
                        log.warning("the run's record is not written: %s", full)
                    raise
                return self._finish("completed", None)
        except KeyboardInterrupt as error:
            raise Interrupted("Stopped by Ctrl-C; the same command continues.") from error
        finally:
            self.scoring.close()

    def story(self) -> None:
        """Curate -> align -> instruct -> evaluate; what each one needs is what the one before it left."""
        found = check(self.config)
        self.origin = Origin.of(self.config, self.store)
        self.recorder.begin()
        self._note_environment(found)
        is_new = self.origin is None and self.sweep is None and not (self.run_dir / "checkpoints").is_dir()
        if is_new and (offer := offered(self.run_dir, self.config)):
            self.recorder.say(offer)
        curated = self._curate(found)
        aligned = self._align(found, curated)
        tuned = self._instruct(found, curated, aligned)
        self._keep_model(tuned)
        for name in self.config.eval.benchmarks:
            self._evaluate(found, name, curated, aligned, tuned)
        self._show_scores()

    # -- stages ------------------------------------------------------------------------------------------------

    def _curate(self, found: Preflight) -> StageOutput:
        """Usable rows of both stages, from the user's files or the generated demo data."""
        recorder = self.recorder
        prepared = Preparation(self.config, found, self._produce, recorder.progress, recorder.say).run()
        curated = prepared.curated
        self.demo, self.origins = prepared.demo, prepared.origins
        self.manifest["data"].update(fingerprint=curated.meta["fingerprint"], n_train=curated.meta["instruct"]["kept"])
        captions = prepared.captions.meta if prepared.captions else None
        content = {"name": self.config.data.name, "recaption": captions, **curated.meta}
        write_json_atomic(self.run_dir / "data.json", content)
        if not (self.run_dir / "data.html").exists():
            hard_link_or_copy(curated.path / "report.html", self.run_dir / "data.html")
        return curated

    def _align(self, found: Preflight, curated: StageOutput) -> StageOutput | None:
        """Stage 1: projector and mining learn to speak to the LLM, on captions."""
        if self.config.model.family is ModelFamily.hf:
            return None
        if self.config.train.align.max_steps == 0:
            self.recorder.say("align: skipped (train.align.max_steps=0); the checkpoint's connector is used as it is")
            return None
        return self._train(
            "align", lambda config: stages.align_payload(config, found.sources, curated.key), curated, None, None
        )

    def _instruct(self, found: Preflight, curated: StageOutput, aligned: StageOutput | None) -> StageOutput:
        """Stage 2: the adapter (or the whole LLM) learns to answer, on conversations."""
        from mgm_exp import train

        config = self.config
        align_key = _key(aligned)
        features = None
        if config.train.cache_visual_tokens:
            self.recorder.say(
                "instruct: the connector is frozen and visual tokens are computed once "
                "(train.freeze_connector, train.cache_visual_tokens); the official recipe trains it here too"
            )
            job = self._job("features", curated, aligned, None)
            features = self._produce(
                "features",
                stages.features_payload(config, found.sources, align_key, curated.key),
                lambda work: train.encode_images_once(job(work), on_progress=self.recorder.progress),
            )
        tuned = self._train(
            "instruct",
            lambda config: stages.instruct_payload(config, found.sources, align_key, curated.key),
            curated,
            aligned,
            features,
        )
        summary = tuned.meta
        self.trained = summary
        self.manifest["trainable"] = summary["trainable"]
        self.manifest["model"]["n_parameters"] = summary["n_parameters"]
        return tuned

    def _evaluate(
        self,
        found: Preflight,
        name: str,
        curated: StageOutput,
        aligned: StageOutput | None,
        tuned: StageOutput,
    ) -> None:
        """One benchmark on the trained model; the demo also on what came before it, and without eyes."""
        from mgm_exp import evaluate

        benchmark = evaluate.load_benchmark(name, self.config, self.demo)
        self.scoring.score_all(found, benchmark, tuned, "the trained model", curated.path, self._show_predictions)
        if name != "demo" or not self.config.eval.demo.baselines:
            return
        base = self.scoring.score(found, benchmark, None, "untouched base")
        self.scoring.metrics[f"{name}/baseline_base"] = base.meta["metrics"][f"{name}/accuracy"]
        if aligned is not None:
            before = self.scoring.score(found, benchmark, aligned, "aligned only")
            self.scoring.metrics[f"{name}/baseline_aligned"] = before.meta["metrics"][f"{name}/accuracy"]
        guess = evaluate.question_only_accuracy(benchmark, curated.path / "instruct.jsonl")
        self.scoring.metrics[f"{name}/baseline_question_only"] = guess

    def _show_predictions(self, benchmark: Any, predictions: Path, metrics: Mapping[str, float]) -> None:
        self.recorder.predictions(benchmark.name, predictions, benchmark.image_root, dict(metrics))

    def _show_scores(self) -> None:
        """The table that a run ends with, also as ``benchmarks.json``."""
        from mgm_exp import evaluate

        write_json_atomic(self.run_dir / "benchmarks.json", evaluate.as_json(self.scoring.lines))
        self.recorder.say(evaluate.render(self.scoring.lines))

    # -- how a stage is made, shared and recorded -------------------------------------------------------------

    def _produce(
        self, stage: str, payload: stages.Payload, make: Callable[[Path], dict[str, Any]], *, label: str = ""
    ) -> StageOutput:
        """Takes the stage from the store, or makes it; says which, and notes it in the manifest."""
        name = label or stage
        self.recorder.stage(name)

        def on_wait(why: str) -> None:
            self.recorder.say(f"{name}: waiting, {why}")
            if self._company is not None:
                self._company.before_waiting(stage)

        output = self.store.produce(
            stage,
            stages.key_of(stage, payload),
            make,
            inputs=payload,
            on_wait=on_wait,
        )
        self.manifest["stages"].append(
            {"name": name, "key": output.key, "reused": output.reused, "seconds": round(output.seconds, 3)}
        )
        self.recorder.say(
            f"{name}: reused {output.key} ({output.seconds:.1f} s saved)"
            if output.reused
            else f"{name}: made {output.key} in {output.seconds:.1f} s"
        )
        self._write_manifest()
        return output

    def _job(
        self, stage: str, curated: StageOutput, aligned: StageOutput | None, features: StageOutput | None
    ) -> Callable[[Path], Any]:
        from mgm_exp.plan import fitted
        from mgm_exp.train import TrainJob

        rows = "align" if stage == "align" else "instruct"
        config = fitted(self.config, stage)
        if config is not self.config:
            blocks = config.model.gradient_checkpointing
            self.recorder.say(f"{stage}: model.gradient_checkpointing=auto: {blocks} blocks of the LLM are recomputed")
        return lambda work: TrainJob(
            stage=stage,
            config=plain(config),
            records=curated.path / f"{rows}.jsonl",
            image_root=self.origins[rows].image_root,
            connector=aligned.path / "connector.safetensors" if aligned else None,
            visual_tokens=features.path if features else None,
            work=work,
            demo=self.demo,
            profile=self.run_dir / "profile" if self.config.train.profile else None,
        )

    def _train(
        self,
        stage: str,
        payload_under: Callable[[ExperimentConfig], stages.Payload],
        curated: StageOutput,
        aligned: StageOutput | None,
        features: StageOutput | None,
    ) -> StageOutput:
        """One trained stage: its rows appear in the run's ``metrics.jsonl`` while it runs, or when it is reused.

        Args:
            payload_under: What the stage is made of under a configuration.
        """
        from mgm_exp import train

        job = self._job(stage, curated, aligned, features)
        if stage == "instruct" and self.reporter.was_stopped:
            raise Pruned("The instruct stage was stopped before: other trials do better.")
        payload = self._payload(stage, payload_under, curated)

        def make(work: Path) -> dict[str, Any]:
            begun = job(work)
            self._begin(stage, work)
            if stage == "instruct" and self.config.sweep.pause_after is not None:
                self._pause_if_there(begun)
            summary = (self._company.train_stage if self._company else train.run_stage)(
                begun,
                on_start=lambda total, rows: self._stage_started(stage, total, rows),
                on_row=self.recorder.row,
                on_checkpoint=lambda folder: self._keep_checkpoint(stage, folder),
                say=self.recorder.say,
                on_progress=self.recorder.progress,
                on_validation=self._validated if stage == "instruct" else None,
            )
            return summary.to_dict()

        try:
            output = self._produce(stage, payload, make)
        except Pruned:
            if self.reporter.was_stopped or not self.reporter.is_paused:
                raise
            raise self._paused() from None  # it was told to stop there as a run is that does worse than others
        if output.reused:
            rows = _json_lines(output.path / "metrics.jsonl")
            self._stage_started(stage, int(output.meta["steps"]), rows)
            if self.config.train.profile:
                self.recorder.say(
                    f"{stage}: train.profile: nothing was trained here that could be recorded; its first steps are "
                    f"computed again and recorded by: mgm-exp replay {self.run_dir} --profile {self.run_dir}/profile"
                )
        self.recorder.stage_finished(stage, output.meta, reused=output.reused)
        return output

    def _pause_if_there(self, begun: Any) -> None:
        """Raises Paused where the stage has come to the rung already, in this run or in one of equal settings."""
        from mgm_exp.train.metrics_file import read_rows

        for row in read_rows(begun.metrics):
            if row.get("event") == "validation":
                self._validated(int(row["step"]), float(row["value"]))
        if self.reporter.is_paused:
            raise self._paused()

    def _paused(self) -> Paused:
        before = read_record(self.run_dir / "result.json").get("planned_steps")
        self.planned_steps = self.planned_steps or before
        of = f" of {self.planned_steps}" if self.planned_steps else ""
        return Paused(
            f"The instruct stage paused after step {self.reporter.last_step}{of}; its state is saved.",
            advice="The same command with a later sweep.pause_after, or without it, goes on from there."
            if self.sweep is None
            else "It goes on from there when its search promotes it.",
        )

    def _payload(
        self, stage: str, under: Callable[[ExperimentConfig], stages.Payload], curated: StageOutput
    ) -> stages.Payload:
        """What a trained stage is made of, and what it goes on from."""
        if self.origin is None:
            return under(self.config)
        payload, is_finished = self.origin.payload_of(stage, under, self.config, curated.key)
        if is_finished:
            self.recorder.say(f"{stage}: as {self.origin.folder} has finished it")
        self.manifest["continued_from"] = self.origin.record()
        return payload

    def _begin(self, stage: str, work: Path) -> None:
        """What a stage finds in its work folder at its beginning: nothing, or what it goes on from."""
        begun = self.origin.begun.get(stage) if self.origin else None
        if begun is not None:
            self._keep_checkpoint(stage, begun.put_into(work))
            self.recorder.say(f"{stage}: goes on from {begun.checkpoint}")

    def _stage_started(self, stage: str, total: int, rows: list[dict[str, Any]]) -> None:
        """Hands on what a stage has already: validation points of a stage that was begun or made elsewhere, too."""
        self.recorder.stage_started(stage, total, rows)
        if stage == "instruct":
            self.planned_steps = total
        for row in rows:
            if row.get("event") == "validation":
                self._validated(int(row["step"]), float(row["value"]))

    def _validated(self, step: int, value: float) -> bool:
        """A validation point; whether the search that this run belongs to wants it to stop."""
        benchmark = self.config.train.validation.benchmark or self.config.eval.benchmarks[0]
        self.scoring.metrics[f"{benchmark}/validation"] = value
        return self.reporter.report(step, value)

    # -- what the run folder keeps ----------------------------------------------------------------------------

    def _keep_checkpoint(self, stage: str, folder: Path) -> None:
        """Hard-links a finished checkpoint into the run folder and drops links to those that were pruned."""
        kept = self.run_dir / "checkpoints" / stage
        link_tree(folder, kept / folder.name)
        alive = {path.name for path in folder.parent.iterdir()}
        for old in kept.iterdir():
            if old.name not in alive:
                _remove(old)

    def _keep_model(self, tuned: StageOutput) -> None:
        """The trained model lies in the run folder itself, so that the folder can be moved or archived alone."""
        kind = "model" if self.config.adapter.kind is AdapterKind.full else "adapter"
        target = self.run_dir / kind
        if not target.exists():
            link_tree(tuned.path / kind, target)

    def _note_environment(self, found: Preflight) -> None:
        from mgm_exp.record import collect_environment

        self.manifest.update(collect_environment())
        self.manifest["device"] = {**_mapping(self.manifest.get("device")), "type": found.sources.device}
        self.manifest["model"].update(fingerprint=found.sources.model)
        self._write_manifest()
        for line in found.notes:
            self.recorder.say(line)

    def _write_manifest(self) -> None:
        write_json_atomic(self.run_dir / "manifest.json", self.manifest)

    def _finish(self, status: str, error: BaseException | None) -> dict[str, Any]:
        """Writes ``manifest.json`` and ``result.json`` and closes the tracker."""
        config = self.config
        self.manifest["ended_at"] = _now()
        self.manifest["system"] = self.monitor.end()
        if "git" not in self.manifest:
            from mgm_exp.record import collect_environment

            self.manifest.update(collect_environment())
        self._write_manifest()
        objective = config.sweep.objective or f"{config.eval.benchmarks[0]}/accuracy"
        result = {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.manifest["run_id"],
            "status": status,
            "metrics": self.scoring.metrics,
            "eval_keys": self.scoring.eval_keys,
            "objective": self.scoring.metrics.get(objective),
            "steps": self.trained.get("steps", self.reporter.last_step),
            "planned_steps": self.planned_steps,
            "wall_s": round(self.seconds_before + time.time() - self.started, 3),
            "train_tokens_per_s": self.trained.get("train_tokens_per_s"),
            "peak_memory_gib": self.trained.get("peak_memory_gib"),
            "trainable_parameters": self.manifest["trainable"]["n_total"] or None,
            "error": None,
        }
        if error is not None and status == "failed":
            explained = explain(error)
            # Of a run that was refused its error is shown, and nothing else; its log has both.
            say = self.recorder.say if self.recorder.has_begun else self.recorder.note
            if not self.recorder.has_begun:
                say(f"{explained['type']}: {explained['message']} {explained['advice']}".strip())
            result["error"] = explained_error(explained, self.run_dir, say)
        elif status in ("interrupted", "paused", "pruned") and isinstance(error, MgmError):
            result["error"] = explain(error)
        write_json_atomic(self.run_dir / "result.json", result)
        self.recorder.finish(result)
        return result


def _key(output: StageOutput | None) -> str | None:
    return output.key if output else None


def _run_id(run_dir: Path, config: ExperimentConfig) -> str:
    """The same for a resumed run, another one for the same command elsewhere; of characters that trackers take."""
    before = read_record(run_dir / "manifest.json")
    if before.get("config_hash") == stages.config_hash(config) and before.get("run_id"):
        return str(before["run_id"])
    # Two people who run one sweep would write into one W&B run.
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{run_dir.parent.name}-{run_dir.name}-{secrets.token_hex(4)}")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {} if value is None else {"name": value}


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
