"""Steps of a run, computed again from what it recorded, and compared bit by bit.

    findings = Replay(read_run(folder), scratch, steps=10, ...).run()

Everything that determines a stage stands in its key, so the inputs are found like those of any run: data is prepared
from its files as they are now (a row that was changed since is a difference, and is named), trained inputs come from
the run's store, or are made again where that lost them. All of it happens in a scratch folder: neither the run nor its
store is written to.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgm_exp import stages
from mgm_exp.compose import checked, explained, parse, refuse_unsafe
from mgm_exp.config import AdapterKind, ExperimentConfig, LaunchConfig, Machines, plain
from mgm_exp.errors import ConfigError, Interrupted, TrainingFailed, UserError
from mgm_exp.folders import open_store, read_record
from mgm_exp.preflight import Preflight, check
from mgm_exp.preparation import Preparation, Prepared
from mgm_exp.replay_findings import (
    Difference,
    Findings,
    Source,
    changed_inputs,
    changed_row,
    changed_surroundings,
    first_difference,
    steps_of,
)
from mgm_exp.store import StageOutput, Store, file_sha256, read_yaml, verify
from mgm_exp.train.pack.compatible import why_alone
from mgm_exp.trained import paths_of, refuse_places

if TYPE_CHECKING:
    from mgm_exp.train import TrainJob

TRAINED = ("align", "instruct")
# Overrides that say where something is now; whether it is what it was is found from its content.
_PLACE = re.compile(r"(?:name|paths\.\w+|tracker\.\w+|[\w.]*\.(?:path|image_root|vision_tower|vision_tower_aux))=")
# Of a checkpoint, what two equal runs have byte for byte; the others hold times.
_SAME_BYTES = ("trainable.safetensors", "optimizer.safetensors", "rng-*.json")


@dataclass(frozen=True)
class Recorded:
    """A run as it was recorded.

    Args:
        folder: The run's.
        config: Its configuration, with what is asked to be different.
        asked: The overrides that make it different.
        manifest: Of the run; empty where it ended before it wrote one.
        rows: Of its ``metrics.jsonl``.
    """

    folder: Path
    config: ExperimentConfig
    asked: tuple[str, ...]
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]

    def key_of(self, stage: str) -> str | None:
        """The key that the run had for a stage."""
        entries = self.manifest.get("stages")
        keys = [e.get("key") for e in entries if isinstance(e, dict) and e.get("name") == stage] if entries else []
        return str(keys[-1]) if keys and keys[-1] else None

    @property
    def begun(self) -> dict[str, dict[str, Any]]:
        """The stages that went on from another run's, and from what."""
        taken = self.manifest.get("continued_from")
        found = taken.get("stages") if isinstance(taken, dict) else None
        return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}

    @property
    def threads(self) -> int | None:
        """CPU threads that the run computed with."""
        device = self.manifest.get("device")
        threads = device.get("threads") if isinstance(device, dict) else None
        return threads if isinstance(threads, int) and 0 < threads <= 1024 else None


def read_run(path: Path, overrides: Sequence[str] = ()) -> Recorded:
    """What a run recorded of itself.

    Args:
        path: The run's folder.
        overrides: Keys that are to have another value than in the run.

    Raises:
        UserError: it is no run's folder, or an override cannot be used.
    """
    from mgm_exp.train.metrics_file import read_rows

    folder = Path(path).expanduser().resolve()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{path} is not a run's folder: it has no config.yaml.", advice="Give outputs/runs/NAME/TIME.")
    refuse_unsafe(overrides)
    try:
        tree = OmegaConf.create(read_yaml(folder / "config.yaml"))
        given = _given(overrides)
        OmegaConf.update(tree, "paths", paths_of(folder, tree, given), merge=True)
        for key, value in given.items():
            OmegaConf.update(tree, key, value)
        # A run's folder may be another's, and commands for other machines stand in its configuration.
        was_packed = bool(OmegaConf.select(tree, "launch.pack"))
        OmegaConf.update(tree, "launch", plain(LaunchConfig(machines=Machines.here, max_restarts=0)))
        refuse_places(tree, {"eval.judge.url": None})  # nothing is scored
        config = checked(tree, overrides)
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, OmegaConfBaseException):
            raise explained(error, overrides) from error
        raise UserError(f"{folder / 'config.yaml'} cannot be read as a run's configuration: {error}") from error
    if was_packed and why_alone(config) is None:
        raise UserError(
            f"{path} was trained in a pack (launch.pack=true): its last bits depend on the trials beside it, and a "
            "replay computes it alone.",
            advice="Runs of other launchers can be replayed; a packed one equals them within rounding.",
        )
    try:
        rows = read_rows(folder / "metrics.jsonl")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'metrics.jsonl'} is damaged: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{folder / 'metrics.jsonl'} is damaged: a line holds no JSON object")
    return Recorded(folder, config, tuple(overrides), read_record(folder / "manifest.json"), rows)


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text, override in zip(overrides, parse(overrides), strict=True):
        if override.is_sweep_override() or override.is_delete() or override.is_add():
            raise ConfigError(f"{text}: a replay takes KEY=VALUE with one value each.")
        found[override.key_or_group] = override.value()
    return found


