"""Curated records as training examples: ids, labels and pixels (or cached visual tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mgm_exp.data.feature_cache import ImageFeatures
from mgm_exp.data.images import ImageFault, open_image
from mgm_exp.data.kept_rows import Rows
from mgm_exp.data.processor import Processor
from mgm_exp.data.records import Record
from mgm_exp.data.visual_tokens import VisualTokens
from mgm_exp.errors import DataError

_KEPT_ROWS = 200_000  # rows whose token ids stay in memory: some hundred MB at most


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Examples of curated records.

    An image that cannot be read any more stops training with its name; no other sample takes its place.

    Args:
        records: Curated records (:func:`mgm_exp.data.read_records`).
        image_root: Folder that their image paths are relative to.
        processor: Of the model; rows are cut to its ``model_max_length``.
        aspect: ``pad`` or ``square``: how an image becomes a square.
        max_megapixels: Most pixels of an image.
        visual_tokens: Cached tokens, read in place of images; None: images are decoded.
        tokens: Where ids and labels of rows are kept once they are made, by number; None: in the dataset alone.

    Attributes:
        features: What towers saw of images; those that have some are not decoded (but for the high resolution, where
            the features are of the low one alone). None: none has any.
        resized: Images as squares of 8 bits; those that have one are not decoded. None: none has any.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_root: Path | str,
        processor: Processor,
        aspect: Any = "pad",
        max_megapixels: float = 50.0,
        visual_tokens: VisualTokens | None = None,
        tokens: Rows | None = None,
    ) -> None:
        self.records, self.image_root, self.processor = records, Path(image_root), processor
        self.aspect = str(getattr(aspect, "value", aspect))
        self.max_megapixels, self.visual_tokens = max_megapixels, visual_tokens
        self.features: ImageFeatures | None = None
        self.resized: ImageFeatures | None = None
        self._tokens: Rows = {} if tokens is None else tokens

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def _shapes(self) -> tuple[np.ndarray, np.ndarray]:
        words = np.empty(len(self.records), dtype=np.int64)
        has_image = np.empty(len(self.records), dtype=bool)
        for i, record in enumerate(self.records):
            words[i], has_image[i] = record.words(), record.image is not None
        return words, has_image

    @property
    def lengths(self) -> np.ndarray:
        """Words of each record (n,), as the official sampler counts."""
        return self._shapes[0]

    @property
    def has_image(self) -> np.ndarray:
        """Whether each record has an image (n,), bool."""
        return self._shapes[1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        """One example.

        Returns:
            ``id``; ``input_ids`` and ``labels`` (T,) long; ``image`` and ``image_aux`` as ``Processor.pixels`` gives
            them, or ``visual_tokens`` (N, hidden), or ``seen`` (features by name; with ``image_aux`` where they are of
            the low resolution alone); zeros for a text-only record.

        Raises:
            DataError: its image cannot be read; record and reason are named.
        """
        record = self.records[i]
        input_ids, labels = self._encode(i, record)
        return {"id": record.id, "input_ids": input_ids, "labels": labels, **self._pixels(record)}

    def _encode(self, i: int, record: Record) -> tuple[Tensor, Tensor]:
        known = self._tokens.get(i)
        if known is None:
            encoded = self.processor.encode(record.turns(), has_image=record.image is not None)
            limit = self.processor.model_max_length
            known = (
                np.asarray(encoded["input_ids"][:limit], dtype=np.int32),
                np.asarray(encoded["labels"][:limit], dtype=np.int32),
            )
            for array in known:
                array.flags.writeable = False
            if len(self._tokens) < _KEPT_ROWS:
                self._tokens[i] = known
        ids, labels = known
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))

    def _pixels(self, record: Record) -> dict[str, Any]:
        if self.visual_tokens is not None:
            cached = self.visual_tokens
            return {"visual_tokens": cached.zeros() if record.image is None else cached.get(record.image)}
        seen = self.features.get(record.image) if self.features is not None else None
        if seen is not None and set(seen) != {"low"}:
            return {"seen": seen}
        if record.image is None:
            image, image_aux = self.processor.no_pixels()
        else:
            square = self.resized.get(record.image) if self.resized is not None else None
            image_aux = self.processor.detail(
                self.processor.square(self._open(record, record.image), aspect=self.aspect)
                if square is None
                else square["square"]
            )
            image = self.processor.low(image_aux) if seen is None else None
        return {"image": image, "image_aux": image_aux} if seen is None else {"seen": seen, "image_aux": image_aux}

    def _open(self, record: Record, image: str) -> Any:
        try:
            return open_image(self.image_root, image, self.max_megapixels)
        except ImageFault as fault:
            raise DataError(
                f"The image {image} of record {record.id} cannot be read any more ({fault}) below {self.image_root}; "
                "it could when the data was curated.",
                advice="Put the file back, or give the command again: changed data is curated anew.",
            ) from fault
