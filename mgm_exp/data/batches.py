"""Which samples an optimizer step sees, and how they come together in tensors.

    plan = BatchPlan(dataset.lengths, dataset.has_image, global_batch_size=128, micro_batch_size=8, max_steps=1000)
    for micro_batches in StepLoader(dataset, plan, start_step=400, workers=2):
        ...                                  # the micro-batches of this process in step 400, 401, ...

A plan is a function of the seed: any step can be asked for directly, which is how a resumed run sees the samples that
an undisturbed one would have seen. The global batch is primary: it is the same for any number of processes.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import math
import multiprocessing
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mgm_exp.data.processor import IGNORE_INDEX
from mgm_exp.data.sampler import IMAGE_WORDS, length_grouped, like_length, modality_length_grouped
from mgm_exp.errors import ConfigError, DataError, MgmError

Batch = dict[str, Any]
"""One micro-batch. ``input_ids`` (B, T) long, -200 where the image belongs; ``attention_mask`` (B, T) bool; ``labels``
(B, T) long, -100 where nothing is learnt; ``images`` (B, 3, h, w), or (B, views, 3, h, w) with an image grid, and
``images_aux`` (B, 3, H, W), float32, zeros for text-only samples; instead of both, ``visual_tokens`` (B, N, hidden)
where they are cached, or ``seen`` with features of k <= B samples by name, and pixels of the others (see
:func:`put_together`); ``ids``: list of B record ids."""

GROUPINGS = ("none", "length", "like_length", "modality_length")
_PAIRS = {"image": "images", "image_aux": "images_aux", "visual_tokens": "visual_tokens"}


class BatchPlan:
    """Which samples belong to which optimizer step and process.

    An epoch is one pass over all samples in a random order, grouped as asked for. Its last global batch is filled up
    with samples that the next epoch then does not begin with: over whole epochs every sample is seen equally often.

    Args:
        lengths: Words of each sample.
        has_image: Whether each sample has an image.
        global_batch_size: Samples of one optimizer step, over all processes.
        micro_batch_size: Samples of one forward pass of one process.
        world_size: Processes.
        rank: Which of them this is.
        seed: Orders are drawn from it.
        group_by: ``none``, ``length``, ``like_length`` or ``modality_length`` (official).
        epochs: Passes over the samples; the number of steps is rounded up.
        max_steps: Optimizer steps; overrides ``epochs``.

    Raises:
        ConfigError: sizes that do not divide, or an unknown grouping.
        DataError: there is no sample.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        has_image: Sequence[bool],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        group_by: Any = "none",
        epochs: float = 1.0,
        max_steps: int | None = None,
    ) -> None:
        self.group_by = str(getattr(group_by, "value", group_by))
        if self.group_by not in GROUPINGS:
            raise ConfigError(f"group_by={self.group_by!r}; allowed are {list(GROUPINGS)}.")
        if min(global_batch_size, micro_batch_size, world_size) < 1 or not 0 <= rank < world_size:
            raise ConfigError(
                f"global_batch_size={global_batch_size}, micro_batch_size={micro_batch_size}, rank {rank} of "
                f"{world_size}: sizes must be 1 or above, the rank below the number of processes."
            )
        if global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} x "
                f"{world_size} processes; change one of the three."
            )
        if not len(lengths) or len(lengths) != len(has_image):
            raise DataError(f"There are {len(lengths)} samples (and {len(has_image)} modalities) to make batches of.")
        # A sample without a word still has a length, so that its sign can say its modality.
        self._lengths = np.maximum(1, np.asarray(lengths, dtype=np.int64))
        self._has_image = np.asarray(has_image, dtype=bool)
        self.n_samples = len(self._lengths)
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.world_size, self.rank, self.seed = world_size, rank, seed
        steps_of_epochs = max(1, math.ceil(epochs * self.n_samples / global_batch_size))
        self.n_steps = steps_of_epochs if max_steps is None else max_steps
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def epoch_at(self, step: int) -> float:
        """Passes over the samples that are done when ``step`` steps are."""
        return step * self.global_batch_size / self.n_samples

    def step(self, i: int) -> list[list[int]]:
        """This process's micro-batches of optimizer step ``i``, as sample numbers.

        Micro-batch j of the global batch belongs to process j % world_size.
        """
        batch = self.global_batch(i)
        size = self.micro_batch_size
        return [batch[start : start + size] for start in range(self.rank * size, len(batch), self.world_size * size)]

    def global_batch(self, i: int) -> list[int]:
        """The samples of optimizer step ``i`` over all processes, micro-batch after micro-batch."""
        start, stop = i * self.global_batch_size, (i + 1) * self.global_batch_size
        batch: list[int] = []
        while start < stop:
            epoch, place = divmod(start, self.n_samples)
            part = self._epoch(epoch)[place : place + stop - start].tolist()
            batch += part
            start += len(part)
        return batch

    def samples(self) -> list[int]:
        """The samples that its steps hold, ascending, each once: not all of them where it ends within an epoch."""
        held = self.n_steps * self.global_batch_size
        return list(range(self.n_samples)) if held >= self.n_samples else sorted(self._epoch(0)[:held].tolist())

    def _epoch(self, epoch: int) -> np.ndarray:
        """The order of one epoch; the last few are kept."""
        if epoch not in self._epochs:
            self._epochs[epoch] = self._order(epoch)
            while len(self._epochs) > 3:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _order(self, epoch: int) -> np.ndarray:
        drawn = torch.randperm(self.n_samples, generator=self._generator(epoch, "samples")).numpy()
        if self.group_by == "none":
            return drawn
        # The samples that fill up the last global batch of the epoch before; the rest is grouped, so that its global
        # batches stay whole.
        lead = -epoch * self.n_samples % self.global_batch_size
        if lead >= self.n_samples:
            return drawn
        rest = np.sort(drawn[lead:])
        n_micro = self.global_batch_size // self.micro_batch_size
        generator = self._generator(epoch, "groups")
        lengths, has_image = self._lengths[rest], self._has_image[rest]
        words = (lengths + IMAGE_WORDS * has_image).tolist()
        if self.group_by == "length":
            order = length_grouped(words, self.micro_batch_size, n_micro, generator)
        elif self.group_by == "like_length":
            order = like_length(words, self.global_batch_size, generator)
        else:
            signed = np.where(has_image, lengths, -lengths).tolist()
            order = modality_length_grouped(signed, self.micro_batch_size, n_micro, generator, generator)
        return np.concatenate([drawn[:lead], rest[order]])

    def _generator(self, epoch: int, what: str) -> torch.Generator:
        key = hashlib.sha256(f"{self.seed} {epoch} {what}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)


def collate(examples: Sequence[Mapping[str, Any]], pad_id: int, max_length: int | None = None) -> Batch:
    """Puts samples together, padded on the right to the longest.

    Args:
        examples: ``input_ids`` and ``labels`` (T,) long; ``image`` and ``image_aux``, or ``visual_tokens``; ``id``.
        pad_id: Token that fills up; it is masked by place, so a text may hold it.
        max_length: Longer rows are cut, as in the official collator; None: they come cut.
    """
    ids = [example["input_ids"][:max_length] for example in examples]
    labels = [example["labels"][:max_length] for example in examples]
    shape = len(ids), max(len(row) for row in ids)
    batch: Batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.bool),
        "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.long),
        "ids": [str(example["id"]) for example in examples],
    }
    for i, (row, row_labels) in enumerate(zip(ids, labels, strict=True)):
        batch["input_ids"][i, : len(row)] = row
        batch["attention_mask"][i, : len(row)] = True
        batch["labels"][i, : len(row)] = row_labels
    if any("seen" in example for example in examples):
        return batch | put_together(examples)
    for one, many in _PAIRS.items():
        if one in examples[0]:
            tensors: list[Tensor] = [example[one] for example in examples]
            batch[many] = torch.stack(tensors)
    return batch


