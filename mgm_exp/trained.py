"""A model that can be scored: a run's folder, with or without the store it came from, or any MGM checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mgm_exp.command import quoted
from mgm_exp.compose import checked, compose, parse, refuse_unsafe
from mgm_exp.config import BENCHMARKS, ExperimentConfig, Precision
from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.folders import open_store, read_record
from mgm_exp.model.folders import ModelSource, find_source, is_adapter
from mgm_exp.preflight import Preflight, check_scoring
from mgm_exp.store import cached_tree_fingerprint, fingerprint, read_yaml

_WHERE = r"device|paths\.(root|store|mirror)|data\.max_megapixels|model\.(vision_tower|vision_tower_aux)"
_OF_RUNS = re.compile(rf"eval\.(?!benchmarks$|name$).+|{_WHERE}|model\.(path|attn_implementation)")
_OF_CHECKPOINTS = re.compile(
    rf"eval\.(?!benchmarks$|name$).+|{_WHERE}|model|model\.(attn_implementation|hidden_activation|mining|image_\w+)"
    r"|train\.(precision|max_length)|data\.demo_\w+"
)
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class TrainedWeights:
    """See :class:`mgm_exp.scoring.Weights`."""

    path: Path
    key: str


@dataclass(frozen=True)
class Trained:
    """A model and how it is to be scored.

    Args:
        folder: The run's or checkpoint's.
        config: The run's configuration, with what was asked for in ``eval``.
        is_run: Whether the folder is a run of ours.
        manifest: The run's; empty where there is none.
    """

    folder: Path
    config: ExperimentConfig
    is_run: bool
    manifest: dict[str, Any]

    def check(self) -> Preflight:
        """Whether model, device and files of the benchmarks are there.

        Raises:
            UserError: naming what is missing, or that the base is not the one that the run was trained on.
        """
        trained_on = _mapping(self.manifest.get("model")).get("fingerprint")
        if self.is_run and (self.folder / "model").is_dir():
            return check_scoring(self.config, base=str(trained_on or "unknown"))
        found = check_scoring(self.config)
        if trained_on not in (None, found.sources.model):
            raise ModelError(
                f"The adapter in {self.folder} was trained on another base than the files in {found.model_folder}.",
                advice="Give that base: model.path=DIR (and model.vision_tower, model.vision_tower_aux if they moved).",
            )
        return found

    def weights(self) -> TrainedWeights | None:
        """What the run trained; None: the checkpoint is scored as it is.

        Where the store still holds the run's instruct stage, and the folder's files are those, the key is the stage's:
        what the run scored is then found again.
        """
        cache = Path(self.config.paths.store) / "fingerprints.json"
        if is_adapter(self.folder):
            return TrainedWeights(self.folder, fingerprint({"adapter": cached_tree_fingerprint([self.folder], cache)}))
        if not self.is_run:
            return None
        kind = "model" if (self.folder / "model").is_dir() else "adapter"
        content = cached_tree_fingerprint([self.folder / kind], cache)
        stage = self.stage("instruct")
        if stage is not None and cached_tree_fingerprint([stage.path / kind], cache) == content:
            return stage
        return TrainedWeights(self.folder, fingerprint({kind: content}))

    def stage(self, name: str) -> TrainedWeights | None:
        """A stage that the run went through, if the store still holds it."""
        keys = [stage["key"] for stage in self.manifest.get("stages", []) if stage.get("name") == name]
        entry = open_store(self.config.paths).entry(name, keys[-1]) if keys else None
        return TrainedWeights(entry.path, entry.key) if entry else None


def find_trained(
    path: Path,
    benchmarks: Sequence[str] | None,
    overrides: Sequence[str],
    base: Path | None = None,
    devices: int = 1,
) -> Trained:
    """Reads what is to be scored, and on what.

    Args:
        path: A run's folder (``config.yaml`` beside ``adapter/`` or ``model/``), a checkpoint's (``config.json``), or
            an adapter's (``adapter_config.json``).
        benchmarks: Their names; None: those of the run.
        overrides: Where files are and how questions are asked (``eval.textvqa.questions=...``).
        base: Base model of an adapter folder that names none which exists here.
        devices: Processes that share the questions.

    Raises:
        ConfigError: a name or an override that cannot be used.
        ModelError: the folder holds no model.
    """
    folder = Path(path).expanduser().resolve()
    _check_names(benchmarks)
    refuse_unsafe(overrides)
    source = find_source(folder, base)
    is_run = not is_adapter(folder) and not (folder / "config.json").is_file()
    config = _of_run(folder, overrides) if is_run else _of_checkpoint(folder, source, benchmarks, overrides)
    section = config.eval
    config = replace(
        config,
        eval=replace(
            section,
            benchmarks=list(benchmarks or section.benchmarks),
            demo=replace(section.demo, baselines=False),
        ),
        train=replace(config.train, validation=replace(config.train.validation, every_steps=None)),
        devices=devices,
    )
    return Trained(folder, config, is_run, read_record(folder / "manifest.json") if is_run else {})


def _check_names(benchmarks: Sequence[str] | None) -> None:
    for place, name in enumerate(benchmarks or ()):
        if name not in BENCHMARKS:
            raise ConfigError(f"--benchmarks holds {name!r}; allowed are {', '.join(BENCHMARKS)}.")
        if name in (benchmarks or ())[:place]:
            raise ConfigError(f"--benchmarks names {name!r} twice; once is enough.")


def _of_run(folder: Path, overrides: Sequence[str]) -> ExperimentConfig:
    """A run's configuration, with the places of files as they are now."""
    try:
        values = read_yaml(folder / "config.yaml")
        tree = OmegaConf.create(values if isinstance(values, dict) else {})
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.yaml'} cannot be read as a run's config: {error}") from error
    given = _allowed(overrides, _OF_RUNS, "of a run only eval.*, device, paths.*, data.max_megapixels, model.path")
    OmegaConf.update(tree, "paths", paths_of(folder, tree, given), merge=True)
    for key, value in given.items():
        OmegaConf.update(tree, key, value)
    refuse_places(tree, given)
    return checked(tree, overrides)


