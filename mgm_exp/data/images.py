"""Images from outside, opened within limits.

    image = open_image(root, "images/1.jpg", max_megapixels=50)      # 8-bit RGB, or an ImageFault that says why not

What is decided here, and why:

- JPEG (MPO included), PNG, WebP, BMP, GIF and TIFF are read; nothing else is even tried (EPS would start Ghostscript).
- Size is checked before a pixel is decoded, also that of the square canvas that a long narrow image needs.
- Several frames or pages are refused: which one is meant is not ours to guess. MPO is the exception: a camera's JPEG
  that brings a preview along; its first image is the picture, as for the official code.
- Palette, grey, CMYK and alpha become RGB as Pillow does it (alpha is dropped), like the official ``convert("RGB")``.
  16-bit grey is scaled to 8 bits; the official code would clip it to white.
- The EXIF orientation is not applied, like in the official code: a photo stored on its side is seen on its side.
- A truncated file is refused. Pillow's process-wide switch that hides this is turned off on every call.
- Paths stay inside their root: no ``..``, no link that leads out of it.
- ``shard.tar::member`` is a file inside a tar shard; it is read where it lies.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageFile, UnidentifiedImageError

from mgm_exp.data.tar_members import MemberMissing, read_member, split_member
from mgm_exp.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_FILE_BYTES = 512 << 20
MAX_ELONGATION = 50
"""Longest side / shortest side. Both image pipelines enlarge the shorter side or pad it to the longer one."""
MAX_CANVAS = 4
"""The square canvas of an image may have this many times ``max_megapixels``."""

_PLAIN_MODES = {"1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_SIXTEEN_BIT_MODES = {"I;16", "I;16L", "I;16B", "I;16N"}


class ImageFault(DataError):
    """An image that cannot be used.

    Args:
        kind: One of :data:`mgm_exp.data.kinds.IMAGE_KINDS`.
        detail: What exactly was found.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        return ImageFault, (self.kind, self.detail)


@dataclass(frozen=True)
class ImageInfo:
    """What is known of an image that can be used.

    Args:
        width, height: In pixels, as stored (EXIF orientation not applied).
        format: Pillow's name, e.g. ``JPEG``.
        mode: Pillow's mode as stored, e.g. ``CMYK``.
        bytes: Size of the file.
        sha256: Of the file, hex.
    """

    width: int
    height: int
    format: str
    mode: str
    bytes: int
    sha256: str


def open_image(root: Path | str, relative: str, max_megapixels: float) -> Image.Image:
    """An image as 8-bit RGB.

    Args:
        root: Folder that ``relative`` lies in.
        relative: Path as a row gives it; an absolute path is taken if it leads into ``root``.
        max_megapixels: Most pixels, in millions.

    Raises:
        ImageFault: it cannot be used; ``kind`` and ``detail`` say why.
    """
    return decode_image(read_image_file(root, relative), max_megapixels)


def decode_image(content: bytes, max_megapixels: float) -> Image.Image:
    """The bytes of an image file as 8-bit RGB; see :func:`open_image`."""
    with _decoding(), _open(content, max_megapixels) as image:
        image.load()
        return _rgb(image)


def read_size(root: Path | str, relative: str) -> tuple[int, int]:
    """Width and height of an image, from its header: as :func:`open_image` would decode it.

    Raises:
        ImageFault: the file cannot be read, or is no image.
    """
    content = read_image_file(root, relative)
    with _decoding(), _open(content, float("inf")) as image:
        return image.size


def probe_image(root: Path | str, relative: str, max_megapixels: float) -> ImageInfo:
    """Checks all that :func:`open_image` needs and decodes the whole file, at lower resolution where that is faster.

    Raises:
        ImageFault: as :func:`open_image` would.
    """
    return _probe(read_image_file(root, relative), max_megapixels, None)[0]


