"""Not a test: gives changed files to the readers of foreign files, guided by which lines they reach (needs atheris).

    python -m tests.security.fuzz CORPUS [libFuzzer's options, such as -runs=100000]

The first byte of an input chooses the reader, the rest is its file. An exception that is not the reader's own ends it
with exit code 77, a traceback, and the input in ``crash-...`` (see ``-artifact_prefix``).
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mgm_exp"]):
    from tests.security.test_parsers import BROKEN, READERS


def write_corpus(corpus: Path) -> None:
    """Whole files of every reader, and a dictionary of what readers stumble over."""
    corpus.mkdir(parents=True, exist_ok=True)
    for number, make in enumerate(READERS.values()):
        for place, whole in enumerate(make().whole):
            (corpus / f"{number:02}-{place}").write_bytes(bytes([number]) + whole)
    words = ("".join(f"\\x{byte:02x}" for byte in word) for word in BROKEN if 0 < len(word) <= 64)
    corpus.with_suffix(".dict").write_text("".join(f'"{word}"\n' for word in words))


def main() -> None:
    corpus = Path(sys.argv[1])
    write_corpus(corpus)
    readers = [make() for make in READERS.values()]
    scratch = Path(tempfile.mkdtemp(dir=corpus.parent))
    for number in range(len(readers)):
        (scratch / str(number)).mkdir()

    def read(data: bytes) -> None:
        if not data:
            return
        number = data[0] % len(readers)
        reader, path = readers[number], scratch / str(number) / readers[number].name
        path.write_bytes(data[1:])
        with contextlib.suppress(reader.errors):
            reader.read(path)

    atheris.Setup([sys.argv[0], *sys.argv[2:], f"-dict={corpus.with_suffix('.dict')}", str(corpus)], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