def refuse_places(tree: Any, given: Mapping[str, Any]) -> None:
    """A run's folder may be another's: what its configuration names outside this machine is not asked, unless the user
    names it too. The mirror is left out (what it has is in the store, or made again).

    Raises:
        ConfigError: it names a judge, who would be sent questions, answers and the environment's key.
    """
    if "paths.mirror" not in given and OmegaConf.select(tree, "paths.mirror") is not None:
        OmegaConf.update(tree, "paths.mirror", None)
    judge = OmegaConf.select(tree, "eval.judge.url")
    if judge is not None and "eval.judge.url" not in given:
        raise ConfigError(
            f"The run's configuration names a judge at {judge}, who would be sent answers and MGM_EXP_JUDGE_KEY.",
            advice=f"Give eval.judge.url={judge} if that is yours, or eval.judge.url=null to score without.",
        )


def paths_of(folder: Path, tree: Any, given: dict[str, Any]) -> dict[str, str]:
    """Where the run's store is now: as given, as it was, beside the run, or (a run that was moved alone) in it."""
    if "paths.root" in given or "paths.store" in given:
        root = given.get("paths.root", OmegaConf.select(tree, "paths.root"))
        return {"root": str(root), "store": str(given.get("paths.store", Path(str(root)) / "store"))}
    configured = OmegaConf.select(tree, "paths.store")
    if configured and Path(str(configured)).is_dir():
        return {}
    for parent in list(folder.parents)[:4]:
        if (parent / "store").is_dir() and {"runs", "sweeps"} & set(folder.relative_to(parent).parts[:1]):
            return {"root": str(parent), "store": str(parent / "store")}
    own = folder / "evaluations"
    return {"root": str(own), "store": str(own / "store")}


def _of_checkpoint(
    folder: Path, source: ModelSource, benchmarks: Sequence[str] | None, overrides: Sequence[str]
) -> ExperimentConfig:
    """A configuration that scores a checkpoint as it is, in the arithmetic that its base's config.json names."""
    from mgm_exp.model.folders import read_json
    from mgm_exp.model.hf.loading import is_hf_folder

    if not benchmarks:
        raise ConfigError(f"{folder} is a checkpoint, which names no benchmarks.", advice="Give --benchmarks a,b.")
    given = _allowed(
        overrides,
        _OF_CHECKPOINTS,
        "of a checkpoint only eval.*, device, paths.*, data.max_megapixels, model, model.vision_tower, "
        "model.hidden_activation, model.image_*, train.precision",
    )
    stated = read_json(source.folder / "config.json")
    name = str(stated.get("dtype") or stated.get("torch_dtype") or "float32").removeprefix("torch.")
    precision = Precision(_PRECISIONS.get(name, "fp32"))
    if precision is Precision.fp16 and "train.precision" not in given:
        import torch

        if given.get("device") == "cpu" or not torch.cuda.is_available():
            precision = Precision.fp32  # which holds every fp16 value, and a CPU can compute with
    before = [f"train.precision={precision.value}"]
    if "model" not in given and is_hf_folder(folder):
        before.insert(0, "model=hf")
    towers = {"vision_tower": source.vision_tower, "vision_tower_aux": source.vision_tower_aux}
    before += [f"model.{key}={quoted(str(place))}" for key, place in towers.items() if place is not None]
    after = [f"model.path={quoted(str(source.folder))}", f"eval.benchmarks=[{','.join(benchmarks)}]"]
    return compose([*before, *overrides, *after])


def _allowed(overrides: Sequence[str], keys: re.Pattern[str], says: str) -> dict[str, Any]:
    """Key -> value of overrides that change how a model is scored, and not what it is."""
    found: dict[str, Any] = {}
    for text, override in zip(overrides, parse(overrides), strict=True):
        if not keys.fullmatch(override.key_or_group) or override.is_sweep_override() or override.is_delete():
            raise ConfigError(f"{text.partition('=')[0]} cannot be given here: {says} can, with one value each.")
        found[override.key_or_group] = override.value()
    return found


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