def probe_miniature(root: Path | str, relative: str, max_megapixels: float, side: int) -> tuple[ImageInfo, Image.Image]:
    """:func:`probe_image`, and the image as ``side`` x ``side`` grey pixels, whatever its shape.

    Raises:
        ImageFault: as :func:`open_image` would.
    """
    info, image = _probe(read_image_file(root, relative), max_megapixels, side)
    assert image is not None
    return info, image


def _probe(content: bytes, max_megapixels: float, side: int | None) -> tuple[ImageInfo, Image.Image | None]:
    with _decoding(), _open(content, max_megapixels) as image:
        mode = image.mode
        _check_mode(mode, image.format)
        width, height = image.size
        # JPEG only: at 1/8 of the resolution, or what the miniature needs; the file is still read to its end.
        image.draft(None, (side or 1, side or 1))
        image.load()
        digest = hashlib.sha256(content).hexdigest()
        info = ImageInfo(width, height, image.format or "", mode, len(content), digest)
        if side is None:
            return info, None
        grey = image if mode == "L" else _rgb(image).convert("L")
        return info, grey.resize((side, side), Image.Resampling.BOX)


def locate(root: Path | str, relative: str) -> Path:
    """The file that a row's path means, links resolved.

    Raises:
        ImageFault: the path is malformed (``bad_path``) or leads out of the root (``outside_root``).
    """
    return Locator(root).locate(relative)


class Locator:
    """:func:`locate` for many images of one root: what lies above several of them is resolved once."""

    def __init__(self, root: Path | str) -> None:
        self._folder = os.path.realpath(root)
        self._folders: dict[str, str] = {}  # above images -> resolved

    def locate(self, relative: str) -> Path:
        """As :func:`locate`."""
        _refuse_malformed(relative)
        try:
            path = self._resolved(os.path.normpath(os.path.join(self._folder, relative)))
        except (OSError, ValueError) as error:
            raise ImageFault("bad_path", f"{relative!r:.80}: {error}") from error
        if path != self._folder and not path.startswith(self._folder.rstrip("/") + "/"):
            what = "is an absolute path" if os.path.isabs(relative) else "is a link"
            raise ImageFault("outside_root", f"{relative!r:.200} {what} that leads out of the image root")
        return Path(path)

    def _resolved(self, path: str) -> str:
        above, name = os.path.split(path)
        if above not in self._folders:
            self._folders[above] = os.path.realpath(above)
        found = os.path.join(self._folders[above], name)
        return os.path.realpath(found) if os.path.islink(found) else found


def _refuse_malformed(relative: str) -> None:
    if not relative or "\x00" in relative or "\\" in relative:
        raise ImageFault("bad_path", f"{relative!r:.80} is empty or holds NUL or a backslash")
    if ".." in relative.split("/"):
        raise ImageFault("outside_root", f"{relative!r:.80} holds '..'")


