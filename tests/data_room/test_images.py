from __future__ import annotations

import copy
import io
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from mgm_exp.data.images import FORMATS, ImageFault, Locator, locate, open_image, probe_image
from mgm_exp.data.kinds import IMAGE_KINDS

from .conftest import picture


def kind_of(root: Path, relative: str, max_megapixels: float = 50) -> str | None:
    """The fault of an image; opening and probing must agree."""
    kinds = []
    for check in (open_image, probe_image):
        try:
            check(root, relative, max_megapixels)
            kinds.append(None)
        except ImageFault as fault:
            assert fault.kind in IMAGE_KINDS and fault.detail
            kinds.append(fault.kind)
    assert kinds[0] == kinds[1]
    return kinds[0]


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A tiny PNG file that claims to be huge, and is: its rows are zeros, which compress to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compressobj(9)
    pixels = b"".join(rows.compress(bytes(width + 1)) for _ in range(min(height, 64))) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_allowed_format_opens_as_rgb(tmp_path: Path, image_format: str) -> None:
    (tmp_path / "a").write_bytes(encoded(picture(), image_format))
    image = open_image(tmp_path, "a", 50)
    assert (image.mode, image.size) == ("RGB", (20, 14))
    info = probe_image(tmp_path, "a", 50)
    assert (info.width, info.height, info.format) == (20, 14, image_format)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_become_rgb_as_the_official_code_makes_them(tmp_path: Path, mode: str) -> None:
    source = picture().convert(mode)
    (tmp_path / "a").write_bytes(encoded(source, "TIFF" if mode == "CMYK" else "PNG"))
    expected = Image.open(tmp_path / "a").convert("RGB")
    assert open_image(tmp_path, "a", 50).tobytes() == expected.tobytes()


def test_cmyk_jpeg_and_a_palette_with_transparency_open_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture().convert("CMYK"), "JPEG"))
    palette = picture().convert("P")
    (tmp_path / "b.png").write_bytes(encoded(palette, "PNG", transparency=bytes(range(256))))
    assert open_image(tmp_path, "a.jpg", 50).mode == "RGB"
    assert open_image(tmp_path, "b.png", 50).tobytes() == palette.convert("RGB").tobytes()
    assert not list(recwarn)


def test_sixteen_bit_grey_is_scaled_and_not_clipped_to_white(tmp_path: Path) -> None:
    values = np.array([[0, 257, 40000, 65535]], dtype=np.uint16)
    for name, image_format in (("a.png", "PNG"), ("a.tif", "TIFF")):
        (tmp_path / name).write_bytes(encoded(Image.fromarray(values), image_format))
        pixels = np.asarray(open_image(tmp_path, name, 50))
        assert pixels[0, :, 0].tolist() == [0, 1, 156, 255]
        assert probe_image(tmp_path, name, 50).mode.startswith("I")


