"""Data-Juicer's `image_captioning_mapper` as the captioner (`data.captioner.engine=data_juicer`).

It opens the image files itself, always samples, and takes BLIP-2 folders of the OPT kind; the seed, the ids and the
shards that survive a kill are added in :mod:`mgm_exp.data.data_juicer.captioning`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.data.captioner import folders
from mgm_exp.data.captioner.demo_blip2 import demo_folder
from mgm_exp.data.captioner.model_captioner import CaptionSettings
from mgm_exp.data.formats import Row


class MapperCaptioner:
    """Captions of image files, by Data-Juicer.

    Args:
        folder: a BLIP-2 folder; None is the shipped demo-blip2.
        settings: `prompt` and `batch_size` of them; the mapper knows no others.
        seed: of the sampling.
        cache: where demo-blip2 is written out on first use.
    """

    can_answer = False

    def __init__(self, folder: Path | None, settings: CaptionSettings, *, seed: int, cache: Path) -> None:
        self.folder = demo_folder(cache) if folder is None else folder
        self.name = f"{'demo-blip2 (synthetic)' if folder is None else folder.name} (Data-Juicer's mapper)"
        self._settings, self._seed = settings, seed

    def fingerprint(self) -> str:
        """SHA-256 over the folder's config and safetensors files."""
        return folders.fingerprint(self.folder)

    def caption_files(
        self, rows: Sequence[Row], *, image_root: Path, work: Path, max_megapixels: float
    ) -> Iterator[dict[str, Any]]:
        """For each row, in order, `{"id", "caption"}` or the fault of its image: `{"id", "kind", "detail"}`."""
        from mgm_exp.data.data_juicer.captioning import caption_with_mapper

        return caption_with_mapper(
            rows,
            image_root,
            self.folder,
            work=work,
            batch_size=self._settings.batch_size,
            seed=self._seed,
            prompt=self._settings.prompt,
            max_megapixels=max_megapixels,
        )
