"""Small copies of images, to be put inside a page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def thumbnail(picture: Image, side: int, quality: int = 80) -> bytes:
    """A JPEG whose longer side has at most so many pixels.

    Args:
        picture: Of any mode and size; it stays as it is.
        side: Pixels; a screen of twice the density needs twice as many as are shown.
        quality: Of the JPEG, 1 to 95.
    """
    small = picture.convert("RGB")
    if small is picture:
        small = picture.copy()
    small.thumbnail((side, side))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=quality, optimize=True)
    return content.getvalue()