@pytest.mark.parametrize("mode", ["F", "I"])
def test_modes_without_a_defined_range_are_refused(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a.tif").write_bytes(encoded(picture().convert("L").convert(mode), "TIFF"))
    assert kind_of(tmp_path, "a.tif") == "wrong_mode"


def test_the_exif_orientation_is_not_applied_as_in_the_official_code(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    (tmp_path / "a.jpg").write_bytes(encoded(picture(20, 14), "JPEG", exif=exif))
    assert open_image(tmp_path, "a.jpg", 50).size == (20, 14)


def damaged_files() -> dict[str, tuple[bytes, str]]:
    jpeg, png = encoded(picture(200, 100), "JPEG"), encoded(picture(200, 100), "PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    frames = [picture(seed=i) for i in range(3)]
    return {
        "empty": (b"", "zero_bytes"),
        "html": (b"<html><body>404 not found</body></html>", "unreadable"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable"),
        "pdf": (b"%PDF-1.4 ...", "unreadable"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unreadable"),
        "ppm": (encoded(picture(), "PPM"), "unreadable"),
        "half_jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "half_png": (png[: len(png) // 2], "truncated"),
        "flipped_png": (bytes(flipped), "unreadable"),
        "gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "animated"),
        "webp": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "animated"),
        "apng": (encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), "animated"),
        "pages": (encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), "animated"),
        "bomb": (png_of_size(12_000, 12_000), "too_large"),
        "beyond_pillows_limit": (png_of_size(30_000, 30_000), "too_large"),
        "line": (png_of_size(3000, 20), "too_elongated"),
        "canvas": (png_of_size(20_000, 1000), "too_elongated"),
    }


@pytest.mark.parametrize(("name", "content", "kind"), [(n, c, k) for n, (c, k) in damaged_files().items()])
def test_damage_has_its_kind(tmp_path: Path, name: str, content: bytes, kind: str, recwarn: Any) -> None:
    (tmp_path / name).write_bytes(content)
    assert kind_of(tmp_path, name) == kind
    assert not list(recwarn)


def test_a_truncated_image_is_refused_whatever_another_library_switched_on(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(damaged_files()["half_jpeg"][0])
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        assert kind_of(tmp_path, "a") == "truncated"
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def test_the_first_picture_of_a_camera_jpeg_is_the_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture(), "MPO", save_all=True, append_images=[picture(8, 8)]))
    assert open_image(tmp_path, "a.jpg", 50).size == (20, 14)
    assert probe_image(tmp_path, "a.jpg", 50).format == "MPO"


def test_the_pixel_limit_is_the_one_given(root: Path) -> None:
    assert kind_of(root, "0.png", 280e-6) is None  # 20 x 14
    assert kind_of(root, "0.png", 279e-6) == "too_large"


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """20,000 x 20,000 pixels would take 400 MB; a process with far less to spare names it all the same."""
    (tmp_path / "bomb.png").write_bytes(png_of_size(20_000, 20_000))
    code = (
        "import resource, sys; from mgm_exp.data.images import ImageFault, open_image\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20),) * 2)\n"
        "try: open_image(sys.argv[1], 'bomb.png', 50)\n"
        "except ImageFault as fault: print(fault.kind)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "too_large", done.stderr


def outside(root: Path) -> dict[str, tuple[str, str]]:
    secret = root.parent / "secret.png"
    picture().save(secret)
    os.symlink(secret, root / "link.png")
    os.symlink(root.parent, root / "folder")
    return {
        "absolute": (str(secret), "outside_root"),
        "up": ("../secret.png", "outside_root"),
        "up_inside": ("a/../../secret.png", "outside_root"),
        "up_and_back": ("../images/0.png", "outside_root"),
        "link": ("link.png", "outside_root"),
        "folder_link": ("folder/secret.png", "outside_root"),
        "passwd": ("/etc/passwd", "outside_root"),
        "nul": ("0.png\x00.jpg", "bad_path"),
        "backslash": ("..\\secret.png", "bad_path"),
        "empty": ("", "bad_path"),
        "long": ("x" * 300, "bad_path"),
        "very_long": ("x/" * 5000, "bad_path"),
        "folder": (".", "not_a_file"),
        "missing": ("nothing.png", "missing"),
        "below_a_file": ("0.png/1.png", "missing"),
    }


def test_paths_stay_inside_their_root(root: Path) -> None:
    for name, (path, kind) in outside(root).items():
        assert kind_of(root, path) == kind, name


def test_links_inside_the_root_and_a_root_that_is_a_link_are_fine(root: Path) -> None:
    os.symlink("0.png", root / "same.png")
    os.symlink(root, root.parent / "alias")
    assert kind_of(root, "same.png") is None
    assert kind_of(root.parent / "alias", "0.png") is None
    assert kind_of(root, str(root / "0.png")) is None
    assert kind_of(root, str(root.parent / "alias" / "0.png")) is None


def test_many_are_located_as_one_by_one(root: Path) -> None:
    refused = {path for path, _ in outside(root).values()}
    (root / "deep" / "er").mkdir(parents=True)
    picture().save(root / "deep" / "er" / "1.png")
    os.symlink("deep", root / "also")
    os.symlink("1.png", root / "deep" / "er" / "2.png")
    os.symlink("loop", root / "loop")
    fine = ["0.png", "deep/er/1.png", "also/er/2.png", "./deep//er/./1.png", "also/er/1.png", "loop", "loop/1.png"]
    locator = Locator(root)
    for path in [*fine, *refused, *fine]:
        try:
            found: object = locator.locate(path)
        except ImageFault as fault:
            found = str(fault)
        if path in fine:
            assert found == Path(os.path.realpath(root / path)) == locate(root, path)
            continue
        try:
            assert locate(root, path) == found
        except ImageFault as fault:
            assert str(fault) == found


def test_a_pipe_is_refused_without_waiting_for_a_writer(root: Path) -> None:
    os.mkfifo(root / "pipe.png")
    assert kind_of(root, "pipe.png") == "not_a_file"


def test_a_link_to_itself_is_named(root: Path) -> None:
    os.symlink("loop.png", root / "loop.png")
    assert kind_of(root, "loop.png") == "unreadable"


def mutations(content: bytes) -> list[Callable[[random.Random], bytes]]:
    def cut(rng: random.Random) -> bytes:
        return content[: rng.randrange(len(content))]

    def flip(rng: random.Random) -> bytes:
        changed = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)

    def insert(rng: random.Random) -> bytes:
        at = rng.randrange(len(content))
        return content[:at] + rng.randbytes(rng.randint(1, 40)) + content[at:]

    return [cut, flip, insert]


@pytest.mark.parametrize("image_format", FORMATS)
def test_random_damage_gives_a_picture_or_a_fault_and_nothing_else(tmp_path: Path, image_format: str) -> None:
    content = encoded(picture(40, 30), image_format)
    rng = random.Random(image_format)
    faults = 0
    for mutate in mutations(content):
        for _ in range(40):
            (tmp_path / "a").write_bytes(mutate(rng))
            try:
                image = open_image(tmp_path, "a", 1)
                assert image.mode == "RGB" and image.width * image.height <= 1e6
            except ImageFault as fault:
                assert fault.kind in IMAGE_KINDS
                faults += 1
    assert faults > 30


def test_a_fault_travels_between_processes() -> None:
    fault = copy.copy(ImageFault("missing", "a.jpg is not there"))  # through __reduce__, as between processes
    assert (fault.kind, fault.detail) == ("missing", "a.jpg is not there")
    assert "a.jpg" in str(fault)