def read_image_file(root: Path | str, relative: str) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageFault: there is none, it is empty, not a file, too large, may not be read, or lies outside the root.
    """
    packed = split_member(relative)
    if packed is not None:
        return _read_member(root, *packed)
    path = locate(root, relative)
    try:
        # Without O_NONBLOCK opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageFault("missing", f"{relative} is not there") from None
    except (OSError, ValueError) as error:
        kind = "bad_path" if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG else "unreadable"
        raise ImageFault(kind, f"{relative:.200}: {error.__class__.__name__}: {error}"[:300]) from error
    with os.fdopen(_regular(descriptor, relative), "rb") as file:
        facts = os.fstat(file.fileno())
        if facts.st_size == 0:
            raise ImageFault("zero_bytes", f"{relative} is empty")
        if facts.st_size > MAX_FILE_BYTES:
            raise ImageFault("too_large", f"{relative} has {facts.st_size:,} bytes; allowed are {MAX_FILE_BYTES:,}")
        try:
            return file.read()
        except OSError as error:
            raise ImageFault("unreadable", f"{relative}: {error.strerror}") from error


def _read_member(root: Path | str, shard: str, member: str) -> bytes:
    """The bytes of an image in a tar shard."""
    try:
        content = read_member(locate(root, shard), member, MAX_FILE_BYTES)
    except FileNotFoundError:
        raise ImageFault("missing", f"{shard} is not there") from None
    except MemberMissing:
        raise ImageFault("missing", f"{member} is not in {shard}") from None
    except EOFError as error:
        raise ImageFault("truncated", f"{shard}: {error}") from error
    except OSError as error:
        raise ImageFault("unreadable", f"{shard:.200}: {error}"[:300]) from error
    if not content:
        raise ImageFault("zero_bytes", f"{member} in {shard} is empty")
    if len(content) > MAX_FILE_BYTES:
        raise ImageFault("too_large", f"{member} in {shard} has more than the allowed {MAX_FILE_BYTES:,} bytes")
    return content


def _regular(descriptor: int, relative: str) -> int:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageFault("not_a_file", f"{relative} is a folder, a pipe or a device")
    return descriptor


class _decoding:
    """Turns whatever a decoder says about a damaged file into an :class:`ImageFault`, and its warnings into silence."""

    def __init__(self) -> None:
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        # Data tools switch this on for the whole process; it would hide half images.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        self._warnings.__enter__()
        warnings.simplefilter("ignore")  # of large sizes (our own limit follows) and odd metadata

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._warnings.__exit__(None, None, None)
        if error is None or isinstance(error, ImageFault) or not isinstance(error, Exception):
            return
        said = f"{error.__class__.__name__}: {error}"[:200]
        if isinstance(error, Image.DecompressionBombError):
            raise ImageFault("too_large", said) from error
        if isinstance(error, UnidentifiedImageError):
            raise ImageFault("unreadable", f"not an image of the formats {', '.join(FORMATS)}") from error
        if "truncated" in said.lower() or isinstance(error, EOFError):
            raise ImageFault("truncated", said) from error
        # Decoders raise anything on damaged files: OSError, SyntaxError, ValueError, struct.error, MemoryError, ...
        raise ImageFault("unreadable", said) from error


def _open(content: bytes, max_megapixels: float) -> Image.Image:
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    _check_size(*image.size, max_megapixels)
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ImageFault("animated", f"{image.format} with several frames or pages")
    return image


def _check_size(width: int, height: int, max_megapixels: float) -> None:
    short, long = sorted((width, height))
    if short < 1:
        raise ImageFault("unreadable", f"{width} x {height} pixels")
    limit = max_megapixels * 1e6
    if width * height > limit:
        raise ImageFault(
            "too_large", f"{width} x {height} = {width * height / 1e6:.1f} megapixels; allowed are {max_megapixels:g}"
        )
    if long / short > MAX_ELONGATION or long * long > MAX_CANVAS * limit:
        raise ImageFault(
            "too_elongated",
            f"{width} x {height}; allowed are sides of 1 : {MAX_ELONGATION} at most, "
            f"the longer one of {int((MAX_CANVAS * limit) ** 0.5)} pixels at most",
        )


def _check_mode(mode: str, image_format: str | None) -> None:
    is_grey_png = mode == "I" and image_format == "PNG"  # how older Pillow versions open 16-bit grey
    if mode not in _PLAIN_MODES and mode not in _SIXTEEN_BIT_MODES and not is_grey_png:
        raise ImageFault("wrong_mode", f"{image_format} of mode {mode} has no defined conversion to 8-bit RGB")


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a decoded image; a new image that does not hold the file open."""
    _check_mode(image.mode, image.format)
    if image.mode == "RGB":
        return image.copy()
    if image.mode in _PLAIN_MODES:
        return image.convert("RGB")
    import numpy as np  # loaded here: most images need it not, and each checking process would pay for it

    sixteen = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((sixteen + 128) // 257).astype(np.uint8)).convert("RGB")


def image_size(root: Path | str, relative: str) -> tuple[int, int]:
    """Width and height of an image as it is decoded, from its header alone.

    Raises:
        DataError: it cannot be read any more.
    """
    try:
        return read_size(root, relative)
    except ImageFault as fault:
        raise DataError(f"The image {relative} cannot be read any more ({fault}) below {root}.") from fault
