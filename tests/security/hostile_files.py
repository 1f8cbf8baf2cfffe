"""Makes files that want to harm whoever opens them. Nothing here is stored: every file is made when a test asks."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from PIL import Image


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


def pickled(sentinel: Path) -> bytes:
    return pickle.dumps({"model.mm_projector.0.weight": Payload(sentinel)})


def torch_file(sentinel: Path) -> bytes:
    """A file as torch.save writes it, with the payload beside a tensor."""
    import torch

    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(1), "more": Payload(sentinel)}, buffer)
    return buffer.getvalue()


def png(width: int, height: int, n_rows: int | None = None) -> bytes:
    """A PNG of zeros, whose rows compress to nothing; with fewer rows than it claims, where ``n_rows`` says so."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = bytes(width + 1)
    pixels = b"".join(packer.compress(row) for _ in range(height if n_rows is None else n_rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def good_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.png", bytes(32 << 20))
    return buffer.getvalue()


def images(root: Path, sentinel: Path) -> None:
    """Fills an image root: one good image, and what is none or too much."""
    root.mkdir()
    (root / "good.png").write_bytes(good_png())
    (root / "bomb.png").write_bytes(png(12_000, 12_000))
    (root / "claims.png").write_bytes(png(60_000, 60_000, n_rows=8))
    (root / "zip.png").write_bytes(zip_bomb())
    (root / "pickle.png").write_bytes(pickled(sentinel))
    (root / "code.eps").write_bytes(f"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%touch {sentinel}) (w) file\n".encode())
    (root / "code.svg").write_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"><script>PWNED()</script></svg>')
    os.symlink("/etc/passwd", root / "link.png")
    os.mkfifo(root / "pipe.png")


def row(number: int, image: str | None = "good.png", text: str = "a red sign") -> dict[str, Any]:
    found = {
        "id": f"row-{number}",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is it?" if image else "what is it?"},
            {"from": "gpt", "value": text},
        ],
    }
    return found | ({"image": image} if image else {})


# What stands in a line of its own between good rows -> the kind of fault that is reported for it; None: it is a row
# like any other, however it reads.
LINES: dict[str, tuple[Any, str | None]] = {
    "a script": (row(1, text="</script><script>PWNED()</script>"), None),
    "a bomb": (row(2, "bomb.png"), "too_large"),
    "a size that is claimed": (row(3, "claims.png"), "too_large"),
    "a zip": (row(4, "zip.png"), "unreadable"),
    "a pickle": (row(5, "pickle.png"), "unreadable"),
    "PostScript": (row(6, "code.eps"), "unreadable"),
    "SVG": (row(7, "code.svg"), "unreadable"),
    "a link that leads out": (row(8, "link.png"), "outside_root"),
    "a pipe": (row(9, "pipe.png"), "not_a_file"),
    "two dots": (row(10, "../../etc/passwd"), "outside_root"),
    "dots inside": (row(11, "a/../../good.png"), "outside_root"),
    "an absolute path": (row(12, "/etc/passwd"), "outside_root"),
    "NUL": (row(13, "good.png\x00.jpg"), "bad_path"),
    "a backslash": (row(14, "..\\..\\good.png"), "bad_path"),
    "ten megabytes": (b'{"id": "' + b"x" * (10 << 20) + b'"}', "row_too_large"),
    "deep nesting": (b"[" * 100_000 + b"]" * 100_000, "nested_too_deep"),
    "five thousand digits": (b'{"id": ' + b"9" * 5000 + b"}", "bad_number"),
    "an infinite number": (b'{"id": 1e400}', "bad_number"),
    "NaN": (b'{"id": NaN}', "bad_number"),
    "a key twice": (b'{"id": "a", "id": "b"}', "duplicate_key"),
    "bytes that are no text": (b'{"id": "\xff\xfe"}', "encoding"),
}


def write_rows(path: Path) -> None:
    """Every hostile line, with a good row before and after each."""
    with path.open("wb") as file:
        for number, (line, _) in enumerate(LINES.values()):
            file.write(json.dumps(row(1000 + number, text=f"sign {number}")).encode() + b"\n")
            file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
        file.write(json.dumps(row(2000, text="the last sign")).encode() + b"\n")


def tar_shard(path: Path) -> None:
    """A WebDataset shard: a good sample, and members that would lead out of wherever they were unpacked."""

    def add(archive: tarfile.TarFile, name: str, content: bytes, **facts: Any) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        for key, value in facts.items():
            setattr(member, key, value)
        archive.addfile(member, io.BytesIO(content))

    with tarfile.open(path, "w") as archive:
        for name in ("0001", "../../../escaped", "/tmp/escaped-absolute"):
            add(archive, f"{name}.png", good_png())
            add(archive, f"{name}.json", json.dumps({k: v for k, v in row(1).items() if k != "image"}).encode())
        add(archive, "0002.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "0002.json", json.dumps({k: v for k, v in row(2).items() if k != "image"}).encode())
        add(archive, "0003.png", b"", type=tarfile.LNKTYPE, linkname="../../etc/passwd")
        add(archive, "0003.json", json.dumps({k: v for k, v in row(3).items() if k != "image"}).encode())


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


_F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "a header of 2^62 bytes": safetensors({}, length=1 << 62),
    "a header that is longer than the file": safetensors({"a": _F32}, length=1 << 20),
    "a header that is no JSON": safetensors(b"{" * 100),
    "a deep header": safetensors(b"[" * 50_000),
    "four tebibytes": safetensors({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, bytes(4)),
    "a shape that overflows": safetensors({"a": {**_F32, "shape": [1 << 62, 1 << 62]}}, bytes(4)),
    "offsets backwards": safetensors({"a": {**_F32, "data_offsets": [4, 0]}}, bytes(4)),
    "tensors over each other": safetensors({"a": _F32, "b": _F32}, bytes(4)),
    "a hole": safetensors({"a": {**_F32, "data_offsets": [4, 8]}}, bytes(8)),
    "a byte too many": safetensors({"a": _F32}, bytes(5)),
    "a type that is none": safetensors({"a": {**_F32, "dtype": "OBJECT"}}, bytes(4)),
    "a pickle": pickle.dumps({"a": 1}),
}
