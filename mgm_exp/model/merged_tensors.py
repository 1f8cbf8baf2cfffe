"""A trained model tensor by tensor: the base with its adapter added and its connector replaced.

One tensor is in memory at a time (and LoRA's own, which are small), so that a model of any size can be written, or
compared with what was written, on a small machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mgm_exp.errors import ModelError
from mgm_exp.model.adapters import Adapter, MergedWeights, adapter_files, class_of_folder, read_connector, read_stated
from mgm_exp.model.folders import ModelSource
from mgm_exp.model.loading import meta_model, plan_tensors
from mgm_exp.model.resolve import resolve_config
from mgm_exp.model.tensors import official_name, read_tensors

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class MergedTensors:
    """Every tensor of a standalone model, by official name.

    Attributes:
        config: of the model, complete.
        shapes: of every tensor that belongs to the model.
        dtype: of all tensors that are given out, a name of `DTYPES`.
        kind: of the adapter; None without one.
        n_changed: weights that it adds to or replaces.
        adapted: names of the weights that the adapter adds to.
        idle: those of them that it leaves as they are, as a factor of its update is zero.
        replaced: names of the tensors that come whole from the run: projector, mining, what the adapter trains itself.
        scale: of its update; 0 without one.

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
        self._adapter = MergedWeights()
        self._kind: type[Adapter] | None = None
        self._connector: dict[str, Tensor] = {}
        if source.adapter is not None:
            self._read_adapter(source.adapter)
        self.scale, self.adapted = self._adapter.scale, frozenset(self._adapter.changed)
        self.idle = frozenset(
            name
            for name, parts in self._adapter.changed.items()
            if self._kind is not None and self._kind.is_idle(parts)
        )
        self.replaced = frozenset(self._connector)
        self.kind = self._kind.kind.value if self._kind is not None else None
        self.n_changed = len(self._adapter.changed) + len(self._adapter.replaced)
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
            if name in self.adapted and self._kind is not None:
                # In fp32, as PEFT computes it: in 16 bits a small update is lost before it is added
                tensor = self._kind.merged(tensor.float(), self._adapter.changed[name], self._adapter)
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
        stated, tensors = read_stated(folder)
        kind = class_of_folder(stated, folder)
        self._kind = kind
        try:
            self._adapter = kind.merged_weights(stated, kind.from_files(stated, tensors), self.shapes)
        except ModelError as error:
            raise ModelError(f"{weights}: {error.message}", advice=error.advice) from error
        beside = read_connector(connector) if connector is not None else {}
        self._connector = {**beside, **self._adapter.replaced}

    def _check_shapes(self) -> None:
        found = {n: p.shape for n, p in self._places.items()} | {n: tuple(t.shape) for n, t in self._connector.items()}
        for name, shape in self.shapes.items():
            if found[name] != shape:
                raise ModelError(
                    f"{name} is {list(found[name])}, the configuration says {list(shape)}.",
                    advice="config.json and weights do not belong together.",
                )