def put_together(examples: Sequence[Mapping[str, Any]]) -> Batch:
    """Samples of which some or all come with features.

    Returns:
        ``seen``: features by name, of those that have some; where some have none, ``order`` (B,): the place of each
        sample among those that have, followed by those that have not, whose ``images`` are filled up to B: the size of
        a batch belongs to the bits. ``images_aux`` likewise, or of all where features are of the low resolution alone.
    """
    kept = [example for example in examples if "seen" in example]
    rest = [example for example in examples if "seen" not in example]
    seen = {name: torch.stack([example["seen"][name] for example in kept]) for name in kept[0]["seen"]}
    batch: Batch = {"seen": seen}
    filled = rest + rest[-1:] * (len(examples) - len(rest)) if rest else []
    if rest:
        places = {id(example): place for place, example in enumerate([*kept, *rest])}
        seen["order"] = torch.tensor([places[id(example)] for example in examples])
        batch["images"] = torch.stack([example["image"] for example in filled])
    detailed = examples if "image_aux" in kept[0] else filled
    if detailed:
        batch["images_aux"] = torch.stack([example["image_aux"] for example in detailed])
    return batch


class _MicroBatches(Dataset[Any]):
    """Reads whole micro-batches; an error of the user's making is handed over as a value, so that it stays readable."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Batch]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, indices: list[int]) -> Batch | MgmError:
        try:
            return self.collate([self.dataset[i] for i in indices])
        except MgmError as error:
            return error


class _Order(torch.utils.data.Sampler[list[int]]):
    def __init__(self, plan: BatchPlan, start_step: int, stop_step: int) -> None:
        self.plan, self.start_step, self.stop_step = plan, start_step, stop_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.stop_step):
            yield from self.plan.step(step)


class StepLoader:
    """Iterates over the steps of a plan: each item is the list of this process's micro-batches.

    With ``workers`` above 0 that many processes decode ahead; order and content do not depend on them, and torch's
    global random state is not touched.

    Args:
        dataset: Gives one example for a sample number (:class:`mgm_exp.data.ImageTextDataset`).
        plan: Which samples, in which order.
        start_step: First step, after a resume.
        stop_step: The step before which it ends; None: where the plan does. Batches were left out where it is later.
        workers: Processes that read ahead; 0: read when asked.
        pad_id: Token that fills up rows.
        pin_memory: Puts tensors where a GPU can fetch them directly.
        collate_with: Puts samples together; None: :func:`collate`.

    Raises:
        DataError: (while iterating) a sample cannot be read; its id and the reason are named.
    """

    def __init__(
        self,
        dataset: Any,
        plan: BatchPlan,
        start_step: int = 0,
        workers: int = 0,
        pad_id: int = 0,
        pin_memory: bool = False,
        stop_step: int | None = None,
        collate_with: Callable[[list[Any]], Batch] | None = None,
    ) -> None:
        self.dataset, self.plan, self.start_step = dataset, plan, start_step
        self.stop_step = plan.n_steps if stop_step is None else stop_step
        self.workers, self.pin_memory = workers, pin_memory
        self.collate_with = collate_with or (lambda examples: collate(examples, pad_id))

    def __len__(self) -> int:
        """Steps that are left."""
        return max(0, self.stop_step - self.start_step)

    def __iter__(self) -> Iterator[list[Batch]]:
        parent = os.getpid()

        def start(_: int) -> None:
            _start_reader(parent)

        loader: DataLoader[Any] = DataLoader(
            _MicroBatches(self.dataset, self.collate_with),
            batch_size=None,
            sampler=_Order(self.plan, self.start_step, self.stop_step),
            num_workers=self.workers,
            worker_init_fn=start if self.workers else None,
            multiprocessing_context="fork" if self.workers else None,
            pin_memory=self.pin_memory,
            # Without a generator of its own the loader would draw from the global one and change dropout masks.
            generator=torch.Generator().manual_seed(self.plan.seed),
        )
        if self.workers:
            _end_readers_at_exit()
        batches = iter(loader)
        per_step = self.plan.global_batch_size // (self.plan.micro_batch_size * self.plan.world_size)
        try:
            for _ in range(len(self)):
                micro_batches = []
                for _ in range(per_step):
                    batch = next(batches)
                    if isinstance(batch, MgmError):
                        raise batch
                    micro_batches.append(batch)
                yield micro_batches
        finally:
            del batches  # ends the readers now: an error that is kept keeps this frame


@functools.cache
def _end_readers_at_exit() -> None:
    """Readers of a loader that somebody still holds when this process ends (the traceback of an error that is kept) do
    not hear the signal by which Python ends such processes, and it would wait for them for ever."""

    def end() -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own would call it an error
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()

    atexit.register(end)


def _start_reader(parent_pid: int) -> None:
    """A reading process leaves signals to its parent (which finishes the step and saves) and ends with it."""
    from mgm_exp.store import die_with_parent

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent_pid=parent_pid)
