"""Curated records as the whole inputs of a model, by a processor that makes them at once (models of transformers)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mgm_exp.data.images import ImageFault, open_image
from mgm_exp.data.processor import InputsProcessor
from mgm_exp.data.records import Record
from mgm_exp.errors import DataError, UnusableRow


class WholeInputsDataset(Dataset[dict[str, Any]]):
    """Examples of curated records; as :class:`mgm_exp.data.ImageTextDataset`, without a form of our own.

    Args:
        records: Curated records.
        image_root: Folder that their image paths are relative to.
        processor: Of the model.
        max_megapixels: Most pixels of an image.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_root: Path | str,
        processor: InputsProcessor,
        max_megapixels: float = 50.0,
    ) -> None:
        self.records, self.image_root, self.processor = records, Path(image_root), processor
        self.max_megapixels = max_megapixels

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Words of each record (n,)."""
        return np.array([record.words() for record in self.records], dtype=np.int64)

    @cached_property
    def has_image(self) -> np.ndarray:
        """Whether each record has an image (n,), bool."""
        return np.array([record.image is not None for record in self.records], dtype=bool)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """One example: ``id``, ``input_ids`` and ``labels`` (T,), and whatever else the model takes.

        Raises:
            DataError: its image cannot be read (any more), or the row cannot be taken; record and reason are named.
        """
        record = self.records[i]
        image = None
        if record.image is not None:
            try:
                image = open_image(self.image_root, record.image, self.max_megapixels)
            except ImageFault as fault:
                raise DataError(
                    f"The image {record.image} of record {record.id} cannot be read any more ({fault}) below "
                    f"{self.image_root}; it could when the data was curated.",
                    advice="Put the file back, or give the command again: changed data is curated anew.",
                ) from fault
        try:
            return {"id": record.id, **self.processor.inputs(record.turns(), image)}
        except UnusableRow as error:
            raise DataError(
                f"Record {record.id} cannot be trained on: {error.message}.",
                advice="Curation left such rows out; was the model's folder or an image changed since?",
            ) from error
