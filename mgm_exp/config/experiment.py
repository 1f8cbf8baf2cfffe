"""The whole configuration of an experiment: composed, typed, checked; as JSON and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf

from mgm_exp.config.as_json import NotPlain, restored
from mgm_exp.config.choices import Device
from mgm_exp.config.data import DataConfig
from mgm_exp.config.evaluate import EvalConfig
from mgm_exp.config.faults import validate
from mgm_exp.config.model import AdapterConfig, ModelConfig
from mgm_exp.config.surroundings import (
    AlertsConfig,
    LaunchConfig,
    MonitorConfig,
    PathsConfig,
    PlanConfig,
    TrackerConfig,
)
from mgm_exp.config.sweep import SweepConfig
from mgm_exp.config.train import TrainConfig, ZeroConfig
from mgm_exp.errors import ConfigError

# ${mgm_times:2,${.rank}}: a product. ${mgm_choose:${train.default_lr},${adapter.kind}}: the value that a choice names.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # OmegaConf 2.4 renames the function to one that means something else in 2.3
    OmegaConf.register_new_resolver("mgm_times", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("mgm_choose", lambda values, choice: values[choice.value], replace=True)


@dataclass
class ExperimentConfig:
    """One experiment: curate -> align -> instruct -> evaluate -> record."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    adapter: AdapterConfig = MISSING
    zero: ZeroConfig = MISSING
    train: TrainConfig = MISSING
    eval: EvalConfig = MISSING
    tracker: TrackerConfig = MISSING
    paths: PathsConfig = MISSING
    sweep: SweepConfig = field(default_factory=SweepConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    # Seeds data order, dropout, new weights.
    seed: int = 0
    # Folder name below <paths.root>/runs.
    name: str = MISSING
    # Processes in all, over all machines: one for each GPU, or CPU processes.
    devices: int = 1
    device: Device = Device.auto
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    # Set by the sweeper: the number of this trial, which is also its folder.
    trial: int | None = None


def typed(cfg: DictConfig) -> ExperimentConfig:
    """The composed config as plain dataclasses, checked.

    Raises:
        ConfigError: a key that the schema does not have was added with +, a value is out of range, or values do not go
            together; every fault is named.
        OmegaConfBaseException: a key is missing or a value is of another type.
    """
    if OmegaConf.get_type(cfg) is ExperimentConfig and _has_every_key(cfg):
        # Hydra merged it into the schema: doing that again would cost more than all the rest.
        config = ExperimentConfig(**{f.name: _plain_value(cfg[f.name]) for f in fields(ExperimentConfig)})
    else:
        merged = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), _without_hydra(cfg))
        config = cast(ExperimentConfig, OmegaConf.to_object(merged))
    # A leading + adds keys past the schema, which would then be ignored: +train.lrr=1 must not look accepted.
    added = list(_added_keys(config))
    if added:
        raise ConfigError(f"There is no key {', '.join(added)}; a + in front does not make one: drop it, or the key.")
    validate(config)
    return config


def _has_every_key(node: DictConfig, also: tuple[str, ...] = ("hydra",)) -> bool:
    """Whether a tree of the schema has all its keys, none removed (``~train.lr``), missing or added at the top."""
    expected = {f.name for f in fields(cast(type, OmegaConf.get_type(node)))}
    if not expected <= set(node) or (also and not set(node) <= expected.union(also)):
        return False
    for name in expected:
        if OmegaConf.is_missing(node, name):
            return False
        child = node._get_node(name)
        if isinstance(child, DictConfig) and is_dataclass(OmegaConf.get_type(child)) and not _has_every_key(child, ()):
            return False
    return True


def _plain_value(value: Any) -> Any:
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def _added_keys(config: Any, prefix: str = "") -> Iterator[str]:
    names = {f.name for f in fields(config)}
    for key, value in vars(config).items():
        if key not in names:
            yield prefix + key
        elif is_dataclass(value):
            yield from _added_keys(value, f"{prefix}{key}.")


def _without_hydra(cfg: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def from_plain(values: dict[str, Any]) -> ExperimentConfig:
    """The typed config of what :func:`plain` gave (read back from ``config.yaml`` or a job file)."""
    try:
        config = restored(ExperimentConfig, values)
    except NotPlain:  # edited by hand: OmegaConf says what is wrong with it, or what it means
        return typed(OmegaConf.create(values))
    validate(config)
    return config
