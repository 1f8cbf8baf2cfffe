"""Images made worse on purpose: blur, noise, JPEG, rotation, brightness, each in five severities.

Blur, noise, JPEG and brightness have the strengths of ImageNet-C (Hendrycks and Dietterich 2019), which are made for
images of 224 pixels: blur and noise grow with the image, so that a severity means the same for a small and a large one.
What is drawn at random (noise, the direction of a rotation) comes from the image's name: every run, every model and
every batch sees the same picture, and answers can be compared question by question.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

BLUR_RADIUS = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Standard deviation of the Gaussian, in pixels of an image whose shorter side has :data:`REFERENCE_SIDE`."""
NOISE_SD = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviation of the noise, where black is 0 and white 1."""
JPEG_QUALITY = (25, 18, 15, 10, 7)
ROTATION_DEGREES = (5.0, 10.0, 20.0, 30.0, 45.0)
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Added to the value of HSV, where 1 is full."""
REFERENCE_SIDE = 224
_BACKGROUND = (122, 116, 104)  # the colour that images are padded with


@dataclass(frozen=True)
class Corruption:
    """One kind at one severity.

    Args:
        kind: One of :data:`KINDS`.
        severity: 1 (slight) to 5 (severe).
        version: Raised whenever a picture comes out differently.

    Raises:
        ValueError: the kind is unknown or the severity out of range.

    Example:
        >>> worse = Corruption("blur", 3).apply(image, "images/1.jpg")
    """

    kind: str
    severity: int
    version: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"there is no corruption {self.kind!r}; there are {', '.join(KINDS)}")
        if not 1 <= self.severity <= 5:
            raise ValueError(f"severity {self.severity} is not 1 (slight) to 5 (severe)")

    def __str__(self) -> str:
        return f"{self.kind}{self.severity}"

    def apply(self, image: Image, name: str) -> Image:
        """The corrupted image, of the same size.

        Args:
            image: 8-bit RGB.
            name: The image's name, which decides what is drawn at random.
        """
        import numpy as np

        # Without the severity: an image is turned the same way, and has the same grains, at all of them.
        digest = hashlib.sha256(f"{self.kind}\0{name}".encode("utf-8", "surrogatepass")).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
        return KINDS[self.kind](image, self.severity - 1, generator)


def _scale(image: Image) -> float:
    return min(image.size) / REFERENCE_SIDE


def _blur(image: Image, level: int, generator: np.random.Generator) -> Image:
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(BLUR_RADIUS[level] * _scale(image)))


def _noise(image: Image, level: int, generator: np.random.Generator) -> Image:
    import numpy as np
    from PIL import Image as Pillow

    # Grains as large as a pixel of the reference size: finer ones would vanish when the image is made smaller.
    factor = max(1.0, _scale(image))
    width, height = (max(1, round(side / factor)) for side in image.size)
    grains = generator.normal(0.0, 255 * NOISE_SD[level], (height, width, 3)).astype(np.float32)
    rows = np.minimum(np.arange(image.height) * height // image.height, height - 1)
    columns = np.minimum(np.arange(image.width) * width // image.width, width - 1)
    noisy = np.asarray(image, dtype=np.float32) + grains[rows][:, columns]
    return Pillow.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8), "RGB")


def _jpeg(image: Image, level: int, generator: np.random.Generator) -> Image:
    from PIL import Image as Pillow

    raw = io.BytesIO()
    image.save(raw, "JPEG", quality=JPEG_QUALITY[level])
    with Pillow.open(raw, formats=("JPEG",)) as again:
        return again.convert("RGB")


def _rotation(image: Image, level: int, generator: np.random.Generator) -> Image:
    from PIL import Image as Pillow

    degrees = ROTATION_DEGREES[level] * (1 if generator.random() < 0.5 else -1)
    return image.rotate(degrees, Pillow.Resampling.BICUBIC, fillcolor=_BACKGROUND)


def _brightness(image: Image, level: int, generator: np.random.Generator) -> Image:
    from PIL import Image as Pillow

    hue, saturation, value = image.convert("HSV").split()
    brighter = value.point([min(255, round(v + 255 * BRIGHTNESS[level])) for v in range(256)])
    return Pillow.merge("HSV", (hue, saturation, brighter)).convert("RGB")


KINDS: dict[str, Callable[[Image, int, np.random.Generator], Image]] = {
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "rotation": _rotation,
    "brightness": _brightness,
}
