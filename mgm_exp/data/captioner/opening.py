"""From `data.captioner` to a captioner: what a folder holds decides, not what it is called."""

from __future__ import annotations

from pathlib import Path

from mgm_exp.config import CaptionEngine, CaptionerConfig
from mgm_exp.data.captioner import folders
from mgm_exp.data.captioner.blip2 import BLIP2, Blip2Captioner
from mgm_exp.data.captioner.image_text import ImageTextCaptioner
from mgm_exp.data.captioner.mapper import MapperCaptioner
from mgm_exp.data.captioner.model_captioner import CaptionSettings, ModelCaptioner


def open_captioner(section: CaptionerConfig, *, device: str, cache: Path) -> ModelCaptioner | MapperCaptioner:
    """The captioner of a config: a BLIP-2 folder, any image-text-to-text model, or the shipped demo-blip2.

    A run of ours is opened by :mod:`mgm_exp.evaluate.captioner`.

    Args:
        section: `data.captioner`; without a path, the demo's.
        device: "cpu", "cuda", ...
        cache: folder below which demo-blip2 is written out on first use.

    Raises:
        ModelError: the folder cannot be used.
        MissingDependencyError: the precision needs what is not there.
    """
    settings, cache = CaptionSettings.of_section(section), cache / "captioners"
    folder = None if section.path is None else Path(section.path).expanduser()
    if section.engine is CaptionEngine.data_juicer:
        return MapperCaptioner(folder, settings, seed=section.seed, cache=cache)
    if folder is None:
        return Blip2Captioner(None, device, settings, cache=cache)
    if folders.model_type(folder, "captioner") == BLIP2:
        return Blip2Captioner(folder, device, settings)
    return ImageTextCaptioner(folder, device, settings)
