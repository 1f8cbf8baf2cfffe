"""What is trained beside an adapter: projector and mining, and the part of the towers that a run trains.

On disk under the official names of `non_lora_trainables`; the connector always whole, also where a stage kept it
frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mgm_exp.errors import ModelError
from mgm_exp.model.adapters.base import by_official_name, copy_exactly
from mgm_exp.model.adapters.files import read_safetensors, safetensors_names, write_tensors
from mgm_exp.model.loading import connector_start
from mgm_exp.model.resident import own
from mgm_exp.model.tensors import CONNECTOR, official_name, read_pickled
from mgm_exp.model.trainable import connector_names

_TOWERS = ("model.vision_tower.", "model.vision_tower_aux.")


def connector_state(model: nn.Module) -> dict[str, Tensor]:
    """Projector and mining by official name, on the CPU."""
    return {n: t.detach().cpu().contiguous() for n, t in by_official_name(model).items() if CONNECTOR.fullmatch(n)}


def state_beside(model: nn.Module) -> dict[str, Tensor]:
    """The connector, and what is trained of the towers, by official name, on the CPU."""
    towers = {n: p for n, p in by_official_name(model).items() if n.startswith(_TOWERS) and p.requires_grad}
    return connector_state(model) | {n: p.detach().cpu().contiguous() for n, p in towers.items()}


def read_connector(file: Path) -> dict[str, Tensor]:
    """Projector and mining by official name, and towers where they were trained; of safetensors or official pickles.

    Raises:
        ModelError: a damaged file, or tensors of other parts.
    """
    tensors = read_pickled(file) if file.suffix == ".bin" else read_safetensors(file)
    named = {official_name(n): t for n, t in tensors.items()}
    if foreign := sorted(n for n in named if not CONNECTOR.fullmatch(n) and not n.startswith(_TOWERS)):
        raise ModelError(
            f"{file} holds {len(foreign)} tensors besides projector, mining and towers, first {foreign[0]!r}.",
            advice="It was made by another code, or for another model.",
        )
    return named


def has_towers(file: Path) -> bool:
    """Whether a file of :func:`read_connector` holds tensors of towers; of safetensors only the head is read.

    Raises:
        ModelError: a damaged file, or tensors of other parts.
    """
    if file.suffix == ".bin":
        return any(name.startswith(_TOWERS) for name in read_connector(file))
    return any(official_name(name).startswith(_TOWERS) for name in safetensors_names(file))


def load_beside(model: nn.Module, path: Path) -> None:
    """Puts what was trained beside an adapter into the model.

    Raises:
        ModelError: the connector is not whole, or a tensor has no place or another size.
    """
    tensors = read_connector(path)
    there = by_official_name(model)
    wanted = {n: p for n, p in there.items() if CONNECTOR.fullmatch(n) or n in tensors}
    copy_exactly(wanted, tensors, f"connector {path.name}")


def save_connector(model: nn.Module, path: str | Path, connector: Mapping[str, Tensor] | None = None) -> None:
    """Writes projector and mining under their official names (`model.mm_projector.0.weight`, ...)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, connector if connector is not None else connector_state(model))


def load_connector(model: nn.Module, path: str | Path) -> None:
    """Reads projector and mining from our safetensors, or from the official `mm_projector.bin`.

    Raises:
        ModelError: missing or foreign tensors, another size, a damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"Connector file {str(path)!r} does not exist.")
    tensors = read_pickled(path) if path.suffix == ".bin" else read_safetensors(path)
    named = {official_name(n): t for n, t in tensors.items()}
    # The official mm_projector.bin holds both towers beside the connector
    named = {n: t for n, t in named.items() if not n.startswith(_TOWERS)}
    wanted = {n: p for n, p in by_official_name(model).items() if CONNECTOR.fullmatch(n)}
    copy_exactly(wanted, named, f"connector {path.name}")


def reset_connector(model: nn.Module, part: str, seed: int) -> list[str]:
    """Starts part of the connector from new seeded values; returns the names.

    Args:
        part: "none", "projector" (mm_projector) or "connector" (projector and mining).
    """
    if part not in ("none", "projector", "connector"):
        raise ModelError(f"Connector part {part!r} is not known: allowed are none, projector, connector.")
    names = sorted(n for n in connector_names() if part == "connector" or "mm_projector" in n) if part != "none" else []
    parameters = by_official_name(model)
    shapes = {n: tuple(parameters[n].shape) for n in connector_names()}
    own(parameters[name] for name in names)
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(connector_start(name, shapes, seed))
    return names
