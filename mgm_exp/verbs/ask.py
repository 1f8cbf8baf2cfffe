"""``mgm-exp ask RUN IMAGE QUESTION``: what a model says about an image; the answer, and nothing else, on stdout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.errors import EXIT_DONE, DataError, UserError
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.arguments import add_base, count, megapixels

if TYPE_CHECKING:
    from PIL.Image import Image


def run(arguments: list[str]) -> int:
    """Prints the answer."""
    options = _options(arguments)
    if not options.question.strip():
        raise UserError("The question is empty.", advice='Give one in quotes: mgm-exp ask RUN IMAGE "What is it?"')
    picture = _picture(options.image, options.max_megapixels)  # before a model is loaded in vain
    with stop_on_signals():
        from mgm_exp.config import Device
        from mgm_exp.evaluate.ask import ask
        from mgm_exp.model.opening import open_model
        from mgm_exp.preflight import resolve_device

        device = resolve_device(Device(options.device), 1)
        model, processor = open_model(options.model, device, options.base)
        answer = ask(model, processor, picture, options.question, options.max_new_tokens)
    print(answer)
    return EXIT_DONE


def _picture(path: Path, max_megapixels: float) -> Image:
    """The image, decoded within the bounds of training data.

    Raises:
        DataError: it cannot be used; says why.
    """
    from mgm_exp.data.images import ImageFault, open_image

    file = path.expanduser().resolve()
    try:
        return open_image(file.parent, file.name, max_megapixels)
    except ImageFault as fault:
        raise DataError(f"The image {path} cannot be used: {fault}.") from fault


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp ask",
        description="Asks the model of a finished run, or of a checkpoint folder, one question about an image and "
        "prints its answer. Decoding is greedy, as in an evaluation.",
    )
    parser.add_argument("model", type=Path, metavar="RUN", help="run folder, or folder of a checkpoint or an adapter")
    add_base(parser, "of an adapter folder that names none which is here")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="PNG, JPEG, WebP, ...")
    parser.add_argument(
        "question",
        metavar="QUESTION",
        help="in quotes; how long the answer is depends on the words the model was trained with, such as "
        "'Answer the question using a single word or phrase.'",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=count("tokens", 4096),
        default=128,
        metavar="N",
        help="longest answer, in tokens (default: 128)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs (default: auto)"
    )
    parser.add_argument(
        "--max-megapixels", type=megapixels, default=50.0, metavar="M", help="refuse larger images (default: 50)"
    )
    return parser.parse_args(arguments)
