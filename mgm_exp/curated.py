"""Rows that were curated before, as the plan wants to know them: how many, and how long.

The store is looked through for an entry of the same files, recipe and model. Its key needs fingerprints of every image,
which a plan does not take: what is compared instead are names, places and times of the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mgm_exp import stages
from mgm_exp.config import ExperimentConfig, plain
from mgm_exp.data.recipe import bounds_of
from mgm_exp.data.stages import user_origins
from mgm_exp.errors import MgmError
from mgm_exp.plan import Curated
from mgm_exp.store import read_record

# Entries that are looked at, the newest first.
_MOST = 40


def curated_rows(config: ExperimentConfig) -> dict[str, Curated]:
    """``align`` and ``instruct`` of the newest fitting entry; empty where there is none."""
    newest = _newest(Path(config.paths.store) / "curate")
    if not newest:
        return {}
    try:
        origins = user_origins(config)
    except (MgmError, OSError):
        return {}  # files that are not there
    model = _Model(config)
    for at, path in newest:
        record = _record(path)
        inputs, meta = _mapping(record.get("inputs")), _mapping(record.get("meta"))
        try:
            if _is_of(config, inputs, meta, origins, at) and model.is_of(inputs):
                size = sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file())
                return {name: Curated.of_report(meta[name], size) for name in ("align", "instruct")}
        except (MgmError, OSError, KeyError, TypeError, ValueError, ZeroDivisionError):
            continue  # dropped meanwhile, or of another version: an older one may know more
    return {}


def _newest(folder: Path) -> list[tuple[float, Path]]:
    """Entries with the time they were made; one that is dropped meanwhile is not among them."""
    found = []
    for path in folder.glob("*/stage.json"):
        with suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path))
    return sorted(found, reverse=True)[:_MOST]


class _Model:
    """The fingerprint of the model folder, taken only where an entry fits otherwise: its files were hashed then."""

    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config
        self._known: str | None = None

    def is_of(self, inputs: Mapping[str, Any]) -> bool:
        from mgm_exp.preflight import model_fingerprint, model_folder

        if self._known is None:
            self._known = model_fingerprint(self._config, model_folder(self._config))
        return bool(inputs.get("model") == self._known)


def _is_of(
    config: ExperimentConfig, inputs: Mapping[str, Any], meta: Mapping[str, Any], origins: Mapping[str, Any], at: float
) -> bool:
    data = config.data
    expected = {
        "limits": {f"{bound.value}.{bound.side}": bound.given for bound in bounds_of(data.recipe)},
        "augment": plain(data.augment),
        "bad_rows": data.bad_rows.value,
        "max_megapixels": data.max_megapixels,
        "max_samples": data.max_samples,
        "max_length": [config.train.align.max_length, config.train.max_length],
    }
    if any(inputs.get(key) != value for key, value in expected.items()):
        return False
    if (inputs.get("align") != inputs.get("align_images")) != (data.recaption or data.recaptioned_path is not None):
        return False
    demo = stages.key_of("demo", stages.demo_payload(config))
    for stage in ("align", "instruct"):
        origin, key = origins.get(stage), "align_images" if stage == "align" else "instruct"
        if origin is None:
            if inputs.get(key) != demo:
                return False
            continue
        found = _mapping(meta.get(stage))
        is_same = found.get("file") == origin.path.name and found.get("image_root") == str(origin.image_root)
        if not is_same or origin.path.stat().st_mtime > at:
            return False
    return True


def _record(path: Path) -> Mapping[str, Any]:
    try:
        return _mapping(read_record(path))
    except (OSError, ValueError):
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
