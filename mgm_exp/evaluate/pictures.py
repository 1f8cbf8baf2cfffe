"""Images that lie inside a table (base64 in a TSV, bytes in parquet) as files named by their content.

A file is written once, whole, however many rows, files and processes bring it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from pathlib import Path

from mgm_exp.store import write_atomic

MAX_BYTES = 128 << 20
_SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}


class Pictures:
    """A folder of images named by their SHA-256.

    Args:
        folder: Made when the first image comes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._kept: dict[bytes, str] = {}

    def keep(self, content: bytes) -> str:
        """Name of the file that holds these bytes.

        Raises:
            ValueError: they are no image of a known format, or too many.
        """
        digest = hashlib.sha256(content).digest()
        if digest not in self._kept:
            self._kept[digest] = self._write(content, digest.hex())
        return self._kept[digest]

    def keep_base64(self, text: str) -> str:
        """:meth:`keep` for an image in base64."""
        try:
            return self.keep(base64.b64decode(text, validate=True))
        except binascii.Error as error:
            raise ValueError(f"not base64 ({error})") from error

    def _write(self, content: bytes, digest: str) -> str:
        if len(content) > MAX_BYTES:
            raise ValueError(f"an image of {len(content):,} bytes (at most {MAX_BYTES:,} are read)")
        name = f"{digest[:32]}.{_suffix(content)}"
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != len(content):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        return name


def _suffix(content: bytes) -> str:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=tuple(_SUFFIX)) as image:
            return _SUFFIX[image.format or ""]
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, KeyError) as error:
        raise ValueError("no image of a known format") from error
