"""Checks while training that what was declared trainable moves, and that nothing else does.

The set itself is declared and asserted by the model room. Here the tensors are compared before and after real updates:
frozen ones after the first, trained ones after the first that can move them. That is not always the first step: a
warm-up begins with a learning rate of 0; LoRA's A has no gradient while B is still zero; projector, mining and towers
have none in a batch without images; the bias in front of mining's keys shifts all scores of a window alike and has a
true gradient of zero.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mgm_exp.errors import TrainingFailed
from mgm_exp.model.bits import add_bits
from mgm_exp.train.engine import Engine
from mgm_exp.train.ranks import Ranks

if TYPE_CHECKING:
    from mgm_exp.model import TrainableSet

# Above this many frozen parameters each tensor is sampled (SAMPLE elements, evenly spaced) instead of read in full.
FULL_CHECK_PARAMETERS = 1_000_000_000
SAMPLE = 65_536


class MovementCheck:
    """Compares checksums of all parameters around the first updates.

    Args:
        module: The whole model.
        engine: Around it; its trainable parameters carry their official names.
        trainable: What was declared.
        ranks: This process (each one checks what it holds).
    """

    def __init__(self, module: nn.Module, engine: Engine, trainable: TrainableSet, ranks: Ranks) -> None:
        self._engine, self._ranks = engine, ranks
        self._needs_images = trainable.needs_images
        self._never_certain = trainable.never_certain
        self._late = trainable.late
        trained = {id(parameter) for parameter in engine.trainable.values()}
        self._frozen = {name: p for name, p in module.named_parameters() if id(p) not in trained}
        self._is_sampled = sum(_elements(p) for p in self._frozen.values()) > FULL_CHECK_PARAMETERS
        self._before_frozen: dict[str, str] = {}
        self._before: dict[str, str] = {}
        self._waiting: set[str] = set(engine.trainable)
        self._has_updated = False

    @property
    def is_done(self) -> bool:
        return self._waiting <= self._never_certain

    def before_update(self) -> None:
        """Takes checksums; called by all processes before a step that will change weights."""
        if not self._before:
            self._before_frozen = {name: self._frozen_sum(parameter) for name, parameter in self._frozen.items()}
            self._before = {name: checksum(self._engine.master(name)) for name in sorted(self._waiting)}

    def after_update(self, *, has_images: bool) -> None:
        """Compares; called by all processes after a step that was applied with a learning rate above 0.

        Raises:
            TrainingFailed: A frozen tensor moved, or a trained one did not although it had to.
        """
        assert self._before, "before_update() comes first"
        frozen = {} if self._has_updated else self._frozen
        moved_frozen = [
            name for name, parameter in frozen.items() if self._frozen_sum(parameter) != self._before_frozen[name]
        ]
        still = {name for name in sorted(self._waiting) if checksum(self._engine.master(name)) == self._before[name]}
        expected = {name for name in self._waiting if self._must_move(name, has_images)}
        self._waiting = still
        self._has_updated = True
        stuck = sorted(still & expected)
        # A shard may be frozen here and moved there: all processes agree before anyone raises
        faults = self._ranks.gather_texts(
            [f"{name} is frozen and moved" for name in moved_frozen]
            + [f"{name} is trained and did not move" for name in stuck]
        )
        if faults:
            shown = "; ".join(sorted(set(faults))[:5])
            raise TrainingFailed(
                f"The trainable set is not what was declared: {shown} ({len(set(faults))} tensors in all).",
                advice="This is a fault of the model or the adapter, not of the data: report it with the run folder.",
            )

    def _must_move(self, name: str, has_images: bool) -> bool:
        if name in self._never_certain or (name in self._late and not self._has_updated):
            return False
        return has_images or name not in self._needs_images

    def _frozen_sum(self, parameter: nn.Parameter) -> str:
        return checksum(self._engine.resident(parameter), sampled=self._is_sampled)

    def report(self) -> dict[str, Any]:
        """For the record: how it was checked, and what has not moved (yet)."""
        return {
            "frozen_tensors": len(self._frozen),
            "frozen_check": f"{SAMPLE} elements of each tensor" if self._is_sampled else "every element",
            "moved": len(self._engine.trainable) - len(self._waiting),
            "not_moved": sorted(self._waiting),
            "is_complete": self.is_done,
        }


def assert_same_start(engine: Engine, ranks: Ranks) -> None:
    """All processes must begin with the same trained weights; called by all of them.

    Raises:
        TrainingFailed: They do not: adding their gradients up would train nothing sensible.
    """
    sums = ranks.gather_texts([" ".join(checksum(parameter) for parameter in engine.trainable.values())])
    differing = [str(rank) for rank, text in enumerate(sums) if text != sums[0]]
    if differing:
        raise TrainingFailed(
            f"Processes {', '.join(differing)} begin with other weights than process 0.",
            advice="Do all of them read the same model folder? It must not change while a run starts.",
        )


def checksum(tensor: Tensor, *, sampled: bool = False) -> str:
    """A digest of a tensor's bits that any change of an element changes.

    Of large ones by sums (:mod:`mgm_exp.model.bits`).
    """
    flat = tensor.detach().reshape(-1)
    if sampled and flat.numel() > SAMPLE:
        flat = flat[:: flat.numel() // SAMPLE]
    digest = hashlib.sha256()
    add_bits(digest, flat.contiguous().view(torch.uint8))
    return digest.hexdigest()


def _elements(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
