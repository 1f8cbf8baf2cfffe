"""A trained model tensor by tensor: the base with its adapter added and its connector replaced.

One tensor is in memory at a time (and LoRA's own, which are small), so that a model of any size can be written, or
compared with what was written, on a small machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgm_exp.errors import ModelError
from mgm_exp.model.adapters import adapter_files, read_adapter, read_connector
from mgm_exp.model.folders import ModelSource, read_json
from mgm_exp.model.loading import meta_model, plan_tensors
from mgm_exp.model.resolve import resolve_config
from mgm_exp.model.tensors import official_name, read_tensors

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# What would need more than W + scale * B @ A: named in adapter_config.json, and empty in every adapter made here.
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")


class MergedTensors:
    """Every tensor of a standalone model, by official name.

    Attributes:
        config: of the model, complete.
        shapes: of every tensor that belongs to the model.
        dtype: of all tensors that are given out, a name of `DTYPES`.
        adapted: names of the weights that LoRA changes.
        idle: those of them that it leaves as they are, as its B is zero.
        replaced: names of the projector and mining tensors that come from the run.
        scale: of B @ A; 0 without an adapter.

    Args:
        source: base, towers and adapter.
        dtype: of the result; None: as the base stores its LLM.

    Raises:
        ModelError: parts that are missing, damaged, or do not fit together.
    """

    def __init__(self, source: ModelSource, dtype: str | None = None) -> None:
        self.config = resolve_config(source)
        self.shapes = {official_name(n): tuple(p.shape) for n, p in meta_model(self.config).named_parameters()}
        self._places = {n: p for n, p in plan_tensors(source, self.config).places.items() if n in self.shapes}
        self._lora: dict[str, Tensor] = {}
        self._connector: dict[str, Tensor] = {}
        self.scale = 0.0
        if source.adapter is not None:
            self._read_adapter(source.adapter)
        self.adapted = frozenset(n.replace(".lora_A.", ".") for n in self._lora if ".lora_A." in n)
        self.idle = frozenset(n for n in self.adapted if not self._lora[n.replace(".weight", ".lora_B.weight")].any())
        self.replaced = frozenset(self._connector)
        if missing := sorted(set(self.shapes) - set(self._places) - set(self._connector)):
            raise ModelError(
                f"{len(missing)} tensors of {source.folder} are nowhere, first {missing[0]!r}.",
                advice="Complete the base, or give the folders of its towers.",
            )
        self._check_shapes()
        stored = self._places["model.embed_tokens.weight"].dtype.removeprefix("torch.")
        self.dtype = dtype or STORED.get(stored, stored)
        if self.dtype not in DTYPES:
            raise ModelError(f"dtype {self.dtype!r} cannot be written: use {', '.join(DTYPES)}.")

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, in the order of the base's files.

        Raises:
            ModelError: a base file is damaged, or a value is not finite.
        """
        wanted = list(names)
        yield from ((n, self._finished(n, self._connector[n])) for n in wanted if n in self._connector)
        places = {n: self._places[n] for n in wanted if n not in self._connector}
        for name, tensor in read_tensors(places):
            if name in self.adapted:
                # In fp32, as PEFT computes it: in 16 bits a small update is lost before it is added
                down = self._lora[name.replace(".weight", ".lora_A.weight")].float()
                up = self._lora[name.replace(".weight", ".lora_B.weight")].float()
                tensor = tensor.float().addmm(up, down, alpha=self.scale)
            yield name, self._finished(name, tensor)

    def base(self, name: str) -> Tensor | None:
        """A tensor as the base has it, in the dtype of the result; None where the base has none."""
        if name not in self._places:
            return None
        [(_, tensor)] = read_tensors({name: self._places[name]})
        return tensor.to(DTYPES[self.dtype])

    def _finished(self, name: str, tensor: Tensor) -> Tensor:
        cast = tensor.to(DTYPES[self.dtype]).contiguous()
        if not torch.isfinite(cast).all():
            raise ModelError(
                f"{name} has values that are not finite in {self.dtype}.",
                advice="The run diverged, or the dtype is too narrow: try --dtype bfloat16 or float32.",
            )
        return cast

    def _read_adapter(self, folder: Path) -> None:
        weights, connector = adapter_files(folder)
        stated = read_json(folder / "adapter_config.json")
        self.scale = _scale(stated, folder)
        self._lora = read_adapter(weights)
        self._connector = read_connector(connector) if connector is not None else {}
        modules = {n.rsplit(".lora_", 1)[0] for n in self._lora}
        foreign = sorted(m for m in modules if f"{m}.weight" not in self._places)
        halves = {f"{m}.lora_{half}.weight" for m in modules for half in "AB"}
        if not modules or foreign or halves != set(self._lora):
            first = (foreign or sorted(halves ^ set(self._lora)) or ["no tensors"])[0]
            raise ModelError(
                f"{weights} does not fit its base: {first}.",
                advice="It was made for another base model, or is no plain LoRA.",
            )
        for module in modules:
            down, up = (self._lora[f"{module}.lora_{half}.weight"] for half in "AB")
            if down.shape[0] != stated["r"] or (up.shape[0], down.shape[1]) != self.shapes[f"{module}.weight"]:
                raise ModelError(
                    f"{weights}: {module} has factors {list(up.shape)} and {list(down.shape)}, its weight is "
                    f"{list(self.shapes[f'{module}.weight'])} and the rank {stated['r']}.",
                    advice="It was made for another base model.",
                )

    def _check_shapes(self) -> None:
        found = {n: p.shape for n, p in self._places.items()} | {n: tuple(t.shape) for n, t in self._connector.items()}
        for name, shape in self.shapes.items():
            if found[name] != shape:
                raise ModelError(
                    f"{name} is {list(found[name])}, the configuration says {list(shape)}.",
                    advice="config.json and weights do not belong together.",
                )


def _scale(stated: dict[str, Any], folder: Path) -> float:
    """LoRA's factor, as PEFT has it: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
    where = folder / "adapter_config.json"
    if str(stated.get("peft_type")).upper() != "LORA":
        raise ModelError(f"{where} describes a {stated.get('peft_type')} adapter; only LoRA can be merged.")
    used = [key for key in _UNSUPPORTED if stated.get(key)]
    if stated.get("init_lora_weights", True) not in (True, False, "gaussian"):
        used.append(f"init_lora_weights={stated['init_lora_weights']}")  # these change the base as well
    if stated.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise ModelError(f"{where} uses {', '.join(used)}, which cannot be merged here.", advice="Merge it with PEFT.")
    rank, alpha = stated.get("r"), stated.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ModelError(f"{where} has no usable r and lora_alpha: {rank!r}, {alpha!r}.")
    return float(alpha) / (math.sqrt(rank) if stated.get("use_rslora") else rank)
