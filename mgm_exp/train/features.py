"""Visual tokens of a stage's images, encoded once under a frozen connector and read from disk while training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import DataError
from mgm_exp.train.job import TrainJob, stage_settings
from mgm_exp.train.launch import check_machine
from mgm_exp.train.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor


def encode_images_once(job: TrainJob, *, on_progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Writes the visual tokens of every image of ``job.records`` into ``job.out``.

    In the precision of training, ``train.micro_batch_size`` images at a time (which belongs to the bits of the result).

    Args:
        job: Its stage may be ``features`` or ``instruct``; its connector is what encodes.
        on_progress: Called with (what, images done, images in all).

    Returns:
        ``{images, seconds, images_per_s, peak_memory_gib, load_report}``.

    Raises:
        DataError: An image cannot be read (any more).
    """
    import torch

    from mgm_exp.data import ImageFault, open_image, read_records, write_visual_tokens
    from mgm_exp.model import family_of
    from mgm_exp.train.assemble import build_base, put_connector
    from mgm_exp.train.determinism import determinism
    from mgm_exp.train.memory import PeakMemory
    from mgm_exp.train.tf32 import tf32

    started = time.perf_counter()
    config = job.experiment()
    check_machine(config)
    settings = stage_settings(config, job.stage)
    ranks = Ranks.alone(config.device)
    memory = PeakMemory(ranks.device)
    model, load_report = build_base(config, settings, ranks)
    put_connector(model, job, config)
    model.eval()
    processor = family_of(config.model).processor(config.model, settings.max_length)

    def pixels(image: str) -> tuple[Tensor, Tensor]:
        try:
            opened = open_image(job.image_root, image, config.data.max_megapixels)
        except ImageFault as fault:
            raise DataError(
                f"The image {image} cannot be read any more ({fault}) below {job.image_root}; it could when the data "
                "was curated.",
                advice="Put the file back, or give the command again: changed data is curated anew.",
            ) from fault
        return processor.pixels(opened, aspect=settings.image_aspect.value)

    def encode(images: list[str]) -> Tensor:
        pairs = [pixels(image) for image in images]
        low, high = (torch.stack(side).to(ranks.device) for side in zip(*pairs, strict=True))
        with torch.no_grad():
            tokens: Tensor = model.model.encode_images(low, high)
        return tokens

    job.out.mkdir(parents=True, exist_ok=True)
    names = [record.image for record in read_records(job.records) if record.image is not None]
    with determinism(config.train.deterministic), tf32(config.train.tf32):
        count = write_visual_tokens(
            names, encode, job.out, batch_size=settings.micro_batch_size, on_progress=on_progress
        )
    seconds = time.perf_counter() - started
    return {
        "images": count,
        "seconds": round(seconds, 3),
        "images_per_s": round(count / seconds, 3),
        "peak_memory_gib": round(memory.gib(), 4),
        "load_report": load_report,
    }
