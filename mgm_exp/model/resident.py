"""Base models that stay in memory: what a worker has loaded for one run, it does not load again for the next.

    keep()                                   # once, in a worker; anywhere else nothing stays
    model, report = base_of(key, load)

Every model is a module of its own whose tensors are those of the base that stays, until somebody wants to write to
them: :func:`own` gives it copies first. Whoever writes into a base (a stage that trains its tensors, PiSSA, a connector
that is put in) calls it. That nobody forgot is proved by a checksum of all bytes, after each run and before a base is
given out again to a run that had it before: one that changed is dropped, read anew, and that is said.
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

# Bases that stay: of the host's memory. On a GPU it is one: its memory is what trials need.
_KEPT = 2

Stamps = tuple[tuple[str, str, int, int, int], ...]
Storages = Mapping[tuple[str, int], "torch.UntypedStorage"]


@dataclass(frozen=True)
class Loaded:
    """A model that was just read.

    Args:
        model: In eval mode.
        report: What was read from where.
        stamps: Of the files, as they were before: see :func:`stamps_of`.
        seed: Of the tensors that started new; None: none did.
    """

    model: Any
    report: Any
    stamps: Stamps
    seed: int | None = None


@dataclass
class _Base:
    """One model as it was read; its tensors are never written to."""

    loaded: Loaded
    checksum: str
    twins: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    is_used: bool = True
    # Found to be what it was when the last run ended: nobody has had it since.
    is_proved: bool = False
    # Of some of its tensors, by their names and places.
    digests: dict[Hashable, str] = field(default_factory=dict)
    # What twins are made from; made with the first.
    structure: _Structure | None = None

    @property
    def device(self) -> str:
        return str(next(self.loaded.model.parameters()).device.type)


_BASES: dict[Hashable, _Base] = {}
_SAID: list[str] = []
_KEEPS = [False]
_HAS_DROPPED = [False]


def keep() -> None:
    """From now on, bases stay in this process."""
    _KEEPS[0] = True


def stop_keeping() -> None:
    """Bases that are loaded from now on do not stay."""
    _KEEPS[0] = False


def base_of(key: Hashable, seed: int | None, load: Callable[[], Loaded]) -> tuple[Any, Any]:
    """A model that shares its tensors with the base that stays, and the report of its loading.

    Args:
        key: All that ``load`` depends on, besides the files and the seed.
        seed: Of tensors that no file has.
        load: Reads it.
    """
    if not _KEEPS[0]:
        loaded = load()
        return loaded.model, loaded.report
    base = _BASES.get(key)
    if (
        base is None
        or base.loaded.seed not in (None, seed)
        or _changed(base.loaded.stamps)
        or not (base.is_proved or _is_intact(key, base))
    ):
        _drop(key)
        del base
        loaded = load()
        if not _may_stay(loaded.model):
            return loaded.model, loaded.report
        base = _Base(loaded, checksum(loaded.model))
        alike = [other for other, kept in _BASES.items() if kept.device == base.device]
        for other in alike[: max(0, len(alike) + 1 - (_KEPT if base.device == "cpu" else 1))]:
            _drop(other)
        _BASES[key] = base
    base.is_used, base.is_proved = True, False
    return _twin(base), base.loaded.report


def own(parameters: Iterable[nn.Parameter]) -> None:
    """Gives each parameter a tensor of its own, where it has one of a base that stays: it is about to be written to.

    A model that asks for most of a base, and is the only one of it, gets that base itself, which then stays no longer:
    copying it would take as much memory again as a process of its own needs.
    """
    if not _BASES:
        return
    wanted = list(parameters)
    for key, base in list(_BASES.items()):
        kept = _storages(base.loaded.model)
        mine = [parameter for parameter in wanted if _place(parameter) in kept]
        asked = sum(kept[place].nbytes() for place in {_place(parameter) for parameter in mine})
        if 2 * asked > sum(storage.nbytes() for storage in kept.values()) and len(base.twins) == 1:
            _drop(key)
            continue
        for parameter in mine:
            parameter.data = parameter.data.clone()


def digest_of(tensors: Mapping[str, torch.Tensor], compute: Callable[[], str]) -> str:
    """What ``compute`` makes of some tensors: once for all twins of a base, where they are the base's, unwritten."""
    for base in _BASES.values():
        kept = _storages(base.loaded.model)
        if all(_place(tensor) in kept for tensor in tensors.values()):
            which = tuple(
                (name, *_place(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
                for name, tensor in sorted(tensors.items())
            )
            if which not in base.digests:
                base.digests[which] = compute()
            return base.digests[which]
    return compute()


def let_go() -> None:
    """Nothing stays: processes that are started now need the memory."""
    if _BASES:
        for key in list(_BASES):
            _drop(key)
        torch = sys.modules["torch"]
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def check() -> bool:
    """After a run: a base that it changed is dropped, as is one that it did not use.

    Returns:
        Whether a base has been dropped since this was last asked.
    """
    for key, base in list(_BASES.items()):
        base.is_proved = _is_intact(key, base)
        if base.is_proved and not base.is_used:
            _drop(key)
        base.is_used = False
    has_dropped, _HAS_DROPPED[0] = _HAS_DROPPED[0], False
    return has_dropped


def kept_gib() -> tuple[float, float]:
    """GiB of the host's memory and of GPU memory that stay."""
    found = {"cpu": 0.0, "cuda": 0.0}
    for base in _BASES.values():
        found[base.device] += sum(storage.nbytes() for storage in _storages(base.loaded.model).values()) / 2**30
    return found["cpu"], found["cuda"]


def said() -> list[str]:
    """What went wrong since this was last asked."""
    sentences = list(_SAID)
    _SAID.clear()
    return sentences


def stamps_of(folders: Iterable[Path]) -> Stamps:
    """Folder, name, size, time of change and inode of every file in some folders."""
    found = []
    for folder in folders:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    facts = entry.stat()
                    found.append((str(folder), entry.name, facts.st_size, facts.st_mtime_ns, facts.st_ino))
    return tuple(sorted(found))


def checksum(model: nn.Module) -> str:
    """Of the bytes of a model's tensors."""
    import torch

    from mgm_exp.model.bits import add_bits

    total = hashlib.sha256()
    for storage in _storages(model).values():
        add_bits(total, torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
    return total.hexdigest()


def _drop(key: Hashable) -> None:
    if _BASES.pop(key, None) is not None:
        _HAS_DROPPED[0] = True


def _changed(stamps: Stamps) -> bool:
    """Whether a file is another one now."""
    try:
        return stamps_of({Path(folder) for folder, *_ in stamps}) != stamps
    except OSError:
        return True


def _is_intact(key: Hashable, base: _Base) -> bool:
    if checksum(base.loaded.model) == base.checksum:
        return True
    _drop(key)
    _SAID.append(
        "a run has written into the base model that stays for later runs; it is read again. Please report this "
        "(hydra/launcher=local keeps nothing between trials)."
    )
    return False


def _may_stay(model: nn.Module) -> bool:
    """Weights of few bits have parameters of a kind of their own, which are read anew."""
    from torch import nn

    return all(type(parameter) is nn.Parameter for parameter in model.parameters())


def _storages(model: nn.Module) -> Storages:
    """Of parameters and buffers, each once."""
    return {_place(tensor): tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())}


def _place(tensor: torch.Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def _twin(base: _Base) -> nn.Module:
    """The same model once more: its parameters have the base's tensors, its buffers are copies."""
    if base.structure is None:
        base.structure = _Structure.of(base.loaded.model)
    model: nn.Module = base.structure.with_tensors(_shared)
    base.twins.add(model)
    return model


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """What a twin has in the place of a base's tensor."""
    from torch import nn

    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.data, requires_grad=tensor.requires_grad)
    return copy.deepcopy(tensor)


@dataclass(frozen=True)
class _Structure:
    """A module without its tensors, pickled in this process's memory: read back in a sixth of a deep copy's time.

    Args:
        pickled: The modules, with numbers in the places of tensors; None: they cannot be pickled, and are copied.
        tensors: By their numbers.
    """

    model: nn.Module
    pickled: bytes | None
    tensors: list[torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> _Structure:
        written = io.BytesIO()
        pickler = _Writer(written, pickle.HIGHEST_PROTOCOL)
        try:
            pickler.dump(model)
        except (pickle.PicklingError, AttributeError, TypeError):  # a function that has no name
            return cls(model, None, [])
        return cls(model, written.getvalue(), pickler.tensors)

    def with_tensors(self, instead_of: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """The modules anew, with other tensors in the places of theirs."""
        if self.pickled is None:
            return copy.deepcopy(self.model, {id(p): instead_of(p) for p in self.model.parameters()})
        return _Reader(io.BytesIO(self.pickled), self.tensors, instead_of).load()


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, sys.modules["torch"].Tensor):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._numbers[id(obj)]


class _Reader(pickle.Unpickler):
    """Reads what :class:`_Writer` wrote, nothing else."""

    def __init__(
        self, file: io.BytesIO, tensors: list[torch.Tensor], instead_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__(file)
        self._tensors, self._instead_of = tensors, instead_of
        self._made: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: int) -> torch.Tensor:
        if pid not in self._made:  # a tensor in two places is one there, too
            self._made[pid] = self._instead_of(self._tensors[pid])
        return self._made[pid]