class Replay:
    """One replay; see the module.

    Args:
        recorded: The run.
        scratch: An empty folder to work in.
        steps: Steps of each stage; None: all that are recorded.
        start: The step whose checkpoint is continued; 0: the beginning.
        only: ``align`` or ``instruct``; None: both, as far as the run has them.
        threads: CPU threads; None: as many as the run had.
        profile: Folder for a profile of the steps (``train.profile``); None: none is made.
        tell: Told (what, done, total).
        say: Takes a sentence.
    """

    def __init__(
        self,
        recorded: Recorded,
        scratch: Path,
        *,
        steps: int | None = 10,
        start: int = 0,
        only: str | None = None,
        threads: int | None = None,
        profile: Path | None = None,
        tell: Callable[[str, int, int], None],
        say: Callable[[str], None],
    ) -> None:
        self.recorded, self.scratch = recorded, Path(scratch)
        self.steps, self.start, self.only = steps, start, only
        self.threads = threads or recorded.threads
        self.tell, self.say = tell, say
        self.config = recorded.config
        self.profile = profile
        if profile is not None:
            train = self.config.train
            self.config = replace(self.config, train=replace(train, profile=train.profile or True))
        self._there = open_store(replace(self.config.paths, mirror=None))
        self._made = Store(self.scratch / "store")
        self._keys: list[tuple[str, str, stages.Payload]] = []

    def run(self) -> Findings:
        """Replays stage after stage until one differs.

        Raises:
            UserError: the run recorded no step, has no such checkpoint, or a file that it was made of is not there.
            Interrupted: a signal.
        """
        wanted = self._wanted()
        compared: dict[str, int] = {}
        weights: list[str] = []
        notes: list[str] = []
        first: Difference | None = None
        with _threads(self.threads) as note:
            notes += note
            notes += [
                f"note: {stage} went on from another run after step {facts.get('step')}, with another split "
                f"({facts.get('split')}); the steps before may differ in their last bits, --from begins later"
                for stage, facts in self.recorded.begun.items()
                if stage in wanted
            ]
            found = check(self.config)
            prepared = self._prepare(found)
            for stage in wanted:
                with_inputs = self._inputs(stage, found, prepared)
                recorded = self._recorded_rows(stage)
                if not any("batch_name" in row for row in recorded):
                    notes.append(f"note: the rows of {stage} name no batches (an older version); they are not compared")
                job = replace(self._job(stage, with_inputs, prepared), profile=self.profile)
                first, compared[stage] = self._replay(job, recorded)
                if first is None:
                    first = self._compare_weights(job, weights)
                if first is not None:
                    break
            sources = self._sources(found, prepared)
        return Findings(str(self.recorded.folder), compared, first, sources, tuple(weights), tuple(notes))

    # -- what is replayed ------------------------------------------------------------------------------------------

    def _wanted(self) -> list[str]:
        """The stages that have steps to compare."""
        there = [stage for stage in TRAINED if steps_of(self.recorded.rows, stage)]
        if self.only is not None and self.only not in there:
            raise UserError(
                f"{self.recorded.folder} recorded no step of {self.only}; it has steps of {', '.join(there) or 'none'}."
            )
        wanted = [self.only] if self.only else there
        if not wanted:
            raise UserError(
                f"{self.recorded.folder} recorded no training step, so there is nothing to compare.",
                advice="mgm-exp doctor RUN says how far it came." if self.recorded.manifest else "",
            )
        if not self.start:
            return wanted
        continued = [stage for stage in wanted if self._checkpoint(stage).is_dir()]
        if not continued:
            raise self._no_checkpoint(wanted[-1])
        return continued

    def _recorded_rows(self, stage: str) -> list[dict[str, Any]]:
        rows = [dict(row) for row in steps_of(self.recorded.rows, stage) if row["step"] > self.start]
        steps = [row for row in rows if "loss" in row]
        if not steps:
            raise UserError(f"{self.recorded.folder} recorded no step of {stage} after step {self.start}.")
        if self.steps is not None and len(steps) > self.steps:
            last = steps[self.steps - 1]
            rows = rows[: rows.index(last) + 1]
        return rows

    def _checkpoint(self, stage: str) -> Path:
        return self.recorded.folder / "checkpoints" / stage / f"step-{self.start:06d}"

    def _no_checkpoint(self, stage: str) -> UserError:
        parent = self.recorded.folder / "checkpoints" / stage
        there = sorted(path.name for path in parent.glob("step-*")) if parent.is_dir() else []
        return UserError(
            f"{self.recorded.folder} has no checkpoint of {stage} after step {self.start}; it has "
            f"{', '.join(there) or 'none'}.",
            advice="Give one of these with --from, or 0 for the beginning.",
        )

    # -- what goes into a stage ------------------------------------------------------------------------------------

    def _produce(self, stage: str, payload: stages.Payload, make: Callable[[Path], dict[str, Any]], /) -> StageOutput:
        """The run's own output, read where it lies; else made again in the scratch folder."""
        key = stages.key_of(stage, payload)
        self._keys.append((stage, key, payload))
        entry = self._there.entry(stage, key)
        if entry is not None:
            return StageOutput(entry.path, key, True, entry.seconds, entry.meta, stage, entry.inputs)
        why = "changed since" if self.recorded.key_of(stage) not in (None, key) else "is not in the store any more"
        self.say(f"{stage}: {why}; it is made again in the scratch folder")
        return self._made.produce(stage, key, make, inputs=payload)

    def _taken_over(self, stage: str) -> StageOutput | None:
        """A stage that was made with other processes, wholly or in part, where the run went on from another one."""
        key = self.recorded.key_of(stage)
        if "continued_from" not in self.recorded.manifest or key is None:
            return None
        entry = self._there.entry(stage, key)
        return StageOutput(entry.path, key, True, entry.seconds, entry.meta, stage, entry.inputs) if entry else None

    def _prepare(self, found: Preflight) -> Prepared:
        return Preparation(self.config, found, self._produce, self.tell, lambda _: None).run()

    def _inputs(self, stage: str, found: Preflight, prepared: Prepared) -> tuple[Path | None, Path | None]:
        """The aligned connector and the cached visual tokens that a stage starts from."""
        if stage == "align":
            self._keys.append(self._payload_of(stage, found, prepared, None))
            return None, None
        aligned: StageOutput | None = None
        if self.config.train.align.max_steps != 0:
            payload = stages.align_payload(self.config, found.sources, prepared.curated.key)
            aligned = self._taken_over("align")
            if aligned is None:
                aligned = self._produce("align", payload, lambda work: self._train_whole("align", prepared, work))
        connector = aligned.path / "connector.safetensors" if aligned else None
        align_key = aligned.key if aligned else None
        features: StageOutput | None = None
        if self.config.train.cache_visual_tokens:
            from mgm_exp.train import encode_images_once

            features = self._produce(
                "features",
                stages.features_payload(self.config, found.sources, align_key, prepared.curated.key),
                lambda work: encode_images_once(
                    replace(self._job("instruct", (connector, None), prepared), stage="features", work=work),
                    on_progress=self.tell,
                ),
            )
        self._keys.append(self._payload_of(stage, found, prepared, align_key))
        return connector, features.path if features else None

    def _payload_of(
        self, stage: str, found: Preflight, prepared: Prepared, align_key: str | None
    ) -> tuple[str, str, stages.Payload]:
        curated = prepared.curated.key
        if stage == "align":
            payload = stages.align_payload(self.config, found.sources, curated)
        else:
            payload = stages.instruct_payload(self.config, found.sources, align_key, curated)
        if stage in self.recorded.begun:
            payload = {**payload, "continued": self.recorded.begun[stage]}
        return stage, stages.key_of(stage, payload), payload

    def _job(self, stage: str, inputs: tuple[Path | None, Path | None], prepared: Prepared) -> TrainJob:
        from mgm_exp.plan import fitted
        from mgm_exp.train import TrainJob

        return TrainJob(
            stage=stage,
            config=plain(fitted(self.config, stage)),
            records=prepared.curated.path / f"{stage}.jsonl",
            image_root=prepared.origins[stage].image_root,
            connector=inputs[0],
            visual_tokens=inputs[1],
            work=self.scratch / stage,
            demo=prepared.demo,
        )

    def _train_whole(self, stage: str, prepared: Prepared, work: Path) -> dict[str, Any]:
        from mgm_exp.train import run_stage

        job = replace(self._job(stage, (None, None), prepared), work=work)
        total = 0

        def on_start(steps: int, rows: list[dict[str, Any]]) -> None:
            nonlocal total
            total = steps

        def on_row(row: dict[str, Any]) -> None:
            self.tell(f"{stage}, all steps", int(row["step"]), total)

        return run_stage(job, on_start=on_start, on_row=on_row).to_dict()

    # -- the steps -------------------------------------------------------------------------------------------------

    def _replay(self, job: TrainJob, recorded: list[dict[str, Any]]) -> tuple[Difference | None, int]:
        """Computes the steps of ``recorded`` again; the first difference, and how many steps were compared."""
        from mgm_exp.train import run_stage

        job.checkpoints.mkdir(parents=True)
        if self.start:
            self._continue_from(job)
        wanted = sum("loss" in row for row in recorded)
        heard: list[dict[str, Any]] = []
        is_enough = False
        stopped: TrainingFailed | None = None

        def on_row(row: dict[str, Any]) -> None:
            heard.append(row)
            self.tell(f"replay {job.stage}", sum("loss" in r for r in heard), wanted)

        def should_stop() -> bool:
            nonlocal is_enough
            is_enough = is_enough or sum("loss" in row for row in heard) >= wanted
            return is_enough

        try:
            run_stage(job, on_row=on_row, should_stop=should_stop, say=self.say if self.profile else None)
        except Interrupted:
            if not is_enough:
                raise
        except TrainingFailed as error:  # the run may have failed there too; its rows say so
            stopped = error
        replayed = steps_of(heard, job.stage)
        end = recorded[-1]["step"]
        first = first_difference(job.stage, recorded, [row for row in replayed if row["step"] <= end][: len(recorded)])
        if stopped is not None and first is not None and first.replayed == "none":
            first = Difference(job.stage, first.step, "stopped", first.recorded, stopped.message)
        if first is not None:
            first = replace(first, samples=self._samples(job, first.step))
        compared = sum("loss" in row for row in replayed if row["step"] <= end)
        return first, min(compared, first.step - self.start) if first else compared

    def _continue_from(self, job: TrainJob) -> None:
        """Puts a copy of the run's checkpoint where the stage looks for one."""
        folder = self._checkpoint(job.stage)
        if not folder.is_dir() or folder.is_symlink():
            raise self._no_checkpoint(job.stage)
        faults = verify(folder)
        if faults:
            raise UserError(f"The checkpoint {folder} is damaged: {'; '.join(faults)}.", advice="Give another --from.")
        shutil.copytree(folder, job.checkpoints / folder.name)

    def _samples(self, job: TrainJob, step: int) -> tuple[str, ...]:
        """Ids of the samples of a step, as the replay's rows have them."""
        from mgm_exp.model import family_of
        from mgm_exp.train.assemble import open_dataset, open_plan
        from mgm_exp.train.job import stage_settings
        from mgm_exp.train.ranks import Ranks

        config = job.experiment()
        settings = stage_settings(config, job.stage)
        processor = family_of(config.model).processor(config.model, settings.max_length, job.stage)
        dataset = open_dataset(job, config, settings, processor)
        plan = open_plan(dataset, settings, Ranks.alone(config.device))
        return tuple(dataset.records[i].id for i in plan.global_batch(step - 1))

    def _compare_weights(self, job: TrainJob, equal: list[str]) -> Difference | None:
        """Compares the files of checkpoints and results that both have."""
        for folder in sorted(job.checkpoints.glob("step-*")):
            mine = self.recorded.folder / "checkpoints" / job.stage / folder.name
            step = int(folder.name.partition("-")[2])
            if step == self.start or not mine.is_dir():
                continue
            for pattern in _SAME_BYTES:
                for file in sorted(folder.glob(pattern)):
                    first = _compare_files(job.stage, step, mine / file.name, file)
                    if first is not None:
                        return first
                    equal.append(f"{job.stage}/{folder.name}/{file.name}")
        if job.stage == "instruct" and job.out.is_dir():
            kind = "model" if self.config.adapter.kind is AdapterKind.full else "adapter"
            last = steps_of(self.recorded.rows, "instruct")[-1]["step"]
            for file in sorted((job.out / kind).glob("*.safetensors")):
                mine = self.recorded.folder / kind / file.name
                if mine.is_file():
                    first = _compare_files(job.stage, last, mine, file)
                    if first is not None:
                        return first
                    equal.append(f"{kind}/{file.name}")
        return None

    # -- why -------------------------------------------------------------------------------------------------------

    def _sources(self, found: Preflight, prepared: Prepared) -> tuple[Source, ...]:
        """What is not as it was when the run was recorded, the likeliest source of a difference first."""
        from mgm_exp.record import collect_environment
        from mgm_exp.record.environment import files_changed

        asked = [text for text in self.recorded.asked if not _PLACE.match(text)]
        sources = [Source("settings", f"asked for {text}") for text in asked]
        if self.recorded.threads not in (None, self.threads):
            sources.append(Source("threads", f"asked for {self.threads}, the run had {self.recorded.threads}"))
        for stage, key, payload in self._keys:
            before = self.recorded.key_of(stage)
            if before is not None and before != key:
                sources += self._changed_stage(stage, before, payload, prepared)
                break  # what comes after differs for that reason
        now = collect_environment()
        now["device"] = {**now["device"], "type": found.sources.device}
        now["device"]["threads"] = self.recorded.threads  # said above
        git = self.recorded.manifest.get("git")
        commit = str(git.get("commit")) if isinstance(git, dict) else ""
        return (*sources, *changed_surroundings(self.recorded.manifest, now, files_changed(commit)))

    def _changed_stage(self, stage: str, before: str, payload: stages.Payload, prepared: Prepared) -> Iterator[Source]:
        """Why a stage has another key than in the run."""
        is_data = stage not in ("align", "features", "instruct")
        entry = self._there.entry(stage, before)
        if entry is None:
            if not self.recorded.asked:
                yield Source("data" if is_data else "settings", f"{stage} has another key ({before} in the run)")
            return
        changed = dict(changed_inputs(entry.inputs, payload))
        if not changed:
            yield Source("code", f"{stage} is made by another version of the code")
        if "model" in changed:
            yield Source("model", f"the files of the model changed ({changed.pop('model')})")
        asked = {text.partition("=")[0].lstrip("+").rpartition(".")[2] for text in self.recorded.asked}
        rest = {name: how for name, how in changed.items() if name.rpartition(".")[2] not in asked}
        if rest:
            details = ", ".join(f"{name} {how}" for name, how in list(rest.items())[:4])
            row = self._changed_row(prepared) if is_data else None
            says = f"{row}; " if row else ""
            yield Source("data" if is_data else "settings", f"{says}inputs of {stage}: {details}")

    def _changed_row(self, prepared: Prepared) -> str | None:
        """The first curated row that is not as it was."""
        before = self.recorded.key_of("curate")
        entry = self._there.entry("curate", before) if before else None
        if entry is None:
            return None
        pairs = ((entry.path / f"{stage}.jsonl", prepared.curated.path / f"{stage}.jsonl") for stage in TRAINED)
        return next((row for row in (changed_row(*pair) for pair in pairs) if row), None)


def _compare_files(stage: str, step: int, recorded: Path, replayed: Path) -> Difference | None:
    digests = [file_sha256(path) if path.is_file() else "none" for path in (recorded, replayed)]
    if digests[0] == digests[1]:
        return None
    return Difference(stage, step, f"weights ({replayed.name})", f"SHA-256 {digests[0]}", f"SHA-256 {digests[1]}")


@contextmanager
def _threads(wanted: int | None) -> Iterator[list[str]]:
    """Computes with as many CPU threads as the run did: sums are split by their number."""
    import torch

    if wanted is None:
        yield ["note: the run did not record its number of CPU threads; this replay used this machine's"]
        return
    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(wanted)
    os.environ["OMP_NUM_THREADS"] = str(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        yield [f"note: {wanted} threads share {cores} cores here"] if cores < wanted else []
    finally:
        torch.set_num_threads(before)
        if variable is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = variable
